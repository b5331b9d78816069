"""One drawn stage applied to a batch: samples grouped by operation, each group computed at once."""

from __future__ import annotations

import math

import numpy as np
import torch

from pipelines.augment_draws import Op, Stage
from pipelines.color_ops import grayscale, hue, saturation, tables
from pipelines.spatial_ops import affine, blur, cutout, inverse_affine, sharpness

_IN_CACHE = 2**18  # pixels that a CPU handles at a time, so that float temporaries stay in its cache
_TAIL = 4  # a Gaussian's weight beyond four standard deviations, 6e-5, moves no byte


def apply(stage: Stage, planes: torch.Tensor) -> None:
    """Change planes, uint8 (B, 3, S, S), in place, on whichever device they lie."""
    # By value within an operation, so that a piece of a group has blurs of about one width.
    order = np.lexsort((stage.value, stage.op))
    op, value = stage.op[order], stage.value[order]
    device = planes.device
    rows_there = torch.from_numpy(order).to(device, non_blocking=True)
    values_there = torch.from_numpy(value.astype(np.float32)).to(device, non_blocking=True)
    at_once = len(order) if device.type == "cuda" else max(1, _IN_CACHE // planes.shape[-1] ** 2)
    for first, last in ((Op.BRIGHTNESS, Op.EQUALIZE), (Op.SHEAR_X, Op.ROTATE), *((mix, mix) for mix in Op if mix > Op.ROTATE)):
        start, stop = np.searchsorted(op, first), np.searchsorted(op, last, side="right")
        for begin in range(start, stop, at_once):
            part = slice(begin, min(begin + at_once, stop))
            rows = rows_there[part]
            changed = _change(planes[rows], op[part], value[part], values_there[part], stage.size)
            planes.index_copy_(0, rows, changed)


def _change(pixels: torch.Tensor, op: np.ndarray, value: np.ndarray, value_there: torch.Tensor, size: int) -> torch.Tensor:
    """A group after its operation. `value` lies on the CPU, `value_there` where the pixels are."""
    match op[0]:
        case Op.SATURATION:
            return saturation(pixels, value_there)
        case Op.HUE:
            return hue(pixels, value_there)
        case Op.GRAYSCALE:
            return grayscale(pixels)
        case Op.SHARPNESS:
            return sharpness(pixels, value_there)
        case Op.BLUR:
            return blur(pixels, value_there, min(size // 2, math.ceil(_TAIL * value.max())))
        case Op.CUTOUT:
            return cutout(pixels, value_there, size)
        case code if code >= Op.SHEAR_X:
            matrix = torch.from_numpy(inverse_affine(op, value, pixels.shape[-1]).astype(np.float32))
            return affine(pixels, matrix.to(pixels.device, non_blocking=True))
        case _:
            return _look_up(pixels, op, value_there)


def _look_up(pixels: torch.Tensor, op: np.ndarray, value: torch.Tensor) -> torch.Tensor:
    """All operations that work by table: the tables by operation, then one look-up for all."""
    table = torch.empty(len(pixels), 3, 256, dtype=torch.uint8, device=pixels.device)
    for code in np.unique(op):
        group = slice(np.searchsorted(op, code), np.searchsorted(op, code, side="right"))
        table[group] = tables(Op(code), pixels[group], value[group])
    return table.gather(2, pixels.flatten(2).long()).view_as(pixels)
