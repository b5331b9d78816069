"""Balanced softmax and logit adjustment.

Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", 2020. Menon et al., "Long-Tail Learning via Logit
Adjustment", 2021.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cibl_ray.losses.base import Kappa, LossSettings
from cibl_ray.losses.cross_entropy import cross_entropy
from cibl_ray.losses.inputs import ClassPrior, LossInputs, Terms
from cibl_ray.networks.precision import at_least_float32

if TYPE_CHECKING:
    import torch


class BalancedSoftmaxConfig(LossSettings):
    """Cross-entropy on logits + κ·log π: balanced softmax (κ = 1), logit adjustment (other κ)."""

    kind: Literal["balanced_softmax"]
    kappa: Kappa = 1.0

    def terms(self, inputs: LossInputs, prior: ClassPrior, progress: float) -> Terms:
        """The mean of cross-entropy on the adjusted logits."""
        return {"loss": cross_entropy(adjust_logits(inputs.logits, prior.log_prior, self.kappa), inputs.labels).mean()}


def adjust_logits(logits: torch.Tensor, log_prior: torch.Tensor, kappa: float) -> torch.Tensor:
    """Logits f + κ·log π (Ren et al. 2020, equation 3; Menon et al. 2021, equation 10).

    Args:
        logits: f, (M, C).
        log_prior: log π, (C,).
        kappa: κ.

    Returns:
        (M, C) in at least float32; for κ = 0 the logits themselves, to the bit.
    """
    logits = at_least_float32(logits)
    return logits + kappa * log_prior if kappa else logits
