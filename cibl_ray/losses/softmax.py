"""The denominator of every contrastive loss, with its gradient, in blocks that stay in the cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Up to so many similarities are kept for the backward pass. Beyond, they are computed again, BLOCK of them at a time, so that
# memory grows with the block and not with the square of the batch.
KEEP = {"cpu": 2**22, "cuda": 2**26}
BLOCK = {"cpu": 2**18, "cuda": 2**24}
# exp(x) = 2^(BITS·x): torch's exp2 takes a third of the time of its exp, which on a CPU is MKL's, written for another maker's.
BITS = math.log2(math.e)
# exp(-LOWEST) is a normal float32. Similarities of unit vectors span 2/τ.
LOWEST = 80


def kept(z: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether the similarities of z (M, d) and others (A, d) are kept for the backward pass."""
    return len(z) * len(others) <= KEEP["cuda" if z.is_cuda else "cpu"]


def one_shift_serves(temperature: float) -> bool:
    """Whether exp(s - 1/τ) is a normal number for all similarities s of unit vectors."""
    return 2 / temperature < LOWEST


OwnClass = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def wide(x: torch.Tensor) -> torch.Tensor:
    """At least float32: half precision has too few digits for sums of exponentials."""
    return x if x.dtype == torch.float64 else x.float()


def log_sum_exp(
    z: torch.Tensor,
    others: torch.Tensor,
    temperature: float,
    exclude: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    own_class: OwnClass | None = None,
) -> torch.Tensor:
    """log Σ_a w_ma·exp(z_m·others_a/τ), (M,), differentiable in z (M, d) and others (A, d), which are float32 or float64.

    Rows of z and others have norm 1, or about. If others is z itself, exclude can only be each row's own column.
    exclude: int64 (M,), the column that does not count for each row. weight: (A,), w_ma of each column; 1 where None.
    own_class: (labels (M,), other labels (A,), weight (M,)), the weight instead where the two labels agree.
    """
    # Compared with themselves, the anchors' two gradients are one product with E + Eᵀ.
    result: torch.Tensor = _LogSumExp.apply(
        z, others.detach() if others is z else others, temperature, exclude, weight, own_class, others is z
    )
    return result


class _LogSumExp(torch.autograd.Function):
    """With E = w·exp(s - shift) and its row sums R: d/dz = g/(R·τ)·E·others, d/dothers = Eᵀ·(g/(R·τ)·z).

    If others is z and one shift serves all rows, E is symmetric: both together are ((u_m + u_k)·E_mk)·z with u = g/(R·τ).
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        others: torch.Tensor,
        temperature: float,
        exclude: torch.Tensor | None,
        weight: torch.Tensor | None,
        own_class: OwnClass | None,
        symmetric: bool,
    ) -> torch.Tensor:
        ctx.symmetric = symmetric
        ctx.temperature, ctx.exclude, ctx.weight, ctx.own_class = temperature, exclude, weight, own_class
        if kept(z, others):
            ctx.one_shift = symmetric and weight is None and own_class is None and one_shift_serves(temperature)
            block, shift = _exponentials(ctx, z, others, slice(None), None)
            sums = block.sum(1)
            result = shift + sums.log()
            ctx.save_for_backward(z, others, block, sums)
            return result
        ctx.rows = max(1, BLOCK["cuda" if z.is_cuda else "cpu"] // len(others))
        result = z.new_empty(len(z))
        for rows in _blocks(len(z), ctx.rows):
            block, shift = _exponentials(ctx, z, others, rows, None)
            result[rows] = shift + block.sum(1).log()
        ctx.save_for_backward(z, others, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, others, *rest = ctx.saved_tensors
        grad = grad / ctx.temperature
        wants_others = ctx.needs_input_grad[1] or ctx.symmetric
        with torch.autocast(z.device.type, enabled=False):
            if len(rest) == 2:
                block, sums = rest
                grad = (grad / sums.clamp(min=torch.finfo(sums.dtype).tiny))[:, None]  # a lone row has nothing to sum
                if ctx.one_shift:
                    return matmul((grad + grad.T).mul_(block), others), None, None, None, None, None, None
                grad_z = matmul(block, others).mul_(grad)
                grad_others = matmul((grad * z).T.contiguous(), block).T if wants_others else None
            else:
                (result,) = rest
                grad_z = torch.empty_like(z)
                grad_others = torch.zeros_like(others) if wants_others else None
                for rows in _blocks(len(z), ctx.rows):
                    block, _ = _exponentials(ctx, z, others, rows, result[rows])
                    grad_rows = grad[rows, None]
                    grad_z[rows] = matmul(block, others).mul_(grad_rows)
                    if grad_others is not None:
                        grad_others.add_(matmul((grad_rows * z[rows]).T.contiguous(), block).T)
        if ctx.symmetric and grad_others is not None:
            grad_z, grad_others = grad_z + grad_others, None
        return grad_z, grad_others, None, None, None, None, None


_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def matmul(x: torch.Tensor, y: torch.Tensor, plus: float = 0.0) -> torch.Tensor:
    """x (M, K) @ y (K, N) + plus. For float32 on a CPU by oneDNN, which on AMD is twice as fast as the MKL that torch takes."""
    if _ONEDNN and x.dtype == torch.float32 and not x.is_cuda:
        bias = x.new_full((y.shape[1],), plus) if plus else None
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, y.T, bias, "none", [], "")
        return product
    return (x @ y).add_(plus) if plus else x @ y


def _blocks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _exponentials(
    ctx: Any, z: torch.Tensor, others: torch.Tensor, rows: slice, shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """w·exp(s - shift) of some rows, (R, A), and the shift (R,): 1/τ, the largest that similarities of unit vectors can be, or
    the row's largest where exp(-2/τ) would be no normal number; unless given."""
    scale = BITS / ctx.temperature
    one_shift = shift is None and one_shift_serves(ctx.temperature)
    with torch.autocast(z.device.type, enabled=False):
        block = matmul(z[rows] * scale, others.T, -scale if one_shift else 0.0)
    if ctx.exclude is not None:
        block.scatter_(1, ctx.exclude[rows, None], float("-inf"))
    if one_shift:
        shift = z.new_full((len(block),), 1 / ctx.temperature)
    else:
        shift = block.amax(1) / BITS if shift is None else shift
        block.sub_((shift * BITS)[:, None])
    block.exp2_()
    if ctx.own_class is not None:
        _weigh(block, ctx.weight, ctx.own_class, rows)
    elif ctx.weight is not None:
        block.mul_(ctx.weight)
    return block, shift


def _weigh(block: torch.Tensor, weight: torch.Tensor, own_class: OwnClass, rows: slice) -> None:
    """Multiply each column by its weight, or by the row's where their labels agree."""
    labels, other_labels, own_weight = own_class
    weigh = _weigh_all if block.is_cuda else _weigh_agreeing
    weigh(block, weight, labels[rows], other_labels, own_weight[rows])


def _weigh_all(
    block: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, other_labels: torch.Tensor, own_weight: torch.Tensor
) -> None:
    """In one pass over all pairs, which waits for no count."""
    block.mul_(torch.where(labels[:, None] == other_labels, own_weight[:, None], weight))


def _weigh_agreeing(
    block: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, other_labels: torch.Tensor, own_weight: torch.Tensor
) -> None:
    """Under a long tail few pairs agree: they are named one by one instead of comparing all."""
    block.mul_(weight)
    members = torch.bincount(other_labels, minlength=int(labels.max()) + 1)
    by_class, first = other_labels.argsort(), members.cumsum(0) - members
    count = members[labels]
    row = torch.repeat_interleave(torch.arange(len(labels)), count)
    place = torch.arange(len(row)) - torch.repeat_interleave(count.cumsum(0) - count, count)
    column = by_class[first[labels[row]] + place]
    block.view(-1)[row * block.shape[1] + column] *= own_weight[row] / weight[column]


def row_exponents(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits f (M, C): BITS·(f - shift), a new tensor, and the shift (M,), each row's largest."""
    shift = logits.amax(1)
    return torch.add((-BITS * shift)[:, None], logits, alpha=BITS), shift


def row_log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """log Σ_c exp(f_mc), (M,), of logits (M, C): torch's logsumexp with the exponentials computed once."""
    result: torch.Tensor = _RowLogSumExp.apply(logits)
    return result


class _RowLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        exponents, shift = row_exponents(logits)
        sums = (exponentials := exponents.exp2_()).sum(1)
        ctx.save_for_backward(exponentials, sums)
        return shift + sums.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        exponentials, sums = ctx.saved_tensors
        gradient: torch.Tensor = exponentials * (grad / sums)[:, None]
        return gradient
