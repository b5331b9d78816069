"""Supervised contrastive learning (Khosla et al. 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cibl_ray.losses import pairs
from cibl_ray.losses.base import LossNeeds, LossSettings, Temperature, weighted_sum
from cibl_ray.losses.cross_entropy import cross_entropy
from cibl_ray.losses.inputs import ClassPrior, ContrastSet, LossInputs, Terms

if TYPE_CHECKING:
    import torch


class SupConConfig(LossSettings):
    """Supervised contrastive learning alone; the classifier learns beside it, on features that its gradient does not reach."""

    kind: Literal["supcon"]
    temperature: Temperature = 0.1

    @property
    def needs(self) -> LossNeeds:
        """Embeddings to compare with each other; the classifier's gradient must not reach the backbone."""
        return LossNeeds(projection=True, contrast=True, detached_head=True)

    def terms(self, inputs: LossInputs, prior: ClassPrior, progress: float) -> Terms:
        """`supcon` plus the classifier's cross-entropy: the two terms teach different parameters."""
        z, contrast = inputs.contrasted()
        contrastive = supcon(z, inputs.labels, contrast, inputs.logits.shape[1], self.temperature).mean()
        return weighted_sum(1.0, contrastive, 1.0, cross_entropy(inputs.logits, inputs.labels).mean())


def supcon(z: torch.Tensor, labels: torch.Tensor, contrast: ContrastSet, classes: int, temperature: float) -> torch.Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, equation 2, L_out).

    l(m) = -1/|P(m)| · Σ_{p∈P(m)} log[ exp(z_m·z_p/τ) / Σ_{a≠m} exp(z_m·z_a/τ) ];  0 where P(m) is empty.

    Args:
        z: The anchors' embeddings of unit norm, (M, d).
        labels: int64 (M,).
        contrast: What the anchors are compared with.
        classes: C.
        temperature: τ.

    Returns:
        One value a sample, (M,).
    """
    return supcon_and_positives(z, labels, contrast, classes, temperature)[0]


def supcon_and_positives(
    z: torch.Tensor, labels: torch.Tensor, contrast: ContrastSet, classes: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `supcon`, and how many positives each anchor has.

    Args:
        z: Embeddings of unit norm, (M, d).
        labels: int64 (M,).
        contrast: The contrast set.
        classes: C.
        temperature: τ.

    Returns:
        `supcon`, (M,), and |P(m)| in its type, (M,).
    """
    log_sum, positive_sum = pairs.pair_sums(z, labels, contrast, classes, temperature)
    positives = pairs.positive_counts(labels, contrast.labels, classes).to(positive_sum.dtype)
    return (log_sum - positive_sum / positives.clamp(min=1)).masked_fill(positives == 0, 0.0), positives
