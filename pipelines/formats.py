"""The image files that are read, by their endings: one list for training, evaluation and the edge client."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping

from PIL import Image, features

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".avif",
)  # fmt: skip
_FEATURES = {".webp": "webp", ".jp2": "jpg_2000", ".avif": "avif"}  # what Pillow may have been built without
HEIF_SUFFIXES, HEIF_MODULE = (".heic", ".heif"), "pillow_heif"
# Folders that operating systems, network storage and archive programs make; thumbnails lie in some.
LEFTOVERS = {"@eadir", "lost+found", "__macosx", "#recycle", "#snapshot", "$recycle.bin", "system volume information"}


@functools.cache
def readable_suffixes() -> tuple[str, ...]:
    """The endings that this installation reads: those whose decoder Pillow has, HEIC's where pillow-heif is installed."""
    known = Image.registered_extensions()
    heif = HEIF_SUFFIXES if importlib.util.find_spec(HEIF_MODULE) is not None else ()
    built = {suffix: features.check(feature) for suffix, feature in _FEATURES.items()}
    return tuple(suffix for suffix in SUFFIXES if known.get(suffix) in Image.OPEN and built.get(suffix, True)) + heif


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats behind these endings. It knows more: for one of them, EPS, it starts Ghostscript."""
    known = Image.registered_extensions()
    found = {known[suffix] for suffix in readable_suffixes() if suffix not in HEIF_SUFFIXES}
    return tuple(sorted(found, key=lambda name: (name == "TGA", name)))  # TGA last: it has no signature


def left_out_text(endings: Mapping[str, int]) -> str:
    """Files that were left out, by their ending ('without ending' is one), and what would read them."""
    kinds = ", ".join(f"{count:,} {ending}" for ending, count in sorted(endings.items()))
    heif = any(ending in HEIF_SUFFIXES for ending in endings)
    return f"{kinds}, not among the endings of images" + ("; for HEIC: pip install 'cibl-ray[heic]'" if heif else "")
