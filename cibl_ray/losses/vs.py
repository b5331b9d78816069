"""Vector scaling (VS) loss.

Kini et al., "Label-Imbalanced and Group-Sensitive Classification under Overparameterization", 2021.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cibl_ray.losses.balanced_softmax import adjust_logits
from cibl_ray.losses.base import Kappa, LossSettings
from cibl_ray.losses.cross_entropy import cross_entropy
from cibl_ray.losses.inputs import ClassPrior, LossInputs, Terms
from cibl_ray.networks.precision import at_least_float32

if TYPE_CHECKING:
    import torch


class VSConfig(LossSettings):
    """Cross-entropy on logits that are scaled and shifted by how common their class is."""

    kind: Literal["vs"]
    logit_gamma: float = Field(
        default=0.15, ge=0, le=10, description="γ: scales logit c by (n_c / n_max)^γ. 0 is balanced softmax with this kappa."
    )
    kappa: Kappa = 1.0

    def terms(self, inputs: LossInputs, prior: ClassPrior, progress: float) -> Terms:
        """The mean of `vs`."""
        scales = logit_scales(prior.train_counts, self.logit_gamma)
        return {"loss": vs(inputs.logits, inputs.labels, scales, prior.log_prior, self.kappa).mean()}


def logit_scales(train_counts: torch.Tensor, gamma: float) -> torch.Tensor:
    """Δ_c = (n_c / n_max)^γ, float64 (C,), 1 for the most common class. A class without images counts as one image."""
    counts = train_counts.double().clamp(min=1)
    return (counts / counts.max()) ** gamma


def scaled_logits(logits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Δ_c·f_c, (M, C) in at least float32, of logits f (M, C) and scales Δ (C,)."""
    logits = at_least_float32(logits)
    return logits * scales.to(logits.dtype)


def vs(logits: torch.Tensor, labels: torch.Tensor, scales: torch.Tensor, log_prior: torch.Tensor, kappa: float) -> torch.Tensor:
    """Cross-entropy on Δ_c·f_c + κ·log π_c (Kini et al. 2021, the VS loss for many classes, without weights).

    Args:
        logits: f, (M, C).
        labels: int64 (M,).
        scales: Δ, (C,).
        log_prior: log π, (C,).
        kappa: κ, the paper's τ.

    Returns:
        One value a sample, (M,), in at least float32.
    """
    return cross_entropy(adjust_logits(scaled_logits(logits, scales), log_prior, kappa), labels)
