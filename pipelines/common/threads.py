"""Work on many items in threads, in order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from pipelines.common.cores import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 16  # items a thread that are begun before their turn


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Generator[Result, None, None]:
    """Do some work on each item in threads, a bounded number of items ahead.

    Args:
        work: Called with each item; it should release Python's lock most of the time.
        items: The items.
        threads: How many; None: one for each core.

    Yields:
        The results, in the order of the items. An exception of `work` is raised in its turn.
    """
    todo, workers = iter(items), threads or usable_cores()
    with ThreadPoolExecutor(workers) as pool:
        pending: list[Future[Result]] = [pool.submit(work, item) for item in islice(todo, _AHEAD * workers)]
        try:
            while pending:
                result = pending.pop(0).result()
                pending += [pool.submit(work, item) for item in islice(todo, 1)]
                yield result
        finally:
            for future in pending:
                future.cancel()
