"""Grey and colours of more than 8 bits: scaled by what the file says of its values, refused where nothing says."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines import png
from pipelines.config import DataConfig, Store
from pipelines.pixels import BadImageError, EvalRule, decode, to_rgb
from pipelines.prepare.images import pack
from tests.conftest import data_config


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_file(values: np.ndarray, *more: bytes) -> bytes:
    """A PNG of 16 bits: values (H, W) are grey, (H, W, 3) colours; `more`: chunks after the header."""
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png.SIGNATURE + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_file(values: np.ndarray, bits: int, **tags: int) -> bytes:
    """A TIFF of one strip, little-endian; 12 bits are packed as the format has it, two values in three bytes."""
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
        data = packed.astype(np.uint8).tobytes()
    else:
        data = values.astype(f"<u{bits // 8}").tobytes()
    height, width = values.shape
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: tags.get("photometric", 1), 273: 8, 277: 1, 278: height}
    entries |= {279: len(data)} | ({281: tags["highest"]} if "highest" in tags else {})
    table = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, entries[tag]) for tag in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries)) + table + bytes(4)


def grey(data: bytes, window=None) -> list[int]:
    return np.asarray(to_rgb(decode(data), window))[..., 0].ravel().tolist()


def test_twelve_bits_are_scaled_by_the_files_own_depth():
    values = np.array([[0, 15, 16, 2048, 4094, 4095]])
    assert grey(tiff_file(values, 12)) == [0, 0, 1, 128, 255, 255]
    assert grey(tiff_file(values, 16, highest=4095)) == [0, 0, 1, 128, 255, 255]
    assert grey(png_file(values, chunk(b"sBIT", b"\x0c"))) == [0, 0, 1, 128, 255, 255]
    assert grey(b"P5 6 1 4095\n" + values.astype(">u2").tobytes()) == [0, 0, 1, 128, 255, 255]


def test_sixteen_bits_are_their_upper_byte():
    values = np.array([[0, 255, 256, 32768, 65535, 4000]])
    right = [0, 0, 1, 128, 255, 15]
    assert grey(png_file(values)) == grey(tiff_file(values, 16)) == right
    assert grey(png_file(values, chunk(b"sBIT", b"\x0c"))) == right  # scaled to 16, as the format asks
    assert grey(tiff_file(values, 16, highest=3000)) == right  # a statistic, and a wrong one
    assert grey(tiff_file(values, 16, photometric=0)) == [255 - value for value in right]


@pytest.mark.parametrize("make", [png_file, lambda values: tiff_file(values, 16)])
@pytest.mark.parametrize("highest", [1023, 4095])
def test_a_depth_that_the_file_does_not_tell(make, highest):
    data = make(np.array([[0, 7, highest // 2 + 1, highest]]))
    for call in (lambda: grey(data), lambda: pack(data, Store())):
        with pytest.raises(
            BadImageError, match=rf"16-bit grey with values from 0 to {highest}, of a depth .* 8 bits$"
        ) as refused:
            call()
        assert refused.value.setting == "data.window: [BLACK, WHITE]"
    assert grey(data, (0, highest)) == [0, 7 * 256 // (highest + 1), 128, 255]
    assert grey(data, (0, 65535))[-1] == highest >> 8  # dark, and meant so
    assert np.frombuffer(pack(data, Store(), window=(0, highest)).data, np.uint8)[-1] == 255
    assert EvalRule(1, window=(0, highest))(decode(data)).shape == (1, 1, 3)


def test_a_window_takes_floats_and_what_lies_outside():
    buffer = io.BytesIO()
    Image.fromarray(np.float32([[-1, 0, 0.5, 1, 9, np.nan]])).save(buffer, "TIFF")
    assert grey(buffer.getvalue(), (0, 1)) == [0, 0, 128, 255, 255, 0]
    assert grey(tiff_file(np.array([[0, 1000, 1500, 1999, 65535]]), 16), (1000, 1999)) == [0, 0, 128, 255, 255]


def pgm_file(values: np.ndarray, highest: int, plain: bool = False) -> bytes:
    height, width = values.shape
    pixels = " ".join(map(str, values.ravel())).encode() if plain else values.astype(">u2").tobytes()
    return f"{'P2' if plain else 'P5'} {width} {height} {highest}\n".encode() + pixels


def jpeg2000_file(values: np.ndarray, bare: bool) -> bytes:
    """12 bits: Pillow writes 16, so the header is changed, and the values by what that moves the middle grey."""
    buffer = io.BytesIO()
    image = Image.fromarray((values + (1 << 15) - (1 << 11)).astype(np.uint16))
    image.save(buffer, "JPEG2000", irreversible=False, num_resolutions=1, no_jp2=bare)
    data = bytearray(buffer.getvalue())
    data[data.find(b"\xff\x4f\xff\x51") + 42] = 11
    if not bare:
        data[data.find(b"ihdr") + 14] = 11
    return bytes(data)


@pytest.mark.parametrize(
    "make",
    [
        lambda values: pgm_file(values, 4095),
        lambda values: pgm_file(values, 4095, plain=True),
        lambda values: pgm_file(values, 65535),
        lambda values: jpeg2000_file(values, bare=False),
        lambda values: jpeg2000_file(values, bare=True),
        lambda values: tiff_file(values, 12),
        lambda values: tiff_file(values, 16),
        png_file,
    ],
    ids=["pgm", "plain_pgm", "pgm_of_16_bits", "jp2", "j2k", "tiff", "tiff_of_16_bits", "png"],
)
def test_a_windows_values_are_those_in_the_file(make):
    """Pillow scales those of some formats to 16 bits."""
    values = np.array([[0, 15, 16, 999, 1000, 2048, 4094, 4095]])
    data = make(values)
    assert grey(data, (0, 4095)) == [value >> 4 for value in values.ravel().tolist()]
    assert grey(data, (1000, 1255)) == [0, 0, 0, 0, 0, 255, 255, 255]
    every = np.arange(4096)[None]
    assert grey(make(every), (0, 4095)) == [value >> 4 for value in range(4096)]


def test_black_images_are_black():
    assert grey(png_file(np.zeros((1, 3), int))) == [0, 0, 0]


def test_colours_of_unknown_depth_are_refused():
    values = np.zeros((1, 2, 3), int)
    values[0, 1] = 4095
    with pytest.raises(BadImageError, match=r"16-bit colours with values below 4,096"):
        to_rgb(decode(png_file(values)))
    values[0, 1, 2] = 4096
    assert np.asarray(to_rgb(decode(png_file(values))))[0, 1].tolist() == [15, 15, 16]


def test_a_transparent_value_of_sixteen_bits_lies_over_white():
    values = np.array([[0, 0x1234, 0x1235, 65535]])
    assert grey(png_file(values, chunk(b"tRNS", struct.pack(">H", 0x1234)))) == [0, 255, 0x12, 255]
    colours = np.array([[[0x1234, 0x5678, 0x9ABC], [0x1234, 0x5678, 0x9ABD], [65535, 0, 0]]])
    data = png_file(colours, chunk(b"tRNS", struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC)))
    assert np.asarray(to_rgb(decode(data)))[0].tolist() == [[255, 255, 255], [0x12, 0x56, 0x9A], [255, 0, 0]]


def test_the_window_is_two_values_in_order():
    assert DataConfig(source={"kind": "digits"}, window=[0, 4095]).window == (0, 4095)
    with pytest.raises(ValueError, match="black < white"):
        data_config(window=[4095, 0])
