"""Prototypical supervised contrastive learning (Wang et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cibl_ray.losses import pairs
from cibl_ray.losses.base import LossNeeds, LossSettings, Temperature, weighted_sum
from cibl_ray.losses.cross_entropy import cross_entropy
from cibl_ray.losses.inputs import ClassPrior, LossInputs, Terms
from cibl_ray.networks.precision import at_least_float32

if TYPE_CHECKING:
    import torch


class PSCConfig(LossSettings):
    """Prototypical supervised contrastive learning alone; the classifier learns beside it, as with supcon."""

    kind: Literal["psc"]
    temperature: Temperature = 0.1
    positive_in_denominator: bool = Field(
        default=False, description="Whether the denominator of the softmax has the own class's prototype."
    )

    @property
    def needs(self) -> LossNeeds:
        """Learned prototypes; the classifier's gradient must not reach the backbone."""
        return LossNeeds(projection=True, prototypes="learned", detached_head=True)

    def terms(self, inputs: LossInputs, prior: ClassPrior, progress: float) -> Terms:
        """`psc` plus the classifier's cross-entropy: the two terms teach different parameters."""
        z, prototypes = inputs.with_prototypes()
        contrastive = psc(z, inputs.labels, prototypes, self.temperature, self.positive_in_denominator).mean()
        return weighted_sum(1.0, contrastive, 1.0, cross_entropy(inputs.logits, inputs.labels).mean())


def psc(
    z: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor, temperature: float, positive_in_denominator: bool = False
) -> torch.Tensor:
    """Prototypical supervised contrastive loss (Wang et al. 2021, equation 7).

    l(m) = -log[ exp(z_m·p_y/τ) / Σ_{j≠y} exp(z_m·p_j/τ) ]. The paper leaves the positive out of the denominator, so the loss
    may be negative.

    Args:
        z: Embeddings of unit norm, (M, d).
        labels: int64 (M,).
        prototypes: p, of unit norm, (C, d).
        temperature: τ.
        positive_in_denominator: Let the sum run over all j.

    Returns:
        One value a sample, (M,).
    """
    z = at_least_float32(z)
    log_sum, own = pairs.prototype_pair_sums(
        z, labels, prototypes.to(z.dtype), temperature, exclude_own=not positive_in_denominator
    )
    return log_sum - own
