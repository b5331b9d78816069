"""Evaluation shows exactly what the one rule makes of the original image file, however the file lies in the .beton."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pipelines.config import LoaderConfig
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import Share, eval_plan, eval_rule
from pipelines.pixels import EvalRule, decode
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.originals import original_images
from tests.conftest import data_config


@pytest.fixture(scope="module")
def odd_images(tmp_path_factory, photos):
    """Test images of every way to lie in the file: large and small JPEG, turned by EXIF, CMYK, PNG, PNG with transparency."""
    root = tmp_path_factory.mktemp("odd")
    photo = Image.open(photos[0])
    turned = Image.Exif()
    turned[0x0112] = 6
    for split in ("train", "test"):
        folder = root / split / "china"
        folder.mkdir(parents=True)
        photo.save(folder / "large.jpg", quality=95)
        photo.crop((10, 20, 250, 330)).save(folder / "small.jpg", quality=60)
        photo.save(folder / "turned.jpg", exif=turned)
        photo.convert("CMYK").save(folder / "cmyk.jpg")
        photo.resize((700, 300)).save(folder / "wide.png")
        photo.convert("RGBA").rotate(20).save(folder / "clear.png")
        (root / split / "other").mkdir()
        photo.resize((50, 40)).save(root / split / "other" / "tiny.png")
    return root


@pytest.mark.parametrize("store", [{}, {"max_side": 300}, {"mode": "raw", "max_side": 200}, {"square": 128}, {"mode": "jpeg"}])
def test_pixels_are_those_of_the_original(odd_images, tmp_path, store):
    data = data_config(
        source={"kind": "folder", "path": str(odd_images)},
        store=store,
        prepared=str(tmp_path),
        size=96,
        eval_cut={"kind": "center", "ratio": 0.875},
        views=[{"cut": {"kind": "resized"}}],
    )
    prepared = ensure_prepared(data, 0)
    loader = make_loader(prepared, "test", eval_plan(data, 3), LoaderConfig(workers=2))
    seen = np.concatenate([batch.views[:, 0].numpy() for batch in loader.epoch(0)])
    originals = list(original_images(prepared, "test", data, 0, 7))
    rule = eval_rule(data)
    assert len(seen) == len(originals) == 7
    for pixels, (content, place) in zip(seen, originals, strict=True):
        assert np.array_equal(pixels, rule(decode(content))), place
        assert content == Path(place).read_bytes()


def test_names_that_hold_ends_of_lines(tmp_path):
    """Rows are found by counting lines of files.txt."""
    names = ("a\nb", "-c,d", "e\u2028f", "g\rh", "i\u0085j")
    for split in ("train", "test"):
        for number, name in enumerate(names):
            folder = tmp_path / "images" / split / f"{number}\n,"
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{name}.png")
    data = data_config(source={"kind": "folder", "path": str(tmp_path / "images")}, prepared=str(tmp_path / "prepared"))
    prepared = ensure_prepared(data, 0)
    beton = prepared.beton("test")
    for row, (content, place) in enumerate(original_images(prepared, "test", data, 0, len(names))):
        assert Path(place).read_bytes() == content
        assert Path(place).parent.name == prepared.classes[beton.labels[row]]
    lines = prepared.folder / "test.files.txt"
    lines.write_text(lines.read_text().replace("\\n", "\n"))  # as an earlier version wrote it: the stored images stand in
    assert all(place.startswith("image ") for _, place in original_images(prepared, "test", data, 0, len(names)))


@pytest.mark.parametrize("turn", [0, 90])
def test_the_rule_is_the_communitys_resize_and_centre_crop(photos, turn):
    image = Image.open(photos[0]).rotate(turn, expand=True)
    whole = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(image)
    ours = EvalRule(224, 0.875)(image)
    assert np.abs(ours.astype(int) - np.asarray(whole)).max() <= 1


def test_workers_share_out_every_sample(odd_images, tmp_path):
    data = data_config(source={"kind": "folder", "path": str(odd_images)}, prepared=str(tmp_path), size=32)
    prepared = ensure_prepared(data, 0)
    rows = []
    for worker in range(3):
        loader = make_loader(prepared, "test", eval_plan(data, 2, Share(worker, 3)), LoaderConfig())
        rows += [batch.index for batch in loader.epoch(0)]
    assert torch.equal(torch.cat(rows), torch.arange(7))


def test_a_pixel_limit_is_kept_before_decoding():
    buffer = io.BytesIO()
    Image.new("RGB", (300, 300)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="300x300 pixels, 10,000 at most"):
        decode(buffer.getvalue(), ("PNG",), 10_000)
