"""Class instance balanced loss: contrastive for classes common in the batch, cross-entropy for rare ones.

Lavoie & Waslander, "Class Instance Balanced Learning for Long-Tailed Classification", 2023. The paper's abstract states that
the two terms are weighted by how often a sample's class occurs in the batch; the exact weight below is our reading of it.
"""

from __future__ import annotations

import torch

from cibl_ray.losses.classification import cross_entropy
from cibl_ray.losses.contrastive import Contrast, positive_counts, supcon


def contrastive_weight(positives: torch.Tensor, tail_skew: float) -> torch.Tensor:
    """w_m = λ·|P(m)| / (1 + λ·|P(m)|), float64 (M,): 0 for λ = 0 or a class that comes once, towards 1 for common classes."""
    weighted = tail_skew * positives.double()
    return weighted / (1 + weighted)


def cibl(
    logits: torch.Tensor,
    z: torch.Tensor,
    labels: torch.Tensor,
    contrast: Contrast,
    tail_skew: float,
    temperature: float,
    classify_every: int = 1,
    normalize_over: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """loss = mean_m [ (1 - w_m)·CE_m ] + mean_m [ w_m·SupCon_m ].

    logits (M, C), where wanted with κ·log π added; z (M, d); labels int64 (M,). P(m), whose size decides w_m, counts the whole
    contrast set. `classify_every` = V takes the first mean over rows 0, V, 2V, ... alone: the first of V views.
    `normalize_over` (the labels of all workers' anchors) divides it by the mean of their 1 - w_m, so that λ decides which
    classes cross-entropy teaches and not how much of it there is: λ → ∞ is then cross-entropy with weights ∝ 1/|P| beside
    SupCon.

    Returns scalars: the loss, both terms unweighted, and the mean weight of cross-entropy. λ = 0 is `cross_entropy` to the bit.
    """
    positives = positive_counts(labels, contrast.labels, logits.shape[1])
    weight = contrastive_weight(positives, tail_skew).to(torch.promote_types(z.dtype, torch.float32))
    rest, chosen, chosen_labels = 1 - weight, logits, labels
    if classify_every > 1:  # a slice's way back is a copy of all logits, even where the slice is all of them
        rest, chosen, chosen_labels = (each[::classify_every] for each in (rest, logits, labels))
    classified = cross_entropy(chosen, chosen_labels)
    contrastive = supcon(z, labels, contrast, logits.shape[1], temperature)
    classification = (rest * classified).mean()
    if normalize_over is not None:
        counts = positive_counts(normalize_over, contrast.labels, logits.shape[1])
        classification = classification / (1 - contrastive_weight(counts, tail_skew)[::classify_every]).mean().to(rest.dtype)
    loss = classification + (weight * contrastive).mean()
    return {
        "loss": loss,
        "cross_entropy": classified.detach().mean(),
        "contrastive": contrastive.detach().mean(),
        "cross_entropy_weight": rest.mean(),
    }
