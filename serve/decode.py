"""From the bytes of image files to the most likely classes, without Ray and torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from cibl_ray.bundle.card import FORMATS, Card
from pipelines.pixels import MAX_PIXELS, BadImageError, EvalRule, decode, opened

Image.MAX_IMAGE_PIXELS = None  # Pillow's own check warns in one range and raises in another; `Limits.max_pixels` is ours
PngImagePlugin.MAX_TEXT_MEMORY = 4 << 20  # of a file's texts, which may be inflated a thousand times

_SIGNATURES = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF",),
    "GIF": (b"GIF8",),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "JPEG2000": (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    "PPM": tuple(b"P%c%c" % pair for pair in itertools.product(b"123456f", b" \t\r\n")),
}
_HEIF = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


@dataclass(frozen=True)
class Limits:
    """What one image may be.

    Attributes:
        max_pixels: Of its header.
        formats: Pillow's names; None: those that training reads.
        max_scans: Of a JPEG. None: only the pixels are limited, as for one's own files.
    """

    max_pixels: int = MAX_PIXELS
    formats: tuple[str, ...] | None = FORMATS
    max_scans: int | None = 100


class UnsupportedImageError(BadImageError):
    """The bytes are of no format that is accepted."""


def pixels(data: bytes, rule: EvalRule, limits: Limits) -> np.ndarray:
    """Decode an image file as evaluation did.

    Args:
        data: The file.
        rule: From the model's card.
        limits: Checked before anything is decoded.

    Returns:
        uint8 (S, S, 3).

    Raises:
        UnsupportedImageError: It is of no format that is accepted.
        BadImageError: It is damaged, or beyond the limits.
    """
    _check_format(data, limits)
    try:
        return rule(decode(data, limits.formats, limits.max_pixels, limits.max_scans))
    except BadImageError:
        raise
    except Exception as error:  # damaged files fail in many ways, deep in their decoders
        raise BadImageError(f"{len(data):,} bytes, {type(error).__name__}") from error


def announced(data: bytes, limits: Limits) -> tuple[int, int]:
    """Read from an image file's head what decoding will cost.

    Args:
        data: The file.
        limits: What it may be.

    Returns:
        Its pixels, and its pixels times the passes of its decoder (the scans of a JPEG).

    Raises:
        UnsupportedImageError: It is of no format that is accepted.
        BadImageError: It is damaged, or beyond the limits.
    """
    _check_format(data, limits)
    try:
        image, scans = opened(data, limits.formats, limits.max_pixels, limits.max_scans)
        with image:
            pixels = image.width * image.height
            return pixels, pixels * scans
    except BadImageError:
        raise
    except Exception as error:  # as above
        raise BadImageError(f"{len(data):,} bytes, {type(error).__name__}") from error


def named(data: bytes) -> str | None:
    """Name the format of an image file by its first bytes.

    Args:
        data: The file, or its first 12 bytes.

    Returns:
        The format in Pillow's words; None for TGA, which has no signature, and for anything that is no image.
    """
    for name, signatures in _SIGNATURES.items():
        if data.startswith(signatures) and (name != "WEBP" or data[8:12] == b"WEBP"):
            return name
    if data[4:8] == b"ftyp":
        return "AVIF" if data[8:11] == b"avi" else "HEIF" if data[8:12] in _HEIF else None
    return None


def _check_format(data: bytes, limits: Limits) -> None:
    if limits.formats is not None and (found := named(data)) not in limits.formats:
        accepted = ", ".join(limits.formats)
        raise UnsupportedImageError(f"not an image of {accepted}" if found is None else f"a {found} file; send {accepted}")


def top(card: Card, probabilities: np.ndarray, k: int) -> list[dict[str, Any]]:
    """Name the most likely classes.

    Args:
        card: Of the model.
        probabilities: float32 (C,).
        k: How many; C at most.

    Returns:
        For each class, the most likely first: label, probability, group (many, medium or few), index.
    """
    k = min(k, len(probabilities))
    best = np.argpartition(-probabilities, k - 1)[:k]
    best = best[np.argsort(-probabilities[best], kind="stable")]
    return [
        {"label": card.classes[i], "probability": round(float(probabilities[i]), 6), "group": card.groups[i], "index": i}
        for i in best.tolist()
    ]
