"""The hybrid network: one backbone, a classifier, and a projection where the loss contrasts embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import nn

from cibl_ray.config import CosineHeadConfig, LinearHeadConfig, NetworkConfig
from cibl_ray.losses.config import Needs
from cibl_ray.networks.heads import CosineHead, LearnedPrototypes, ProjectedPrototypes, Projection
from cibl_ray.networks.precision import wide
from cibl_ray.networks.resnet_cifar import CifarResNet
from cibl_ray.training.schedules import head_scale
from pipelines.common.seeding import torch_seed


@dataclass(frozen=True)
class Outputs:
    """logits (M, C). embeddings (M, d_z) of unit norm, prototypes (C, d_z) of unit norm; None where the network has none. All
    in at least float32. scale: s of a cosine head, else 1."""

    logits: torch.Tensor
    embeddings: torch.Tensor | None
    prototypes: torch.Tensor | None
    scale: torch.Tensor | float


class HybridNetwork(nn.Module):
    """Images (M, 3, S, S) to `Outputs`."""

    def __init__(self, config: NetworkConfig, classes: int, needs: Needs) -> None:
        super().__init__()
        self.classes, self.head_config, self.detached_head = classes, config.head, needs.detached_head
        self.backbone, features = _backbone(config.backbone)
        self.head = _head(config.head, features, classes)
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
        h = self.backbone(x)
        return Outputs(
            logits=wide(self.head(h.detach() if self.detached_head else h)),
            embeddings=self.projection(h) if self.projection is not None else None,
            prototypes=self.prototypes(self.head.weight) if self.prototypes is not None else None,
            scale=self.head.scale if isinstance(self.head, CosineHead) else 1.0,
        )

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Logits alone, (M, C), in at least float32: what evaluation and serving need."""
        return wide(self.head(self.backbone(x)))

    def schedule(self, epoch: float, epochs: int) -> None:
        """Set what changes over a run of `epochs`: a cosine head's scale, where it is not learned."""
        if isinstance(self.head_config, CosineHeadConfig) and not self.head_config.scale.learnable:
            assert isinstance(self.head, CosineHead)
            self.head.set_scale(head_scale(self.head_config.scale, epoch, epochs))

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to the parameter `name`: not to a learned scale, which it would pull to 1."""
        return name != "head.log_scale"


def build_network(config: NetworkConfig, classes: int, needs: Needs, seed: int) -> HybridNetwork:
    """A network with weights drawn from `seed`, channels last in memory.

    Projection and prototypes are drawn last, so that networks with and without start from the same backbone and classifier.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "weights"))
        network = HybridNetwork(config, classes, needs)
    return network.to(memory_format=torch.channels_last)


def _backbone(name: str) -> tuple[nn.Module, int]:
    match name:
        case "resnet20" | "resnet32":
            return CifarResNet(int(name.removeprefix("resnet"))), CifarResNet.features
        case "resnet50" | "resnext50":
            from torchvision import models

            backbone = models.resnet50() if name == "resnet50" else models.resnext50_32x4d()
            features = backbone.fc.in_features
            backbone.fc = nn.Identity()
            return backbone, features
    raise AssertionError(name)


def _head(config: LinearHeadConfig | CosineHeadConfig, features: int, classes: int) -> nn.Module:
    match config:
        case LinearHeadConfig():
            return nn.Linear(features, classes)
        case CosineHeadConfig():
            return CosineHead(features, classes, config.scale.start, config.scale.learnable)
    assert_never(config)
