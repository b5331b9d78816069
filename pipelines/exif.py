"""The orientation of an image file: one tag of its metadata, read alone, however damaged or unusual the others are."""

from __future__ import annotations

import re

from PIL import Image

_ORIENTATION = 0x0112
_SIZES = {1: 1, 3: 2, 4: 4}  # bytes of a value, of the types that a whole number may have: BYTE, SHORT, LONG
_XMP = re.compile(rb'tiff:Orientation(?:="|>)\s*([0-9])')
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(image: Image.Image) -> int:
    """How a viewer turns the image: 1 to 8 as in EXIF, 1 where the file does not say or says a number of no meaning.

    Args:
        image: An opened image. Its EXIF data decide, else its XMP data. TIFF files are turned by Pillow when they are loaded.
    """
    if image.format == "TIFF":
        return 1
    value = _from_exif(_exif_bytes(image))
    if value is None:
        value = _from_xmp(image)
    return 1 if value not in _TURNS else value


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned as an orientation says; itself where that is 1."""
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _exif_bytes(image: Image.Image) -> bytes:
    """The TIFF structure that holds the tags; empty where there is none."""
    data = image.info.get("exif", b"")
    if not data and isinstance(text := image.info.get("Raw profile type exif"), str):  # ImageMagick's, in PNG files
        try:
            data = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            data = b""
    if not isinstance(data, bytes):
        return b""
    return data.removeprefix(b"Exif\0\0")


def _from_exif(data: bytes) -> int | None:
    if data[:2] not in (b"II", b"MM"):
        return None

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], "little" if data[:2] == b"II" else "big")

    first = number(4, 4)
    for entry in range(number(first, 2)):
        at = first + 2 + 12 * entry
        if at + 12 > len(data):
            return None
        if number(at, 2) == _ORIENTATION:
            kind, count = number(at + 2, 2), number(at + 4, 4)
            size = _SIZES.get(kind, 0)
            if not size or not count:
                return None
            return number(at + 8 if size * count <= 4 else number(at + 8, 4), size)
    return None


def _from_xmp(image: Image.Image) -> int | None:
    text = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    found = _XMP.search(text.encode("utf-8", "replace") if isinstance(text, str) else text)
    return int(found[1]) if found else None
