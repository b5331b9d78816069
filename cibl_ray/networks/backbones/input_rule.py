"""How images were prepared when a network was pretrained. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class InputRule:
    """How images were prepared when a network was pretrained.

    Attributes:
        size: Width and height of the input, pixels.
        ratio: `size` over the shorter side before the central square is taken.
        interpolation: Of that resize.
        mean: Mean of each channel, for pixels from 0 to 1.
        std: Standard deviation of each channel, likewise.
        fixed: Whether the network takes this size only.
    """

    size: int
    ratio: float
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fixed: bool = False
