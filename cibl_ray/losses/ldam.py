"""Label-distribution-aware margins with deferred re-weighting.

Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", 2019. The weights are those of Cui et al.,
"Class-Balanced Loss Based on Effective Number of Samples", 2019.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cibl_ray.losses.base import LossSettings
from cibl_ray.losses.cross_entropy import cross_entropy
from cibl_ray.losses.inputs import ClassPrior, LossInputs, Terms
from cibl_ray.networks.heads.base import HeadSettings
from cibl_ray.networks.heads.cosine import ScaleConfig
from cibl_ray.networks.precision import at_least_float32

if TYPE_CHECKING:
    import torch


class LDAMConfig(LossSettings):
    """Label-distribution-aware margins, with deferred re-weighting from `reweight_from` (a share of the epochs) on."""

    kind: Literal["ldam"]
    max_margin: float = Field(default=0.5, gt=0, description="Margin of the rarest class, in cosine.")
    reweight_from: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="Re-weighting starts at this fraction of the run; 1: never. With fewer than 5 epochs, lower it.",
    )
    beta: float = Field(default=0.9999, ge=0, lt=1, description="β of the effective number of samples, (1 - β^n)/(1 - β).")

    def check(self, head: HeadSettings, views: int) -> None:
        """Refuse a head whose logits are no cosines."""
        if not head.cosine:
            raise ValueError("loss.kind 'ldam' sets margins between cosines; set network.head.kind: cosine")

    def config_warnings(self, epochs: int, head: HeadSettings) -> list[str]:
        """Re-weighting that would start after the last epoch begins, and the small default scale of the head."""
        found = []
        if head.initial_scale == ScaleConfig().start and not head.learns_scale:
            found.append(
                f"loss 'ldam' with the cosine head's default scale of {head.initial_scale:g}; the paper's is 30: "
                "set network.head.scale.start: 30"
            )
        if not epochs:
            return found
        last = (epochs - 1) / epochs  # t/T of the last epoch
        if not last < self.reweight_from < 1:
            return found
        return [
            *found,
            f"loss.reweight_from = {self.reweight_from:g} is after the last of {epochs} epochs begins: LDAM without its "
            f"re-weighting; set it to {math.floor(100 * last) / 100:g} at most (1 if that is meant), or train.epochs higher",
        ]

    def terms(self, inputs: LossInputs, prior: ClassPrior, progress: float) -> Terms:
        """The mean of `ldam`, weighted by class from `reweight_from` on."""
        losses = ldam(inputs.logits, inputs.labels, ldam_margins(prior.train_counts, self.max_margin), inputs.scale)
        if progress < self.reweight_from:
            return {"loss": losses.mean()}
        weights = effective_number_weights(prior.train_counts, self.beta).to(losses.dtype)
        return {"loss": (weights[inputs.labels] * losses).mean() / weights[inputs.all_labels].mean()}


def ldam_margins(train_counts: torch.Tensor, max_margin: float) -> torch.Tensor:
    """Δ_c = K / n_c^¼, K such that the rarest class has `max_margin`: float64 (C,) (Cao et al. 2019, equation 12)."""
    margins = train_counts.double().clamp(min=1) ** -0.25
    return margins * (max_margin / margins.max())


def effective_number_weights(train_counts: torch.Tensor, beta: float) -> torch.Tensor:
    """(1-β)/(1-β^n_c), scaled to a mean of 1: float64 (C,) (Cui et al. 2019, equation 3)."""
    weights = (1 - beta) / (1 - beta ** train_counts.double().clamp(min=1))
    return weights * (len(weights) / weights.sum())


def ldam(logits: torch.Tensor, labels: torch.Tensor, margins: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Cross-entropy with the true class's logit lowered by its margin (Cao et al. 2019, equation 13).

    Args:
        logits: A cosine classifier's, s·cos, (M, C).
        labels: int64 (M,).
        margins: In cosine, (C,).
        scale: s.

    Returns:
        One value a sample, (M,).
    """
    logits = at_least_float32(logits)
    lowered = scale * margins.to(logits.dtype)[labels]
    return cross_entropy(logits.scatter_add(1, labels[:, None], -lowered[:, None]), labels)
