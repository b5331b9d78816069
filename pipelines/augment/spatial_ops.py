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
    """From an output pixel to the input's, both counted from the image's middle: float64 (B, 2, 3).

    Shears leave the top left corner where it is, rotations the middle.
    """
    angle = np.where(op == Op.ROTATE, np.deg2rad(value), 0)
    across, down = (np.where(op == shear, value, 0) for shear in (Op.SHEAR_X, Op.SHEAR_Y))
    right, below = (np.where(op == move, value, 0) for move in (Op.TRANSLATE_X, Op.TRANSLATE_Y))
    rows = [np.cos(angle), across - np.sin(angle), across * size / 2 - right]
    rows += [down + np.sin(angle), np.cos(angle), down * size / 2 - below]
    return np.stack(rows, axis=1).reshape(-1, 2, 3)


def affine(planes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Each output pixel's nearest input pixel, black where that lies outside. matrix: `inverse_affine`, float32 (B, 2, 3)."""
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
    return planes.flatten(2).gather(2, source).view_as(planes).mul_(inside.unsqueeze(1))


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
    """A Gaussian of 2·radius + 1 taps across and down; the image is mirrored at its border."""
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
    """A black square of `width` pixels about pixel number `centre` = row · S + column, clipped by the border."""
    size = planes.shape[-1]
    places = torch.arange(size, device=planes.device)
    row, column = centre.long().div(size, rounding_mode="floor"), centre.long().remainder(size)

    def within(middle: torch.Tensor) -> torch.Tensor:
        first = middle.unsqueeze(1) - width // 2
        return (places >= first) & (places < first + width)

    hidden = within(row).unsqueeze(2) & within(column).unsqueeze(1)
    return planes * ~hidden.unsqueeze(1)
