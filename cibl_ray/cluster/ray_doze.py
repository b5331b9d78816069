"""A Ray worker's main thread sleeps while another thread of it trains.

Ray has that thread look for signals a hundred times a second, for which it takes Python's lock (GIL) and one of the cores that
train. Here it looks by way of a handler that sleeps itself, and asks for the next signal as it returns. What is asked of the
worker meanwhile (how it does, every two seconds), and another signal, may wait for a quarter of a second.
"""

from __future__ import annotations

import atexit
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ray.train.v2._internal.execution.callback import WorkerCallback

_NAP = 0.25  # seconds
_NEXT = 0.002  # until the next signal: the handler must have returned to Ray's loop, or it would be called by itself

_training = False  # no lock: the handler may run at any moment


class Doze(WorkerCallback):
    """Prepares it in a worker, in its main thread, which alone may say what a signal does."""

    def after_init_train_context(self) -> None:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
            signal.signal(signal.SIGALRM, _nap)
            atexit.register(_wake)  # a worker that is told to end does so while it trains


@contextmanager
def main_thread_dozes() -> Iterator[None]:
    """Within this, and where it was prepared, the main thread sleeps."""
    global _training
    if signal.getsignal(signal.SIGALRM) is not _nap:
        yield
        return
    _training = True
    signal.setitimer(signal.ITIMER_REAL, _NEXT)
    try:
        yield
    finally:
        _wake()


def _wake() -> None:
    global _training
    _training = False


def _nap(number: int, frame: FrameType | None) -> None:
    if _training:
        time.sleep(_NAP)
        if _training:
            signal.setitimer(signal.ITIMER_REAL, _NEXT)
