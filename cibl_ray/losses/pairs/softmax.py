"""Softmax over the similarities to any set of embeddings, in blocks that stay in the cache, and what all losses share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Up to so many similarities are kept for the backward pass. Beyond, they are computed again, BLOCK of them at a time, so that
# memory grows with the block and not with the square of the batch.
KEEP = {"cpu": 2**22, "cuda": 2**26}
BLOCK = {"cpu": 2**18, "cuda": 2**24}
# exp(x) = 2^(BITS·x): torch's exp2 takes a third of the time of its exp, which on a CPU is MKL's, written for another maker's.
BITS = math.log2(math.e)
# exp(HIGHEST), times a billion, is a normal float32, and so is exp(-HIGHEST).
HIGHEST = 40


def kept(z: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether the similarities of z (M, d) and others (A, d) are kept for the backward pass."""
    return len(z) * len(others) <= KEEP["cuda" if z.is_cuda else "cpu"]


def no_shift_needed(temperature: float) -> bool:
    """Whether exp(s/τ), and a sum of many, is a normal number for all similarities s of unit vectors."""
    return 1 / temperature < HIGHEST


@dataclass(frozen=True)
class PairWeights:
    """What each pair counts in a sum: column a counts weight[a], and `more`[m] more for anchor m where their labels agree.

    labels (M,), other_labels (A,), weight (A,), more (M,). Both depend on the label alone.
    """

    labels: torch.Tensor
    other_labels: torch.Tensor
    weight: torch.Tensor
    more: torch.Tensor

    def of(self, rows: slice) -> torch.Tensor:
        """w_ma of some rows, (R, A)."""
        agree = agreeing(self.labels[rows], self.other_labels, self.weight.dtype)
        return torch.addcmul(self.weight, agree, self.more[rows, None])


def agreeing(labels: torch.Tensor, others: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """1 where labels (M,) and others (A,) agree, else 0: (M, A). Labels are below 2**24, as many classes as no data set has."""
    # Compared as numbers of the result's type, on a CPU a sixteenth of the time of comparing integers and converting.
    numbers = labels.to(dtype)
    result = numbers.new_empty((len(labels), len(others)))
    return torch.eq(numbers[:, None], numbers if others is labels else others.to(dtype), out=result)


def log_sum_exp(
    z: torch.Tensor,
    others: torch.Tensor,
    temperature: float,
    exclude: torch.Tensor,
    weights: PairWeights | None = None,
) -> torch.Tensor:
    """Compute log Σ_a w_ma·exp(z_m·others_a/τ), differentiable in z and others.

    Args:
        z: Embeddings of norm 1, or about, float32 or float64 (M, d).
        others: What they are contrasted with, likewise, (A, d).
        temperature: τ.
        exclude: The column that does not count for each row, int64 (M,).
        weights: w; None: 1.

    Returns:
        (M,), in the type of z.
    """
    # torch.compile takes no tensor twice.
    result: torch.Tensor = _LogSumExp.apply(z, None if others is z else others, temperature, exclude, weights)
    return result


class _LogSumExp(torch.autograd.Function):
    """With E = w·exp(s - shift) and its row sums R: d/dz = g/(R·τ)·E·others, d/dothers = Eᵀ·(g/(R·τ)·z)."""

    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        others: torch.Tensor | None,
        temperature: float,
        exclude: torch.Tensor,
        weights: PairWeights | None,
    ) -> torch.Tensor:
        ctx.temperature, ctx.exclude, ctx.weights, ctx.itself = temperature, exclude, weights, others is None
        others = z if others is None else others
        ctx.blocks, held = row_blocks(z, others), []
        result = z.new_empty(len(z))
        for rows in ctx.blocks:
            block, shift = _exponentials(ctx, z, others, rows, None)
            result[rows] = (sums := block.sum(1)).log() + shift
            if kept(z, others):
                held = [block, sums]
        ctx.save_for_backward(z, others, result, *held)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, others, result, *held = ctx.saved_tensors
        grad = grad / ctx.temperature
        grad_z = torch.empty_like(z)
        grad_others = torch.zeros_like(others) if ctx.needs_input_grad[1] or ctx.itself else None
        for rows in ctx.blocks:
            if held:
                block, sums = held
                pushed = grad[rows] / sums.clamp(min=torch.finfo(sums.dtype).tiny)  # a lone row has nothing to sum
            else:
                (block, _), pushed = _exponentials(ctx, z, others, rows, result[rows]), grad[rows]
            with torch.autocast(z.device.type, enabled=False):
                grad_z[rows] = (block @ others).mul_(pushed[:, None])
                if grad_others is not None:
                    grad_others.add_(block.T @ (pushed[:, None] * z[rows]))
        if ctx.itself and grad_others is not None:
            grad_z, grad_others = grad_z + grad_others, None
        return grad_z, grad_others, None, None, None


def row_blocks(z: torch.Tensor, others: torch.Tensor) -> list[slice]:
    """All rows of z where their similarities to others are kept; else so many at a time that BLOCK similarities are held."""
    size = max(1, len(z)) if kept(z, others) else max(1, BLOCK["cuda" if z.is_cuda else "cpu"] // len(others))
    return [slice(start, min(start + size, len(z))) for start in range(0, max(1, len(z)), size)]


def _exponentials(
    ctx: Any, z: torch.Tensor, others: torch.Tensor, rows: slice, shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Compute w·exp(s - shift) of some rows, (R, A), and the shift.

    Unless it is given, the shift is 0 where no exponential of similarities of unit vectors leaves the range of normal numbers,
    else each row's largest, (R,).
    """
    with torch.autocast(z.device.type, enabled=False):
        block = z[rows] * (BITS / ctx.temperature) @ others.T
    block.scatter_(1, ctx.exclude[rows, None], float("-inf"))
    if shift is None and not no_shift_needed(ctx.temperature):
        shift = block.amax(1).clamp_(min=torch.finfo(block.dtype).min) / BITS  # a lone row has no largest
    if shift is not None:
        block.sub_((shift * BITS)[:, None])
    block.exp2_()
    if ctx.weights is not None:
        block.mul_(ctx.weights.of(rows))
    return block, 0.0 if shift is None else shift
