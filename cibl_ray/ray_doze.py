"""A Ray worker's main thread sleeps while another thread of it trains.

Ray has that thread look for signals a hundred times a second, for which it takes Python's lock (GIL) and one of the cores that
train. Here it looks by way of a handler that sleeps itself, and asks for the next signal as it returns. What is asked of the
worker meanwhile (how it does, every two seconds) waits for a fraction of a second; SIGTERM is heard at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ray.train.v2._internal.execution.callback import WorkerCallback

_NAP = 0.25  # seconds
_NEXT = 0.002  # until the next signal: the handler must have returned to Ray's loop, or it would be called by itself

_awake = threading.Event()
_awake.set()


class Doze(WorkerCallback):
    """Prepares it in a worker, in its main thread, which alone may say what a signal does."""

    def after_init_train_context(self) -> None:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
            signal.signal(signal.SIGALRM, _nap)


@contextmanager
def main_thread_dozes() -> Iterator[None]:
    """Within this, and where it was prepared, the main thread sleeps."""
    if signal.getsignal(signal.SIGALRM) is not _nap:
        yield
        return
    _awake.clear()
    signal.setitimer(signal.ITIMER_REAL, _NEXT)
    try:
        yield
    finally:
        _awake.set()


def _nap(number: int, frame: FrameType | None) -> None:
    if not _awake.wait(_NAP):
        signal.setitimer(signal.ITIMER_REAL, _NEXT)
