"""From a step's images to the terms of the loss: runs the network, and keeps what a loss carries from step to step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from cibl_ray.losses.config import AnyLoss
from cibl_ray.losses.inputs import ClassPrior, ContrastSet, LossInputs, Terms
from cibl_ray.losses.memory import ClassMeans, LabelledQueue
from cibl_ray.networks.average import copy_buffers, update_average
from cibl_ray.networks.network import HybridNetwork, Outputs
from cibl_ray.networks.state import below
from cibl_ray.world import World
from pipelines.common.errors import UserError


@dataclass(frozen=True)
class Images:
    """One stream's images, ready for the network.

    Attributes:
        pixels: float32 (B*V, 3, S, S); row b*V + v is view v of sample b.
        labels: int64 (B,).
        views: V.
        mixed: Labels of the samples that each is mixed with, int64 (B,), and the share of its own in it; None: not mixed.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    views: int
    mixed: tuple[torch.Tensor, float] | None = None

    def split(self, parts: int) -> list[Images]:
        """The images in so many equal parts, in order."""
        if parts == 1:
            return [self]
        rows = len(self.labels) // parts
        pairs = zip(self.pixels.split(rows * self.views), self.labels.split(rows), strict=True)
        return [Images(pixels, labels, self.views) for pixels, labels in pairs]

    def all_labels(self, world: World, batch: int) -> torch.Tensor:
        """The labels of every view over all workers, int64 (M,)."""
        return world.gather(self.labels, batch).repeat_interleave(self.views)


class Objective:
    """What a run minimises. The trainer calls it and asks no further; its state goes into the checkpoint.

    Args:
        config: The loss.
        network: The one that is trained; copied where the loss embeds with an average of it.
        train_counts: Images of each class, (C,).
        device: Where the network is.
        world: The workers. The contrast set and the queue are those of all workers.
        batch: Samples of a step over all workers.
    """

    def __init__(
        self,
        config: AnyLoss,
        network: HybridNetwork,
        train_counts: np.ndarray,
        device: torch.device,
        world: World,
        batch: int,
    ) -> None:
        self.config, self.needs, self.world, self.batch = config, config.needs, world, batch
        self._network = network
        self.prior = ClassPrior.of(torch.from_numpy(train_counts).to(device))
        self.averaged: HybridNetwork | None = None
        self.queue: LabelledQueue | None = None
        if self.needs.momentum is not None:
            self.averaged = copy.deepcopy(network).requires_grad_(False).train()
        if self.needs.queue:
            assert network.projection is not None
            self.queue = LabelledQueue(self.needs.queue, network.projection.size, device)
        self.class_means: ClassMeans | None = None
        if self.needs.class_means:
            assert network.projection is not None
            self.class_means = ClassMeans(len(train_counts), network.projection.size).to(device)

    @torch.no_grad()
    def begin_step(self) -> None:
        """Move the averaged network one step: its parameters follow, its running statistics are the network's."""
        if self.averaged is not None and self.needs.momentum is not None:
            update_average(self.averaged, self._network, self.needs.momentum)
            copy_buffers(self.averaged.buffers(), self._network.buffers())

    def __call__(
        self, network: HybridNetwork, run: Callable[[nn.Module, torch.Tensor], Outputs], streams: list[Images], progress: float
    ) -> Terms:
        """Compute the terms of one step, or of a part of it. `begin_step` comes first, once a step.

        Args:
            network: The one that is trained.
            run: Calls a network on pixels; mixed precision is up to it.
            streams: This worker's images, one or, where the loss needs a second stream, two.
            progress: t/T, the share of the epochs done.

        Returns:
            Scalars by name, "loss" and the "accuracy" of what is classified among them. They are means over this worker's
            images; weighted by the world's `fraction` they add up to the whole batch's.
        """
        main = streams[0]
        keys = None
        if self.averaged is not None:
            keys, main = self._keys(run, main)
        pixels = [main.pixels, *(other.pixels for other in streams[1:])]
        outputs = run(network, torch.cat(pixels) if len(pixels) > 1 else main.pixels)
        rows = len(main.pixels)
        logits, labels = outputs.logits[:rows], main.labels.repeat_interleave(main.views)
        all_labels = main.all_labels(self.world, self.batch) if self.world.size > 1 else labels
        second = None
        if len(streams) > 1:
            second = outputs.logits[rows:], streams[1].labels.repeat_interleave(streams[1].views)
        z = outputs.embeddings[:rows] if outputs.embeddings is not None else None
        inputs = LossInputs(
            logits=logits,
            labels=labels,
            all_labels=all_labels,
            views=main.views,
            embeddings=z,
            contrast=self._contrast(z, all_labels, keys) if z is not None and self.needs.contrast else None,
            prototypes=outputs.prototypes,
            scale=outputs.scale,
            second_stream=second,
            class_means=self.class_means.take if self.class_means is not None else None,
        )
        terms = self.config.terms(inputs, self.prior, progress)
        if main.mixed is not None:  # a classification loss, which is linear in the labels' distribution
            others, share = main.mixed
            all_others = self.world.gather(others, self.batch) if self.world.size > 1 else others
            of_others = replace(
                inputs,
                labels=others.repeat_interleave(main.views),
                all_labels=all_others.repeat_interleave(main.views),
            )
            second_terms = self.config.terms(of_others, self.prior, progress)
            terms = {name: share * term + (1 - share) * second_terms[name] for name, term in terms.items()}
        classified, truth = second if second is not None else (logits, labels)
        return {"accuracy": (classified.detach().argmax(1) == truth).float().mean()} | terms

    @property
    def networks(self) -> list[nn.Module]:
        """Every network whose running statistics differ from worker to worker: those that embed in training mode."""
        return [self._network] if self.averaged is None else [self._network, self.averaged]

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a resumed run needs, tensors by name."""
        state = {f"queue.{name}": tensor for name, tensor in self.queue.state().items()} if self.queue is not None else {}
        if self.averaged is not None:
            state |= {f"averaged.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        if self.class_means is not None:
            state |= {f"class_means.{name}": tensor for name, tensor in self.class_means.state_dict().items()}
        return state

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of what a pass moves: queue and class means."""
        return {name: tensor.clone() for name, tensor in self.state().items() if not name.startswith("averaged.")}

    def put_back(self, snapshot: dict[str, torch.Tensor]) -> None:
        """Take up a snapshot, which must not be used after it."""
        if self.queue is not None:
            self.queue.load(below("queue.", snapshot))
        if self.class_means is not None:
            self.class_means.load_state_dict(below("class_means.", snapshot))

    def continue_epoch(self, progress: float) -> None:
        """Take the loaded state for one within the epoch at `progress`, which a run of another length calls otherwise."""
        if self.class_means is not None:
            self.class_means.progress.fill_(progress)

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Load what `state` returned.

        Raises:
            UserError: It is of another queue or average.
        """
        # As torch's AveragedModel named them, in checkpoints of earlier versions.
        state = {name.replace("averaged.module.", "averaged."): state[name] for name in state if name != "averaged.n_averaged"}
        shapes = {name: tensor.shape for name, tensor in self.state().items()}
        if shapes != {name: tensor.shape for name, tensor in state.items()}:
            raise UserError(
                f"the checkpoint's queue or averaged network is not that of loss {self.config.kind!r} as configured now; "
                "resume with the same loss.queue and loss.momentum, or start a new run"
            )
        self.put_back(state)
        if self.averaged is not None:
            self.averaged.load_state_dict(below("averaged.", state))

    def _keys(
        self, run: Callable[[nn.Module, torch.Tensor], Outputs], images: Images
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], Images]:
        """Every view but the first embedded by the averaged network, (B*(V-1), d) with labels; and the first views."""
        assert self.averaged is not None
        by_view = images.pixels.unflatten(0, (-1, images.views))
        with torch.no_grad():
            embeddings = run(self.averaged, _compact(by_view[:, 1:].flatten(0, 1))).embeddings
        assert embeddings is not None
        labels = self.world.gather(images.labels, self.batch).repeat_interleave(images.views - 1)
        return (self.world.gather(embeddings, self.batch), labels), Images(_compact(by_view[:, 0]), images.labels, 1)

    def _contrast(self, z: torch.Tensor, labels: torch.Tensor, keys: tuple[torch.Tensor, torch.Tensor] | None) -> ContrastSet:
        """The batch's embeddings, the averaged network's, the queue's; the queue then takes in this step's.

        z: this worker's; labels and keys are all workers', and so is the result.
        """
        gathered = self.world.gather(z, self.batch)
        start = self.world.share.of(self.batch).start * (len(gathered) // self.batch)
        parts = [(gathered, labels)] + ([keys] if keys is not None else [])
        newest = parts[-1]
        if self.queue is not None:
            parts.append(self.queue.content())
        if len(parts) == 1:
            return ContrastSet(gathered, labels, start)
        contrast = ContrastSet(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), start)
        if self.queue is not None:
            self.queue.push(*newest)
        return contrast


def _compact(pixels: torch.Tensor) -> torch.Tensor:
    """Images channels-last; features, which a head is trained on, as they are."""
    return pixels.contiguous(memory_format=torch.channels_last if pixels.ndim == 4 else torch.contiguous_format)
