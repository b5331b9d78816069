"""The sums of an epoch: the terms of its steps, and where its seconds went."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch

from cibl_ray.training.feed import FeatureFeed, Feed
from cibl_ray.world import World


class EpochTotals:
    """Adds up the steps of an epoch, and measures its time from here on.

    Args:
        earlier: What `sums` returned when the epoch was interrupted; empty where it begins.
        world: The workers. Its seconds of communication are counted from 0.
        batch_size: Images of a step, over all workers.
        device: Where the terms are.
        feeds: The training streams, which are waited for.
        saving: Seconds that checkpoints have taken so far; they are no part of the epoch's.
    """

    def __init__(
        self,
        earlier: Mapping[str, dict[str, float]],
        world: World,
        batch_size: int,
        device: torch.device,
        feeds: Sequence[Feed | FeatureFeed],
        saving: Callable[[], float],
    ) -> None:
        self._world, self._feeds, self._saving = world, feeds, saving
        self._fraction = world.fraction(batch_size)
        self._terms: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=device))
        for name, total in earlier.get("terms", {}).items():
            self._terms[name] += total / self._fraction if world.is_rank0 else 0.0
        self._earlier_seconds = earlier.get("seconds", {})
        self._started = time.perf_counter()
        world.communication_seconds = 0.0
        self._waited_before, self._saving_before = self._waited(), saving()

    @property
    def loss(self) -> torch.Tensor:
        """The sum of this worker's losses, a scalar on the device."""
        return self._terms["loss"]

    def add(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Add the terms of a step."""
        for name, value in terms.items():
            self._terms[name] += value

    def sums(self) -> dict[str, dict[str, float]]:
        """The sums up to here. Every worker calls it.

        Returns:
            `terms`: each term over all steps and workers. `seconds`: those of the epoch, and of these the ones in which this
            worker waited for data and for other workers.
        """
        totals = torch.stack([total.float() for total in self._terms.values()])
        terms = self._world.sum(totals * self._fraction).tolist()
        seconds = {
            "epoch": time.perf_counter() - self._started - (self._saving() - self._saving_before),
            "data_wait": self._waited() - self._waited_before,
            "communication": self._world.communication_seconds,
        }
        return {
            "terms": dict(zip(self._terms, terms, strict=True)),
            "seconds": {name: value + self._earlier_seconds.get(name, 0.0) for name, value in seconds.items()},
        }

    def _waited(self) -> float:
        return sum(feed.waited for feed in self._feeds)
