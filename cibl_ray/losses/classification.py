"""Classification losses for long tails: pure functions, one value a sample."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from cibl_ray.losses.pairs.softmax import BITS, row_exponents
from cibl_ray.networks.precision import wide


def log_prior(train_counts: torch.Tensor) -> torch.Tensor:
    """log π_c, π_c = n_c / Σn: float64 (C,). A class without images counts as one image."""
    counts = train_counts.double().clamp(min=1)
    return (counts / counts.sum()).log()


def adjusted(logits: torch.Tensor, prior: torch.Tensor, kappa: float) -> torch.Tensor:
    """f + κ·log π (M, C) (Ren et al. 2020, equation 3; Menon et al. 2021, equation 10); κ = 0 is f itself, to the bit."""
    return wide(logits) + kappa * prior if kappa else wide(logits)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log softmax(f)_y, (M,): torch's cross_entropy without reduction, to rounding."""
    logits = wide(logits)
    if logits.is_cuda:
        return F.cross_entropy(logits, labels, reduction="none")
    result: torch.Tensor = _CrossEntropy.apply(logits, labels)
    return result


class _CrossEntropy(torch.autograd.Function):
    """For the CPU: the exponentials are computed once, where torch computes them again on the way back."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        exponents, _ = row_exponents(logits)
        own = exponents.gather(1, labels[:, None]).squeeze(1)
        sums = (exponentials := exponents.exp2_()).sum(1)
        ctx.save_for_backward(exponentials, sums, labels)
        return sums.log2().sub_(own).div_(BITS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        exponentials, sums, labels = ctx.saved_tensors
        result = exponentials * (grad / sums)[:, None]
        return result.scatter_add_(1, labels[:, None], -grad[:, None]), None


def ldam_margins(train_counts: torch.Tensor, max_margin: float) -> torch.Tensor:
    """Δ_c = K / n_c^¼, K such that the rarest class has `max_margin`: float64 (C,) (Cao et al. 2019, equation 12)."""
    margins = train_counts.double().clamp(min=1) ** -0.25
    return margins * (max_margin / margins.max())


def effective_number_weights(train_counts: torch.Tensor, beta: float) -> torch.Tensor:
    """(1-β)/(1-β^n_c), scaled to a mean of 1: float64 (C,) (Cui et al. 2019, equation 3)."""
    weights = (1 - beta) / (1 - beta ** train_counts.double().clamp(min=1))
    return weights * (len(weights) / weights.sum())


def ldam(logits: torch.Tensor, labels: torch.Tensor, margins: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Cross-entropy with the true class's logit lowered by its margin, (M,) (Cao et al. 2019, equation 13).

    logits: a cosine classifier's, s·cos (M, C); `scale` is its s, so that margins are in cosine.
    """
    logits = wide(logits)
    lowered = scale * margins.to(logits.dtype)[labels]
    return cross_entropy(logits.scatter_add(1, labels[:, None], -lowered[:, None]), labels)
