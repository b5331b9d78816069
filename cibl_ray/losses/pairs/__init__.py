"""Sums over pairs of embeddings, which the contrastive losses share, in memory that grows like the batch.

The names below load torch when they are first used: the losses' files hold configurations too, which are read without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cibl_ray.losses.pairs.contrast import pair_sums
    from cibl_ray.losses.pairs.positives import class_counts, positive_counts
    from cibl_ray.losses.pairs.prototypes import prototype_pair_sums
    from cibl_ray.losses.pairs.softmax import PairWeights

_MODULES = {
    "pair_sums": "contrast",
    "class_counts": "positives",
    "positive_counts": "positives",
    "prototype_pair_sums": "prototypes",
    "PairWeights": "softmax",
}
__all__ = ["PairWeights", "class_counts", "pair_sums", "positive_counts", "prototype_pair_sums"]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
