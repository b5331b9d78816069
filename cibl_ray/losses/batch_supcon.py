"""The supervised contrastive loss of a batch against itself, as most training steps compute it, in one step of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from cibl_ray.losses.attraction import class_sizes, group_sums, grouped
from cibl_ray.losses.softmax import BITS, kept, matmul, one_shift_serves


def fits(z: torch.Tensor, temperature: float) -> bool:
    """Whether `batch_supcon` can be used: z (M, d) is no lone row, its similarities are kept, one shift serves all rows."""
    return len(z) > 1 and kept(z, z) and one_shift_serves(temperature)


def batch_supcon(z: torch.Tensor, labels: torch.Tensor, classes: int, temperature: float) -> torch.Tensor:
    """`contrastive.supcon`, (M,), of z (M, d), float32 or float64 of unit norm, where its contrast set is z itself."""
    result: torch.Tensor = _BatchSupCon.apply(z, labels, classes, temperature)
    return result


class _BatchSupCon(torch.autograd.Function):
    """Numerator and denominator as in `attraction` and `softmax`, without what autograd does between them.

    With E = exp(s - 1/τ) without its diagonal, its row sums R, the sum S of each class, u = g/(R·τ), a = g/(|P|·τ) and T the
    sums of a·z:  l = 1/τ + log R - z·(S_y - z)/(|P|·τ),  dl/dz = ((u_m + u_k)·E_mk)·z - a·(S_y - z) - (T_y - a·z).
    """

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, labels: torch.Tensor, classes: int, temperature: float) -> torch.Tensor:
        members = class_sizes(labels, classes)
        groups = grouped(labels, members)
        positives = members.index_select(0, labels) - 1
        alone = positives == 0
        per_positive = 1 / (positives.clamp(min=1).to(z.dtype) * temperature)
        with torch.autocast(z.device.type, enabled=False):
            block = matmul(z * (BITS / temperature), z.T, -BITS / temperature)
        sums = block.fill_diagonal_(float("-inf")).exp2_().sum(1)
        rest = group_sums(z, *groups).index_select(0, labels).sub_(z)
        ctx.temperature = temperature
        ctx.save_for_backward(z, labels, *groups, alone, per_positive, block, sums, rest)
        repulsion = sums.log().add_(1 / temperature)
        return repulsion.addcmul_((z * rest).sum(1), per_positive, value=-1).masked_fill_(alone, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        z, labels, order, first, alone, per_positive, block, sums, rest = ctx.saved_tensors
        grad = grad.masked_fill(alone, 0.0)
        pushed = (grad / (sums * ctx.temperature))[:, None]
        with torch.autocast(z.device.type, enabled=False):
            result = matmul((pushed + pushed.T).mul_(block), z)
        pull = (grad * per_positive)[:, None]
        pulled = pull * z
        result.sub_(group_sums(pulled, order, first).index_select(0, labels))
        return result.addcmul_(pull, rest, value=-1).add_(pulled), None, None, None
