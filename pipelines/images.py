"""One image: read whatever the user has as RGB, and pack it for the .beton file."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.config import Store

RAW_SIDE = 64  # Up to 64x64, pixels are hardly larger than a JPEG and need no decoding.
_EXIF_ORIENTATION = 0x0112


class BadImageError(ValueError):
    """The bytes are not an image, or only a part of one."""


@dataclass(frozen=True)
class Packed:
    """An image as it lies in the .beton file: `data` holds a JPEG file, or uint8 pixels of shape (height, width, 3)."""

    jpeg: bool
    width: int
    height: int
    data: bytes


def decode(data: bytes | np.ndarray) -> Image.Image:
    """The image in `data` (an encoded file, or uint8 pixels), in its own mode. Raises BadImageError."""
    if isinstance(data, np.ndarray):
        return Image.fromarray(data)
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:
        raise BadImageError(f"{len(data)} bytes, not of any image format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImageError(f"{len(data)} bytes, {error}") from error
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """As a viewer shows it: turned as its EXIF says, transparency over white, 16-bit grey scaled, CMYK converted."""
    with contextlib.suppress(Exception):  # EXIF data are often broken; then the image is taken as it lies
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def pack(data: bytes | np.ndarray, store: Store) -> Packed:
    """`data` as `store` wants it. A JPEG file that already fits keeps its bytes, so nothing is lost. Raises BadImageError."""
    try:
        return _pack(data, store)
    except (BadImageError, MemoryError):
        raise
    except Exception as error:  # damaged files fail in many ways, deep in their decoders
        raise BadImageError(f"{len(data)} bytes, {error}") from error


def _pack(data: bytes | np.ndarray, store: Store) -> Packed:
    image = decode(data)
    width, height = _stored_size(image, store)
    raw = store.mode == "raw" or (store.mode == "auto" and max(width, height) <= RAW_SIDE)
    keeps_bytes = (
        isinstance(data, bytes)
        and not raw
        and image.format == "JPEG"
        and image.mode == "RGB"
        and image.getexif().get(_EXIF_ORIENTATION, 1) == 1
        and image.size == (width, height)
    )
    if keeps_bytes:
        assert isinstance(data, bytes)
        return Packed(True, width, height, data)
    image = to_rgb(image)
    width, height = _stored_size(image, store)  # EXIF may have turned it
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if raw:
        return Packed(False, width, height, image.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=store.quality)
    return Packed(True, width, height, buffer.getvalue())


def _stored_size(image: Image.Image, store: Store) -> tuple[int, int]:
    if store.square is not None:
        return store.square, store.square
    width, height = image.size
    scale = 1.0 if store.max_side is None else min(1.0, store.max_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))
