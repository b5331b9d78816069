"""A large batch compared with itself.

The similarities are symmetric: only the tiles on and above the diagonal are computed, and computed again in the backward pass.
So they stay in the cache, and memory grows linearly with the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from cibl_ray.losses.pairs.softmax import BITS, PairWeights, agreeing

# Up to so many pairs are taken at once; beyond, TILE x TILE at a time.
AT_ONCE = {"cpu": 2**20, "cuda": 2**24}
TILE = {"cpu": 512, "cuda": 4096}


def fits_at_once(z: torch.Tensor) -> bool:
    """Whether all pairs of z (M, d) are few enough to be held."""
    return len(z) ** 2 <= AT_ONCE["cuda" if z.is_cuda else "cpu"]


def tiled_log_sum_exp(
    z: torch.Tensor, labels: torch.Tensor, temperature: float, weights: PairWeights | None = None
) -> torch.Tensor:
    """Compute log Σ_{a≠m} w_ma·exp(z_m·z_a/τ), (M,), in tiles.

    Args:
        z: float32 or float64 (M, d), of unit norm.
        labels: int64 (M,).
        temperature: τ, where `no_shift_needed`.
        weights: What each pair counts; None: 1. Their labels and other labels are `labels`.
    """
    result: torch.Tensor = _Tiled.apply(z, labels, temperature, weights, TILE["cuda" if z.is_cuda else "cpu"])
    return result if weights is None else result - weights.weight.log()


class _Tiled(torch.autograd.Function):
    """With E = w·exp(s) without its diagonal and its row sums R: u = g/(R·τ), dl/dz_m = Σ_k E_mk·(u_m + u_k)·z_k."""

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


def _weigh(block: torch.Tensor, same: torch.Tensor, weights: PairWeights, rows: slice, columns: slice) -> None:
    """Multiply by w_m·w_mk, which is symmetric as the similarities are, so that the rest need not know of weights.

    The factor w_m of a row's sum is taken from its logarithm.
    """
    weight = weights.weight
    block.mul_(torch.outer(weight[rows], weight[columns]).addcmul_(same, (weight[rows] * weights.more[rows])[:, None]))
