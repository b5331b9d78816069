"""Real photographs as image files of many kinds, for those who decode them: service, edge, browser."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin


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
    return files | turned_otherwise(image)


def turned_otherwise(image: Image.Image) -> dict[str, bytes]:
    """Files whose orientation is not the first EXIF tag as a SHORT: in XMP, in a PNG's texts, of another type or byte order."""
    xmp, plain = b'<rdf:Description tiff:Orientation="6"/>', b"<tiff:Orientation> 5</tiff:Orientation>"
    profile = f"\nexif\n{len(_exif(6)):8d}\n{_exif(6).hex()}\n"
    long = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\4\0\0\0\1\0\0\0\x07\0\0\0\0"
    rows = {
        "jpeg, xmp": saved(image, "JPEG", quality=88, xmp=xmp),
        "jpeg, xmp as an element": saved(image, "JPEG", quality=88, xmp=plain),
        "jpeg, exif before xmp": saved(image, "JPEG", quality=88, xmp=xmp, exif=_exif(1)),
        "jpeg, exif of no meaning before xmp": saved(image, "JPEG", quality=88, xmp=xmp, exif=_exif(9)),
        "jpeg, a long in the other byte order": saved(image, "JPEG", quality=88, exif=long),
        "jpeg, damaged exif": saved(image, "JPEG", quality=88, exif=long[:-8], xmp=xmp),
        "png, xmp": saved(image, "PNG", pnginfo=_texts("XML:com.adobe.xmp", xmp.decode(), "iTXt")),
        "png, compressed xmp": saved(image, "PNG", pnginfo=_texts("XML:com.adobe.xmp", xmp.decode(), "iTXt", zip=True)),
        "png, imagemagick's text": saved(image, "PNG", pnginfo=_texts("Raw profile type exif", profile)),
        "png, imagemagick's compressed text": saved(image, "PNG", pnginfo=_texts("Raw profile type exif", profile, zip=True)),
        "png, exif before a text": saved(image, "PNG", exif=_exif(3), pnginfo=_texts("Raw profile type exif", profile)),
        "webp, xmp": saved(image, "WEBP", lossless=True, xmp=xmp),
        "webp, exif before xmp": saved(image, "WEBP", lossless=True, xmp=xmp, exif=_exif(8)),
    }
    png = rows["png, xmp"]
    start = png.index(b"iTXt") - 4
    end = start + 12 + int.from_bytes(png[start : start + 4], "big")
    rows["png, xmp behind the picture"] = png[:start] + png[end:-12] + png[start:end] + png[-12:]
    return {f"orientation of {name}": data for name, data in rows.items()}


def _texts(keyword: str, text: str, kind: str = "tEXt", zip: bool = False) -> PngImagePlugin.PngInfo:  # noqa: A002
    """One text of a PNG file."""
    info = PngImagePlugin.PngInfo()
    (info.add_itxt if kind == "iTXt" else info.add_text)(keyword, text, zip=zip)
    return info


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
