"""The statistics of batch norm: which ones it normalises by, whether they move, and what several workers make of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from cibl_ray.config import RunConfig
from cibl_ray.networks.depth import BATCH_NORMS
from cibl_ray.networks.precision import at_least_float32
from cibl_ray.world import World
from pipelines.common.errors import UserError


def keeps_statistics(config: RunConfig) -> bool:
    """Whether batch norm keeps the running statistics that it starts with.

    Args:
        config: The run's configuration; 'auto' keeps those of pretrained weights.
    """
    if config.train.batch_norm == "auto":
        return config.network.backbone.pretrained
    return config.train.batch_norm == "keep"


@contextmanager
def several_values() -> Iterator[None]:
    """Raise as a UserError that a batch norm has a single image of 1 x 1 pixels, or a single vector, to normalise by."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "a batch norm has one value a channel to normalise by; raise train.batch_size, or lower train.accumulate or the "
            "number of workers"
        ) from error


@contextmanager
def running_statistics_stay(network: nn.Module) -> Iterator[None]:
    """Let batch norms compute with the batch's statistics, and keep their running ones, which are of the weights themselves."""
    norms = [module for module in network.modules() if isinstance(module, BATCH_NORMS)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def average_statistics(networks: Iterable[nn.Module], world: World) -> None:
    """Average the running statistics of batch norm over the workers, each of which normalises by its own part of a batch.

    Args:
        networks: Their running means and variances change.
        world: The workers.
    """
    if world.size == 1:
        return
    buffers = [
        buffer
        for network in networks
        for module in network.modules()
        if isinstance(module, BATCH_NORMS)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not buffers:
        return
    means = world.sum(torch.cat(buffers)).div_(world.size)
    for buffer, mean in zip(buffers, means.split([len(buffer) for buffer in buffers]), strict=True):
        buffer.copy_(mean)


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch norm that normalises by the statistics of the whole batch, over all workers.

    torch's SyncBatchNorm does this for equal parts of a batch on GPUs. This one also runs on CPUs. It takes the place of
    a batch norm of any dimension, and has its parameters, statistics and names.

    Args:
        norm: The batch norm; its dropout and activation are kept where it has some (timm's BatchNormAct2d).
        world: The workers.
    """

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, world: World) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.world = world
        self.drop = getattr(norm, "drop", None)
        self.act = getattr(norm, "act", None)
        self.train(norm.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (N, C, ...): in training by the mean and variance of all workers' N, else by the running ones."""
        if self.training:
            weight = self.weight if self.affine else x.new_ones(self.num_features)
            bias = self.bias if self.affine else x.new_zeros(self.num_features)
            x, mean, variance, count = _Normalize.apply(x, weight, bias, self.eps, self.world)
            if self.track_running_stats:
                self._follow(mean, variance, count)
        else:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        for layer in (self.drop, self.act):
            x = x if layer is None else layer(x)
        return x

    @torch.no_grad()
    def _follow(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        """Move the running statistics towards those of a batch, as torch's batch norm does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share: float | torch.Tensor = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = variance * count / (count - 1)
        self.running_mean += share * (mean - self.running_mean)
        self.running_var += share * (unbiased - self.running_var)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, world: World
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = at_least_float32(x)
        variance, mean = torch.var_mean(wide, _but_channels(x), correction=0)
        # Each worker's row: mean, variance, count. They are merged by Chan et al. 1979, without a second pass over x.
        rows = wide.new_zeros(world.size, 2 * len(mean) + 1)
        rows[world.rank] = torch.cat((mean, variance, mean.new_tensor([x.numel() // len(mean)])))
        rows = world.sum(rows)
        means, variances, counts = rows[:, : len(mean)], rows[:, len(mean) : -1], rows[:, -1:]
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.world = world
        ctx.mark_non_differentiable(mean, variance, count)
        y = (wide - _wide(mean, x)) * _wide(scale * weight, x) + _wide(bias, x)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        wide = at_least_float32(grad)
        normal = (at_least_float32(x) - _wide(mean, x)) * _wide(scale, x)
        of_bias = wide.sum(_but_channels(x))
        of_weight = (wide * normal).sum(_but_channels(x))
        all_bias, all_weight = ctx.world.sum(torch.cat((of_bias, of_weight))).div(count).chunk(2)
        of_x = (wide - _wide(all_bias, x) - normal * _wide(all_weight, x)) * _wide(scale * weight, x)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None


def sync_batch_norm(network: nn.Module, world: World) -> None:
    """Let every batch norm of a network normalise over all workers. One worker's network stays as it is.

    Args:
        network: Its batch norms are replaced; names and values of parameters and statistics stay.
        world: The workers.
    """
    if world.size == 1:
        return
    for parent in [*network.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, BATCH_NORMS) and not isinstance(child, nn.SyncBatchNorm):
                setattr(parent, name, SyncedBatchNorm(child, world))


def _but_channels(x: torch.Tensor) -> list[int]:
    return [dimension for dimension in range(x.ndim) if dimension != 1]


def _wide(of_channels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Numbers of the channels (C,), to be combined with x (N, C, ...)."""
    return of_channels.reshape(1, -1, *[1] * (x.ndim - 2))
