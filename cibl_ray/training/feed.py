"""A stream of images on its way to the network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import torch

from cibl_ray.losses.base import LossSettings
from cibl_ray.losses.objective import Images
from pipelines.augment.recipe import Augment, Normalize
from pipelines.common.seeding import stream
from pipelines.config import DataConfig
from pipelines.loaders.reading import Batch, Loader, ReadPlan, Share, train_reading

_SMALL, _STEPS_AT_ONCE = 64, 8  # up to this many pixels a side a GPU augments 8 steps at once


def read_plans(loss: LossSettings, data: DataConfig, batch_size: int, seed: int, share: Share) -> list[ReadPlan]:
    """What each stream of images reads: one stream, and a second from the same files where the loss needs it.

    Args:
        loss: Says whether it needs a second stream, and of what.
        data: Sampling and views of the first stream.
        batch_size: Samples of a step over all workers.
        seed: The run's.
        share: This worker's part of each batch.
    """
    plans = [train_reading(data, batch_size, seed, share)]
    second = loss.needs.second_stream
    if second is not None:
        views = tuple(data.views[number] for number in second.views)
        of_second = data.model_copy(update={"views": views, "sampling": second.sampling})
        plans.append(train_reading(of_second, batch_size, int(stream(seed, "classifier stream").integers(2**32)), share))
    return plans


class FeatureFeed:
    """`Feed` of features that were computed before: nothing is read, augmented or normalised.

    Args:
        loader: The features.
        device: Where the head is.
    """

    waited = 0.0

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def steps(self, epoch: int, step: int) -> Iterator[Images]:
        """The features of the epoch's steps from `step` on."""
        for number, batch in enumerate(self.loader.epoch(epoch, step)):
            yield from self.ready([batch], epoch, step + number)

    def ready(self, batches: list[Batch], epoch: int, step: int) -> list[Images]:
        """The features of one batch for each step."""
        return [Images(batch.views.flatten(0, 1), batch.labels, batch.views.shape[1]) for batch in batches]


class Feed:
    """The network's input from one stream, step by step: the loader's views, augmented and normalised on the device.

    Args:
        loader: The images.
        reading: Views, size and seed.
        normalize: Turns uint8 pixels into the network's input.
        device: Where the network is.
        rows: This worker's rows of each step's samples.
        batch: Samples of a step, over all workers.

    Attributes:
        waited: Seconds spent waiting for the loader, so far.
    """

    def __init__(
        self, loader: Loader, reading: ReadPlan, normalize: Normalize, device: torch.device, rows: slice, batch: int
    ) -> None:
        self.loader, self.normalize, self.device, self.rows, self.batch = loader, normalize, device, rows, batch
        self.augment = Augment(reading.views, reading.size, reading.seed)
        self.waited = 0.0
        # Small images on a GPU: augmentation is limited by kernel launches, and their number does not grow with the steps.
        small = reading.size <= _SMALL and any(self.augment.recipes)
        self.at_once = _STEPS_AT_ONCE if device.type == "cuda" and loader.lasting and small else 1
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" and not loader.lasting else None

    def steps(self, epoch: int, step: int) -> Iterator[Images]:
        """The images of the epoch's steps from `step` on."""
        batches = iter(self.loader.epoch(epoch, step))
        while True:
            before = time.perf_counter()
            taken = [*islice(batches, self.at_once)]
            self.waited += time.perf_counter() - before
            if not taken:
                return
            yield from self.ready(taken, epoch, step)
            step += len(taken)

    def ready(self, batches: list[Batch], epoch: int, step: int) -> list[Images]:
        """The images of one step for each batch, the first of them number `step` of the epoch."""
        each = len(batches[0].labels)
        parts = [self._on_device(batch.views) for batch in batches]
        views = torch.cat(parts) if len(parts) > 1 else parts[0]
        pixels = self.normalize(self.augment(views, epoch, step, self.rows, self.batch, len(batches)))
        labels = [batch.labels.to(self.device, non_blocking=True) for batch in batches]
        return [Images(*pair, views.shape[1]) for pair in zip(pixels.split(each * views.shape[1]), labels, strict=True)]

    def _on_device(self, views: torch.Tensor) -> torch.Tensor:
        if self._copies is None:
            return views.to(self.device, non_blocking=True)
        # The loader overwrites this memory when the next batch is taken, so the copy must be over by then. On the stream of the
        # training steps it would wait for all of them; on its own stream only the copy is waited for.
        with torch.cuda.stream(self._copies):
            copy = views.to(self.device, non_blocking=True)
        self._copies.synchronize()
        copy.record_stream(torch.cuda.current_stream(self.device))
        return copy
