"""Class instance balanced loss: contrastive for classes common in the batch, cross-entropy for rare ones.

Lavoie & Waslander, "Class Instance Balanced Learning for Long-Tailed Classification", 2023. The paper's abstract states that
the two terms are weighted by how often a sample's class occurs in the batch; the exact weight below is our reading of it.
"""

from __future__ import annotations

from typing import Literal

import torch

from cibl_ray.losses.classification import cross_entropy
from cibl_ray.losses.contrastive import Contrast, positive_counts, supcon_and_positives
from cibl_ray.losses.pairs.attraction import class_sizes

Normalization = Literal["none", "batch", "class"]


def term_weights(positives: torch.Tensor, tail_skew: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(w, 1 - w) with w_m = λ·|P(m)| / (1 + λ·|P(m)|), (M,), of counts as floats: w is 0 for λ = 0 or a class that comes once,
    towards 1 for common classes. 1 - w is computed by itself, which keeps its digits for large λ."""
    weighted = tail_skew * positives
    rest = (1 + weighted).reciprocal_()
    return weighted * rest, rest


def class_shares(labels: torch.Tensor, everyone: torch.Tensor, classes: int) -> torch.Tensor:
    """What makes a mean over all anchors (their labels: `everyone`) one over the classes among them of each class's mean:
    M / (K·n_y), float64, of mean 1; K classes are present, n_y anchors are of class y."""
    sizes = class_sizes(everyone, classes)
    return len(everyone) / ((sizes > 0).sum() * sizes.index_select(0, labels)).double()


def cibl(
    logits: torch.Tensor,
    z: torch.Tensor,
    labels: torch.Tensor,
    contrast: Contrast,
    tail_skew: float,
    temperature: float,
    classify_every: int = 1,
    normalization: Normalization = "none",
    everyone: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """loss = mean_m [ (1 - w_m)·CE_m ] + mean_m [ w_m·SupCon_m ].

    logits (M, C), where wanted with κ·log π added; z (M, d); labels int64 (M,). P(m), whose size decides w_m, counts the whole
    contrast set. `classify_every` = V takes the first mean over rows 0, V, 2V, ... alone: the first of V views.
    `everyone`: the labels of all workers' anchors, where they are not `labels`.

    normalization, readings of what the abstract leaves open: 'batch' divides the first mean by the mean of 1 - w_m, so that λ
    decides which classes cross-entropy teaches and not how much of it there is: λ → ∞ is then cross-entropy with weights
    ∝ 1/|P| beside SupCon. 'class' takes both means within each class first, then over the classes of the batch (so λ = 0 is
    cross-entropy with each class of the batch weighing alike).

    Returns scalars: the loss, both terms unweighted, and the mean weight of cross-entropy. λ = 0 is `cross_entropy` to the bit.
    """
    contrastive, positives = supcon_and_positives(z, labels, contrast, logits.shape[1], temperature)
    weight, rest = term_weights(positives, tail_skew)
    everyone = labels if everyone is None else everyone
    if normalization == "class":
        shares = class_shares(labels, everyone, logits.shape[1]).to(weight.dtype)
        weight, rest = weight * shares, rest * shares
    chosen, chosen_labels = logits, labels
    if classify_every > 1:  # a slice's way back is a copy of all logits, even where the slice is all of them
        rest, chosen, chosen_labels = (each[::classify_every] for each in (rest, logits, labels))
    classified = cross_entropy(chosen, chosen_labels)
    classification = (rest * classified).mean()
    if normalization == "batch":
        counts = positive_counts(everyone, contrast.labels, logits.shape[1]).to(rest.dtype)
        classification = classification / term_weights(counts, tail_skew)[1][::classify_every].mean()
    loss = classification + torch.dot(weight, contrastive) / len(z)
    return {
        "loss": loss,
        "cross_entropy": classified.detach().mean(),
        "contrastive": contrastive.detach().mean(),
        "cross_entropy_weight": rest.mean(),
    }
