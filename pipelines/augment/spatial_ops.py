"""Operations on places, in batch: planes uint8 (B, 3, S, S), one float64 value a sample.

The definitions are those of torchvision.transforms.v2.functional on uint8 tensors.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from pipelines.augment.color_ops import per_sample, to_bytes
from pipelines.augment.draws import Op


def inverse_affine(op: np.ndarray, value: np.ndarray, size: int) -> np.ndarray:
    """Compute the matrices from an output pixel to the input's, both counted from the image's middle.

    Shears leave the top left corner where it is, rotations the middle.

    Args:
        op: The operation of each image, (B,).
        value: Its strength: pixels, degrees, or the shear's slope, (B,).
        size: Width and height of the images, pixels.

    Returns:
        float64 (B, 2, 3).
    """
    angle = np.where(op == Op.ROTATE, np.deg2rad(value), 0)
    across, down = (np.where(op == shear, value, 0) for shear in (Op.SHEAR_X, Op.SHEAR_Y))
    right, below = (np.where(op == move, value, 0) for move in (Op.TRANSLATE_X, Op.TRANSLATE_Y))
    rows = [np.cos(angle), across - np.sin(angle), across * size / 2 - right]
    rows += [down + np.sin(angle), np.cos(angle), down * size / 2 - below]
    return np.stack(rows, axis=1).reshape(-1, 2, 3)


def affine(planes: torch.Tensor, matrix: torch.Tensor, fill: tuple[int, int, int] = (0, 0, 0)) -> torch.Tensor:
    """Take each output pixel from its nearest input pixel.

    Args:
        planes: The images, (B, 3, S, S).
        matrix: As `inverse_affine` gives it, float32 (B, 2, 3).
        fill: The colour of pixels that lie outside of the input.

    Returns:
        Images of the same shape.
    """
    size = planes.shape[-1]
    # In torchvision's order of operations, scaled to -1..1 and back, so that ties fall the same way.
    scaled = (matrix / (0.5 * size)).view(-1, 6, 1, 1)
    x = torch.linspace((1 - size) * 0.5, (size - 1) * 0.5, size, device=planes.device)
    y = x.view(-1, 1)
    column = (((scaled[:, 0] * x + scaled[:, 1] * y + scaled[:, 2] + 1) * size - 1) / 2).round_()
    row = (((scaled[:, 3] * x + scaled[:, 4] * y + scaled[:, 5] + 1) * size - 1) / 2).round_()
    inside = (column.clamp(0, size - 1) == column) & (row.clamp(0, size - 1) == row)
    source = row.clamp_(0, size - 1).mul_(size).add_(column.clamp_(0, size - 1)).long()
    source = source.flatten(1).unsqueeze(1).expand(-1, 3, -1)
    moved = planes.flatten(2).gather(2, source).view_as(planes).mul_(inside.unsqueeze(1))
    return moved if not any(fill) else moved.add_(_colour(fill, planes) * ~inside.unsqueeze(1))


def _colour(fill: tuple[int, int, int], planes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(fill, dtype=torch.uint8, device=planes.device).view(1, 3, 1, 1)


def smooth_affine(
    planes: torch.Tensor, matrix: torch.Tensor, taps: torch.Tensor, fill: tuple[int, int, int] = (0, 0, 0)
) -> torch.Tensor:
    """Each output pixel read between input pixels, as Pillow's affine transform does.

    Args:
        planes: uint8 (B, 3, S, S).
        matrix: `inverse_affine`, float32 (B, 2, 3).
        taps: int8 (B,): 2 reads bilinearly, 4 bicubically (Keys 1981, a = -1). Beyond the border its pixels are repeated.
        fill: Colour where the centre of an output pixel lies outside the input.

    Returns:
        uint8 (B, 3, S, S).
    """
    size = planes.shape[-1]
    place = torch.arange(size, device=planes.device) - (size - 1) / 2
    x, y = place.view(1, 1, -1), place.view(1, -1, 1)
    rows = matrix.view(-1, 6, 1, 1)
    column = rows[:, 0] * x + rows[:, 1] * y + rows[:, 2] + (size - 1) / 2
    row = rows[:, 3] * x + rows[:, 4] * y + rows[:, 5] + (size - 1) / 2
    inside = (column >= -0.5) & (column < size - 0.5) & (row >= -0.5) & (row < size - 0.5)
    left, top = column.floor(), row.floor()
    across, down = (_tap_weights(share, taps) for share in (column - left, row - top))
    flat, total = planes.flatten(2), torch.zeros(planes.shape, device=planes.device)
    for line in range(4):
        from_row = (top + (line - 1)).clamp_(0, size - 1).mul_(size)
        for tap in range(4):
            source = (left + (tap - 1)).clamp_(0, size - 1).add_(from_row).long().flatten(1).unsqueeze(1)
            part = flat.gather(2, source.expand(-1, 3, -1)).view_as(planes)
            total.addcmul_(part.float(), (across[tap] * down[line]).unsqueeze(1))
    moved = to_bytes(total.add_(CUT_OFF).clamp_(0, 255))  # Pillow cuts fractions off
    return torch.where(inside.unsqueeze(1), moved, _colour(fill, planes))


CUT_OFF = 2**-9  # what a sum of floats may miss of a whole number


def _tap_weights(share: torch.Tensor, taps: torch.Tensor) -> list[torch.Tensor]:
    """The weights of the pixels -1, 0, 1, 2 for a place `share` (B, S, S) after pixel 0, four of (B, S, S)."""
    d, cubic = share, (taps == 4).view(-1, 1, 1)
    square, cube = d * d, d * d * d
    cubics = (2 * square - d - cube, 1 - 2 * square + cube, d + square - cube, cube - square)
    linears = (torch.zeros_like(d), 1 - d, d, torch.zeros_like(d))
    return [torch.where(cubic, *pair) for pair in zip(cubics, linears, strict=True)]


def sharpness(planes: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Between the image smoothed with [[1 1 1] [1 5 1] [1 1 1]]/13 (factor 0) and itself (1), or beyond; the border stays."""
    pixels = planes.to(torch.int16)
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    middle = pixels[:, :, 1:-1, 1:-1]
    smooth = total.add_(middle, alpha=4).float().div_(13).round_()
    sharp = torch.addcmul(middle.float(), smooth.sub_(middle), per_sample(1 - factor))
    result = planes.clone()
    result[:, :, 1:-1, 1:-1] = to_bytes(sharp.clamp_(0, 255))
    return result


def blur(planes: torch.Tensor, sigma: torch.Tensor, radius: int) -> torch.Tensor:
    """Blur by a Gaussian of 2·radius + 1 taps across and down. The image is mirrored at its border.

    Args:
        planes: The images, (B, 3, S, S).
        sigma: Of each image, pixels, (B,).
        radius: Pixels.

    Returns:
        Images of the same shape.
    """
    size = planes.shape[-1]
    distance = torch.arange(-radius, radius + 1, device=planes.device)
    weights = torch.softmax(-0.5 * (distance / sigma.view(-1, 1)) ** 2, dim=1).unbind(1)
    padded = F.pad(planes.float(), (radius,) * 4, mode="reflect")
    down = padded[:, :, :size] * per_sample(weights[0])
    for tap in range(1, 2 * radius + 1):
        down.addcmul_(padded[:, :, tap : tap + size], per_sample(weights[tap]))
    across = down[..., :size] * per_sample(weights[0])
    for tap in range(1, 2 * radius + 1):
        across.addcmul_(down[..., tap : tap + size], per_sample(weights[tap]))
    return to_bytes(across.round_())


def cutout(planes: torch.Tensor, centre: torch.Tensor, width: int) -> torch.Tensor:
    """Draw a black square, clipped by the border.

    Args:
        planes: The images, (B, 3, S, S).
        centre: The middle pixel's number, row · S + column, of each image, (B,).
        width: Of the square, pixels.

    Returns:
        Images of the same shape.
    """
    size = planes.shape[-1]
    places = torch.arange(size, device=planes.device)
    row, column = centre.long().div(size, rounding_mode="floor"), centre.long().remainder(size)

    def within(middle: torch.Tensor) -> torch.Tensor:
        first = middle.unsqueeze(1) - width // 2
        return (places >= first) & (places < first + width)

    hidden = within(row).unsqueeze(2) & within(column).unsqueeze(1)
    return planes * ~hidden.unsqueeze(1)
