"""What is known of pretrained weights: how their images were prepared, where they come from. Imports no torch."""

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


@dataclass(frozen=True)
class Origin:
    """Where a network's pretrained weights come from.

    Attributes:
        network: The network's name.
        weights: The package, repository or file.
        licence: The licence of the weights, as their publisher names it; None where it is not known.
    """

    network: str
    weights: str
    licence: str | None
