"""Class instance balanced loss: contrastive for classes common in the batch, cross-entropy for rare ones.

Lavoie & Waslander, "Class Instance Balanced Learning for Long-Tailed Classification", 2023. The paper's abstract states that
the two terms are weighted by how often a sample's class occurs in the batch; the exact weight below is our reading of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cibl_ray.losses.contrastive import positive_counts, supcon


def contrastive_weight(positives: torch.Tensor, tail_skew: float) -> torch.Tensor:
    """w_m = λ·|P(m)| / (1 + λ·|P(m)|), float32 (M,): 0 for λ = 0 or a class that comes once, towards 1 for common classes."""
    weighted = tail_skew * positives.float()
    return weighted / (1 + weighted)


def cibl(
    logits: torch.Tensor, z: torch.Tensor, labels: torch.Tensor, tail_skew: float, temperature: float
) -> dict[str, torch.Tensor]:
    """loss = mean_m [ (1 - w_m)·CE_m + w_m·SupCon_m ]; logits (M, C), z (M, d) of unit norm, labels int64 (M,).

    Returns scalars: the loss, both terms unweighted, and the mean weight of cross-entropy. λ = 0 is cross-entropy to the bit.
    """
    classes = logits.shape[1]
    weight = contrastive_weight(positive_counts(labels, classes), tail_skew)
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    contrastive = supcon(z, labels, classes, temperature)
    loss = ((1 - weight) * cross_entropy + weight * contrastive).mean()
    return {
        "loss": loss,
        "cross_entropy": cross_entropy.detach().mean(),
        "contrastive": contrastive.detach().mean(),
        "cross_entropy_weight": (1 - weight).mean(),
    }
