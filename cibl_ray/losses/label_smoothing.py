"""Label smoothing, the same for all classes or stronger for common ones.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016. Zhong et al., "Improving Calibration for
Long-Tailed Recognition" (MiSLAS), 2021: label-aware smoothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cibl_ray.losses.balanced_softmax import adjust_logits
from cibl_ray.losses.base import Kappa, LossSettings
from cibl_ray.losses.inputs import ClassPrior, LossInputs, Terms
from cibl_ray.networks.precision import at_least_float32

if TYPE_CHECKING:
    import torch

Shape = Literal["concave", "linear", "convex"]


class LabelSmoothingConfig(LossSettings):
    """Cross-entropy against smoothed labels; the smoothing grows from the tail to the head with the images of a class."""

    kind: Literal["label_smoothing"]
    head_smoothing: float = Field(default=0.4, ge=0, lt=1, description="ε of the most common class.")
    tail_smoothing: float = Field(
        default=0.1, ge=0, lt=1, description="ε of the rarest class; the same as `head_smoothing` smooths all alike."
    )
    smoothing_shape: Shape = Field(default="concave", description="How ε grows with the images of a class.")
    kappa: Kappa = 0.0

    def terms(self, inputs: LossInputs, prior: ClassPrior, progress: float) -> Terms:
        """The mean of `smoothed_cross_entropy`."""
        smoothing = class_smoothing(prior.train_counts, self.head_smoothing, self.tail_smoothing, self.smoothing_shape)
        logits = adjust_logits(inputs.logits, prior.log_prior, self.kappa)
        return {"loss": smoothed_cross_entropy(logits, inputs.labels, smoothing).mean()}


def class_smoothing(train_counts: torch.Tensor, head: float, tail: float, shape: Shape = "concave") -> torch.Tensor:
    """The smoothing ε_c of each class (Zhong et al. 2021, label-aware smoothing).

    With r_c = (n_c - n_min) / (n_max - n_min), ε_c = tail + (head - tail)·g(r_c); g is sin(r·π/2) (concave), r (linear) or
    1 - cos(r·π/2) (convex).

    Args:
        train_counts: Images of each class, (C,).
        head: ε of the most common class.
        tail: ε of the rarest class.
        shape: g.

    Returns:
        float64 (C,). Where all classes have equally many images it is `head`.
    """
    import torch

    counts = train_counts.double().clamp(min=1)
    span = counts.max() - counts.min()
    share = torch.where(span > 0, (counts - counts.min()) / span.clamp(min=1), 1.0)
    if shape == "concave":
        share = (share * math.pi / 2).sin()
    elif shape == "convex":
        share = 1 - (share * math.pi / 2).cos()
    return tail + (head - tail) * share


def smoothed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against 1 - ε_y for the true class and ε_y / (C-1) for each other one.

    Args:
        logits: (M, C), C at least 2 where a smoothing is not 0.
        labels: int64 (M,).
        smoothing: ε, (C,).

    Returns:
        One value a sample, (M,), in at least float32.
    """
    logits = at_least_float32(logits)
    log_probabilities = logits.log_softmax(1)
    own = log_probabilities.gather(1, labels[:, None]).squeeze(1)
    epsilon = smoothing.to(logits.dtype)[labels]
    others = (log_probabilities.sum(1) - own) / max(1, logits.shape[1] - 1)
    return -(1 - epsilon) * own - epsilon * others
