"""ResNets of torchvision, for photographs (He et al. 2016; Xie et al. 2017). They shrink images 32-fold."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cibl_ray.networks.backbones.weights import cannot_fetch, put

LICENCE = "BSD-3-Clause"  # of torchvision and of the weights that it publishes


def build(name: str) -> tuple[nn.Module, int]:
    """Build a network with random weights and without its classifier.

    Args:
        name: 'resnet18', 'resnet50' or 'resnext50'.

    Returns:
        The network, images (M, 3, S, S) to features (M, d_h), and d_h.
    """
    from torchvision import models

    builders = {"resnet18": models.resnet18, "resnet50": models.resnet50, "resnext50": models.resnext50_32x4d}
    network: Any = builders[name]()
    features = int(network.fc.in_features)
    network.fc = nn.Identity()
    return network, features


def load(network: nn.Module, name: str) -> str:
    """Load torchvision's ImageNet weights.

    Args:
        network: Gets the weights.
        name: As in `build`.

    Returns:
        Where they came from.

    Raises:
        UserError: They are not on this machine, and cannot be fetched.
    """
    weights = _known()[name]
    url = weights.url
    try:
        tensors = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, progress=False)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise cannot_fetch(f"torchvision's weights of {name}", url.rpartition("/")[2], error) from error
    put(network, tensors, f"of torchvision for {name}", ("fc",))
    return weights_name(name)


def weights_name(name: str) -> str:
    """Name the ImageNet weights that torchvision has of a network, which is named as in `build`."""
    return f"torchvision, {_known()[name]}"


def _known() -> dict[str, Any]:
    from torchvision import models

    return {
        "resnet18": models.ResNet18_Weights.DEFAULT,
        "resnet50": models.ResNet50_Weights.DEFAULT,
        "resnext50": models.ResNeXt50_32X4D_Weights.DEFAULT,
    }
