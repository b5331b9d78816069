"""One image from its bytes to the network's input, by Pillow and numpy alone.

Evaluation, the server and the edge client all go through `EvalRule`, so that what was measured is what is served.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines import jpeg

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG"
_LONGEST = 65535  # pixels of a side, as JPEG has
_PASSES = 25  # over as many pixels as are allowed; progressive files have some 10 to 20
# Pillow walks through a file's parts in Python, a microsecond for each read: of a segment four, of a chunk three, of a byte
# that belongs to none one. 512 segments are more metadata than any camera writes; pictures come in chunks of kilobytes.
_HEADER_READS = 2048
_BYTES_A_READ = 256
_SEGMENTS = 2048  # of a JPEG: a scan of a progressive one has some tables
_PROFILES = 4  # of colour in a PNG, which may have one: each is inflated, to a megabyte from a thousand bytes
_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for damaged files


class BadImageError(ValueError):
    """The bytes are not an image, or only a part of one."""


def decode(
    data: bytes | np.ndarray, formats: tuple[str, ...] | None = None, max_pixels: int | None = None, max_scans: int = 100
) -> Image.Image:
    """The image in `data` (an encoded file, or uint8 pixels), in its own mode. Raises BadImageError.

    formats: Pillow's names of those that are tried; None: all it knows. max_pixels: what its header may announce, and
    max_scans: of a JPEG, fewer where it is large, both checked before anything is decoded, as is that its parts are not too
    many; max_pixels None: nothing is.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data)
    image, _ = opened(data, formats, max_pixels, max_scans)
    try:
        image.load()
    except BadImageError:
        raise
    except _BROKEN as error:
        raise BadImageError(f"{len(data)} bytes, {error}") from error
    return image


def opened(
    data: bytes, formats: tuple[str, ...] | None = None, max_pixels: int | None = None, max_scans: int = 100
) -> tuple[Image.Image, int]:
    """The same, of which only the header has been read, and checked; and the passes over it that a decoder makes (of a JPEG:
    else 1). Raises BadImageError."""
    file = io.BytesIO(data) if max_pixels is None else _Counted(data)
    scans = 1
    try:
        if max_pixels is not None and data.startswith(_PNG) and data.count(b"iCCP") > _PROFILES:
            raise BadImageError(f"{len(data)} bytes with more than {_PROFILES} colour profiles; save it anew")
        image = Image.open(file, formats=formats)
        if max_pixels is not None:
            scans = _check(image, data, max_pixels, max_scans)
        if isinstance(file, _Counted):
            file.left = _HEADER_READS + len(data) // _BYTES_A_READ
    except UnidentifiedImageError as error:
        known = "any image format" if formats is None else ", ".join(formats)
        raise BadImageError(f"{len(data)} bytes, not of {known}") from error
    except BadImageError:
        raise
    except _BROKEN as error:
        raise BadImageError(f"{len(data)} bytes, {error}") from error
    return image, scans


class _Counted(io.BytesIO):
    """A file that refuses to be read in too many parts."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.left = _HEADER_READS

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise BadImageError(f"{self.getbuffer().nbytes} bytes in too many parts; save it anew, without its metadata")
        return super().read(size)


def _check(image: Image.Image, data: bytes, max_pixels: int, max_scans: int) -> int:
    """A JPEG's scans, else 1. Raises BadImageError where decoding would cost too much."""
    pixels = image.width * image.height
    # A side of millions would make a resize cost gigabytes, however short the other one is.
    if pixels > max_pixels or max(image.size) > _LONGEST:
        raise BadImageError(f"{image.width}x{image.height} pixels, {max_pixels:,} at most")
    if data.startswith(_JPEG):
        # A decoder goes over the whole picture for each scan, even for one of a few bytes.
        most = min(max_scans, _PASSES * max_pixels // pixels)
        scans = jpeg.scans(data, most + 1, _SEGMENTS)
        if scans is None:
            raise BadImageError(f"{len(data)} bytes in more than {_SEGMENTS} segments; save it anew, without its metadata")
        if scans > most:
            raise BadImageError(f"{image.width}x{image.height} pixels in more than {most} scans; save it with fewer")
        return max(1, scans)
    return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """As a viewer shows it: turned as its EXIF says, transparency over white, 16-bit grey scaled, CMYK converted.

    Raises BadImageError for numbers of which none is said to be white.
    """
    _refuse_wide(image)
    with contextlib.suppress(Exception):  # EXIF data are often broken; then the image is taken as it lies
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def _refuse_wide(image: Image.Image) -> None:
    """Floats, and 32-bit integers that are not 16-bit grey: by a guess of their range, most would be black."""
    if image.mode == "F":
        raise BadImageError("floating-point grey; save it with 8 or 16 bits")
    if image.mode == "I":
        values = np.asarray(image)
        low, high = values.min(), values.max()
        wide = image.format != "PPM"  # whose 16 bits Pillow reads as 32: it may be dark
        if low < 0 or high > 65535 or (wide and 0 < high < 256):
            raise BadImageError(f"32-bit grey with values from {low} to {high}; save it with 8 or 16 bits")


def stored_size(width: int, height: int, square: int | None, max_side: int | None) -> tuple[int, int]:
    """Width and height that an image is stored with: `square` both, else scaled down so that no side exceeds `max_side`."""
    if square is not None:
        return square, square
    scale = 1.0 if max_side is None else min(1.0, max_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An RGB image at another width and height (bicubic, antialiased), or itself where it has them."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class EvalRule:
    """What evaluation shows of an image: scaled as it would be stored, then resized so that the shorter side has `side` pixels
    (bilinear, antialiased), then the central square: torchvision's Resize and CenterCrop (256 and 224: ratio .875).

    size: of the result. ratio: size over side. square, max_side: as `stored_size`.
    """

    size: int
    ratio: float = 1.0
    square: int | None = None
    max_side: int | None = None

    @property
    def side(self) -> int:
        """Pixels of the shorter side before the central square is taken."""
        return round(self.size / self.ratio)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """uint8 (size, size, 3) of an image of any mode. An image that is stored scaled gives what its original gives."""
        image = to_rgb(image)
        image = scaled(image, stored_size(*image.size, self.square, self.max_side))
        width, height = image.size
        shorter = min(width, height)
        wide, high = int(self.side * width / shorter), int(self.side * height / shorter)
        left, top = round((wide - self.size) / 2), round((high - self.size) / 2)
        if (wide, high) == (width, height):
            return np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        # Only what remains of it is resized: the box in the original's coordinates.
        x, y = width / wide, height / high
        box = (left * x, top * y, min(width, (left + self.size) * x), min(height, (top + self.size) * y))
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))
