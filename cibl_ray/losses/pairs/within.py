"""A batch compared with itself: what every contrastive loss sums over pairs, and the gradient, in few passes.

The similarities are symmetric. A small batch takes all pairs at once; of a large one only the tiles on and above the diagonal
are computed, on the way back once more, so that they stay in the cache and memory does not grow with the square.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from cibl_ray.losses.pairs.attraction import positive_sums
from cibl_ray.losses.pairs.softmax import BITS, PairWeights, agreeing, no_shift_needed

# Up to so many pairs are taken at once, and two matrices of them kept; beyond, TILE x TILE at a time.
AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
TILE = {"cpu": 512, "cuda": 4096}


def fits(z: torch.Tensor, temperature: float) -> bool:
    """Whether `pairs_within` can be used: z (M, d) is no lone row, and no exponential leaves the range of numbers."""
    return len(z) > 1 and no_shift_needed(temperature)


def few(z: torch.Tensor) -> bool:
    """Whether all pairs of z (M, d) are taken at once."""
    return len(z) ** 2 <= AT_ONCE["cuda" if z.is_cuda else "cpu"]


def pairs_within(
    z: torch.Tensor, labels: torch.Tensor, classes: int, temperature: float, weights: PairWeights | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """log Σ_{a≠m} w_ma·exp(z_m·z_a/τ) and Σ_{p∈P(m)} z_m·z_p/τ, (M,) each, of z (M, d), float32 or float64 of unit norm.

    w is 1 where `weights` are None; its labels and other labels are `labels`.
    """
    if few(z):
        normalizer, attraction = _AtOnce.apply(z, labels, temperature, weights)
    else:
        normalizer = _Tiled.apply(z, labels, temperature, weights, TILE["cuda" if z.is_cuda else "cpu"])
        attraction = positive_sums(z, labels, z, labels, 0, classes) / temperature
    return normalizer if weights is None else normalizer - weights.weight.log(), attraction


def supcon_within(z: torch.Tensor, labels: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of z (M, d), where `few` enough: log Σ_{a≠m} exp(z_m·z_a/τ) - 1/|P(m)|·Σ_{p∈P(m)} z_m·z_p/τ, 0 where P(m) is empty, and
    |P(m)|, in z's type: (M,) each.

    What `pairs_within` and a few more operations give, as one operation: at that size the calls cost as much as the sums.
    """
    both: tuple[torch.Tensor, torch.Tensor] = _SupCon.apply(z, labels, temperature)
    return both


def _weigh(block: torch.Tensor, same: torch.Tensor, weights: PairWeights, rows: slice, columns: slice) -> None:
    """Multiply by w_m·w_mk, which is symmetric as the similarities are, so that the rest need not know of weights: the factor
    w_m of a row's sum is taken from its logarithm."""
    weight = weights.weight
    block.mul_(torch.outer(weight[rows], weight[columns]).addcmul_(same, (weight[rows] * weights.more[rows])[:, None]))


def _exponentials(z: torch.Tensor, labels: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of all pairs [same class], (M, M), without its diagonal; BITS·Σ_{p∈P(m)} z_m·z_p/τ, (M,); and E, without its diagonal."""
    same = agreeing(labels, labels, z.dtype).fill_diagonal_(0)
    with torch.autocast(z.device.type, enabled=False):
        block = z * (BITS / temperature) @ z.T
    attraction = (block * same).sum(1)
    return same, attraction, block.fill_diagonal_(float("-inf")).exp2_()


def _way_back(
    z: torch.Tensor, same: torch.Tensor, block: torch.Tensor, pushed: torch.Tensor, pull: torch.Tensor
) -> torch.Tensor:
    """(E_mk·(u_m + u_k) + [same class]·(h_m + h_k))·z, of u = `pushed` and h = `pull`, (M,)."""
    both = (pushed[:, None] + pushed).mul_(block).addcmul_(same, pull[:, None] + pull)
    with torch.autocast(z.device.type, enabled=False):
        return both @ z


class _AtOnce(torch.autograd.Function):
    """With E = w·exp(s) without its diagonal, R its row sums, g and h the outputs' gradients: dl/dz is `_way_back` of
    u = g/(R·τ) and h/τ."""

    @staticmethod
    def forward(
        ctx: Any, z: torch.Tensor, labels: torch.Tensor, temperature: float, weights: PairWeights | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        same, attraction, block = _exponentials(z, labels, temperature)
        if weights is not None:
            _weigh(block, same, weights, slice(None), slice(None))
        sums = block.sum(1)
        ctx.temperature = temperature
        ctx.save_for_backward(z, same, block, sums)
        return sums.log(), attraction.div_(BITS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, pull: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, same, block, sums = ctx.saved_tensors
        return _way_back(z, same, block, grad / (sums * ctx.temperature), pull / ctx.temperature), None, None, None


class _SupCon(torch.autograd.Function):
    """As `_AtOnce`, with g for both outputs: where P(m) is not empty, h = -g/|P|; where it is, neither counts."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, labels: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        same, attraction, block = _exponentials(z, labels, temperature)
        sums, positives = block.sum(1), same.sum(1)
        has, share = positives.sign(), positives.clamp(min=1).reciprocal_()
        ctx.temperature = temperature
        ctx.save_for_backward(z, same, block, sums, has, share)
        ctx.mark_non_differentiable(positives)
        return sums.log2().addcmul_(attraction, share, value=-1).mul_(has).div_(BITS), positives

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, same, block, sums, has, share = ctx.saved_tensors
        grad = (grad * has).div_(ctx.temperature)
        return _way_back(z, same, block, grad / sums, share.mul(grad).neg_()), None, None


class _Tiled(torch.autograd.Function):
    """`_AtOnce` without the attraction, which needs no pairs."""

    @staticmethod
    def forward(
        ctx: Any, z: torch.Tensor, labels: torch.Tensor, temperature: float, weights: PairWeights | None, size: int
    ) -> torch.Tensor:
        ctx.temperature, ctx.weights = temperature, weights
        ctx.bands = [slice(start, min(start + size, len(z))) for start in range(0, len(z), size)]
        sums = z.new_zeros(len(z))
        with torch.autocast(z.device.type, enabled=False):
            for rows, columns, tile in _tiles(ctx, z, labels):
                sums[rows] += tile.sum(1)
                if rows != columns:
                    sums[columns] += tile.sum(0)
        ctx.save_for_backward(z, labels, sums)
        return sums.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, labels, sums = ctx.saved_tensors
        pushed, result = grad / (sums * ctx.temperature), torch.zeros_like(z)
        with torch.autocast(z.device.type, enabled=False):
            for rows, columns, tile in _tiles(ctx, z, labels):
                tile.mul_(pushed[rows, None] + pushed[columns])
                result[rows] += tile @ z[columns]
                if rows != columns:
                    result[columns] += tile.T @ z[rows]
        return result, None, None, None, None


def _tiles(ctx: Any, z: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Rows, columns and w·exp(s) of each tile on and above the diagonal."""
    scaled = z * (BITS / ctx.temperature)
    for number, rows in enumerate(ctx.bands):
        for columns in ctx.bands[number:]:
            tile = scaled[rows] @ z[columns].T
            if rows == columns:
                tile.fill_diagonal_(float("-inf"))
            tile.exp2_()
            if ctx.weights is not None:
                _weigh(tile, agreeing(labels[rows], labels[columns], z.dtype), ctx.weights, rows, columns)
            yield rows, columns, tile
