"""One step: the gradients of a batch, and the update."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from cibl_ray.config import RunConfig
from cibl_ray.losses.objective import Images, Objective
from cibl_ray.networks.average import WeightAverage
from cibl_ray.networks.network import HybridNetwork, Outputs
from cibl_ray.training.batch_norm import running_statistics_stay
from cibl_ray.training.cached import CachedPasses
from cibl_ray.training.compiled import begin_step
from cibl_ray.training.exchange import GradientExchange
from cibl_ray.training.mix import mix, paste
from cibl_ray.training.sharpness import at_the_peak
from cibl_ray.world import World
from pipelines.common.seeding import stream

_WIRE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Step:
    """Trains a network one step at a time.

    Args:
        config: The run's configuration.
        network: What is trained.
        objective: Its loss.
        optimizer: Of its parameters.
        average: Of its weights; None: none is kept.
        world: The workers, which sum their gradients.
        batches: Steps of an epoch.
    """

    def __init__(
        self,
        config: RunConfig,
        network: HybridNetwork,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        world: World,
        batches: int,
    ) -> None:
        self._config, self._train, self._batches = config, config.train, batches
        self._network, self._objective, self._optimizer, self._average = network, objective, optimizer, average
        self._exchange = GradientExchange(network.parameters(), world, wire=_WIRE[self._train.exchange_precision])
        self._first_row = world.share.of(self._train.batch_size).start
        self._share = world.fraction(self._train.batch_size)
        self._device = torch.device(self._train.device).type
        # A head alone gains nothing by bf16.
        self._autocast = self._train.precision == "bf16" and self._train.tune != "head"

    def __call__(self, streams: list[Images], epoch: int, step: int) -> dict[str, torch.Tensor]:
        """Train one step.

        Args:
            streams: The images of each stream, ready for the network.
            epoch: Whole epochs done.
            step: Steps done of this epoch.

        Returns:
            The terms of the loss by name, detached scalars.
        """
        sam, clip_norm = self._config.optimizer.sam, self._config.optimizer.clip_norm
        sharp = sam is not None and (epoch + step / self._batches) / self._train.epochs >= sam.start
        self._optimizer.zero_grad(set_to_none=True)  # first: memory of CUDA graphs is used again in every step
        self._objective.begin_step()
        before = self._objective.snapshot() if sharp else {}
        terms = self._gradients(streams, epoch, step)
        if sam is not None and sharp:
            after = self._objective.snapshot()
            self._objective.put_back(before)  # the queue must not have these images already
            networks = nn.ModuleList(self._objective.networks)
            with at_the_peak(self._network.parameters(), sam.rho), running_statistics_stay(networks):
                self._gradients(streams, epoch, step)
            self._objective.put_back(after)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self._network.parameters(), clip_norm)
        self._optimizer.step()
        self._network.head.project()
        if self._average is not None:
            self._average.update(self._network, epoch * self._batches + step + 1)
        return terms

    def _gradients(self, streams: list[Images], epoch: int, step: int) -> dict[str, torch.Tensor]:
        """Compute the gradients of a step, summed over all workers, and its terms."""
        begin_step(self._train.compile is True)
        parts, progress = self._train.accumulate, epoch / self._train.epochs
        if parts > 1 and self._train.contrast_set == "step":
            return self._cached_gradients(self._mixed(streams, epoch, step, 0), progress)
        terms: dict[str, torch.Tensor] = {}
        for number, part in enumerate(zip(*(images.split(parts) for images in streams), strict=True)):
            of_part = self._objective(self._network, self._run, self._mixed([*part], epoch, step, number), progress)
            # Each worker's loss is the mean over its own images; the parts add up to the mean over the batch.
            with self._exchange.summing() if number == parts - 1 else nullcontext():
                (of_part["loss"] * self._share / parts).backward()
            for name, term in of_part.items():
                mean = term.detach() / parts
                terms[name] = terms[name] + mean if name in terms else mean
        return terms

    def _cached_gradients(self, streams: list[Images], progress: float) -> dict[str, torch.Tensor]:
        """As `_gradients`, with the outputs of all micro-batches in one loss."""
        rows = [len(images.labels) * images.views for images in streams]
        if self._objective.averaged is not None:  # which embeds every view but the first
            rows[0] = len(streams[0].labels)
        passes = CachedPasses(self._run, self._train.accumulate, rows)
        terms = self._objective(self._network, passes, streams, progress)
        (terms["loss"] * self._share).backward()
        passes.backward(self._exchange.summing())
        return {name: term.detach() for name, term in terms.items()}

    def _mixed(self, streams: list[Images], epoch: int, step: int, part: int) -> list[Images]:
        """A micro-batch's images, mixed with each other, or with those of the stream that CMO pastes from."""
        train = self._train
        if not (train.mixup or train.cutmix or train.cmo is not None):
            return streams
        draw = stream(self._config.seed, "mix", epoch, step, part, self._first_row)
        if train.cmo is None:
            return [mix(images, train.mixup, train.cutmix, draw) for images in streams]
        images, sources = streams
        # All workers paste in the same steps, for they gather the labels together: the first worker's first number decides.
        draw.random()  # each worker's own first number, so that its rectangles do not depend on the decision
        chosen = stream(self._config.seed, "mix", epoch, step, part, 0).random() < train.cmo.chance
        now = train.cmo.first_epochs <= epoch < train.epochs - train.cmo.last_epochs
        return [paste(images, sources, draw) if now and chosen else images]

    def _run(self, network: nn.Module, pixels: torch.Tensor) -> Outputs:
        with torch.autocast(self._device, torch.bfloat16, enabled=self._autocast):
            outputs: Outputs = network(pixels)
        return outputs
