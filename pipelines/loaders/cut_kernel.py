"""Decode once, cut V views: compiled by numba, cached between runs, without Python's lock.

What makes it fast: a JPEG is decoded to its own planes (luma, and chroma at half the size, as most files have it), so nothing
is upsampled or converted but the pixels that come out; a cut is two passes of vectors, rows and then columns, sixteen output
rows at a time, which stay in the first cache; decoders and buffers live as long as the loader. Where every crop of an image is
much larger than the output, the decoder leaves out what the crops cannot show (its DCT scaling).

The resize is torchvision's antialiased bilinear one: a triangle as wide as the reduction, at least one source pixel.

All in one file, because numba takes a kept function for current as long as its own file has not changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, get_thread_id, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from pipelines.common.numba_cache import ensure_numba_cache
from pipelines.loaders import turbojpeg

LANES = 16
PADDING = 64  # bytes after an image that the vectors may read
# A crop that is this many times as large as the output is decoded at half the size, one twice as large at a quarter.
# Lower would show: single photographs then differ from torchvision's by up to 3 of 255 at 64 pixels (2), now by less than 1.
OVERSAMPLING = 4

ensure_numba_cache()
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": True, "cache": True}


class Table(NamedTuple):
    """What an epoch reads, a row a position in its order.

    address, size: of the stored bytes, int64 (N,). jpeg: int32 (N,), 0 for raw pixels. height, width: int32 (N,).
    cuts: int32 (N, V, 5), as `pipelines.loaders.cuts`. refused: int32 (N,), written: 1 where turbojpeg reports a problem.
    """

    address: np.ndarray
    size: np.ndarray
    jpeg: np.ndarray
    height: np.ndarray
    width: np.ndarray
    cuts: np.ndarray
    refused: np.ndarray


class Work(NamedTuple):
    """Each thread's decoder and buffers, the thread in the first dimension (T).

    header, starts: what turbojpeg reads and writes. planes: the decoded image. rows, tiles: sixteen resized rows of its three
    planes, and their transposes. pixels, strip: sixteen rows of output, transposed and straight. firsts, weights: of both axes
    of both kinds of plane, where an output pixel's source pixels begin, and the weight of each.
    """

    decoders: np.ndarray  # int64 (T,)
    header: np.ndarray  # int32 (T, 4)
    starts: np.ndarray  # int64 (T, 3)
    planes: np.ndarray  # uint8 (T, P)
    rows: np.ndarray  # uint8 (T, 16, W)
    tiles: np.ndarray  # uint8 (T, 3, W, 16)
    pixels: np.ndarray  # uint8 (T, 3 S', 16)
    strip: np.ndarray  # uint8 (T, 16, 3 S')
    firsts: np.ndarray  # int32 (T, 4, S')
    weights: np.ndarray  # float32 (T, 4, taps, S')


def make_work(decoders: np.ndarray, size: int, heights: np.ndarray, widths: np.ndarray) -> Work:
    """Make the buffers of `cut_batch` and `cut_pixels`.

    Args:
        decoders: Of libjpeg-turbo, one for each thread.
        size: Width and height of a view, pixels.
        heights: Of all images, pixels.
        widths: Likewise.

    Returns:
        Buffers for the largest of the images.
    """
    height, width = int(heights.max()), int(widths.max())
    pixels = int(((heights.astype(np.int64) + LANES) * (widths.astype(np.int64) + LANES)).max())
    threads, padded = len(decoders), -(-size // LANES) * LANES
    row = 3 * (width + LANES) + PADDING
    taps = 2 * math.ceil(max(1.0, height / size, width / size)) + 3
    return Work(
        decoders,
        np.zeros((threads, 4), np.int32),
        np.zeros((threads, 3), np.int64),
        np.empty((threads, 3 * pixels + PADDING), np.uint8),
        np.empty((threads, LANES, row), np.uint8),
        np.empty((threads, 3, row, LANES), np.uint8),
        np.empty((threads, 3 * padded, LANES), np.uint8),
        np.empty((threads, LANES, 3 * padded), np.uint8),
        np.empty((threads, 4, padded), np.int32),
        np.empty((threads, 4, taps, padded), np.float32),
    )


# --- vectors ---
# Numba's own loops over bytes become slow gathers; these few say in LLVM's terms what is meant, for any CPU.

_I64, _I32, _F32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
_BYTES, _INTS, _FLOATS = (ir.VectorType(kind, LANES) for kind in (ir.IntType(8), _I32, _F32))
_FAST = ("fast",)


def _load(b: Any, base: Any, offset: Any, kind: Any) -> Any:
    value = b.load(b.inttoptr(b.add(base, offset), kind.as_pointer()))
    value.align = 1
    return value


def _store(b: Any, value: Any, base: Any, offset: Any) -> None:
    b.store(value, b.inttoptr(b.add(base, offset), value.type.as_pointer())).align = 1


def _floats(value: float) -> Any:
    return ir.Constant(_FLOATS, [value] * LANES)


def _int(value: int) -> Any:
    return ir.Constant(_I64, value)


def _to_bytes(b: Any, value: Any) -> Any:
    return b.trunc(b.fptosi(value, _INTS), _BYTES)


def _clamped(b: Any, value: Any) -> Any:
    low, high = _floats(0.0), _floats(255.0)
    value = b.select(b.fcmp_ordered(">", value, low, flags=_FAST), value, low)
    return b.select(b.fcmp_ordered("<", value, high, flags=_FAST), value, high)


def _plus(b: Any, value: Any, factor: float, other: Any) -> Any:
    return b.fadd(value, b.fmul(other, _floats(factor), flags=_FAST), flags=_FAST)


def _weighted(b: Any, taps: Any, source: Any, stride: Any, weights: Any, weight_stride: Any, start: Any) -> Any:
    """Add to start the weighted sum of `taps` vectors of bytes, `stride` bytes apart."""
    total, at, weight_at = cgutils.alloca_once(b, _FLOATS), cgutils.alloca_once(b, _I64), cgutils.alloca_once(b, _I64)
    for place, value in ((total, start), (at, source), (weight_at, weights)):
        b.store(value, place)
    with cgutils.for_range(b, taps):
        pixels = b.uitofp(_load(b, b.load(at), _int(0), _BYTES), _FLOATS)
        one = b.insert_element(
            ir.Constant(_FLOATS, ir.Undefined), _load(b, b.load(weight_at), _int(0), _F32), ir.Constant(_I32, 0)
        )
        weight = b.shuffle_vector(one, one, ir.Constant(_INTS, [0] * LANES))
        b.store(b.fadd(b.load(total), b.fmul(pixels, weight, flags=_FAST), flags=_FAST), total)
        b.store(b.add(b.load(at), stride), at)
        b.store(b.add(b.load(weight_at), weight_stride), weight_at)
    return b.load(total)


@intrinsic
def _weigh_rows(context, source, stride, count, weights, weight_stride, taps, out):  # type: ignore[no-untyped-def]
    """out[x] = Σ_t weight_t · source[t][x] for `count` bytes, rounded; a few bytes more are read and written."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        source, stride, count, weights, weight_stride, taps, out = arguments
        with cgutils.for_range(b, b.udiv(b.add(count, _int(LANES - 1)), _int(LANES))) as loop:
            x = b.mul(loop.index, _int(LANES))
            value = _weighted(b, taps, b.add(source, x), stride, weights, weight_stride, _floats(0.5))
            _store(b, _to_bytes(b, value), out, x)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


@intrinsic
def _transpose(context, source, source_stride, out, out_stride):  # type: ignore[no-untyped-def]
    """The transpose of 16 by 16 bytes."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        source, source_stride, out, out_stride = arguments
        rows = [_load(b, source, b.mul(source_stride, _int(i)), _BYTES) for i in range(LANES)]
        low, high = (ir.Constant(_INTS, [lane for i in range(first, first + 8) for lane in (i, LANES + i)]) for first in (0, 8))
        for _ in range(4):
            pairs = [(rows[i], rows[i + 8]) for i in range(8)]
            rows = [b.shuffle_vector(*pair, mask) for pair in pairs for mask in (low, high)]
        for i, row in enumerate(rows):
            _store(b, row, out, b.mul(out_stride, _int(i)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


def _columns(convert: bool) -> Callable[..., Any]:
    """The pass over columns: three transposed planes to transposed RGB pixels; convert: they are YCbCr (JFIF)."""

    def weigh_columns(context, tiles, steps, index, weights, taps, other_index, other_weights, other_taps, count, stride, out):  # type: ignore[no-untyped-def]
        def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            tiles, steps, index, weights, taps, other_index, other_weights, other_taps, count, stride, out = arguments
            # steps: bytes from plane to plane. Interleaved planes lie one vector apart, and a pixel is three vectors.
            pixel = _int(LANES if convert else 3 * LANES)
            with cgutils.for_range(b, count) as loop:
                x = b.mul(loop.index, _int(4))

                def channel(number: int, index: Any, weights: Any, taps: Any, start: float) -> Any:
                    first = b.mul(b.sext(_load(b, index, x, _I32), _I64), pixel)
                    at = b.add(b.add(tiles, b.mul(steps, _int(number))), first)
                    return _weighted(b, taps, at, pixel, b.add(weights, x), stride, _floats(start))

                first = channel(0, index, weights, taps, 0.5)
                middle = -128.0 if convert else 0.5
                second, third = (channel(i, other_index, other_weights, other_taps, middle) for i in (1, 2))
                colours = [first, second, third]
                if convert:
                    green = _plus(b, _plus(b, first, -0.344136286, second), -0.714136286, third)
                    colours = [_plus(b, first, 1.402, third), green, _plus(b, first, 1.772, second)]
                for number, colour in enumerate(colours):
                    place = b.add(b.mul(loop.index, _int(3 * LANES)), _int(number * LANES))
                    _store(b, _to_bytes(b, _clamped(b, colour)), out, place)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 11), generate

    return intrinsic(weigh_columns)


_columns_ycc, _columns_rgb = _columns(convert=True), _columns(convert=False)


@intrinsic
def _pointer(context, address):  # type: ignore[no-untyped-def]
    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


# --- one image ---


@njit(**_OPTIONS)
def _taps(first, length, low, high, size, flip, index, weight):  # type: ignore[no-untyped-def]
    """For each of `size` output pixels of a box of a plane: where its source pixels begin (from `low`), and their weights.

    first, length: of the box, in the plane's pixels, possibly between two. low, high: the whole pixels it touches.
    Returns the taps a pixel.
    """
    scale = length / size
    support = max(1.0, scale)
    taps = min(math.ceil(2 * support) + 1 if scale > 1.0 else 2, high - low)
    for o in range(size):
        centre = first + (o + 0.5) * scale
        start = min(max(math.floor(centre - support + 0.5), low), high - taps)
        place = size - 1 - o if flip else o
        total = 0.0
        for t in range(taps):
            w = max(0.0, 1.0 - abs(start + t + 0.5 - centre) / support)
            weight[t, place] = w
            total += w
        for t in range(taps):
            weight[t, place] /= total
        index[place] = start - low
    for o in range(size, len(index)):  # the rest of the last sixteen
        index[o] = index[size - 1]
        for t in range(taps):
            weight[t, o] = weight[t, size - 1]
    return taps


@njit(**_OPTIONS)
def _resize_rows(base, stride, count, index, weight, o, taps, rows, tile):  # type: ignore[no-untyped-def]
    """Sixteen output rows from `o` on of a plane that begins at address `base`, transposed into `tile`."""
    for r in range(LANES):
        weights = weight.ctypes.data + 4 * (o + r)
        _weigh_rows(
            base + index[o + r] * stride, stride, count, weights, weight.strides[0], taps, rows.ctypes.data + r * rows.shape[1]
        )
    for x in range(0, count, LANES):
        _transpose(rows.ctypes.data + x, rows.shape[1], tile + x * LANES, LANES)


@njit(**_OPTIONS)
def _emit(pixels, strip, out, y):  # type: ignore[no-untyped-def]
    """Sixteen rows of transposed pixels into `out` (S, S, 3) from row `y` on."""
    row = 3 * out.shape[1]
    if row % LANES == 0 and y + LANES <= out.shape[0]:
        for x in range(0, row, LANES):
            _transpose(pixels.ctypes.data + x * LANES, LANES, out.ctypes.data + y * row + x, row)
        return
    for x in range(0, row, LANES):
        _transpose(pixels.ctypes.data + x * LANES, LANES, strip.ctypes.data + x, strip.shape[1])
    for r in range(min(LANES, out.shape[0] - y)):
        for x in range(out.shape[1]):
            for c in range(3):
                out[y + r, x, c] = strip[r, 3 * x + c]


@njit(**_OPTIONS)
def _cut_ycc(starts, stride, height, width, x_share, y_share, scale, cut, out, work, thread):  # type: ignore[no-untyped-def]
    """One view of the planes that begin at `starts`: luma of height by width, chroma of a share of it, 1/scale of the image."""
    top, left, h, w, flip = cut
    size = out.shape[0]
    rows, tiles = work.rows[thread], work.tiles[thread]
    index, weight = work.firsts[thread], work.weights[thread]
    chroma_height, chroma_width = math.ceil(height * y_share), math.ceil(width * x_share)
    # Of luma and chroma: what a pixel of the image measures there, and what the box spans.
    y0, y1 = top / scale, (top + h) / scale
    x0, x1 = left / scale, (left + w) / scale
    ty, tx, ly, lx = math.floor(y0), math.floor(x0), min(math.ceil(y1), height), min(math.ceil(x1), width)
    taps_y = _taps(y0, y1 - y0, ty, ly, size, False, index[0], weight[0])
    taps_x = _taps(x0, x1 - x0, tx, lx, size, flip != 0, index[1], weight[1])
    y0, y1, x0, x1 = y0 * y_share, y1 * y_share, x0 * x_share, x1 * x_share
    cy, cx = math.floor(y0), math.floor(x0)
    my, mx = min(math.ceil(y1), chroma_height), min(math.ceil(x1), chroma_width)
    chroma_y = _taps(y0, y1 - y0, cy, my, size, False, index[2], weight[2])
    chroma_x = _taps(x0, x1 - x0, cx, mx, size, flip != 0, index[3], weight[3])
    plane = tiles.shape[1] * LANES
    tile = tiles.ctypes.data
    luma = starts[0] + ty * stride + tx
    blue, red = starts[1] + cy * chroma_width + cx, starts[2] + cy * chroma_width + cx
    for o in range(0, size, LANES):
        _resize_rows(luma, stride, lx - tx, index[0], weight[0], o, taps_y, rows, tile)
        _resize_rows(blue, chroma_width, mx - cx, index[2], weight[2], o, chroma_y, rows, tile + plane)
        _resize_rows(red, chroma_width, mx - cx, index[2], weight[2], o, chroma_y, rows, tile + 2 * plane)
        _columns_ycc(
            tile,
            plane,
            index[1].ctypes.data,
            weight[1].ctypes.data,
            taps_x,
            index[3].ctypes.data,
            weight[3].ctypes.data,
            chroma_x,
            size,
            weight.strides[1],
            work.pixels[thread].ctypes.data,
        )
        _emit(work.pixels[thread], work.strip[thread], out, o)


@njit(**_OPTIONS)
def _cut_rgb(base, height, width, cut, out, work, thread):  # type: ignore[no-untyped-def]
    """One view of RGB pixels at address `base`: a box of the output's size is copied, any other resized."""
    top, left, h, w, flip = cut
    size = out.shape[0]
    if h == size and w == size:
        _copy_box(carray(_pointer(base), (height, width, 3), np.uint8), top, left, flip, out)
        return
    rows, tile = work.rows[thread], work.tiles[thread].ctypes.data
    index, weight = work.firsts[thread], work.weights[thread]
    taps_y = _taps(float(top), float(h), top, top + h, size, False, index[0], weight[0])
    taps_x = _taps(float(left), float(w), left, left + w, size, flip != 0, index[1], weight[1])
    first = base + 3 * (top * width + left)
    x_index, x_weight = index[1].ctypes.data, weight[1].ctypes.data
    for o in range(0, size, LANES):
        _resize_rows(first, 3 * width, 3 * w, index[0], weight[0], o, taps_y, rows, tile)
        _columns_rgb(
            tile,
            LANES,
            x_index,
            x_weight,
            taps_x,
            x_index,
            x_weight,
            taps_x,
            size,
            weight.strides[1],
            work.pixels[thread].ctypes.data,
        )
        _emit(work.pixels[thread], work.strip[thread], out, o)


@njit(**_OPTIONS)
def _copy_box(image, top, left, flip, out):  # type: ignore[no-untyped-def]
    """The box at (top, left) of `out`'s size, black where it leaves the image."""
    size = out.shape[0]
    for y in range(size):
        for x in range(size):
            inside = 0 <= top + y < image.shape[0] and 0 <= left + x < image.shape[1]
            place = size - 1 - x if flip else x
            for c in range(3):
                out[y, place, c] = image[top + y, left + x, c] if inside else 0


@njit(**_OPTIONS)
def _chroma_shares(subsampling):  # type: ignore[no-untyped-def]
    """Width and height of the chroma planes as shares of the luma's; (0, 0) where there are none, or unknown."""
    if subsampling == 0:  # 4:4:4
        return 1.0, 1.0
    if subsampling == 1:  # 4:2:2
        return 0.5, 1.0
    if subsampling == 2:  # 4:2:0
        return 0.5, 0.5
    if subsampling == 4:  # 4:4:0
        return 1.0, 0.5
    if subsampling == 5:  # 4:1:1
        return 0.25, 1.0
    return 0.0, 0.0


@njit(**_OPTIONS)
def _reduction(cuts, size):  # type: ignore[no-untyped-def]
    """1, 2, 4 or 8: how far the image may be scaled down in decoding."""
    smallest = min(cuts[:, 2].min(), cuts[:, 3].min())
    scale = 1
    while scale < 8 and smallest >= scale * OVERSAMPLING * size:
        scale *= 2
    return scale


@njit(**_OPTIONS)
def _cut_jpeg(address, bytes_, height, width, cuts, out, work, thread):  # type: ignore[no-untyped-def]
    """All views of a JPEG file; true where turbojpeg reports a problem: then nothing in `out` counts."""
    decoder, header = work.decoders[thread], work.header[thread]
    at = header.ctypes.data
    status = turbojpeg.read_header(decoder, address, bytes_, at, at + 4, at + 8, at + 12)
    if status != 0 or header[0] != width or header[1] != height:
        return True
    size = out.shape[1]
    copied = False
    for v in range(len(cuts)):
        copied |= cuts[v, 2] == size and cuts[v, 3] == size
    base = work.planes[thread].ctypes.data
    x_share, y_share = _chroma_shares(header[2])
    if copied or x_share == 0.0 or header[3] != turbojpeg.YCBCR:
        if turbojpeg.decode_rgb(decoder, address, bytes_, base, width, 0, height, turbojpeg.RGB, 0) != 0:
            return True
        for v in range(len(cuts)):
            _cut_rgb(base, height, width, cuts[v], out[v], work, thread)
        return False
    scale = _reduction(cuts, size)
    h, w = -(-height // scale), -(-width // scale)
    chroma_h, chroma_w = math.ceil(h * y_share), math.ceil(w * x_share)
    stride = int(chroma_w / x_share)  # turbojpeg fills luma up to whole pixels of chroma
    starts = work.starts[thread]
    starts[0] = base
    starts[1] = base + int(chroma_h / y_share) * stride
    starts[2] = starts[1] + chroma_h * chroma_w
    if turbojpeg.decode_planes(decoder, address, bytes_, starts.ctypes.data, w, 0, h, 0) != 0:
        return True
    for v in range(len(cuts)):
        _cut_ycc(starts, stride, h, w, x_share, y_share, scale, cuts[v], out[v], work, thread)
    return False


@njit(parallel=True, **_OPTIONS)
def cut_batch(positions: np.ndarray, out: np.ndarray, table: Table, work: Work) -> None:
    """Cut the views of images.

    Args:
        positions: Of the images in `table`, int64 (B,).
        out: Takes the views, uint8 (B, V, S, S, 3).
        table: Where the images are, and their cuts.
        work: Buffers, from `make_work`.
    """
    refused = table.refused
    for i in prange(len(positions)):
        position, thread = positions[i], get_thread_id()
        address, height, width = table.address[position], table.height[position], table.width[position]
        cuts = table.cuts[position]
        if table.jpeg[position]:
            refused[position] = _cut_jpeg(address, table.size[position], height, width, cuts, out[i], work, thread)
        else:
            for v in range(len(cuts)):
                _cut_rgb(address, height, width, cuts[v], out[i, v], work, thread)


@njit(**_OPTIONS)
def cut_pixels(image: np.ndarray, cuts: np.ndarray, out: np.ndarray, work: Work) -> None:
    """Cut the views of one image's pixels.

    Args:
        image: RGB, uint8 (height, width, 3), with `PADDING` bytes allocated after it.
        cuts: Its cuts, int32 (V, 5).
        out: Takes the views, uint8 (V, S, S, 3).
        work: Buffers, from `make_work`.
    """
    for v in range(len(cuts)):
        _cut_rgb(image.ctypes.data, image.shape[0], image.shape[1], cuts[v], out[v], work, 0)
