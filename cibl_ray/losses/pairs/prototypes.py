"""A batch compared with one prototype a class: the sums of the contrastive losses over pairs, and the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from cibl_ray.losses.pairs.softmax import BITS, PairWeights, kept, no_shift_needed, row_blocks


def prototype_pair_sums(
    z: torch.Tensor,
    labels: torch.Tensor,
    prototypes: torch.Tensor,
    temperature: float,
    weights: PairWeights | None = None,
    exclude_own: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two sums of anchors compared with one prototype a class.

    Args:
        z: float32 or float64 (M, d), of unit norm.
        labels: int64 (M,).
        prototypes: p, of unit norm, (C, d).
        temperature: τ.
        weights: w, what each pair counts in the first sum; None: 1. Their labels are `labels`, their other labels the classes.
        exclude_own: The anchor's own class c = y does not count in the first sum.

    Returns:
        log Σ_c w_mc·exp(z_m·p_c/τ) and z_m·p_y/τ, (M,) each.
    """
    both: tuple[torch.Tensor, torch.Tensor] = _PrototypePairs.apply(z, labels, prototypes, temperature, weights, exclude_own)
    return both


class _PrototypePairs(torch.autograd.Function):
    """The sums over prototypes, with their gradients.

    With E = w·exp(s - shift), R its row sums, u = g/(R·τ) and h the other output's gradient, G = u·E + [c = y]·h/τ:
    dl/dz = G·p, dl/dp = Gᵀ·z.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        labels: torch.Tensor,
        prototypes: torch.Tensor,
        temperature: float,
        weights: PairWeights | None,
        exclude_own: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.temperature, ctx.weights, ctx.exclude_own = temperature, weights, exclude_own
        ctx.blocks, held = row_blocks(z, prototypes), []
        parts = []
        for rows in ctx.blocks:
            block, attraction, shift = _exponentials(ctx, z, labels, prototypes, rows)
            sums = block.sum(1)
            parts.append((sums.log2() if shift is None else sums.log2().add_(shift), attraction, sums))
            if kept(z, prototypes):
                held = [block]
        normalizer, attraction, sums = parts[0] if len(parts) == 1 else (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(z, labels, prototypes, sums, *held)
        return normalizer / BITS, attraction / BITS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, pull: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, labels, prototypes, sums, *held = ctx.saved_tensors
        pushed, pull = (grad / (sums * ctx.temperature))[:, None], (pull / ctx.temperature)[:, None]
        parts, grad_prototypes = [], None
        with torch.autocast(z.device.type, enabled=False):
            for rows in ctx.blocks:
                block = held[0] if held else _exponentials(ctx, z, labels, prototypes, rows)[0]
                block = block * pushed[rows]
                block.scatter_add_(1, labels[rows, None], pull[rows])
                parts.append(block @ prototypes)
                part = block.T @ z[rows]
                grad_prototypes = part if grad_prototypes is None else grad_prototypes.add_(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts), None, grad_prototypes, None, None, None


def _exponentials(
    ctx: Any, z: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor, rows: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of some rows w·2^(s - shift), (R, C), s_y, and the shift, (R,), None for 0; s in bits."""
    own = labels[rows, None]
    with torch.autocast(z.device.type, enabled=False):
        block = z[rows] * (BITS / ctx.temperature) @ prototypes.T
    attraction, shift = block.gather(1, own).squeeze(1), None
    if ctx.exclude_own:
        block.scatter_(1, own, float("-inf"))
    if not no_shift_needed(ctx.temperature):
        shift = block.amax(1)
        block.sub_(shift[:, None])
    block.exp2_()
    if ctx.weights is not None:
        more = block.gather(1, own) * ctx.weights.more[rows, None]
        block.mul_(ctx.weights.weight).scatter_add_(1, own, more)
    return block, attraction, shift
