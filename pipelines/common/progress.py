"""Progress of a loop over many images: a bar on a terminal and in a notebook, elsewhere a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")
LINE_EVERY = 60.0  # seconds between lines where there is no bar
NOTEBOOK = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)  # its bar is a widget, which needs no terminal
# What tqdm takes for `disable`: in a notebook never, elsewhere where standard error is no terminal.
NO_BAR = False if NOTEBOOK else None


def counted(items: Iterable[T], total: int, doing: str, done: int = 0, unit: str = "images") -> Iterator[T]:
    """Yield `items`, and show how many there have been.

    Args:
        items: One for each image.
        total: How many images there are.
        doing: What is done, at the start of each line.
        done: Images that an earlier process has done.
        unit: What is counted, where it is not images.
    """
    count = done
    since = said = time.monotonic()
    with tqdm(
        total=total, initial=done, desc=doing, unit="img" if unit == "images" else unit, leave=False, disable=NO_BAR
    ) as bar:
        for item in items:
            yield item
            count += 1
            bar.update()
            now = time.monotonic()
            if bar.disable and now - said >= LINE_EVERY:
                said = now
                rate = (count - done) / (now - since)
                left = duration((total - count) / rate)
                per_s = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
                print(f"{doing}: {count:,} of {total:,} {unit}, {per_s} {unit}/s, about {left} left", file=sys.stderr)


def duration(seconds: float) -> str:
    """A time to read: '40 s', '12 min' or '3.5 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
