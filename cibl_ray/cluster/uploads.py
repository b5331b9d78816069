"""A run's copy in a store, brought up to date by a thread beside training."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from cibl_ray.cluster.storage import Frozen, Mirror
from cibl_ray.run.progress import Progress, messages_to
from pipelines.common.errors import UserError

log = logging.getLogger(__name__)

_TRIES, _WAIT = 5, 1.0  # of an upload; seconds before the second one, and twice as many before each later one


@contextmanager
def uploads(mirror: Mirror | None, progress: Progress) -> Iterator[Callable[[], None] | None]:
    """Keep a run's copy up to date until the end of the block, which waits for the last upload.

    Args:
        mirror: The copy; None: there is none.
        progress: Shows what the last upload says: it goes on after training, which shows the others.

    Yields:
        What to call when the folder has changed: it takes a snapshot and returns at once. While one is sent, of those that
        come later only the last one is kept. None without a copy.

    Raises:
        UserError: The last upload failed, again and again. Earlier ones are only told: the next one has their files, too.
    """
    if mirror is None:
        yield None
        return
    sender = _Sender(mirror)
    try:
        yield sender.take
    finally:
        with messages_to(progress.log_handler()):
            sender.finish()
    if sender.error is not None:
        raise UserError(
            f"the copy {mirror.uri} is not up to date: {sender.error}; all files are in the run folder"
        ) from sender.error


class _Sender:
    """The thread. error: why the last snapshot could not be sent."""

    def __init__(self, mirror: Mirror) -> None:
        self.error: Exception | None = None
        self._mirror = mirror
        self._changed = threading.Condition()
        self._next: tuple[ExitStack, list[Frozen]] | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
        self._thread.start()

    def take(self) -> None:
        stack = ExitStack()
        files = stack.enter_context(self._mirror.snapshot())
        with self._changed:
            if self._next is not None:
                self._next[0].close()  # never sent: this one is newer
            self._next = stack, files
            self._changed.notify()

    def finish(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._ended)
                if self._next is None:
                    return
                (stack, files), self._next = self._next, None
            with stack:
                self.error = self._send(files)

    def _send(self, files: list[Frozen]) -> Exception | None:
        for number in range(1, _TRIES + 1):
            try:
                self._mirror.send(files)
                return None
            except Exception as error:  # of any kind: a thread that ended unseen would look like success
                log.warning("%s: upload %d of %d failed: %s", self._mirror.uri, number, _TRIES, error)
                if number == _TRIES:
                    return error
            with self._changed:  # a newer snapshot does not wait
                self._changed.wait_for(lambda: self._next is not None, timeout=_WAIT * 2 ** (number - 1))
                if self._next is not None:
                    return None
        raise AssertionError("unreachable")
