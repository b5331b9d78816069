"""Images that were added move others from training to the test: later scores say so."""

import gzip
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import cibl_ray
from cibl_ray.evaluation.evaluate import evaluate
from cibl_ray.exporting.make_bundle import Options, make_bundle
from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.run.images import changed, keep_images
from pipelines.prepare.build import ensure_prepared

TINY = {
    "train.epochs": 1, "train.batch_size": 8, "network.backbone": "resnet20", "data.size": 32, "loader.kind": "torch",
    "loss": {"kind": "cross_entropy"}, "train.device": "cpu", "schedule.warmup_epochs": 0,
}  # fmt: skip


def add(folder, numbers):
    random = np.random.default_rng(numbers.start)
    for name in ("ash", "elm"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A finished run, its images as it saw them, and as they are after some were added."""
    folder = tmp_path_factory.mktemp("grown")
    add(folder / "photos", range(20))
    own = {"data.source.path": str(folder / "photos"), "data.prepared": str(folder / "prepared"), "runs": folder / "runs"}
    config = cibl_ray.load_config("folder", {**TINY, **own, "data.test_fraction": 0.25, "data.val_fraction": 0.1})
    run = cibl_ray.fit(config, name="first", progress=False)
    before = ensure_prepared(config.data, config.seed)
    held = {split: {*before.names(split)} for split in before.splits}
    add(folder / "photos", range(20, 50))
    return run, config, before, held


def test_a_run_keeps_the_names_of_what_it_saw(grown):
    run, _, _, held = grown
    lines = gzip.decompress((run.folder / "images.txt.gz").read_bytes()).decode().splitlines()
    assert {*lines} == {f"{split}\t{name}" for split in ("train", "val") for name in held[split]}


def test_test_images_that_were_trained_on_are_counted(grown, caplog):
    run, config, before, held = grown
    checkpoint = load_checkpoint(run.folder / "checkpoints" / "last.safetensors")
    assert changed(checkpoint, before, "test") == ""
    now = ensure_prepared(config.data, config.seed)
    seen = len({*now.names("test")} & (held["train"] | held["val"]))
    assert seen > 0
    said = (
        f"the test images have changed since this checkpoint was trained: it was trained on or chosen by {seen} of these "
        f"{now.splits['test'].samples}, so the scores are too high; train again, or keep test images in a folder of their own"
    )
    evaluate(checkpoint)
    assert said in caplog.text
    caplog.clear()
    made = make_bundle(run.folder / "checkpoints" / "last.safetensors", run.folder / "bundle", Options(precisions=("fp32",)))
    assert said in caplog.text
    assert f"**{said[0].upper()}{said[1:]}.**" in (made.folder / "README.md").read_text()
    (run.folder / "images.txt.gz").write_bytes(b"cut short")
    assert changed(checkpoint, now, "test") == "the test images have changed since this checkpoint was trained"


@pytest.mark.parametrize(("test", "samples", "kept"), [("c", 3, True), ("a", 3, False), ("c", 2_000_000, False)])
def test_names_that_tell_nothing_are_not_kept(tmp_path, test, samples, kept):
    """Numbers within each split, and names too many for the memory."""
    names = {"train": ["a", "b"], "test": [test]}
    splits = {"train": SimpleNamespace(samples=samples), "test": SimpleNamespace(samples=1)}
    keep_images(tmp_path, SimpleNamespace(splits=splits, names=lambda split: names[split]))
    assert (tmp_path / "images.txt.gz").exists() == kept
