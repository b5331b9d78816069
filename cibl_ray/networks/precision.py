"""Where numbers need more digits than mixed precision gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Give x in float32, or in float64 if it is that: half precision has too few digits for norms and sums of exponentials."""
    return x if x.element_size() >= 4 else x.float()
