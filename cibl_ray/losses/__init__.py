"""Losses: one file a method, and a `torch.nn.Module` of each for any training loop.

`from cibl_ray.losses import CIBLLoss` loads torch; `import cibl_ray.losses` does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cibl_ray.losses.modules import (
        BalancedSoftmaxLoss,
        BCLLoss,
        CIBLLoss,
        CrossEntropyLoss,
        HybridPSCLoss,
        HybridSCLoss,
        LabelSmoothingLoss,
        LDAMLoss,
        PaCoLoss,
        PSCLoss,
        SupConLoss,
        VSLoss,
    )

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
    "SupConLoss",
    "VSLoss",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.modules"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
