"""Sharpness-aware minimisation: the gradient where the loss is highest nearby (Foret et al. 2021, arXiv:2010.01412)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def at_the_peak(parameters: Iterable[nn.Parameter], rho: float) -> Iterator[None]:
    """Move parameters by ρ·g/|g| along their gradient g, and back at the end. Their gradients are cleared in between.

    Args:
        parameters: Those of a network; without a gradient they stay.
        rho: ρ, the distance.
    """
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
    before = [parameter.detach().clone() for parameter in moved]
    with torch.no_grad():
        scale = rho / nn.utils.get_total_norm(gradients).clamp(min=1e-12)
        for parameter, gradient in zip(moved, gradients, strict=True):
            parameter.add_(gradient * scale.to(gradient.dtype))
            parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(moved, before, strict=True):
                parameter.copy_(value)
