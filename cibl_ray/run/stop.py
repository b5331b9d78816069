"""Asking a run to stop. It saves a checkpoint first, and ends with a status that says whether to start it again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipelines.common.errors import Interrupted

AGAIN = os.EX_TEMPFAIL  # 75, "temporary failure": a scheduler should start the job again
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Whether a run is asked to stop; this one never is.

    Attributes:
        polled: Whether the run looks at `asked` by itself, within seconds, and saves before it ends.
        status: The exit status of a command that was stopped.
    """

    polled = False
    status = 130

    def asked(self) -> bool:
        """Whether the run should save and end."""
        return False

    def tell(self, status: int) -> None:
        """Another worker is asked to stop, so this one ends too.

        Args:
            status: Its exit status.
        """

    def notice(self) -> float | None:
        """Seconds until a machine of this run is taken away; None: nothing is known. All workers of a run ask together."""
        return None


class StopSignals(Stop):
    """Ctrl-C, SIGTERM and SIGUSR1 ask the run to stop.

    While the run does not look, the first signal raises `Interrupted` at once, and so does a second Ctrl-C at any time. Every
    other later signal is ignored: the run ends already.
    """

    def __init__(self) -> None:
        self._since: float | None = None

    def asked(self) -> bool:
        """Whether a signal has arrived."""
        return self._since is not None

    def tell(self, status: int) -> None:
        """Another worker has got a signal."""
        if self._since is None:
            self._since, self.status = time.monotonic(), status

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A scheduler may send one signal twice, to the job's shell and to its processes.
        again = number == signal.SIGINT and self._since is not None and time.monotonic() - self._since > 1
        first = self._since is None
        if first:
            self._since = time.monotonic()
        elif not again:
            return  # torchrun too sends SIGTERM to the other workers, once one of them has saved and ended
        self.status = 130 if number == signal.SIGINT else AGAIN
        if again or not self.polled:
            raise Interrupted("stopped", self.status)


@contextmanager
def stop_signals(exits: bool = False) -> Iterator[Stop]:
    """Handle the signals that ask a run to stop, as long as the context lasts. Only the main thread can handle signals.

    Args:
        exits: The process ends after a stop: a scheduler's second signal must not cut its last message, and is ignored.

    Yields:
        Whether the run is asked to stop. In another thread it never is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return
    stop = StopSignals()
    before = {number: signal.signal(number, stop._handle) for number in _SIGNALS}
    stopped = False
    try:
        yield stop
    except KeyboardInterrupt:
        stopped = exits
        raise
    finally:
        for number, handler in before.items():
            ignored = stopped and number != signal.SIGINT
            signal.signal(number, _ignore if ignored else handler if handler is not None else signal.SIG_DFL)


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler, and not SIG_IGN: what this process still starts would inherit that."""
