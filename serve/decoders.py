"""Threads that decode images, and how much waits for them."""

from __future__ import annotations

import asyncio
import itertools
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

# A small image goes before large ones that came seconds earlier, and a large one waits no longer than it takes by this rate.
_PIXELS_A_SECOND = 2e6


class Decoders:
    """Threads for one event loop.

    Attributes:
        waiting: Pixels of the images that are not decoded yet.
    """

    def __init__(self, threads: int, name: str) -> None:
        """Make the threads.

        Args:
            threads: How many.
            name: What they are called.
        """
        self.waiting = 0
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._jobs: queue.PriorityQueue[tuple[float, int, Future[Any], Callable[[], Any]]] = queue.PriorityQueue()
        self._numbers = itertools.count()

    def submit(self, pixels: int, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """Call `work` in a thread.

        Args:
            pixels: That it goes over.
            work: The call.

        Returns:
            A future of its result. Once it is cancelled the call does not begin.
        """
        job: Future[Any] = Future()
        self._jobs.put((time.monotonic() + pixels / _PIXELS_A_SECOND, next(self._numbers), job, work))
        self._threads.submit(self._next)
        self.waiting += pixels
        done = asyncio.wrap_future(job)
        done.add_done_callback(lambda _: self._end(pixels))
        return done

    def close(self) -> None:
        """End the threads. What has not begun never does."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _end(self, pixels: int) -> None:
        self.waiting -= pixels

    def _next(self) -> None:
        _, _, job, work = self._jobs.get_nowait()
        if not job.set_running_or_notify_cancel():
            return
        try:
            job.set_result(work())
        except Exception as error:
            job.set_exception(error)
