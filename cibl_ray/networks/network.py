"""The hybrid network: one backbone, a classifier, and a projection where the loss contrasts embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import nn

from cibl_ray.config import CosineHeadConfig, LinearHeadConfig, NetworkConfig
from cibl_ray.networks.heads import CosineHead, Projection
from cibl_ray.networks.resnet_cifar import CifarResNet
from pipelines.seeding import torch_seed


@dataclass(frozen=True)
class Outputs:
    """logits: float32 (M, C). embeddings: float32 (M, d_z) of unit norm, or None where the network has no projection."""

    logits: torch.Tensor
    embeddings: torch.Tensor | None


class HybridNetwork(nn.Module):
    """Images (M, 3, S, S) to `Outputs`."""

    def __init__(self, config: NetworkConfig, classes: int, with_projection: bool) -> None:
        super().__init__()
        self.backbone, features = _backbone(config.backbone)
        self.head = _head(config.head, features, classes)
        self.projection: Projection | None = None
        if with_projection:
            self.projection = Projection(features, config.projection.hidden, config.projection.size)

    def forward(self, x: torch.Tensor) -> Outputs:
        h = self.backbone(x)
        embeddings = self.projection(h) if self.projection is not None else None
        return Outputs(self.head(h).float(), embeddings)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Logits alone, float32 (M, C): what evaluation and serving need."""
        return self.head(self.backbone(x)).float()


def build_network(config: NetworkConfig, classes: int, with_projection: bool, seed: int) -> HybridNetwork:
    """A network with weights drawn from `seed`, channels last in memory.

    The projection is drawn last, so that networks with and without one start from the same backbone and classifier.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "weights"))
        network = HybridNetwork(config, classes, with_projection)
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
            return CosineHead(features, classes, config.scale)
    assert_never(config)
