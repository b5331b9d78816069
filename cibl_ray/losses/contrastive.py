"""Contrastive losses on embeddings of unit norm."""

from __future__ import annotations

import torch


def positive_counts(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """|P(m)|, the other members of m's class in the batch: int64 (M,)."""
    return torch.bincount(labels, minlength=classes)[labels] - 1


def supcon(z: torch.Tensor, labels: torch.Tensor, classes: int, temperature: float) -> torch.Tensor:
    """Supervised contrastive loss of each sample, float (M,) (Khosla et al. 2020, equation 2, L_out).

    l(m) = -1/|P(m)| · Σ_{p∈P(m)} log[ exp(z_m·z_p/τ) / Σ_{a≠m} exp(z_m·z_a/τ) ];  0 where P(m) is empty.
    z: (M, d) of unit norm, M >= 2; labels: int64 (M,) in [0, classes).

    The positives enter through their class's sum, z_m·(Σ_{a: y_a=y_m} z_a - z_m), so the similarity matrix is needed for the
    denominator alone and no M×M mask is built.
    """
    positives = positive_counts(labels, classes)
    sums = z.new_zeros(classes, z.shape[1]).index_add(0, labels, z)
    attraction = (z * (sums[labels] - z)).sum(1) / positives.clamp(min=1)
    similarity = z @ z.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), float("-inf"))
    loss = similarity.logsumexp(1) - attraction / temperature
    return torch.where(positives > 0, loss, torch.zeros_like(loss))
