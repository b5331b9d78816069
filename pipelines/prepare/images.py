"""One image, packed for the .beton file."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.config import Store
from pipelines.exif import orientation
from pipelines.pixels import damage_told, decode, scaled, stored_size, to_rgb

RAW_SIDE = 64  # Up to 64x64, pixels are hardly larger than a JPEG and need no decoding.
LARGEST = 1 << 23  # bytes of an image: a page of the .beton file
LARGEST_SQUARE = math.isqrt(LARGEST // 3)  # pixels of a side: as pixels, every image of this longer side fits


@dataclass(frozen=True)
class Packed:
    """An image as it is stored in the .beton file.

    Attributes:
        jpeg: Whether `data` is a JPEG file.
        width: Pixels.
        height: Pixels.
        data: The JPEG file, or uint8 pixels of shape (height, width, 3).
        kept: Whether it is the source's own file.
    """

    jpeg: bool
    width: int
    height: int
    data: bytes
    kept: bool = False

    @property
    def how(self) -> str:
        """What was done to the image, in words."""
        return "raw pixels" if not self.jpeg else "as they were" if self.kept else "re-encoded"


def pack(
    data: bytes | np.ndarray,
    store: Store,
    lossless: bool = False,
    raw: bool = False,
    max_pixels: int | None = None,
    window: tuple[float, float] | None = None,
) -> Packed:
    """Pack one image as `store` says. A JPEG file that fits keeps its bytes, so nothing is lost.

    Args:
        data: An encoded file, or uint8 pixels (H, W, 3).
        store: How training images are stored.
        lossless: For evaluation: what is not kept as a JPEG file becomes raw pixels, scaled as `store` says. Evaluation scales
            by the same rule, so it sees the same pixels as a server that is sent the original file.
        raw: In mode 'mixed', whether this image is one of those stored raw.
        max_pixels: The largest image that is read.
        window: The range of grey values that becomes black to white, for images of more than 8 bits; see `to_rgb`.

    Returns:
        The packed image.

    Raises:
        BadImageError: The file is damaged, or beyond a limit.
    """
    with damage_told(data):
        image = decode(data, max_pixels=max_pixels, max_scans=None)
        return _pack(image, data, store, lossless, raw, window)


def _pack(
    image: Image.Image,
    data: bytes | np.ndarray,
    store: Store,
    lossless: bool,
    drawn: bool,
    window: tuple[float, float] | None,
) -> Packed:
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
    if (
        isinstance(data, bytes)
        and not raw
        and image.format in ("JPEG", "MPO")  # MPO: a JPEG file, and further pictures after it
        and image.mode == "RGB"
        and orientation(image) == 1
        and image.size == stored
        and len(data) <= LARGEST
    ):
        return Packed(True, *image.size, data, kept=True)
    image = to_rgb(image, window)
    image = scaled(image, stored_size(*image.size, store.square, store.max_side))  # EXIF may have turned it
    if raw or lossless:
        return Packed(False, *image.size, image.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=store.quality)
    return Packed(True, *image.size, buffer.getvalue())
