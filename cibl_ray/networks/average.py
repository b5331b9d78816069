"""Averages of a network's weights over the steps of training."""

from __future__ import annotations

import copy

import torch
from torch import nn

from cibl_ray.networks.network import HybridNetwork


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, share: float) -> None:
    """average ← (1 − share)·average + share·network, for the parameters; nothing is asked of the device.

    (torch's AveragedModel asks it in every step whether it is the first.)
    """
    torch._foreach_lerp_([*average.parameters()], [*network.parameters()], share)


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
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        follow(self.network, network, share)
        averaged, current = [], []
        for (name, own), theirs in zip(self.network.named_buffers(), network.buffers(), strict=True):
            if name.endswith(("running_mean", "running_var")):
                averaged.append(own)
                current.append(theirs)
            else:
                own.copy_(theirs)
        if averaged:  # a network may normalise nothing
            torch._foreach_lerp_(averaged, current, share)
