"""torchvision's ResNets for photographs (He et al. 2016; Xie et al. 2017). They shrink images 32-fold."""

from __future__ import annotations

from typing import Any

from torch import nn


def resnet50() -> tuple[nn.Module, int]:
    """ResNet-50 without its classifier, and how many features it has."""
    from torchvision import models

    return _without_classifier(models.resnet50())


def resnext50() -> tuple[nn.Module, int]:
    """ResNeXt-50 (32x4d) without its classifier, and how many features it has."""
    from torchvision import models

    return _without_classifier(models.resnext50_32x4d())


def _without_classifier(network: Any) -> tuple[nn.Module, int]:
    features = network.fc.in_features
    network.fc = nn.Identity()
    return network, features
