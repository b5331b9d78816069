"""One's own files are read whatever their metadata hold; their pixels are what counts."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipelines import png
from pipelines.pixels import MAX_PIXELS, BadImageError, decode, to_rgb
from tests.pipelines.test_depth import chunk


@pytest.fixture(scope="module")
def plain(photos):
    buffer = io.BytesIO()
    Image.open(photos[0]).resize((64, 48)).save(buffer, "PNG")
    return buffer.getvalue()


LONG = bytes(3 << 20)
KINDS = {
    "zTXt": b"Comment\0\0" + zlib.compress(LONG),
    "iTXt": b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG),
    "iCCP": b"profile\0\0" + zlib.compress(LONG),
}


@pytest.mark.parametrize("kind", [*KINDS])
@pytest.mark.parametrize("at", [33, -12])
def test_text_and_profiles_of_megabytes_are_stepped_over(plain, kind, at):
    data = plain[:at] + chunk(kind.encode(), KINDS[kind]) + plain[at:]
    assert np.array_equal(np.asarray(to_rgb(decode(data))), np.asarray(decode(plain)))
    if kind != "iCCP" or at > 0:
        with pytest.raises(BadImageError):  # a stranger's file is not worth it
            decode(data, ("PNG",), MAX_PIXELS)


@pytest.mark.parametrize("limit", [4 << 20, 64 << 20])
def test_much_text_altogether_and_a_damaged_one(plain, monkeypatch, limit):
    """Whatever Pillow's limit is: the service lowers it for its whole process."""
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", limit)
    text = chunk(b"tEXt", b"Comment\0" + bytes(900_000)) * 80
    damaged = bytearray(chunk(b"tEXt", b"Comment\0words"))
    damaged[-1] ^= 1
    for more in (text, bytes(damaged)):
        data = plain[:33] + more + plain[33:]
        assert np.array_equal(np.asarray(decode(data)), np.asarray(decode(plain)))


def test_only_what_is_too_large_is_left_out(plain):
    """The orientation in a small chunk counts beside a large one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    small = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    profile = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"words"))
    data = plain[:33] + small + profile + chunk(b"zTXt", KINDS["zTXt"]) + plain[33:]
    assert to_rgb(decode(data)).size == (48, 64)
    kept = png.without_large_metadata(data)
    assert kept == plain[:33] + small + profile + plain[33:]
    assert PngImagePlugin.PngImageFile(io.BytesIO(kept)).text == {"Comment": "words"}


def test_damaged_pixels_stay_damaged(plain):
    data = plain[:33] + chunk(b"zTXt", KINDS["zTXt"]) + plain[33:-200]
    with pytest.raises(BadImageError):
        decode(data)


def test_pillows_own_limit_of_pixels_does_not_hold(recwarn):
    """It warns from 89 million pixels on and raises from 179 million; ours is one number."""
    before = Image.MAX_IMAGE_PIXELS
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10_000 * 2_501), 1)
    data = png.SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert decode(data, max_pixels=200_000_000, max_scans=None).size == (20_000, 10_000)
    with pytest.raises(BadImageError, match="20000x10000 pixels, 60,000,000 at most"):
        decode(data, max_pixels=MAX_PIXELS, max_scans=None)
    assert before == Image.MAX_IMAGE_PIXELS
    assert not recwarn
