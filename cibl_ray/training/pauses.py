"""When a run pauses: to save a checkpoint, or to stop. All workers get the same answer."""

from __future__ import annotations

import time
from typing import NoReturn

from cibl_ray.run.stop import Stop
from cibl_ray.world import World

_ASK_EVERY = 1.0  # seconds between two questions among the workers
_ASK_STEPS = 100  # the most steps between two of them


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
        due = self._minutes is not None and time.monotonic() - self._saved >= 60 * self._minutes
        if self._world.size == 1:
            return due, self.stop.asked()
        if self._until_asked > 0:
            self._until_asked -= 1
            return False, False
        now, (then, done) = time.monotonic(), self._last
        self._last = now, self._steps
        steps = int(_ASK_EVERY * (self._steps - done) / max(now - then, 1e-9))
        answers = self._world.all_gather((due, self.stop.asked(), min(steps, _ASK_STEPS)))
        due, _, self._until_asked = answers[0]
        return due, any(stop for _, stop, _ in answers)

    def end(self) -> NoReturn:
        """Stop the run. Every worker calls it, rank 0 after it has saved.

        Raises:
            KeyboardInterrupt: Always.
        """
        self._world.all_gather(None)  # no worker ends before rank 0 has saved
        raise KeyboardInterrupt

    def raise_if_stopped(self) -> None:
        """Stop at once, where nothing is lost by that: in evaluation.

        Raises:
            KeyboardInterrupt: The run is asked to stop.
        """
        if self.stop.polled and self.stop.asked():
            raise KeyboardInterrupt
