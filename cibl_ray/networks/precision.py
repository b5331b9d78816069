"""Where numbers need more digits than mixed precision gives them."""

from __future__ import annotations

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in at least float32: half precision has too few digits for norms and sums of exponentials."""
    return x if x.dtype == torch.float64 else x.float()
