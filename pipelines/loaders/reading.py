"""The contract of the loaders: what they are asked for, and the batches that they return."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pipelines.config import CenterCrop, DataConfig, Sampling, View
from pipelines.loaders.cache import by_pages
from pipelines.loaders.cuts import epoch_order
from pipelines.pixels import EvalRule
from pipelines.prepare.beton import Beton


@dataclass(frozen=True)
class Batch:
    """One batch, before augmentation: B samples, V views, S pixels a side.

    Unless the loader is `lasting`, the tensors are its own buffers and hold until the next batch is taken. Copy what must last
    longer.

    Attributes:
        views: uint8 (B, V, S, S, 3), each view of each sample cut by its own draw. Of stored features: float32 (B, V, d).
        labels: int64 (B,).
        index: int64 (B,), the samples' rows in the split (line numbers, from 0, of its `.files.txt`).
    """

    views: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor


class Loader(Protocol):
    """Batches of one split. Two loaders of different kinds give the same batches for the same seed and epoch.

    Attributes:
        name: Its kind and resources, for the log.
        lasting: Whether its batches stay as they are when the next is taken.
        samples: Images in the files that this worker opens, other workers' shares included.
        batches: This worker's batches of an epoch.
    """

    name: str
    lasting: bool
    samples: int
    batches: int

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch number `epoch`, from batch `start` on: what comes does not depend on what came before."""
        ...

    def close(self) -> None:
        """End threads and processes."""
        ...


@dataclass(frozen=True)
class Share:
    """One worker's share of the data.

    Attributes:
        worker: Its number, from 0.
        workers: How many there are.
    """

    worker: int = 0
    workers: int = 1

    def of(self, count: int, worker: int | None = None) -> slice:
        """This worker's part (or another's) of `count` things in order: parts differ by at most one."""
        worker = self.worker if worker is None else worker
        return slice(count * worker // self.workers, count * (worker + 1) // self.workers)


@dataclass(frozen=True)
class ReadPlan:
    """What to read and how to cut it: the part of a loader's work that does not depend on its kind.

    Attributes:
        views: V views of each sample.
        size: Width and height of a view, pixels.
        batch_size: Samples in a batch: in training of all workers together, in evaluation of each worker.
        seed: Decides the order, the cuts and the augmentation.
        sampling: How training draws an epoch. None, as in evaluation: every sample once, in the file's order.
        drop_last: True in training: full batches only.
        share: This worker's share. In training each batch is shared out, so the workers together see the batches that one
            worker would see. In evaluation the samples are shared out.
        rule: What evaluation shows of an image. None: the views, each cut by its draw.
        part_batches: Batches of an epoch where each worker reads files of its own; samples and positions then count those
            files alone. None: every worker reads all files.
        weights: How often each class is drawn, (C,), where each worker reads files of its own. None: as the sampling says.
            The weights of 'weighted' are the images', and come with the files.
        group: With cache 'process', how many pages are read together: the order is random within them. None: throughout.
    """

    views: tuple[View, ...]
    size: int
    batch_size: int
    seed: int
    sampling: Sampling | None
    drop_last: bool
    share: Share = Share()
    rule: EvalRule | None = None
    part_batches: int | None = None
    weights: tuple[float, ...] | None = None
    group: int | None = None

    @property
    def own_batch(self) -> int:
        """Samples in one of this worker's batches (in evaluation, at most)."""
        rows = self.share.of(self.batch_size)
        return rows.stop - rows.start if self.drop_last else self.batch_size

    def batches(self, samples: int) -> int:
        """This worker's batches of an epoch over `samples` of all workers."""
        if self.part_batches is not None:
            return self.part_batches
        return (
            len(self.positions(samples)) // self.own_batch
            if self.drop_last
            else -(-len(self.positions(samples)) // self.batch_size)
        )

    def positions(self, samples: int, start: int = 0) -> np.ndarray:
        """Where in an epoch's order this worker's samples stand, from its batch number `start` on: int64."""
        if self.part_batches is not None:
            return np.arange(start * self.own_batch, self.part_batches * self.own_batch)
        if not self.drop_last:
            own = self.share.of(samples)
            return np.arange(own.start + start * self.batch_size, own.stop)
        every = np.arange(start * self.batch_size, samples // self.batch_size * self.batch_size)
        return every.reshape(-1, self.batch_size)[:, self.share.of(self.batch_size)].ravel()

    def order(self, beton: Beton, epoch: int) -> np.ndarray:
        """An epoch's rows of `beton`, in order: int64."""
        order = epoch_order(beton.labels, self.sampling, self.seed, epoch, self.weights, beton.weights)
        return order if self.group is None else by_pages(order, beton.pages, self.group, self.seed, epoch)


def train_plan(data: DataConfig, batch_size: int, seed: int, share: Share = Share()) -> ReadPlan:
    """Plan how training reads: every view with its own draw, samples as data.sampling says, full batches only.

    Args:
        data: The data configuration.
        batch_size: Samples in a batch, of all workers together.
        seed: The run's seed.
        share: Which part of each batch this worker reads.

    Returns:
        The plan.
    """
    return ReadPlan(data.views, data.size, batch_size, seed, data.sampling, drop_last=True, share=share)


def eval_plan(data: DataConfig, batch_size: int, share: Share = Share()) -> ReadPlan:
    """Plan how evaluation reads: one central view, each sample once.

    Args:
        data: The data configuration.
        batch_size: Samples in a batch of this worker.
        share: Which part of the split this worker reads.

    Returns:
        The plan.
    """
    view = View(cut=data.eval_cut, flip=0.0)
    return ReadPlan((view,), data.size, batch_size, 0, sampling=None, drop_last=False, share=share, rule=eval_rule(data))


def eval_rule(data: DataConfig) -> EvalRule:
    """What this configuration's evaluation shows of an image."""
    assert isinstance(data.eval_cut, CenterCrop)
    return EvalRule(data.size, data.eval_cut.ratio, data.store.square, data.store.max_side, data.window, data.interpolation)
