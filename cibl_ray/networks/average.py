"""Averages of a network's weights over the steps of training."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cibl_ray.networks.network import HybridNetwork


def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Set average ← decay·average + (1 − decay)·network, for the parameters, without waiting for the device.

    (torch's AveragedModel asks it in every step whether it is the first.)

    Args:
        average: The average, which is changed.
        network: A network of the same parameters.
        decay: The share of the past, 0 to 1.
    """
    _move([*average.parameters()], [*network.parameters()], decay)


@torch.no_grad()
def copy_buffers(own: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> None:
    """Copy theirs to own."""
    for mine, other in zip(own, theirs, strict=True):
        mine.copy_(other)


def _move(averages: list[torch.Tensor], values: list[torch.Tensor], decay: float) -> None:
    get_ema_multi_avg_fn(decay)(averages, values, 0)  # the third argument is of torch's other averages


class WeightAverage:
    """An exponential moving average of the weights (Polyak & Juditsky 1992), for evaluation and export.

    The share of the past after step t is min(decay, (1 + t) / (10 + t)), TensorFlow's warm-up, so that the random start is soon
    forgotten. Running statistics are averaged likewise, since they belong to the weights; other buffers are the network's.
    """

    def __init__(self, network: HybridNetwork, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, network: HybridNetwork, step: int) -> None:
        """`network` has just made step number `step` of the run, from 1 on."""
        decay = min(self.decay, (1 + step) / (10 + step))
        update_average(self.network, network, decay)
        running: list[tuple[torch.Tensor, torch.Tensor]] = []
        rest: list[tuple[torch.Tensor, torch.Tensor]] = []
        for (name, own), theirs in zip(self.network.named_buffers(), network.buffers(), strict=True):
            (running if name.endswith(("running_mean", "running_var")) else rest).append((own, theirs))
        if running:  # a network may normalise nothing
            _move([own for own, _ in running], [theirs for _, theirs in running], decay)
        copy_buffers((own for own, _ in rest), (theirs for _, theirs in rest))
