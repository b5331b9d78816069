"""Contrastive losses on embeddings of unit norm: pure functions, one value a sample.

Every one takes the anchors, "my embeddings" z (M, d) with labels (M,), and the `Contrast` that they are compared with, "all
embeddings with labels": the batch itself, the batches of all workers, a queue.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cibl_ray.losses.pairs.attraction import class_sizes, positive_sums
from cibl_ray.losses.pairs.prototypes import prototype_pairs
from cibl_ray.losses.pairs.softmax import PairWeights, log_sum_exp, row_log_sum_exp
from cibl_ray.losses.pairs.within import few, fits, pairs_within, supcon_within
from cibl_ray.networks.precision import wide


@dataclass(frozen=True)
class Contrast:
    """embeddings (A, d) of unit norm, labels int64 (A,); the anchors themselves are rows own, own+1, ... of it."""

    embeddings: torch.Tensor
    labels: torch.Tensor
    own: int = 0

    def rows_of(self, anchors: torch.Tensor) -> torch.Tensor:
        """The anchors' own rows, int64 (M,)."""
        return torch.arange(self.own, self.own + len(anchors), device=anchors.device)


def positive_counts(labels: torch.Tensor, contrast_labels: torch.Tensor, classes: int) -> torch.Tensor:
    """|P(m)|, the other members of m's class in the contrast set: int64 (M,)."""
    return class_sizes(contrast_labels, classes).index_select(0, labels) - 1


def supcon(z: torch.Tensor, labels: torch.Tensor, contrast: Contrast, classes: int, temperature: float) -> torch.Tensor:
    """Supervised contrastive loss, (M,) (Khosla et al. 2020, equation 2, L_out).

    l(m) = -1/|P(m)| · Σ_{p∈P(m)} log[ exp(z_m·z_p/τ) / Σ_{a≠m} exp(z_m·z_a/τ) ];  0 where P(m) is empty.
    """
    return supcon_and_positives(z, labels, contrast, classes, temperature)[0]


def supcon_and_positives(
    z: torch.Tensor, labels: torch.Tensor, contrast: Contrast, classes: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`supcon`, and |P(m)| in its type, (M,)."""
    anchors = wide(z)
    if contrast.embeddings is z and few(anchors) and fits(anchors, temperature):
        return supcon_within(anchors, labels, temperature)
    normalizer, attraction = _pairs(z, labels, contrast, classes, temperature)
    positives = positive_counts(labels, contrast.labels, classes).to(attraction.dtype)
    return (normalizer - attraction / positives.clamp(min=1)).masked_fill(positives == 0, 0.0), positives


def psc(
    z: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor, temperature: float, positive_in_denominator: bool = False
) -> torch.Tensor:
    """Prototypical supervised contrastive loss, (M,) (Wang et al. 2021, equation 7); prototypes p (C, d) of unit norm.

    l(m) = -log[ exp(z_m·p_y/τ) / Σ_{j≠y} exp(z_m·p_j/τ) ]. The paper leaves the positive out of the denominator, so the loss
    may be negative; with `positive_in_denominator` the sum runs over all j.
    """
    z = wide(z)
    prototypes = prototypes.to(z.dtype)
    normalizer, attraction = prototype_pairs(z, labels, prototypes, temperature, exclude_own=not positive_in_denominator)
    return normalizer - attraction


def balanced_contrastive(
    z: torch.Tensor, labels: torch.Tensor, contrast: Contrast, prototypes: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Balanced contrastive loss, (M,) (Zhu et al. 2022, equation 7); prototypes p (C, d) of unit norm.

    Class complement: each class's prototype joins the contrast set, so that every class has a member and every anchor a
    positive. Class averaging: the denominator sums each class's mean. With A_c(m) the members of class c other than m,

        l(m) = -1/(|P(m)|+1) · Σ_{p∈P(m)∪{p_y}} log[ exp(z_m·p/τ) / Σ_c 1/(|A_c(m)|+1) · Σ_{a∈A_c(m)∪{p_c}} exp(z_m·a/τ) ].
    """
    anchors = wide(z)
    prototypes = prototypes.to(anchors.dtype)
    classes = len(prototypes)
    members = class_sizes(contrast.labels, classes) + 1  # with the prototype
    per_member, own_members = 1 / members.to(prototypes.dtype), members.index_select(0, labels)
    positives = (own_members - 1).to(prototypes.dtype)
    # A member of another class stands for 1/|class|; of the anchor's own class, without the anchor, 1/(|P|+1).
    more = 1 / (positives * own_members)
    everyone = per_member.index_select(0, contrast.labels)
    weights = PairWeights(labels, contrast.labels, everyone, more)
    normalizer, attraction = _pairs(z, labels, contrast, classes, temperature, weights)
    to_prototypes = PairWeights(labels, torch.arange(classes, device=labels.device), per_member, more)
    second, own = prototype_pairs(anchors, labels, prototypes, temperature, to_prototypes)
    return torch.logaddexp(normalizer, second) - (attraction + own) / positives


def paco(
    logits: torch.Tensor,
    z: torch.Tensor,
    labels: torch.Tensor,
    contrast: Contrast,
    temperature: float,
    alpha: float,
    beta: float,
    everyone: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Parametric contrastive loss (Cui et al. 2021, equation 4); logits f (M, C), where wanted with κ·log π added.

    The class centres and the embeddings share one softmax: with D = Σ_c exp(f_c) + Σ_{a≠m} exp(z_m·z_a/τ),

        l(m) = -[ β·log(exp(f_y)/D) + α·Σ_{p∈P(m)} log(exp(z_m·z_p/τ)/D) ] / (β + α·|P(m)|).

    Scalars: 'loss', the mean of l; detached 'center', the mean of -log(exp(f_y)/D), and 'contrastive', that of the positives'
    mean, over the anchors that have any. `everyone`: the labels of all workers' anchors, where they are not `labels`: in the
    last mean, how many have any is then this worker's part of all workers' number, so that parts add up to the whole batch's.
    """
    logits = wide(logits)
    classes = logits.shape[1]
    normalizer, attraction = _pairs(z, labels, contrast, classes, temperature)
    normalizer = torch.logaddexp(row_log_sum_exp(logits), normalizer)
    center = logits.gather(1, labels[:, None]).squeeze(1)
    count = positive_counts(labels, contrast.labels, classes).to(center.dtype)
    losses = normalizer - (beta * center + alpha * attraction) / (beta + alpha * count)
    with torch.no_grad():
        has = (count > 0).to(count.dtype)
        number = has.sum()
        if everyone is not None and everyone is not labels:
            all_have = (positive_counts(everyone, contrast.labels, classes) > 0).to(count.dtype)
            number = all_have.mean() * len(labels)
        contrasted = (has * (normalizer - attraction / count.clamp(min=1))).sum() / number.masked_fill(number == 0, 1)
        parts = {"center": (normalizer - center).mean(), "contrastive": contrasted}
    return {"loss": losses.mean()} | parts


def _pairs(
    z: torch.Tensor,
    labels: torch.Tensor,
    contrast: Contrast,
    classes: int,
    temperature: float,
    weights: PairWeights | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log Σ_{a≠m} w_ma·exp(z_m·z_a/τ) over the contrast set and Σ_{p∈P(m)} z_m·z_p/τ, (M,) each, in at least float32."""
    anchors = wide(z)
    # One tensor where the anchors are the whole set.
    others = anchors if contrast.embeddings is z else wide(contrast.embeddings)
    if others is anchors and fits(anchors, temperature):
        return pairs_within(anchors, labels, classes, temperature, weights)
    attraction = positive_sums(anchors, labels, others, contrast.labels, contrast.own, classes)
    return log_sum_exp(anchors, others, temperature, contrast.rows_of(anchors), weights), attraction / temperature
