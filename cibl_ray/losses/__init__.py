"""Losses: one file a method, and a `torch.nn.Module` of each for any training loop.

`from cibl_ray.losses import CIBLLoss` loads torch; `import cibl_ray.losses` does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cibl_ray.losses.modules.classification import (
        BalancedSoftmaxLoss,
        CrossEntropyLoss,
        LabelSmoothingLoss,
        LDAMLoss,
        VSLoss,
    )
    from cibl_ray.losses.modules.combined import BCLLoss, CIBLLoss, HybridPSCLoss, HybridSCLoss, PaCoLoss, ProCoLoss
    from cibl_ray.losses.modules.contrastive import PSCLoss, SupConLoss

__all__ = [
    "BCLLoss",
    "BalancedSoftmaxLoss",
    "CIBLLoss",
    "CrossEntropyLoss",
    "HybridPSCLoss",
    "HybridSCLoss",
    "LDAMLoss",
    "LabelSmoothingLoss",
    "PSCLoss",
    "PaCoLoss",
    "ProCoLoss",
    "SupConLoss",
    "VSLoss",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        for file in ("classification", "contrastive", "combined"):
            module = importlib.import_module(f"{__name__}.modules.{file}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
