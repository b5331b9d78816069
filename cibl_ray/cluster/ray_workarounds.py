"""What mends faults of Ray, by its documented interface, until Ray mends them itself.

The place of a lost trial's workers: a placement group that an actor creates lives as long as the job, not as long as the actor
(https://github.com/ray-project/ray/issues/65881). A trial of a sweep that is stopped or lost would keep its CPUs and GPUs, and
the next trial would wait for ever. Ray Train has a cleaner for that (https://github.com/ray-project/ray/pull/58515). It asks
whether the trial lives through Ray's State API, which fails where several clusters run on a machine, and without a dashboard.
So each worker registers its placement group, and the sweep's driver, which outlives all trials, removes it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group
from ray.util.queue import Empty, Queue


def register_place(places: tuple[Queue, str] | None) -> None:
    """Tell the driver of a sweep which placement group this worker runs in.

    Args:
        places: The sweep's queue and the trial's name; None outside of sweeps.
    """
    if places is not None and (group := get_current_placement_group()) is not None:
        queue, trial = places
        with suppress(RayError):
            queue.put((trial, group))


class TrialPlaces:
    """In the driver of a sweep: the placement groups of its trials' workers."""

    def __init__(self) -> None:
        self.queue = Queue(actor_options={"num_cpus": 0})
        self._groups: dict[str, dict[Any, PlacementGroup]] = {}

    def free(self, trial: str) -> None:
        """Remove the placement groups of a trial that has ended, or is tried again."""
        with suppress(RayError, Empty):
            while True:
                name, group = self.queue.get_nowait()
                self._groups.setdefault(name, {})[group.id] = group
        for group in self._groups.pop(trial, {}).values():
            with suppress(RayError):
                remove_placement_group(group)
