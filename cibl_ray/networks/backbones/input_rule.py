"""How a pretrained network was shown its images. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class InputRule:
    """How a pretrained network was shown its images.

    Attributes:
        size: Width and height of the input, pixels.
        ratio: `size` over the shorter side before the central square is taken.
        interpolation: Of that resize.
        mean: Of each channel, of pixels from 0 to 1.
        std: Likewise.
        fixed: Whether the network takes no other size.
    """

    size: int
    ratio: float
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fixed: bool = False
