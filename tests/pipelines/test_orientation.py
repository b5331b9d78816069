"""An image is turned by its orientation tag alone, whatever else its metadata hold."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from pipelines.config import Store
from pipelines.pixels import EvalRule, decode, to_rgb
from pipelines.prepare.images import pack

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of the damaged metadata that these files have

TURNS = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2)}
TURNS |= {6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90}


@pytest.fixture(scope="module")
def pixels(photos):
    return np.asarray(Image.open(photos[0]).resize((96, 80)))


def saved(pixels, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def tags(*entries, order="<"):
    """EXIF bytes of raw (tag, type, count, four bytes of value) entries."""
    body = b"".join(struct.pack(f"{order}HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    start = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + start + struct.pack(f"{order}IH", 8, len(entries)) + body + bytes(4)


SIX = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("value", [*TURNS])
def test_every_orientation_of_every_format(pixels, kind, value):
    exif = Image.Exif()
    exif[0x0112] = value
    options = {"WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_lzw"}}.get(kind, {})
    got = np.asarray(to_rgb(decode(saved(pixels, kind, exif=exif, **options))))
    lies = np.asarray(to_rgb(decode(saved(pixels, kind, **options))))
    assert np.array_equal(got, TURNS[value](lies))


def test_no_other_tag_keeps_an_image_from_being_turned(pixels):
    """Each tag, type and count of a grid beside the orientation, as cameras and editors write them wrongly."""
    lies = np.asarray(decode(saved(pixels, "JPEG")))
    right, tried = np.rot90(lies, -1), 0
    for tag in (0x0001, 0x010E, 0x0111, 0x011A, 0x0128, 0x0132, 0x0213, 0x8769, 0x8825, 0x9286, 0xA005, 0xFFFF):
        for kind in range(14):
            for count in (0, 1, 2, 5, 0xFFFFFFFF):
                other = (tag, kind, count, b"\xff\xff\xff\x7f")
                for entries in ((other, SIX), (SIX, other)):
                    data = saved(pixels, "JPEG", exif=tags(*entries))
                    got = np.asarray(to_rgb(decode(data)))
                    assert np.array_equal(got, right), (tag, kind, count)
                    tried += 1
    assert tried == 1680


@pytest.mark.parametrize(("order", "kind", "value"), [("<", 3, b"\6\0\0\0"), (">", 3, b"\0\6\0\0"), (">", 4, b"\0\0\0\6")])
def test_byte_orders_and_types(pixels, order, kind, value):
    data = saved(pixels, "JPEG", exif=tags((0x0112, kind, 1, value), order=order))
    assert to_rgb(decode(data)).size == (80, 96)


def test_orientation_in_xmp_counts_where_exif_has_none(pixels):
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    assert to_rgb(decode(saved(pixels, "JPEG", xmp=xmp))).size == (80, 96)
    assert to_rgb(decode(saved(pixels, "JPEG", xmp=xmp, exif=tags((0x0112, 3, 1, b"\1\0\0\0"))))).size == (96, 80)


@pytest.mark.parametrize("value", [0, 1, 9, 65535])
def test_a_number_of_no_meaning_keeps_the_bytes(pixels, value):
    data = saved(pixels, "JPEG", exif=tags((0x0112, 3, 1, struct.pack("<HH", value, 0))))
    packed = pack(data, Store(mode="jpeg"))
    assert packed.kept
    assert packed.data == data
    assert not pack(saved(pixels, "JPEG", exif=tags(SIX)), Store(mode="jpeg")).kept


def test_a_picture_with_others_behind_it_keeps_its_bytes(pixels):
    second = Image.fromarray(pixels[::-1].copy())
    data = saved(pixels, "MPO", save_all=True, append_images=[second])
    assert decode(data).format == "MPO"
    packed = pack(data, Store(mode="jpeg"))
    assert packed.data == data
    assert np.array_equal(np.asarray(to_rgb(decode(packed.data))), np.asarray(to_rgb(decode(data))))


def test_an_image_that_is_stored_turned_gives_what_its_original_gives(pixels):
    data, rule = saved(pixels, "JPEG", exif=tags((0x9286, 7, 0xFFFFFFFF, b"\xff" * 4), SIX)), EvalRule(32, max_side=60)
    packed = pack(data, Store(max_side=60), lossless=True)
    assert (packed.width, packed.height) == (50, 60)
    stored = np.frombuffer(packed.data, np.uint8).reshape(60, 50, 3)
    assert np.array_equal(rule(decode(stored)), rule(decode(data)))
