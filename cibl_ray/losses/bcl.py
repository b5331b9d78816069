"""Balanced contrastive learning.

Zhu et al., "Balanced Contrastive Learning for Long-Tailed Visual Recognition", 2022.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cibl_ray.losses import pairs
from cibl_ray.losses.balanced_softmax import adjust_logits
from cibl_ray.losses.base import Kappa, LossNeeds, LossSettings, Temperature, weighted_sum
from cibl_ray.losses.cross_entropy import cross_entropy
from cibl_ray.losses.inputs import ClassPrior, ContrastSet, LossInputs, Terms
from cibl_ray.networks.heads.base import HeadSettings
from cibl_ray.networks.precision import at_least_float32

if TYPE_CHECKING:
    import torch


class BCLConfig(LossSettings):
    """Balanced contrastive learning beside logit-adjusted cross-entropy."""

    kind: Literal["bcl"]
    temperature: Temperature = 0.1
    kappa: Kappa = 1.0
    cross_entropy_weight: float = Field(default=2.0, ge=0, description="Weight of the cross-entropy term.")
    contrastive_weight: float = Field(default=0.6, ge=0, description="Weight of the contrastive term.")
    classify: Literal["all", "first"] = Field(default="all", description="Views that cross-entropy sees.")
    contrast_views: Literal["all", "others"] = Field(
        default="all", description="Views that are contrasted: all, or all but the first, as in the paper's three views."
    )

    def check(self, head: HeadSettings, views: int) -> None:
        """Refuse a contrast of the other views where there is none."""
        if self.contrast_views == "others" and views < 2:
            raise ValueError("loss.contrast_views 'others' leaves out the first view, and data.views has one; set it to all")

    def config_warnings(self, epochs: int, head: HeadSettings) -> list[str]:
        """A loss that is 0."""
        if self.cross_entropy_weight or self.contrastive_weight:
            return []
        return ["loss.cross_entropy_weight and loss.contrastive_weight are both 0: nothing is learned; set one of them"]

    @property
    def needs(self) -> LossNeeds:
        """Embeddings to compare with each other and with prototypes made of the classifier's weights."""
        return LossNeeds(projection=True, prototypes="projected", contrast=True)

    def terms(self, inputs: LossInputs, prior: ClassPrior, progress: float) -> Terms:
        """`balanced_contrastive` and logit-adjusted cross-entropy, each with its weight."""
        z, contrast = inputs.contrasted()
        contrasted = inputs.labels
        if self.contrast_views == "others":
            z, contrasted, contrast = inputs.contrasted_others()
        _, prototypes = inputs.with_prototypes()
        contrastive = balanced_contrastive(z, contrasted, contrast, prototypes, self.temperature).mean()
        logits, labels = inputs.logits, inputs.labels
        if self.classify == "first":
            logits, labels = logits[:: inputs.views], labels[:: inputs.views]
        classified = cross_entropy(adjust_logits(logits, prior.log_prior, self.kappa), labels).mean()
        return weighted_sum(self.contrastive_weight, contrastive, self.cross_entropy_weight, classified)


def balanced_contrastive(
    z: torch.Tensor, labels: torch.Tensor, contrast: ContrastSet, prototypes: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Balanced contrastive loss (Zhu et al. 2022, equation 7).

    Class complement: each class's prototype joins the contrast set, so that every class has a member and every anchor a
    positive. Class averaging: the denominator sums each class's mean. With A_c(m) the members of class c other than m,

        l(m) = -1/(|P(m)|+1) · Σ_{p∈P(m)∪{p_y}} log[ exp(z_m·p/τ) / Σ_c 1/(|A_c(m)|+1) · Σ_{a∈A_c(m)∪{p_c}} exp(z_m·a/τ) ].

    Args:
        z: The anchors' embeddings of unit norm, (M, d).
        labels: int64 (M,).
        contrast: What the anchors are compared with.
        prototypes: p, of unit norm, (C, d).
        temperature: τ.

    Returns:
        One value a sample, (M,).
    """
    import torch

    anchors = at_least_float32(z)
    prototypes = prototypes.to(anchors.dtype)
    classes = len(prototypes)
    members = pairs.class_counts(contrast.labels, classes) + 1  # with the prototype
    per_member, own_members = 1 / members.to(prototypes.dtype), members.index_select(0, labels)
    positives = (own_members - 1).to(prototypes.dtype)
    # A member of another class has the weight 1/|class|; one of the anchor's class, without the anchor, 1/(|P|+1).
    more = 1 / (positives * own_members)
    weights = pairs.PairWeights(labels, contrast.labels, per_member.index_select(0, contrast.labels), more)
    log_sum, positive_sum = pairs.pair_sums(z, labels, contrast, classes, temperature, weights)
    to_prototypes = pairs.PairWeights(labels, torch.arange(classes, device=labels.device), per_member, more)
    prototype_log_sum, own = pairs.prototype_pair_sums(anchors, labels, prototypes, temperature, to_prototypes)
    return torch.logaddexp(log_sum, prototype_log_sum) - (positive_sum + own) / positives
