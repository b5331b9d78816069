"""What a run shows while it goes. The trainer tells it; where it appears is the caller's choice."""

from __future__ import annotations

import logging
import sys
from typing import Any, Protocol

from tqdm import tqdm


class Progress(Protocol):
    """Told by rank 0 alone."""

    def begin(self, total: int, done: int) -> None:
        """A run of `total` images, `done` of them already."""
        ...

    def advance(self, images: int) -> None: ...

    def epoch(self, row: dict[str, Any], text: str) -> None:
        """An epoch's figures, as the log has them, and to be read."""
        ...

    def line(self, text: str) -> None:
        """Something to be read."""
        ...

    def close(self) -> None: ...

    def log_handler(self) -> logging.Handler:
        """Where log messages are shown."""
        ...


class Terminal:
    """A bar with images a second, and lines above it."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def begin(self, total: int, done: int) -> None:
        self._bar = tqdm(total=total, initial=done, unit="img", unit_scale=True, disable=None, mininterval=1)

    def advance(self, images: int) -> None:
        if self._bar is not None:
            self._bar.update(images)

    def epoch(self, row: dict[str, Any], text: str) -> None:
        self.line(text)

    def line(self, text: str) -> None:
        tqdm.write(text)
        sys.stdout.flush()  # in its place among the messages of stderr, where both go to one file

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def log_handler(self) -> logging.Handler:
        return logging.StreamHandler()


class Silent:
    """Nothing: for every rank but the first, and for measurements."""

    def begin(self, total: int, done: int) -> None: ...

    def advance(self, images: int) -> None: ...

    def epoch(self, row: dict[str, Any], text: str) -> None: ...

    def line(self, text: str) -> None: ...

    def close(self) -> None: ...

    def log_handler(self) -> logging.Handler:
        return logging.NullHandler()


class Lines(logging.Handler):
    """Log messages as lines of a `Progress`."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.line(self.format(record))
