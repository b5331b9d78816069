"""Contrastive losses on embeddings of unit norm: pure functions, one value a sample.

Every one takes the anchors, "my embeddings" z (M, d) with labels (M,), and the `Contrast` that they are compared with, "all
embeddings with labels": the batch itself, the batches of all workers, a queue.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cibl_ray.losses.attraction import class_sizes, own_products, positive_sums
from cibl_ray.losses.batch_supcon import batch_supcon, fits
from cibl_ray.losses.softmax import log_sum_exp, row_log_sum_exp, wide


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
    z, others = _widened(z, contrast)
    if others is z and fits(z, temperature):
        return batch_supcon(z, labels, classes, temperature)
    positives = positive_counts(labels, contrast.labels, classes)
    attraction = positive_sums(z, labels, others, contrast.labels, contrast.own, classes)
    attraction = attraction / (positives.clamp(min=1).to(z.dtype) * temperature)
    loss = log_sum_exp(z, others, temperature, exclude=contrast.rows_of(z)) - attraction
    return torch.where(positives > 0, loss, torch.zeros_like(loss))


def psc(
    z: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor, temperature: float, positive_in_denominator: bool = False
) -> torch.Tensor:
    """Prototypical supervised contrastive loss, (M,) (Wang et al. 2021, equation 7); prototypes p (C, d) of unit norm.

    l(m) = -log[ exp(z_m·p_y/τ) / Σ_{j≠y} exp(z_m·p_j/τ) ]. The paper leaves the positive out of the denominator, so the loss
    may be negative; with `positive_in_denominator` the sum runs over all j.
    """
    z, prototypes = wide(z), wide(prototypes)
    attraction = own_products(z, labels, prototypes) / temperature
    return log_sum_exp(z, prototypes, temperature, exclude=None if positive_in_denominator else labels) - attraction


def balanced_contrastive(
    z: torch.Tensor, labels: torch.Tensor, contrast: Contrast, prototypes: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Balanced contrastive loss, (M,) (Zhu et al. 2022, equation 7); prototypes p (C, d) of unit norm.

    Class complement: each class's prototype joins the contrast set, so that every class has a member and every anchor a
    positive. Class averaging: the denominator sums each class's mean. With A_c(m) the members of class c other than m,

        l(m) = -1/(|P(m)|+1) · Σ_{p∈P(m)∪{p_y}} log[ exp(z_m·p/τ) / Σ_c 1/(|A_c(m)|+1) · Σ_{a∈A_c(m)∪{p_c}} exp(z_m·a/τ) ].
    """
    z, prototypes = wide(z), wide(prototypes)
    classes = len(prototypes)
    others = torch.cat((wide(contrast.embeddings), prototypes))
    other_labels = torch.cat((contrast.labels, torch.arange(classes, device=labels.device)))
    with_prototypes = Contrast(others, other_labels, contrast.own)
    members = class_sizes(other_labels, classes)
    positives = members[labels] - 1
    attraction = positive_sums(z, labels, others, other_labels, contrast.own, classes) / (positives.to(z.dtype) * temperature)
    # A member of another class stands for 1/|class|; of the anchor's own class, without the anchor, 1/(|P|+1).
    normalizer = log_sum_exp(
        z, others, temperature, with_prototypes.rows_of(z), weight=1 / members[other_labels].to(z.dtype),
        own_class=(labels, other_labels, 1 / positives.to(z.dtype)),
    )  # fmt: skip
    return normalizer - attraction


def paco(
    logits: torch.Tensor,
    z: torch.Tensor,
    labels: torch.Tensor,
    contrast: Contrast,
    temperature: float,
    alpha: float,
    beta: float,
) -> dict[str, torch.Tensor]:
    """Parametric contrastive loss (Cui et al. 2021, equation 4); logits f (M, C), where wanted with κ·log π added.

    The class centres and the embeddings share one softmax: with D = Σ_c exp(f_c) + Σ_{a≠m} exp(z_m·z_a/τ),

        l(m) = -[ β·log(exp(f_y)/D) + α·Σ_{p∈P(m)} log(exp(z_m·z_p/τ)/D) ] / (β + α·|P(m)|).

    Scalars: 'loss', the mean of l; detached 'center', the mean of -log(exp(f_y)/D), and 'contrastive', that of the positives'
    mean, over the anchors that have any.
    """
    logits, (z, others) = wide(logits), _widened(z, contrast)
    classes = logits.shape[1]
    positives = positive_counts(labels, contrast.labels, classes)
    normalizer = torch.logaddexp(row_log_sum_exp(logits), log_sum_exp(z, others, temperature, exclude=contrast.rows_of(z)))
    attraction = positive_sums(z, labels, others, contrast.labels, contrast.own, classes) / temperature
    center, count = logits.gather(1, labels[:, None]).squeeze(1), positives.to(z.dtype)
    losses = normalizer - (beta * center + alpha * attraction) / (beta + alpha * count)
    with torch.no_grad():
        has = (count > 0).to(z.dtype)
        contrasted = (has * (normalizer - attraction / count.clamp(min=1))).sum() / has.sum().clamp(min=1)
        parts = {"center": (normalizer - center).mean(), "contrastive": contrasted}
    return {"loss": losses.mean()} | parts


def _widened(z: torch.Tensor, contrast: Contrast) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchors and contrast set in at least float32: one tensor where the anchors are the whole set."""
    anchors = wide(z)
    return anchors, anchors if contrast.embeddings is z else wide(contrast.embeddings)
