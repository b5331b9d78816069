"""From the bytes of image files to the most likely classes. No Ray, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from cibl_ray.bundle.card import FORMATS, Card
from pipelines.pixels import BadImageError, EvalRule, decode, opened

Image.MAX_IMAGE_PIXELS = None  # Pillow's own check warns in one range and raises in another; `Limits.max_pixels` is ours
PngImagePlugin.MAX_TEXT_MEMORY = 4 << 20  # of a file's texts, which may be inflated a thousand times

MAX_SHIFT = 100.0  # either way, of tail_shift
_SIGNATURES = {
    "JPEG": b"\xff\xd8\xff",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "WEBP": b"RIFF",
    "GIF": b"GIF8",
    "BMP": b"BM",
}


@dataclass(frozen=True)
class Limits:
    """What one image may be. formats: Pillow's names. max_scans: of a JPEG."""

    max_pixels: int = 40_000_000
    formats: tuple[str, ...] = FORMATS
    max_scans: int = 100


class UnsupportedImageError(BadImageError):
    """Bytes of no format that is accepted."""


def pixels(data: bytes, rule: EvalRule, limits: Limits) -> np.ndarray:
    """uint8 (S, S, 3) of an image file, by the rule that evaluation followed. Raises BadImageError, or
    UnsupportedImageError."""
    _check_format(data, limits)
    try:
        return rule(decode(data, limits.formats, limits.max_pixels, limits.max_scans))
    except BadImageError:
        raise
    except Exception as error:  # damaged files fail in many ways, deep in their decoders
        raise BadImageError(f"{len(data):,} bytes, {type(error).__name__}") from error


def announced(data: bytes, limits: Limits) -> tuple[int, int]:
    """(pixels, pixels that all passes of its decoder go over) of an image file, not decoded. Raises BadImageError, or
    UnsupportedImageError."""
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


def _check_format(data: bytes, limits: Limits) -> None:
    known = any(data.startswith(_SIGNATURES[name]) for name in limits.formats)
    if not known or (data.startswith(b"RIFF") and data[8:12] != b"WEBP"):
        raise UnsupportedImageError(f"not an image of {', '.join(limits.formats)}")


def top(card: Card, probabilities: np.ndarray, k: int) -> list[dict[str, Any]]:
    """The k most likely classes of probabilities float32 (C,), most likely first: label, probability, shot group, index."""
    k = min(k, len(probabilities))
    best = np.argpartition(-probabilities, k - 1)[:k]
    best = best[np.argsort(-probabilities[best], kind="stable")]
    return [
        {"label": card.classes[i], "probability": round(float(probabilities[i]), 6), "group": card.groups[i], "index": i}
        for i in best.tolist()
    ]
