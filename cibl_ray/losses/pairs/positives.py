"""Sums over the positives of any set of embeddings, with their gradient, without a mask of all pairs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def class_counts(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """How often each class is in labels (N,): int64 (C,). Unlike torch.bincount, it never waits for the device."""
    return labels.new_zeros(classes).index_add_(0, labels, torch.ones_like(labels))


def positive_counts(labels: torch.Tensor, contrast_labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Count |P(m)|, the other members of m's class in the contrast set.

    Args:
        labels: Of the anchors, which are in the contrast set themselves, int64 (M,).
        contrast_labels: int64 (A,).
        classes: C.

    Returns:
        int64 (M,).
    """
    return class_counts(contrast_labels, classes).index_select(0, labels) - 1


def class_sums(x: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Σ of x (N, d) over the rows of each class: (C, d), 0 where a class has none. Deterministic on every device."""
    members = class_counts(labels, classes)
    # A third of index_add's time on a CPU, and in a fixed order on a GPU.
    return F.embedding_bag(labels.argsort(stable=True), x, members.cumsum(0) - members, mode="sum")


def positive_sums(
    z: torch.Tensor, labels: torch.Tensor, others: torch.Tensor, other_labels: torch.Tensor, start: int, classes: int
) -> torch.Tensor:
    """Compute Σ_{p∈P(m)} z_m·others_p, differentiable in z and others.

    Args:
        z: Embeddings of the anchors, (M, d).
        labels: int64 (M,).
        others: The contrast set, (A, d). Its rows start, start+1, ... are z.
        other_labels: int64 (A,).
        start: The row of the first anchor.
        classes: C.

    Returns:
        (M,).
    """
    # torch.compile takes no tensor twice.
    result: torch.Tensor = _PositiveSums.apply(
        z, None if others is z else others, labels, None if other_labels is labels else other_labels, start, classes
    )
    return result


class _PositiveSums(torch.autograd.Function):
    """Through the sum S of each class: z_m·(S_y - z_m). With T the sums of g·z: d/dz = g·(S_y - z), d/dothers = T_y - g·z."""

    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        others: torch.Tensor | None,
        labels: torch.Tensor,
        other_labels: torch.Tensor | None,
        start: int,
        classes: int,
    ) -> torch.Tensor:
        ctx.start, ctx.classes, ctx.itself = start, classes, others is None
        others = z if others is None else others
        other_labels = labels if other_labels is None else other_labels
        rest = class_sums(others, other_labels, classes).index_select(0, labels).sub_(others[start : start + len(z)])
        ctx.save_for_backward(z, rest, labels, other_labels)
        return (z * rest).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, rest, labels, other_labels = ctx.saved_tensors
        grad_z = grad[:, None] * rest
        grad_others = None
        if ctx.itself or ctx.needs_input_grad[1]:
            pulled = grad[:, None] * z
            grad_others = class_sums(pulled, labels, ctx.classes).index_select(0, other_labels)
            grad_others[ctx.start : ctx.start + len(z)] -= pulled
            if ctx.itself:
                grad_z, grad_others = grad_z.add_(grad_others), None
        return grad_z, grad_others, None, None, None, None
