"""Real photographs as image files of many kinds, for those who decode them: service, edge, browser."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture_files(photo: Path) -> dict[str, bytes]:
    """A photograph in many formats and modes, by name."""
    with Image.open(photo) as opened:
        image = opened.convert("RGB").crop((40, 30, 341, 250))  # odd and even sides
    files = {
        "jpeg 4:2:0": saved(image, "JPEG", quality=88, subsampling=2),
        "jpeg 4:2:2": saved(image, "JPEG", quality=88, subsampling=1),
        "jpeg 4:4:4": saved(image, "JPEG", quality=88, subsampling=0),
        "jpeg progressive": saved(image, "JPEG", quality=88, progressive=True),
        "jpeg grayscale": saved(image.convert("L"), "JPEG", quality=88),
        "jpeg cmyk": saved(image.convert("CMYK"), "JPEG", quality=88),
        "png": saved(image, "PNG"),
        "png alpha": saved(_with_alpha(image), "PNG"),
        "png grayscale": saved(image.convert("L"), "PNG"),
        "png grayscale alpha": saved(_with_alpha(image).convert("LA"), "PNG"),
        "png palette": saved(image.quantize(64), "PNG"),
        "png palette transparent": saved(image.quantize(64), "PNG", transparency=3),
        "png 1 bit": saved(image.convert("1"), "PNG"),
        "png 16 bit": saved(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257 + 90), "PNG"),
        "webp": saved(image, "WEBP", quality=80),
        "webp lossless": saved(image, "WEBP", lossless=True),
        "webp alpha": saved(_with_alpha(image), "WEBP", quality=80),
    }
    for orientation in range(1, 9):
        files[f"jpeg orientation {orientation}"] = saved(image, "JPEG", quality=88, exif=_exif(orientation))
    files["png orientation 6"] = saved(image, "PNG", exif=_exif(6))
    files["webp orientation 8"] = saved(image, "WEBP", lossless=True, exif=_exif(8))
    return files


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _with_alpha(image: Image.Image) -> Image.Image:
    """Opaque on the left, transparent on the right."""
    ramp = np.broadcast_to(np.linspace(255, 0, image.width).astype(np.uint8), (image.height, image.width))
    image = image.copy()
    image.putalpha(Image.fromarray(np.ascontiguousarray(ramp)))
    return image


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()
