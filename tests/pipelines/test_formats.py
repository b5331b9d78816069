"""HEIC through its extra: read like any other image where the package is installed, and named where it is not."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipelines.config import Store
from pipelines.pixels import decode, to_rgb
from pipelines.prepare.images import pack
from pipelines.prepare.sources import FolderSource
from tests.conftest import REPOSITORY

pillow_heif = pytest.importorskip("pillow_heif")


def heic(image: Image.Image, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=95, exif=exif.tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_is_read_and_turned(photos, orientation):
    photo = Image.open(photos[0]).resize((320, 240))
    got = np.asarray(to_rgb(decode(heic(photo, orientation)))).astype(int)
    right = np.asarray(photo) if orientation == 1 else np.rot90(np.asarray(photo), -1)
    assert got.shape == right.shape
    assert np.abs(got - right).mean() < 6
    packed = pack(heic(photo, orientation), Store())
    assert packed.jpeg
    assert (packed.width, packed.height) == right.shape[1::-1]


def test_heic_of_a_folder(image_folder, photos):
    (image_folder / "train" / "one" / "a.HEIC").write_bytes(heic(Image.open(photos[0]).resize((64, 64))))
    assert "train/one/a.HEIC" in FolderSource(kind="folder", path=image_folder).open().train.names


def test_without_the_extra_the_message_names_it(tmp_path, photos):
    (tmp_path / "a.heic").write_bytes(heic(Image.open(photos[0]).resize((64, 64))))
    code = f"""
import sys
sys.modules["pillow_heif"] = None
from pipelines.pixels import BadImageError, decode
try:
    decode(open({str(tmp_path / "a.heic")!r}, "rb").read())
except BadImageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "HEIC, which needs: pip install 'cibl-ray[heic]'\n"
