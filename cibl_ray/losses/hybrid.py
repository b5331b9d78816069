"""Hybrid-SC and Hybrid-PSC: from learning features to learning the classifier in the course of a run (Wang et al. 2021)."""

from __future__ import annotations

import math
from typing import Literal

Curve = Literal["parabolic", "linear", "cosine", "constant"]


def contrastive_share(curve: Curve, progress: float, constant: float = 0.5) -> float:
    """α at `progress` = t/T of the run: 1-(t/T)² (the paper's equation 4), 1-t/T, (1+cos(π·t/T))/2, or `constant`."""
    match curve:
        case "parabolic":
            return 1 - progress**2
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "constant":
            return constant
