"""Every kind of image file is read as a viewer shows it, and a JPEG that fits keeps its bytes."""

import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines import jpeg
from pipelines.config import Store
from pipelines.formats import readable_formats
from pipelines.pixels import BadImageError, decode, to_rgb
from pipelines.prepare.images import pack


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(to_rgb(decode(data)))


@pytest.fixture(scope="module")
def photo(photos) -> Image.Image:
    return Image.open(photos[0]).resize((64, 48))


def test_grayscale(photo):
    grey = photo.convert("L")
    pixels = rgb(encode(grey, "PNG"))
    assert pixels.shape == (48, 64, 3)
    assert (pixels == np.asarray(grey)[..., None]).all()


def test_cmyk_jpeg_shows_the_same_picture(photo):
    pixels = rgb(encode(photo.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - np.asarray(photo)).mean() < 3


def test_palette(photo):
    indexed = photo.quantize(64)
    assert (rgb(encode(indexed, "PNG")) == np.asarray(indexed.convert("RGB"))).all()


def test_alpha_lies_over_white():
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    assert rgb(encode(image, "PNG")).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_premultiplied_grey_lies_over_white():
    """Pillow converts such grey to nothing but grey with alpha."""
    image = Image.new("LA", (2, 1))
    image.putpixel((1, 0), (100, 128))
    tag = b"\x52\1\3\0\1\0\0\0"  # ExtraSamples, a short
    data = encode(image, "TIFF").replace(tag + b"\2", tag + b"\1")
    assert decode(data).mode == "La"
    assert rgb(data).tolist() == [[[255] * 3, [100 + 127] * 3]]


def test_palette_with_transparency():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert rgb(encode(image, "PNG", transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_sixteen_bit_grey_is_scaled():
    image = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert rgb(encode(image, "PNG"))[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian"])
def test_every_sixteen_bit_grey_is_its_upper_byte(kind):
    values = np.arange(65536)[None]
    if kind == "big-endian":
        image = Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes())
    else:
        image = decode(encode(Image.fromarray(values.astype(np.uint16)), kind))
    assert image.mode == ("I;16B" if kind == "big-endian" else "I;16")
    assert (np.asarray(to_rgb(image)) == (values >> 8).astype(np.uint8)[..., None]).all()


def test_grey_of_32_bits_is_taken_for_16_where_it_can_be():
    image = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.int32))
    assert rgb(encode(image, "TIFF"))[0, :, 0].tolist() == [0, 1, 255]
    assert rgb(encode(Image.new("I", (2, 1)), "TIFF")).max() == 0
    assert rgb(b"P5 2 1 65535\n\0\0\0\7").max() == 0  # 16 bits, and dark


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.float32([0.0, 0.5, 1.0]), "floating-point grey; save it with 8 bits"),
        (
            np.int32([0, 7, 255]),
            "32-bit grey with values from 0 to 255, of a depth that the file does not tell; save it with 8 bits",
        ),
        (np.int32([0, 7, 65536]), "from 0 to 65536"),
        (np.int32([-1, 7, 300]), "from -1 to 300"),
    ],
)
def test_numbers_of_an_unknown_range_are_no_image(values, message):
    data = encode(Image.fromarray(values[None]), "TIFF")
    with pytest.raises(BadImageError, match=message) as caught:
        rgb(data)
    assert caught.value.setting == "data.window: [BLACK, WHITE]"  # for commands that have it
    with pytest.raises(BadImageError, match=message):
        pack(data, Store())


def test_exif_turns_the_image(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo, "JPEG", exif=exif)
    assert pack(data, Store(mode="jpeg")).width == 48


def test_a_jpeg_that_fits_keeps_its_bytes(photos):
    data = photos[0].read_bytes()
    packed = pack(data, Store(max_side=640))
    assert packed.jpeg
    assert packed.data == data
    smaller = pack(data, Store(max_side=320))
    assert (smaller.width, smaller.height) == (320, 214)
    assert smaller.data != data


def test_small_images_are_raw_and_exact(photo):
    packed = pack(encode(photo, "PNG"), Store())
    assert not packed.jpeg
    assert packed.data == photo.tobytes()


@pytest.mark.parametrize("length", [0, 10, 5_000, -100])
def test_truncated(photos, length):
    with pytest.raises(BadImageError):
        pack(photos[0].read_bytes()[:length], Store())


def test_square():
    packed = pack(np.zeros((8, 8, 3), np.uint8), Store(square=16))
    assert (packed.width, packed.height) == (16, 16)


def with_scans(count: int, side: int) -> bytes:
    """A progressive JPEG of so many scans, the last of a few bytes again and again."""
    data = encode(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * (count - jpeg.scans(data, 100)) + data[-2:]


def test_scans_are_counted_as_a_decoder_finds_them(photo):
    assert jpeg.scans(encode(photo, "JPEG", quality=95), 100) == 1
    assert jpeg.scans(encode(photo, "JPEG", progressive=True), 100) == 10
    data = with_scans(60, 64)
    assert jpeg.scans(data, 100) == 60
    assert jpeg.scans(data, 7) == 7
    assert jpeg.scans(data, 100, 60) is None
    hidden = data[:2] + b"\xff\xe1\x00\x06\xff\xda\xff\xd9" + data[2:]  # in a segment that is stepped over
    assert jpeg.scans(hidden, 100) == 60
    assert jpeg.end(hidden + data) == len(hidden)
    assert jpeg.end(data[:-1]) is None
    # Fill bytes, a stuffed one, a restart, and a marker without a length hide nothing.
    at = data.rfind(b"\xff\xda")
    for between in (b"\xff\xff", b"\xff\x00\x12", b"\xff\xd3", b"\xff\x02"):
        assert jpeg.scans(data[:at] + between + data[at:], 100) == 60


def test_a_picture_of_too_many_scans_is_refused_before_it_is_decoded():
    for count, side in ((100, 64), (25, 512)):
        assert decode(with_scans(count, side), ("JPEG",), 512 * 512).size == (side, side)
        with pytest.raises(BadImageError, match=f"more than {count} scans"):
            decode(with_scans(count + 1, side), ("JPEG",), 512 * 512)
    with pytest.raises(BadImageError, match="more than 1 scans"):
        decode(with_scans(6, 64), ("JPEG",), 512 * 512, 1)
    assert decode(with_scans(200, 64)).size == (64, 64)  # one's own data


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    ("kind", "at", "part"),
    [
        ("JPEG", 2, segment(0xFE, b"")),
        ("JPEG", 2, segment(0xE1, b"Exif\0\0" + bytes(100))),  # to which Pillow adds the next, again and again
        ("JPEG", 2, segment(0xF0, segment(0xFE, b"") * 1000)),  # whose length Pillow does not step over
        ("JPEG", 2, b"\xff\0"),
        ("JPEG", 2, b"\xff"),
        ("JPEG", -2, segment(0xFE, b"")),
        ("PNG", 33, chunk(b"teSt", b"")),
        ("PNG", 33, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 20)))),
        ("PNG", -12, chunk(b"teSt", b"")),
        ("PNG", -12, chunk(b"IDAT", b"")),
    ],
)
def test_a_file_of_too_many_parts_is_refused_before_they_have_cost_anything(photo, kind, at, part):
    data = encode(photo, kind)
    many = data[:at] + part * (1_000_000 // len(part) + 1) + data[at:]
    begun = time.process_time()
    with pytest.raises(BadImageError, match="too many parts|more than 2048 segments|more than 4 colour profiles"):
        decode(many, (kind,), 512 * 512)
    assert time.process_time() - begun < 0.25
    few = data[:at] + part * 3 + data[at:]
    if part[:2] != b"\xff\xf0":  # libjpeg takes none of them
        assert decode(few, (kind,), 512 * 512).size == photo.size


def test_metadata_of_megabytes_and_small_chunks_are_taken(photo):
    data = encode(photo, "JPEG")
    metadata = segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000)) * 240
    assert decode(data[:2] + metadata + data[2:], ("JPEG",), 512 * 512).size == photo.size
    data = encode(Image.effect_noise((200, 200), 99), "PNG")
    idat = data[data.index(b"IDAT") + 4 : -16]
    small = b"".join(chunk(b"IDAT", idat[n : n + 1024]) for n in range(0, len(idat), 1024))
    assert decode(data[: data.index(b"IDAT") - 4] + small + data[-12:], ("PNG",), 512 * 512).size == (200, 200)


def test_a_side_that_is_too_long_is_no_question_of_max_pixels():
    buffer = io.BytesIO()
    Image.new("1", (70000, 10)).save(buffer, "PNG")
    with pytest.raises(BadImageError, match=r"^70000x10 pixels, 65,535 a side at most$") as caught:
        decode(buffer.getvalue(), max_pixels=60_000_000)
    assert not caught.value.setting


def test_a_file_of_another_format_starts_no_decoder_whatever_it_is_called(tmp_path, monkeypatch):
    """Pillow hands an EPS file to Ghostscript, a program, whatever the file's name."""
    called = tmp_path / "called"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho 10.0\ntouch '{called}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # searched again
    image = Image.new("RGB", (20, 20))
    known = ", ".join(readable_formats())
    for kind in ("EPS", "PCX", "SGI", "ICO"):
        with pytest.raises(BadImageError, match=rf"^\d+ bytes, not of {known}$"):
            pack(encode(image, kind), Store())
    assert not called.exists()


def test_the_formats_are_those_of_the_endings():
    assert {"JPEG", "PNG", "BMP", "GIF", "TIFF", "PPM"} <= {*readable_formats()}
    assert {*readable_formats()} <= {"JPEG", "PNG", "BMP", "GIF", "TIFF", "PPM", "WEBP", "TGA", "JPEG2000", "AVIF"}
    for kind in readable_formats():
        assert decode(encode(Image.new("RGB", (20, 20)), kind)).format == kind
