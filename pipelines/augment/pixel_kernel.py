"""Augmentation of bytes on a CPU: compiled by numba, kept between runs, several threads, without Python's lock.

Each image goes through its whole recipe while it lies in the cache, as the loader laid it out. On a GPU, and where numba is not
installed, `recipe.apply` does the same. Where torch's own code multiplies and adds in one rounding (AVX2 and later),
both ways give the same bytes, but for a blur's: its taps end where this image's are nothing, not where the widest of a group's
are, so that a byte may differ by 1.

All in one file, because numba takes a kept function for current as long as its own file has not changed.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic

from pipelines.augment.draws import Op, Stage
from pipelines.augment.spatial_ops import CUT_OFF, inverse_affine
from pipelines.common.numba_cache import ensure_numba_cache

_TAIL = 4  # standard deviations that a blur's taps reach, as in `augment_apply`
_PIECES = 8  # of a thread's share
_WORTH_A_THREAD = 2**18  # bytes: waking one takes about as long as it needs for these
ensure_numba_cache()
# No fast mathematics: rounding decides which pixel is taken, and which byte.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": True}

# As numba reads them: plain numbers, fixed when it compiles.
_IDENTITY, _BRIGHTNESS, _CONTRAST, _POSTERIZE, _SOLARIZE = 0, 1, 2, 3, 4
_SOLARIZE_ADD, _INVERT, _AUTO_CONTRAST, _EQUALIZE, _ROTATE = 5, 6, 7, 8, 13
_SATURATION, _HUE, _GRAYSCALE, _SHARPNESS, _BLUR, _CUTOUT = 14, 15, 16, 17, 18, 19
for _name in ("IDENTITY", "BRIGHTNESS", "CONTRAST", "POSTERIZE", "SOLARIZE", "SOLARIZE_ADD", "INVERT", "AUTO_CONTRAST"):
    assert globals()[f"_{_name}"] == Op[_name]
for _name in ("EQUALIZE", "ROTATE", "SATURATION", "HUE", "GRAYSCALE", "SHARPNESS", "BLUR", "CUTOUT"):
    assert globals()[f"_{_name}"] == Op[_name]
_CUT_OFF = float(CUT_OFF)


def augment(views: torch.Tensor, result: torch.Tensor, number: int, stages: list[Stage]) -> None:
    """Augment one view of each sample.

    Args:
        views: uint8 (B, V, S, S, 3), contiguous.
        result: Takes the view in the same place, likewise.
        number: The view's number.
        stages: What happens to it, in order.

    Raises:
        ValueError: Stages and tensors are not of one batch. The compiled code checks no bounds.
    """
    size, samples = views.shape[2], len(views)
    fit = views.shape == result.shape == (samples, views.shape[1], size, size, 3) and 0 <= number < views.shape[1]
    bytes_in_order = all(each.dtype == torch.uint8 and each.is_contiguous() for each in (views, result))
    if not (fit and bytes_in_order and all(len(stage.op) == len(stage.value) == samples for stage in stages)):
        raise ValueError(f"stages of {[len(stage.op) for stage in stages]} samples for views of {tuple(views.shape)}")
    if not samples:
        return
    ops, values = (np.stack(each) for each in zip(*((stage.op, stage.value) for stage in stages), strict=True))
    moves = [inverse_affine(stage.op, stage.value, size).astype(np.float32).reshape(-1, 6) for stage in stages]
    sampling = np.stack([stage.taps for stage in stages])
    fills = np.array([stage.fill for stage in stages], np.uint8)
    # Of pixels read between others in pixels, of the nearest ones as torchvision scales them.
    scaled = np.stack(
        [
            np.where(smooth[:, None] > 1, move, move / np.float32(0.5 * size))
            for smooth, move in zip(sampling, moves, strict=True)
        ]
    )
    widths = np.array([stage.size for stage in stages])
    radius = max((stage.size // 2 for stage in stages if (stage.op == Op.BLUR).any()), default=0)
    taps = np.stack([_taps(stage, radius) for stage in stages])
    work: tuple[Any, ...] = (views.numpy(), result.numpy(), number, ops, values, widths, scaled, taps, sampling, fills)
    threads = max(1, min(torch.get_num_threads(), samples, samples * size * size * 3 // _WORTH_A_THREAD))
    piece = max(1, samples // (_PIECES * threads)) if threads > 1 else samples
    pieces = iter([(start, min(start + piece, samples)) for start in range(0, samples, piece)])

    def run() -> None:
        for start, stop in pieces:  # whoever is done takes the next: some operations take ten times as long as others
            _augment(*work, start, stop)

    others = [_pool(threads).submit(run) for _ in range(threads - 1)]
    run()
    for other in others:
        other.result()


def _taps(stage: Stage, radius: int) -> np.ndarray:
    """Each sample's weights of a blur, float32 (B, 2·radius + 1), 0 beyond its own."""
    blurred = stage.op == Op.BLUR
    if not blurred.any():
        return np.zeros((len(stage.op), 2 * radius + 1), np.float32)
    distance, deviation = np.arange(-radius, radius + 1), np.where(blurred, stage.value, 1.0)[:, None]
    reach = np.minimum(stage.size // 2, np.ceil(_TAIL * deviation))
    weights = np.exp(-0.5 * (distance / deviation) ** 2) * (np.abs(distance) <= reach)
    weights /= weights.sum(1, keepdims=True)
    return weights.astype(np.float32)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # Not numba's own threads: those wait actively beside torch's.
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="augment")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has the pool, and none of its threads


@intrinsic
def _multiply_add(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """x·y + z, rounded once, as torch adds with a factor."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), code


@njit(**_OPTIONS)
def _augment(  # type: ignore[no-untyped-def]
    views, result, number, ops, values, widths, scaled, taps, sampling, fills, start, stop
):
    size = views.shape[2]
    table = np.empty((3, 256), np.float32)
    counts = np.empty((3, 256), np.int64)
    source = np.zeros(3 * size * size + 3, np.uint8)  # the last pixel is what lies outside
    floats = np.empty((0, 0), np.float32)
    for sample in range(start, stop):
        image = result[sample, number]
        pixels = image.reshape(-1)
        _copy(views[sample, number].reshape(-1), pixels)
        for stage in range(len(ops)):
            op, value = ops[stage, sample], values[stage, sample]
            if op == _IDENTITY:
                continue
            if op <= _EQUALIZE:
                if op <= _INVERT:
                    _table_by_value(op, value, _mean_luma(pixels) if op == _CONTRAST else np.float32(0), table)
                else:
                    _count(pixels, counts)
                    for channel in range(3):
                        if op == _AUTO_CONTRAST:
                            _stretch(counts[channel], table[channel])
                        else:
                            _equalize(counts[channel], len(pixels) // 3, table[channel])
                _look_up(pixels, table)
            elif op <= _ROTATE:
                _copy(pixels, source)
                if sampling[stage, sample] > 1:
                    _move_smoothly(source, image, scaled[stage, sample], sampling[stage, sample], fills[stage])
                else:
                    for channel in range(3):
                        source[3 * size * size + channel] = fills[stage, channel]
                    _move(source, image, scaled[stage, sample])
            elif op == _SATURATION:
                _saturate(pixels, value)
            elif op == _HUE:
                _turn_hue(image, value)
            elif op == _GRAYSCALE:
                for place in range(0, len(pixels), 3):
                    grey = np.uint8(_luma(pixels, place))
                    pixels[place], pixels[place + 1], pixels[place + 2] = grey, grey, grey
            elif op == _SHARPNESS:
                _copy(pixels, source)
                _sharpen(source, image, value)
            elif op == _BLUR:
                if len(floats) < size:
                    floats = np.empty((size, 3 * size), np.float32)
                _blur(image, floats, taps[stage, sample], min(widths[stage] // 2, math.ceil(_TAIL * value)))
            elif op == _CUTOUT:
                middle, width = int(value), widths[stage]
                top, left = middle // size - width // 2, middle % size - width // 2
                image[max(0, top) : max(0, top + width), max(0, left) : max(0, left + width)] = 0


@njit(**_OPTIONS)
def _copy(source, target):  # type: ignore[no-untyped-def]
    for place in range(len(source)):  # fourteen times as fast as an assignment
        target[place] = source[place]


@njit(inline="always")
def _clamped(value):  # type: ignore[no-untyped-def]
    return min(max(value, np.float32(0)), np.float32(255))


@njit(inline="always")
def _luma(pixels, place):  # type: ignore[no-untyped-def]
    grey = np.float32(pixels[place]) * np.float32(0.2989)
    grey = _multiply_add(np.float32(pixels[place + 1]), np.float32(0.587), grey)
    return np.floor(_multiply_add(np.float32(pixels[place + 2]), np.float32(0.114), grey))


@njit(**_OPTIONS)
def _mean_luma(pixels):  # type: ignore[no-untyped-def]
    total = 0.0
    for place in range(0, len(pixels), 3):
        total += _luma(pixels, place)
    return np.float32(total) / np.float32(len(pixels) // 3)


@njit(**_OPTIONS)
def _table_by_value(op, value, mean, table):  # type: ignore[no-untyped-def]
    factor, rest = np.float32(value), np.float32(1 - value)
    for number in range(256):
        level = np.float32(number)
        if op == _BRIGHTNESS:
            new = _clamped(level * factor)
        elif op == _CONTRAST:
            new = _clamped(_multiply_add(mean, rest, level * factor))
        elif op == _POSTERIZE:
            new = np.floor(level / factor) * factor
        elif op == _SOLARIZE:
            new = np.float32(255) - level if level >= factor else level
        elif op == _SOLARIZE_ADD:
            new = min(level + factor, np.float32(255)) if level < np.float32(128) else level
        else:
            new = np.float32(255) - level
        table[:, number] = new


@njit(**_OPTIONS)
def _stretch(counts, table):  # type: ignore[no-untyped-def]
    least, greatest = 0, 255
    while counts[least] == 0:
        least += 1
    while counts[greatest] == 0:
        greatest -= 1
    span = np.float32(greatest - least) * np.float32(1 / 255)
    for number in range(256):
        if least == greatest:
            table[number] = np.float32(number)
        else:
            table[number] = _clamped(np.float32(number - least) / span)


@njit(**_OPTIONS)
def _equalize(counts, pixels, table):  # type: ignore[no-untyped-def]
    greatest = 255
    while counts[greatest] == 0:
        greatest -= 1
    step, below = (pixels - counts[greatest]) // 255, 0
    for number in range(256):
        table[number] = np.float32(number if step == 0 else min((below + step // 2) // step, 255))
        below += counts[number]


@njit(**_OPTIONS)
def _count(pixels, counts):  # type: ignore[no-untyped-def]
    # Neighbours are often alike: two counts in turns, so that fewer additions wait for the one before.
    second = np.zeros((3, 256), np.int64)
    counts[:] = 0
    whole = len(pixels) // 6 * 6
    for place in range(0, whole, 6):
        for channel in range(3):
            counts[channel, pixels[place + channel]] += 1
            second[channel, pixels[place + 3 + channel]] += 1
    for place in range(whole, len(pixels)):
        counts[place - whole, pixels[place]] += 1
    counts += second


@njit(**_OPTIONS)
def _look_up(pixels, table):  # type: ignore[no-untyped-def]
    red, green, blue = (table[0].astype(np.uint8), table[1].astype(np.uint8), table[2].astype(np.uint8))
    for place in range(0, len(pixels), 3):
        pixels[place] = red[pixels[place]]
        pixels[place + 1] = green[pixels[place + 1]]
        pixels[place + 2] = blue[pixels[place + 2]]


@njit(**_OPTIONS)
def _move(source, image, scaled):  # type: ignore[no-untyped-def]
    """Each pixel's nearest in `source`, black where that lies outside, in torchvision's order of roundings."""
    size = len(image)
    one, half, wide, last = np.float32(1), np.float32(0.5), np.float32(size), np.float32(size - 1)
    outside = np.int32(size * size)
    middle = (np.arange(size) - (size - 1) * 0.5).astype(np.float32)
    place = np.empty(size, np.int32)
    a, b, c, d, e, f = scaled
    for row in range(size):
        right, below = b * middle[row], e * middle[row]
        for column in range(size):
            across = np.rint(((a * middle[column] + right + c + one) * wide - one) * half)
            down = np.rint(((d * middle[column] + below + f + one) * wide - one) * half)
            inside = (across >= 0) & (across <= last) & (down >= 0) & (down <= last)
            place[column] = 3 * (np.int32(down * wide + across) if inside else outside)
        for column in range(size):
            first = place[column]
            image[row, column, 0] = source[first]
            image[row, column, 1] = source[first + 1]
            image[row, column, 2] = source[first + 2]


@njit(**_OPTIONS)
def _move_smoothly(source, image, matrix, sampling, fill):  # type: ignore[no-untyped-def]
    """As `spatial_ops.smooth_affine`."""
    size = len(image)
    middle = (size - 1) / 2
    across, down = np.empty(4), np.empty(4)
    first = 0 if sampling == 4 else 1
    for row in range(size):
        for column in range(size):
            x = matrix[0] * (column - middle) + matrix[1] * (row - middle) + matrix[2] + middle
            y = matrix[3] * (column - middle) + matrix[4] * (row - middle) + matrix[5] + middle
            if not (x >= -0.5 and x < size - 0.5 and y >= -0.5 and y < size - 0.5):
                image[row, column] = fill
                continue
            left, top = math.floor(x), math.floor(y)
            _tap_weights(x - left, sampling, across)
            _tap_weights(y - top, sampling, down)
            for channel in range(3):
                total = 0.0
                for line in range(first, 4 - first):
                    from_row = size * min(max(top + line - 1, 0), size - 1)
                    of_row = 0.0
                    for tap in range(first, 4 - first):
                        place = min(max(left + tap - 1, 0), size - 1)
                        of_row += across[tap] * source[3 * (from_row + place) + channel]
                    total += down[line] * of_row
                image[row, column, channel] = np.uint8(min(max(total + _CUT_OFF, 0.0), 255.0))


@njit(**_OPTIONS)
def _tap_weights(share, sampling, weights):  # type: ignore[no-untyped-def]
    if sampling == 4:
        square, cube = share * share, share * share * share
        weights[0], weights[1] = 2 * square - share - cube, 1 - 2 * square + cube
        weights[2], weights[3] = share + square - cube, cube - square
    else:
        weights[1], weights[2] = 1 - share, share


@njit(**_OPTIONS)
def _saturate(pixels, value):  # type: ignore[no-untyped-def]
    factor, rest = np.float32(value), np.float32(1 - value)
    for place in range(0, len(pixels), 3):
        grey = _luma(pixels, place)
        for channel in range(3):
            coloured = np.float32(pixels[place + channel]) * factor
            pixels[place + channel] = np.uint8(_clamped(_multiply_add(grey, rest, coloured)))


@njit(**_OPTIONS)
def _sharpen(source, image, value):  # type: ignore[no-untyped-def]
    """Between `source` smoothed with [[1 1 1] [1 5 1] [1 1 1]]/13 (0) and itself (1), or beyond; the border stays."""
    rest, width = np.float32(1 - value), 3 * len(image)
    sums = np.empty(width, np.int32)
    left, middle, right = sums[: width - 6], sums[3 : width - 3], sums[6:]
    for row in range(1, len(image) - 1):
        start = row * width
        above, below = source[start - width : start], source[start + width : start + 2 * width]
        here = source[start : start + width]
        for place in range(width):
            sums[place] = np.int32(above[place]) + np.int32(here[place]) + np.int32(below[place])
        inner, target = here[3 : width - 3], image[row].reshape(-1)[3 : width - 3]
        for place in range(width - 6):
            total = left[place] + middle[place] + right[place] + 4 * np.int32(inner[place])
            smooth, old = np.rint(np.float32(total) / np.float32(13)), np.float32(inner[place])
            target[place] = np.uint8(_clamped(_multiply_add(smooth - old, rest, old)))


@njit(**_OPTIONS)
def _turn_hue(image, turn):  # type: ignore[no-untyped-def]
    """As `color_ops.hue`, in its order of roundings: a row's channels by themselves, so that vectors can be used."""
    size = len(image)
    red, green, blue = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    nought, one, six, turned = np.float32(0), np.float32(1), np.float32(6), np.float32(6 * turn)
    scale = np.float32(255.999 / 255)
    for row in range(size):
        for column in range(size):
            red[column], green[column] = np.float32(image[row, column, 0]), np.float32(image[row, column, 1])
            blue[column] = np.float32(image[row, column, 2])
        for column in range(size):
            r, g, b = red[column], green[column], blue[column]
            greatest, least = max(max(r, g), b), min(min(r, g), b)
            chroma = greatest - least
            sixths = (g + b - r - least) / max(chroma, one) + one
            sixths = (sixths if g >= b else -sixths) + turned
            sixths -= six * np.rint(sixths / six)
            from_red = min(max(abs(sixths) - one, nought), one)
            from_green = min(max(abs(sixths + one) - one, nought), one)
            from_blue = min(max(abs(sixths - one) - one, nought), one)
            red[column] = _multiply_add(-chroma, from_red, greatest) * scale
            green[column] = _multiply_add(chroma, from_green, least) * scale
            blue[column] = _multiply_add(chroma, from_blue, least) * scale
        for column in range(size):
            image[row, column, 0], image[row, column, 1] = np.uint8(red[column]), np.uint8(green[column])
            image[row, column, 2] = np.uint8(blue[column])


@njit(**_OPTIONS)
def _blur(image, floats, taps, radius):  # type: ignore[no-untyped-def]
    """Down, then across, the image mirrored at its border: a tap at a time over a whole row, so that vectors can be used."""
    size, first = len(image), len(taps) // 2 - radius
    width, edge = 3 * size, 3 * radius
    row, total = np.empty(width + 2 * edge, np.float32), np.empty(width, np.float32)
    for line in range(size):
        pixels, target = image[line].reshape(-1), floats[line]
        for place in range(width):
            target[place] = np.float32(pixels[place])
    for line in range(size):
        total[:] = 0
        for tap in range(2 * radius + 1):
            other = abs(line - radius + tap)
            _add(total, floats[other if other < size else 2 * (size - 1) - other], taps[first + tap])
        row[edge : edge + width] = total
        for away in range(1, radius + 1):
            for channel in range(3):
                row[edge - 3 * away + channel] = total[3 * away + channel]
                row[edge + width - 3 + 3 * away + channel] = total[width - 3 - 3 * away + channel]
        total[:] = 0
        for tap in range(2 * radius + 1):
            _add(total, row[3 * tap : 3 * tap + width], taps[first + tap])
        pixels = image[line].reshape(-1)
        for place in range(width):
            pixels[place] = np.uint8(np.rint(total[place]))


@njit(**_OPTIONS)
def _add(total, values, weight):  # type: ignore[no-untyped-def]
    for place in range(len(total)):
        total[place] = _multiply_add(values[place], weight, total[place])
