"""When a run pauses: to save a checkpoint, or to stop. All workers get the same answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from cibl_ray.run.stop import Stop
from cibl_ray.world import World
from pipelines.common.errors import Interrupted

_ASK_EVERY = 1.0  # seconds between two questions among the workers
_ASK_STEPS = 100  # the most steps between two of them
_HEAR_EVERY = 5.0  # seconds between two questions whether a machine is taken away
_SAVE_BEFORE = 15.0  # seconds before it goes, for a second checkpoint
log = logging.getLogger(__name__)
T = TypeVar("T")


class AllStopped(Interrupted):
    """Every worker stops here, and knows that the others do."""


class Pauses:
    """Says after a step whether the run should save, and whether it should stop.

    Args:
        world: The workers.
        minutes: The longest time between two checkpoints; None: only an epoch's end saves.
        stop: Asks the run to stop.
    """

    def __init__(self, world: World, minutes: float | None, stop: Stop) -> None:
        self.stop = stop
        self._world, self._minutes = world, minutes
        self._saved = time.monotonic()
        self._steps = self._until_asked = 0  # steps of this process, and until the next question
        self._last = self._saved, 0  # time and steps at the last question
        self._heard = self._saved
        self._goes: float | None = None  # when a machine of this run is taken away
        self._save_again: float | None = None

    def saved(self) -> None:
        """A checkpoint was written now."""
        self._saved = time.monotonic()

    def step(self) -> None:
        """A step was trained."""
        self._steps += 1

    def ask(self) -> tuple[bool, bool]:
        """Ask all workers, at most about once a second.

        Returns:
            Whether to save, and whether to stop.
        """
        if self._until_asked > 0:
            self._until_asked -= 1
            return False, False
        now = time.monotonic()
        due = self._minutes is not None and now - self._saved >= 60 * self._minutes
        if self._save_again is not None and now >= self._save_again:
            due, self._save_again = True, None
        hear = now - self._heard >= _HEAR_EVERY
        if self._world.size == 1:
            return due or (hear and self._hear(now)), self.stop.asked()
        then, done = self._last
        self._last = now, self._steps
        steps = int(_ASK_EVERY * (self._steps - done) / max(now - then, 1e-9))
        answers = self._world.all_gather((due, self._status(self.stop.asked()), min(steps, _ASK_STEPS), hear))
        due, _, self._until_asked, hear = answers[0]
        if hear:
            due |= self._hear(now)
        return due, self._told([status for _, status, *_ in answers])

    def together(self, work: Callable[[], T]) -> T:
        """Do what a stop interrupts: once one worker is interrupted, so are all, when they have done their part.

        Args:
            work: Every worker's own part; it may call `raise_if_stopped`.

        Returns:
            What it returns.

        Raises:
            AllStopped: A worker was interrupted. With one worker: what interrupted it.
        """
        if self._world.size == 1:
            return work()
        interrupted = False
        try:
            result = work()
        except KeyboardInterrupt:
            interrupted = True
        if self._told(self._world.all_gather(self._status(interrupted))):
            raise AllStopped("stopped", self.stop.status)
        return result

    def _status(self, asked: bool) -> int | None:
        return self.stop.status if asked else None

    def _told(self, statuses: list[int | None]) -> bool:
        """Whether any worker is asked to stop; then this one knows it too. statuses: the exit status of those that are."""
        asked = [status for status in statuses if status is not None]
        if asked:
            self.stop.tell(asked[0])
        return bool(asked)

    def _hear(self, now: float) -> bool:
        """Ask whether a machine of this run is taken away. Returns whether that is news: what was trained should be saved."""
        self._heard = now
        left = self.stop.notice()
        if left is None or (self._goes is not None and abs(now + left - self._goes) < _HEAR_EVERY):
            return False
        self._goes = now + left
        self._save_again = self._goes - _SAVE_BEFORE if left > _SAVE_BEFORE + _HEAR_EVERY else None
        if self._world.is_rank0:
            log.warning("a machine of this run is taken away in %.0f s: saving a checkpoint, and training on", left)
        return True

    def end(self) -> NoReturn:
        """Stop the run. Every worker calls it, rank 0 after it has saved.

        Raises:
            AllStopped: Always.
        """
        self._world.all_gather(None)  # no worker ends before rank 0 has saved
        raise AllStopped("stopped", self.stop.status)

    def raise_if_stopped(self) -> None:
        """Stop at once, where nothing is lost by that: in evaluation.

        Raises:
            KeyboardInterrupt: The run is asked to stop.
        """
        if self.stop.asked():
            raise KeyboardInterrupt
