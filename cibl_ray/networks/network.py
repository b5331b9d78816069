"""The hybrid network: one backbone, a classifier, and a projection where the loss contrasts embeddings."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import nn

from cibl_ray.networks.config import BACKBONES, Needs, NetworkConfig
from cibl_ray.networks.modules import Head, LearnedPrototypes, ProjectedPrototypes, Projection
from cibl_ray.networks.precision import at_least_float32
from pipelines.common.seeding import torch_seed


@dataclass(frozen=True)
class Outputs:
    """What the network makes of M images, in at least float32.

    Attributes:
        logits: (M, C).
        embeddings: (M, d_z) of unit norm; None where the network has no projection.
        prototypes: (C, d_z) of unit norm; None where the network has none.
        scale: The head's scale s; 1 where it has none.
    """

    logits: torch.Tensor
    embeddings: torch.Tensor | None
    prototypes: torch.Tensor | None
    scale: torch.Tensor | float


class HybridNetwork(nn.Module):
    """Images (M, 3, S, S) to `Outputs`.

    Args:
        config: Backbone, head and projection.
        classes: C.
        needs: What the loss asks for beside logits.
    """

    def __init__(self, config: NetworkConfig, classes: int, needs: Needs) -> None:
        super().__init__()
        self.classes, self.detached_head = classes, needs.detached_head
        self.backbone, features = build_backbone(config.backbone)
        self.head = Head(config.head, features, classes)
        self.projection: Projection | None = None
        self.prototypes: LearnedPrototypes | ProjectedPrototypes | None = None
        if needs.projection:
            self.projection = Projection(features, config.projection.hidden, config.projection.size)
        match needs.prototypes:
            case "learned":
                self.prototypes = LearnedPrototypes(classes, config.projection.size)
            case "projected":
                self.prototypes = ProjectedPrototypes(features, config.projection.hidden, config.projection.size)

    def forward(self, x: torch.Tensor) -> Outputs:
        """Everything that a loss may need of images (M, 3, S, S)."""
        h = self.backbone(x)
        return Outputs(
            logits=at_least_float32(self.head(h.detach() if self.detached_head else h)),
            embeddings=self.projection(h) if self.projection is not None else None,
            prototypes=self.prototypes(self.head.weight) if self.prototypes is not None else None,
            scale=self.head.scale,
        )

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Logits alone, (M, C), in at least float32: what evaluation and serving need."""
        return at_least_float32(self.head(self.backbone(x)))

    def schedule(self, epoch: float, epochs: int) -> None:
        """Set what changes over a run of `epochs`: the head's scale, where a schedule sets it."""
        scale = self.head.config.scale_at(epoch, epochs)
        if scale is not None:
            self.head.set_scale(scale)

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to the parameter `name`: not to a learned scale, which it would pull to 1."""
        return name != "head.log_scale"


def build_network(config: NetworkConfig, classes: int, needs: Needs, seed: int) -> HybridNetwork:
    """Build a network with weights drawn from `seed`, channels last in memory.

    Projection and prototypes are drawn last, so that networks with and without them start from the same backbone and
    classifier. torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "weights"))
        network = HybridNetwork(config, classes, needs)
    return network.to(memory_format=torch.channels_last)


def build_backbone(name: str) -> tuple[nn.Module, int]:
    """The backbone `name` of `BACKBONES`, with weights from torch's global generator, and how many features it has."""
    module, _, function = BACKBONES[name].builder.partition(":")
    backbone: tuple[nn.Module, int] = getattr(importlib.import_module(f"cibl_ray.networks.backbones.{module}"), function)()
    return backbone
