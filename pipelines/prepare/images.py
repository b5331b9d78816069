"""One image, packed for the .beton file."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from pipelines.config import Store
from pipelines.pixels import BadImageError, decode, scaled, stored_size, to_rgb

RAW_SIDE = 64  # Up to 64x64, pixels are hardly larger than a JPEG and need no decoding.
LARGEST = 1 << 23  # bytes of an image: a page of the .beton file
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Packed:
    """An image as it lies in the .beton file: `data` holds a JPEG file, or uint8 pixels of shape (height, width, 3)."""

    jpeg: bool
    width: int
    height: int
    data: bytes
    kept: bool = False

    @property
    def how(self) -> str:
        """What was done to the image, in words."""
        return "raw pixels" if not self.jpeg else "as they were" if self.kept else "encoded anew"


def pack(data: bytes | np.ndarray, store: Store, lossless: bool = False, raw: bool = False) -> Packed:
    """`data` as `store` wants it. A JPEG file that already fits keeps its bytes, so nothing is lost. Raises BadImageError.

    lossless: for evaluation, which sees what a server would see: a JPEG file keeps its bytes whatever its size, and anything
    else lies as raw pixels, scaled as `store` says. raw: in mode 'mixed', whether this image is one of those stored raw.
    """
    try:
        return _pack(data, store, lossless, raw)
    except (BadImageError, MemoryError):
        raise
    except Exception as error:  # damaged files fail in many ways, deep in their decoders
        raise BadImageError(f"{len(data)} bytes, {error}") from error


def _pack(data: bytes | np.ndarray, store: Store, lossless: bool, drawn: bool) -> Packed:
    image = decode(data)
    stored = stored_size(*image.size, store.square, store.max_side)
    match store.mode:
        case "raw":
            raw = True
        case "jpeg":
            raw = False
        case "auto":
            raw = max(stored) <= RAW_SIDE
        case "mixed":
            raw = drawn and not lossless
    keeps_bytes = (
        isinstance(data, bytes)
        and not raw
        and image.format == "JPEG"
        and image.mode == "RGB"
        and image.getexif().get(_EXIF_ORIENTATION, 1) == 1
        and (image.size == stored or (lossless and len(data) <= LARGEST and max(image.size) < 1 << 16))
    )
    if keeps_bytes:
        assert isinstance(data, bytes)
        return Packed(True, *image.size, data, kept=True)
    image = to_rgb(image)
    image = scaled(image, stored_size(*image.size, store.square, store.max_side))  # EXIF may have turned it
    if raw or lossless:
        return Packed(False, *image.size, image.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=store.quality)
    return Packed(True, *image.size, buffer.getvalue())
