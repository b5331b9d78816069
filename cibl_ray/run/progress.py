"""How a run shows its progress: a bar, lines of text, or nothing. The caller chooses; the trainer reports."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm.auto import tqdm

from pipelines.common.progress import LINE_EVERY, NO_BAR, duration


class Progress(Protocol):
    """Where rank 0 of a run reports its progress."""

    def begin(self, total: int, done: int) -> None:
        """Start a run of `total` images, `done` of which an earlier process has trained."""
        ...

    def advance(self, images: int) -> None:
        """Count `images` more as trained."""
        ...

    def epoch(self, row: dict[str, Any], text: str) -> None:
        """Report an epoch: its numbers as the log has them, and a line of text."""
        ...

    def line(self, text: str) -> None:
        """Report a line of text."""
        ...

    def close(self) -> None:
        """End the bar. Lines may still follow."""
        ...

    def log_handler(self) -> logging.Handler:
        """A handler that shows log messages."""
        ...


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """The line of text that reports an epoch.

    Args:
        row: The epoch's numbers, as the log has them.
        epochs: Epochs of the run.
    """
    terms = "  ".join(f"{name} {value:.3f}" for name, value in row["train"].items())
    val = f"  val balanced {100 * row['val']['balanced']:.1f} %" if "val" in row else ""
    return f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  {terms}{val}  {row['rate']['images_per_s']:,.0f} img/s"


class Terminal:
    """A bar with images a second, and lines above it. Where the output is no terminal, a line a minute instead of the bar."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._total = self._done = 0
        self._since = self._next_line = 0.0
        self._done_before = 0

    def begin(self, total: int, done: int) -> None:
        """Start the bar."""
        self._total, self._done, self._done_before = total, done, done
        self._since = time.monotonic()
        self._next_line = self._since + LINE_EVERY
        self._bar = tqdm(total=total, initial=done, unit="img", unit_scale=True, disable=NO_BAR, mininterval=1)

    def advance(self, images: int) -> None:
        """Move the bar."""
        if self._bar is None:
            return
        self._done += images
        self._bar.update(images)
        now = time.monotonic()
        if self._bar.disable and now >= self._next_line and self._done > self._done_before:
            self._next_line = now + LINE_EVERY
            rate = (self._done - self._done_before) / (now - self._since)
            left = max(self._total - self._done, 0) / rate
            share = 100 * self._done / self._total
            self.line(f"{share:.0f} % of all images, {rate:,.0f} img/s, about {duration(left)} left")

    def epoch(self, row: dict[str, Any], text: str) -> None:
        """Print the text."""
        self.line(text)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text)
        sys.stdout.flush()  # keeps the order of lines where stdout and stderr go to one file

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def log_handler(self) -> logging.Handler:
        """Messages go to standard error, unless the program shows them itself."""
        # A program that has set up logging shows the messages itself.
        return logging.NullHandler() if logging.getLogger().handlers else logging.StreamHandler()


class Silent:
    """Shows nothing: for all ranks but the first, and for measurements."""

    def begin(self, total: int, done: int) -> None:
        """Show nothing."""

    def advance(self, images: int) -> None:
        """Show nothing."""

    def epoch(self, row: dict[str, Any], text: str) -> None:
        """Show nothing."""

    def line(self, text: str) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Show nothing."""

    def log_handler(self) -> logging.Handler:
        """Messages go nowhere."""
        return logging.NullHandler()


class Lines(logging.Handler):
    """Log messages as lines of a `Progress`."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Report the message."""
        self._progress.line(self.format(record))


@contextmanager
def messages_to(handler: logging.Handler) -> Iterator[None]:
    """Send the log messages of this project to `handler`, too, from level INFO on. Afterwards logging is as it was before."""
    handler.setFormatter(logging.Formatter("%(message)s"))
    loggers = [logging.getLogger(name) for name in ("cibl_ray", "pipelines")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()
