"""Anchors compared with a contrast set: the sums of the contrastive losses, by the way that fits the set's size."""

from __future__ import annotations

import torch

from cibl_ray.losses.inputs import ContrastSet
from cibl_ray.losses.pairs.positives import positive_sums
from cibl_ray.losses.pairs.self_pairs import fits_at_once, tiled_log_sum_exp
from cibl_ray.losses.pairs.softmax import PairWeights, log_sum_exp, no_shift_needed
from cibl_ray.networks.precision import at_least_float32


def pair_sums(
    z: torch.Tensor,
    labels: torch.Tensor,
    contrast: ContrastSet,
    classes: int,
    temperature: float,
    weights: PairWeights | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two sums over pairs that every contrastive loss is made of, in at least float32.

    Args:
        z: The anchors' embeddings of unit norm, (M, d).
        labels: int64 (M,).
        contrast: What the anchors are compared with.
        classes: C.
        temperature: τ.
        weights: w, what each pair counts in the first sum; None: 1.

    Returns:
        log Σ_{a≠m} w_ma·exp(z_m·z_a/τ) over the contrast set, and Σ_{p∈P(m)} z_m·z_p/τ, (M,) each.
    """
    anchors = at_least_float32(z)
    itself = contrast.embeddings is z
    others = anchors if itself else at_least_float32(contrast.embeddings)
    positives = positive_sums(anchors, labels, others, contrast.labels, contrast.start, classes) / temperature
    if itself and not fits_at_once(anchors) and no_shift_needed(temperature):
        return tiled_log_sum_exp(anchors, labels, temperature, weights), positives
    return log_sum_exp(anchors, others, temperature, contrast.rows_of(anchors), weights), positives
