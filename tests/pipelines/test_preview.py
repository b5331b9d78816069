"""The preview shows what training sees."""

import subprocess

import numpy as np
import pytest
from PIL import Image

from pipelines import preview as preview_command
from tests.commands import in_process


def preview(*arguments: str) -> subprocess.CompletedProcess[str]:
    return in_process(preview_command.main, *arguments)


def test_a_picture_of_the_views(photo_folder, tmp_path):
    out = tmp_path / "views.png"
    data = ["--data.source.kind", "folder", "--data.source.path", str(photo_folder), "--prepared", str(tmp_path / "prepared")]
    done = preview("recipes/imagenet_lt_90", *data, "--images", "4", "--out", str(out), "--data.size", "64")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"4 images, 2 views of 64x64: {out}\n"
    picture = np.asarray(Image.open(out))
    assert picture.shape == (4 * 182 + 6, 3 * 166 + 6, 3)
    tiles = [
        picture[22 + row * 182 : 182 + row * 182, 6 + column * 166 : 166 + column * 166]
        for row in range(4)
        for column in (1, 2)
    ]
    assert all(tile.std() > 5 for tile in tiles)  # a photograph in each
    again = preview("recipes/imagenet_lt_90", *data, "--out", str(out))
    assert again.returncode == 2
    assert again.stderr == f"error: {str(out)!r} exists; remove it, or name another file (--out)\n"


def test_where_the_network_decides_the_size_it_says_so(photo_folder, tmp_path):
    data = ["--data.source.path", str(photo_folder), "--prepared", str(tmp_path / "prepared"), "--images", "2"]
    done = preview("photos", *data)
    assert done.returncode == 0, done.stderr
    (first, second) = done.stdout.splitlines()
    assert first.startswith("2 images, 1 view of 32x32: ")
    assert second == (
        "data.size is not set: 32 is the default; a pretrained network is shown its own size, often --data.size 224"
    )
    assert len(preview("photos", *data, "--data.size", "224").stdout.splitlines()) == 1


def test_the_picture_lies_beside_the_prepared_data(tmp_path):
    """Where no file is named. Made again, it replaces the one before: it is this command's own."""
    for _ in range(2):
        done = preview("quickstart", "--prepared", str(tmp_path), "--images", "2")
        assert done.returncode == 0, done.stderr
        (picture,) = tmp_path.glob("*/views.png")
        assert done.stdout == f"2 images, 2 views of 16x16: {picture}\n"
        with Image.open(picture) as image:
            assert image.format == "PNG"


def test_a_view_belongs_to_its_image(digits, tmp_path):
    """The views of a digit are crops of it: the nearest of all stored images to each is its own."""
    out = tmp_path / "views.png"
    flags = ["--views", "[{cut: {kind: crop, padding: 0}, flip: 0}]", "--prepared", str(tmp_path)]
    done = preview("quickstart", *flags, "--images", "20", "--out", str(out))
    assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(out)).astype(int)
    for row in range(20):
        stored, view = (picture[22 + row * 182 : 182 + row * 182, left : left + 160] for left in (6, 172))
        assert (stored == view).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "0"], "1 to 64 images"),
        (["--nonsense", "1"], "unknown field"),
        (["--out", "v.psd"], "--out 'v.psd': name a file such as views.png in a folder that exists"),  # Pillow only reads it
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, message):
    done = preview("quickstart", "--out", str(tmp_path / "views.png"), *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
