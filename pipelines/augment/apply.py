"""Drawn stages applied to a batch: samples grouped by operation, each group computed at once."""

from __future__ import annotations

import math

import numpy as np
import torch

from pipelines.augment.color_ops import grayscale, hue, saturation, tables
from pipelines.augment.draws import NEAREST, Op, Stage
from pipelines.augment.spatial_ops import affine, blur, cutout, inverse_affine, sharpness, smooth_affine

# What is computed together, by first and last code: all tables, all moves, and each of the others.
_FIRST = np.array([Op.BRIGHTNESS, Op.SHEAR_X, *range(Op.ROTATE + 1, len(Op))], dtype=np.int8)
_LAST = np.array([Op.EQUALIZE, Op.ROTATE, *range(Op.ROTATE + 1, len(Op))], dtype=np.int8)
_BY_VALUE = {Op.SATURATION: saturation, Op.HUE: hue, Op.SHARPNESS: sharpness}
_IN_CACHE = 2**18  # pixels that a CPU handles at a time, so that float temporaries stay in its cache
_TAIL = 4  # standard deviations that a blur's taps reach: what lies beyond weighs 6e-5, and moves a byte by 1 at most


def apply(stages: list[Stage], planes: torch.Tensor) -> torch.Tensor:
    """planes, uint8 (B, 3, S, S), after the stages, as new ones, on whichever device they lie."""
    place = np.arange(len(planes))  # where each sample lies now: groups stand together until the next stage regroups them
    for stage in stages:
        # By value within an operation, so that a piece of a group has blurs of about one width; last, what moves smoothly.
        order = np.lexsort((stage.value, stage.op, stage.taps > NEAREST))
        planes = planes.index_select(0, _upload(place[order], planes.device))
        place = np.argsort(order)
        ordered = stage.rows(order)
        plain = int((ordered.taps == NEAREST).sum())
        for part in (slice(0, plain), slice(plain, None)):
            _apply_grouped(ordered.rows(part), planes[part])
    return planes.index_select(0, _upload(place, planes.device))


def _apply_grouped(stage: Stage, planes: torch.Tensor) -> None:
    """One stage, in place, on samples sorted by operation."""
    values = _upload(stage.value, planes.device)
    at_once = len(planes) if planes.device.type == "cuda" else max(1, _IN_CACHE // planes.shape[-1] ** 2)
    starts, stops = np.searchsorted(stage.op, _FIRST), np.searchsorted(stage.op, _LAST, side="right")
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        for begin in range(start, stop, at_once):
            part = slice(begin, min(begin + at_once, stop))
            planes[part] = _change(planes[part], stage.rows(part), values[part])


def _upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _change(pixels: torch.Tensor, group: Stage, value: torch.Tensor) -> torch.Tensor:
    """A group of samples after its operation. `value` is the group's, where the pixels are."""
    op = Op(group.op[0])
    if op <= Op.EQUALIZE:
        return _look_up(pixels, group.op, value)
    if op <= Op.ROTATE:
        matrix = _upload(inverse_affine(group.op, group.value, pixels.shape[-1]).astype(np.float32), pixels.device)
        if group.taps[0] == NEAREST:
            return affine(pixels, matrix, group.fill)
        return smooth_affine(pixels, matrix, _upload(group.taps, pixels.device), group.fill)
    if op == Op.GRAYSCALE:
        return grayscale(pixels)
    if op == Op.BLUR:
        return blur(pixels, value, min(group.size // 2, math.ceil(_TAIL * group.value.max())))
    if op == Op.CUTOUT:
        return cutout(pixels, value, group.size)
    return _BY_VALUE[op](pixels, value)


def _look_up(pixels: torch.Tensor, op: np.ndarray, value: torch.Tensor) -> torch.Tensor:
    """All operations that work by table: the tables by operation, then one look-up for all."""
    table = torch.empty(len(pixels), 3, 256, dtype=torch.uint8, device=pixels.device)
    codes, starts = np.unique(op, return_index=True)
    for code, start, stop in zip(codes, starts, [*starts[1:], len(op)], strict=True):
        group = slice(start, stop)
        table[group] = tables(Op(code), pixels[group], value[group])
    return table.gather(2, pixels.flatten(2).long()).view_as(pixels)
