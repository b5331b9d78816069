"""A stream of images on its way to the network."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from cibl_ray.config import RunConfig, one_view_epochs
from cibl_ray.features.folds import FoldFeatures
from cibl_ray.features.loader import AsTheyAre, FeatureLoaders
from cibl_ray.losses.base import LossSettings
from cibl_ray.losses.objective import Images
from cibl_ray.world import World
from pipelines.augment.recipe import Augment, Normalize
from pipelines.common.seeding import stream
from pipelines.config import DataConfig
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import Batch, Loader, ReadPlan, Share, eval_plan, train_plan
from pipelines.prepare.prepared import Prepared

_SMALL, _STEPS_AT_ONCE = 64, 8  # up to this many pixels a side a GPU augments 8 steps at once


@dataclass(frozen=True)
class Streams:
    """A run's images, or their features.

    Attributes:
        feeds: The training streams, one for each reading plan.
        held_out: Loaders of the other splits, by name.
        normalize: Turns what a loader gives into the network's input.
    """

    feeds: Sequence[Feed | FeatureFeed]
    held_out: Mapping[str, Loader]
    normalize: nn.Module


def open_images(config: RunConfig, prepared: Prepared, device: torch.device, world: World) -> Streams:
    """Open loaders of all splits.

    Args:
        config: The run's configuration.
        prepared: The images.
        device: Where the network is.
        world: The workers.
    """
    batch, normalize = config.train.batch_size, Normalize(config.data).to(device)
    rows, two_streams = world.share.of(batch), config.loss.needs.second_stream is not None
    feeds = []
    for number, plan in enumerate(_plans(config, world.share)):
        loader = make_loader(prepared, "train", plan, config.loader, device)
        # A second stream of the loss has views of its own; the images that CMO pastes have those of the others.
        alone = 0 if number and two_streams else one_view_epochs(config.train)
        feeds.append(Feed(loader, plan, normalize, device, rows, batch, alone))
    # Opened now, so that a damaged test set is not found out after the last epoch.
    held_out = eval_plan(config.data, config.train.eval_batch_size, world.share)
    loaders = {split: make_loader(prepared, split, held_out, config.loader) for split in _held_out(prepared)}
    return Streams(feeds, loaders, normalize)


def open_features(config: RunConfig, prepared: Prepared, world: World, features: FeatureLoaders | FoldFeatures) -> Streams:
    """Compute the features of all splits, or find them.

    Args:
        config: The run's configuration.
        prepared: The images.
        world: The workers.
        features: Of the run's frozen backbone.
    """
    feeds = [FeatureFeed(features.train(plan)) for plan in _plans(config, world.share)]
    held_out = eval_plan(config.data, config.train.eval_batch_size, world.share)
    return Streams(feeds, {split: features.evaluation(split, held_out) for split in _held_out(prepared)}, AsTheyAre())


def _plans(config: RunConfig, share: Share) -> list[ReadPlan]:
    plans = read_plans(config.loss, config.data, config.train.batch_size, config.seed, share)
    if config.train.cmo is not None:  # what is pasted: every class as often
        balanced = config.data.model_copy(update={"sampling": "class_balanced"})
        plans.append(train_plan(balanced, config.train.batch_size, int(stream(config.seed, "cmo").integers(2**32)), share))
    return plans


def _held_out(prepared: Prepared) -> list[str]:
    return [split for split in prepared.splits if split != "train"]


def read_plans(loss: LossSettings, data: DataConfig, batch_size: int, seed: int, share: Share) -> list[ReadPlan]:
    """What each stream of images reads: one stream, and a second from the same files where the loss needs it.

    Args:
        loss: Says whether it needs a second stream, and of what.
        data: Sampling and views of the first stream.
        batch_size: Samples of a step over all workers.
        seed: The run's.
        share: This worker's part of each batch.
    """
    plans = [train_plan(data, batch_size, seed, share)]
    second = loss.needs.second_stream
    if second is not None:
        views = tuple(data.views[number] for number in second.views)
        of_second = data.model_copy(update={"views": views, "sampling": second.sampling})
        plans.append(train_plan(of_second, batch_size, int(stream(seed, "classifier stream").integers(2**32)), share))
    return plans


class FeatureFeed:
    """`Feed` of features that were computed before: nothing is read, augmented or normalised.

    Args:
        loader: The features.
    """

    waited = 0.0

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

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
        plan: Views, size and seed.
        normalize: Turns uint8 pixels into the network's input.
        device: Where the network is.
        rows: This worker's rows of each step's samples.
        batch: Samples of a step, over all workers.
        one_view_epochs: Epochs at the start that have the first view alone.

    Attributes:
        waited: Seconds spent waiting for the loader, so far.
    """

    def __init__(
        self,
        loader: Loader,
        plan: ReadPlan,
        normalize: Normalize,
        device: torch.device,
        rows: slice,
        batch: int,
        one_view_epochs: int = 0,
    ) -> None:
        self.loader, self.normalize, self.device, self.rows, self.batch = loader, normalize, device, rows, batch
        self.augment = Augment(plan.views, plan.size, plan.seed)
        self._first, self._one_view_epochs = Augment(plan.views[:1], plan.size, plan.seed), one_view_epochs
        self.waited = 0.0
        # Small images on a GPU: augmentation is limited by kernel launches, and their number does not grow with the steps.
        small = plan.size <= _SMALL and any(self.augment.recipes)
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
        alone = epoch < self._one_view_epochs
        parts = [self._on_device(batch.views[:, :1] if alone else batch.views) for batch in batches]
        views = torch.cat(parts) if len(parts) > 1 else parts[0]
        augment = self._first if alone else self.augment
        pixels = self.normalize(augment(views, epoch, step, self.rows, self.batch, len(batches)))
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
