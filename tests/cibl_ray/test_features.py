"""A head on features: computed once, those of evaluation, kept whole, and a run on them goes on to the bit."""

import errno
import importlib
import json
import logging
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cibl_ray.config import load_config
from cibl_ray.evaluation.evaluate import evaluate
from cibl_ray.features import store
from cibl_ray.features.extract import Extractor
from cibl_ray.features.folds import FoldFeatures
from cibl_ray.features.loader import FeatureLoader
from cibl_ray.hardware import resolve
from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.run.log import read_metrics
from cibl_ray.training.folds import cross_validate
from cibl_ray.training.trainer import Trainer
from pipelines.common.errors import UserError
from pipelines.config import View
from pipelines.loaders.cuts import epoch_order
from pipelines.loaders.reading import ReadPlan
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.writer import read_lines

FLAGS = [
    "--tune",
    "head",
    "--epochs",
    "3",
    "--warmup_epochs",
    "1",
    "--batch_size",
    "32",
    "--loader.kind",
    "torch",
    "--precision",
    "fp32",
]


def configure(folder, *more):
    return resolve(load_config("quickstart", [*FLAGS, "--data.prepared", str(folder / "prepared"), *more]))


def trainer(folder, name, *more, start=None):
    config = configure(folder, *more)
    (folder / name).mkdir(exist_ok=True)
    return Trainer(config, ensure_prepared(config.data, config.seed), folder / name, resume_from=start)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


def test_only_the_head_learns_and_evaluation_of_the_images_agrees(folder):
    run = trainer(folder, "plain", "--loss", "{kind: balanced_softmax}", "--optimizer", "{kind: adamw, lr: 0.01}")
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    result = run.fit()
    after = run.network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    checkpoint = load_checkpoint(folder / "plain" / "checkpoints" / "last.safetensors")
    scores, of_images = result["last"]["scores"], evaluate(checkpoint).scores
    assert of_images.overall == scores.overall
    assert of_images.loss == pytest.approx(scores.loss, rel=1e-4)
    rows = read_metrics(folder / "plain")
    assert rows[-1]["train"]["loss"] < rows[0]["train"]["loss"]


def test_a_run_goes_on_to_the_bit(folder):
    flags = ("--loss", "{kind: cibl}", "--network.neck", "{hidden: 32, dropout: 0.1}", "--optimizer.kind", "adamw")
    whole = trainer(folder, "whole", *flags)
    whole.fit()
    half = trainer(folder, "half", *flags)
    half.train_epoch()
    half.save()
    start = load_checkpoint(folder / "half" / "checkpoints" / "last.safetensors")
    rest = trainer(folder, "half", *flags, start=start)
    rest.restore(start)
    rest.fit()
    last, expected = (load_checkpoint(folder / name / "checkpoints" / "last.safetensors") for name in ("half", "whole"))
    for mine, theirs in ((last.weights, expected.weights), (last.optimizer, expected.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert {name.partition(":")[2] for name in last.optimizer} == {"exp_avg", "exp_avg_sq", "step"}


def extractor(folder, *more, seed=0):
    config = configure(folder, *more)
    torch.manual_seed(seed)
    backbone, _ = config.network.backbone.build()
    said: list[str] = []
    made = Extractor(backbone, "small", config.data, config.loader, torch.device("cpu"), said.append)
    return made, ensure_prepared(config.data, config.seed), said


def test_features_are_computed_once_and_only_for_new_images_or_weights(tmp_path):
    made, prepared, said = extractor(tmp_path)
    first = made.split(prepared, "test")
    assert first.shape == (prepared.splits["test"].samples, 1, 64)
    assert "all known" not in said[0]
    again, _, said = extractor(tmp_path)
    assert torch.equal(again.split(prepared, "test"), first)
    assert said == [f"features of test: {len(first):,} images, all known"]
    # Another seed carves other images out for validation; those that were seen are not computed again.
    made, moved, said = extractor(tmp_path, "--seed", "1")
    made.split(prepared, "train")
    made.split(moved, "train")
    new = set(store.digests_of(moved.beton("train")).tolist()) - set(store.digests_of(prepared.beton("train")).tolist())
    line = next(line for line in reversed(said) if line.startswith("features of train"))
    assert f"on {len(new):,} images, {moved.splits['train'].samples - len(new):,} known" in line
    other, _, said = extractor(tmp_path, seed=1)
    assert not torch.equal(other.split(prepared, "test"), first)
    assert "all known" not in said[0]


def test_files_that_are_damaged_or_half_written_are_never_used(tmp_path, caplog):
    made, prepared, _ = extractor(tmp_path)
    expected = made.split(prepared, "test")
    (file,) = (tmp_path / "prepared" / "features").rglob("*.safetensors")
    whole = file.read_bytes()
    file.with_name("000001.safetensors.part").write_bytes(whole[: len(whole) // 2])
    file.write_bytes(whole[: len(whole) // 2])
    again, _, said = extractor(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(again.split(prepared, "test"), expected)
    assert "are damaged" in caplog.text
    assert f"on {len(expected):,} images" in said[0]
    # Once the images are stored again, nothing is left to warn of.
    caplog.clear()
    again, _, said = extractor(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(again.split(prepared, "test"), expected)
    assert "all known" in said[0]
    assert not file.exists()
    assert "damaged" not in caplog.text


def test_a_new_file_of_features_replaces_none_after_one_was_removed(tmp_path):
    kept = store.FeatureStore(tmp_path, {})
    for image in range(3):
        kept.add(np.array([image], dtype=np.uint64), torch.full((1, 2), float(image)))
    (kept.folder / "000000.safetensors").unlink()
    kept.add(np.array([3], dtype=np.uint64), torch.full((1, 2), 3.0))
    there, features = kept.read(np.arange(4, dtype=np.uint64))
    assert there.tolist() == [False, True, True, True]
    assert features[:, 0].tolist() == [1, 2, 3]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    made, prepared, _ = extractor(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_atomically", full)
    with pytest.raises(UserError, match="No space left on device.*--data.prepared"):
        made.split(prepared, "test")


def test_changed_code_of_the_users_own_computes_features_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = """
from torch import nn
import own_layers
def model():
    return nn.Sequential(own_layers.Mean(), nn.Flatten())
"""
    layers = "from torch import nn\nclass Mean(nn.Module):\n    def forward(self, x):\n        return {} * x.mean((2, 3))\n"

    def features(factor: str) -> torch.Tensor:
        (tmp_path / "own.py").write_text(source)
        (tmp_path / "own_layers.py").write_text(layers.format(factor))
        for name in ("own", "own_layers"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        run = trainer(tmp_path, f"run {factor}", "--network.backbone", "{kind: module, path: own.model}")
        return run.train_loaders[0]._features

    one, ten = features("1"), features("10.0")
    assert torch.equal(10 * one, ten)
    assert torch.equal(features("1"), one)
    assert len([*(tmp_path / "prepared" / "features").glob("*/what.json")]) == 2


def test_the_key_of_known_networks_is_as_it_was(tmp_path):
    made, prepared, _ = extractor(tmp_path)
    made.split(prepared, "test")
    (what,) = (tmp_path / "prepared" / "features").glob("*/what.json")
    assert {*json.loads(what.read_text())} == {"version", "weights", "mean", "std", "precision", "rule"}


def test_views_are_drawn_among_those_that_are_kept(tmp_path):
    made, prepared, said = extractor(tmp_path)
    features = made.split(prepared, "train", views=2)
    assert features.shape[1] == 3
    assert not torch.equal(features[:, 0], features[:, 1])
    assert not torch.equal(features[:, 1], features[:, 2])
    again, _, said = extractor(tmp_path)
    assert torch.equal(again.split(prepared, "train", views=2), features)
    assert not any("augmented" in line for line in said)
    # Draws follow an image's place: of other images, and of copies, no earlier view is taken.
    grown, moved, said = extractor(tmp_path, "--seed", "1")
    assert not torch.equal(grown.split(moved, "train", views=1)[:, 1], features[:, 1])
    assert any("augmented" in line for line in said)
    labels = np.arange(40) % 4
    kept = torch.arange(40 * 3).view(40, 3, 1).float()
    plan = ReadPlan((View(), View()), 8, 10, 0, "instance", drop_last=True)
    loader = FeatureLoader(kept, labels, plan, torch.device("cpu"), "train")
    batches = [*loader.epoch(0)]
    assert len(batches) == loader.batches == 4
    views = torch.cat([batch.views for batch in batches])[..., 0]
    rows = torch.cat([batch.index for batch in batches])
    assert sorted(rows.tolist()) == [*range(40)]
    assert torch.equal(views // 3, rows[:, None].expand(-1, 2).float())  # a sample's own features
    assert {*(views % 3).flatten().tolist()} == {0, 1, 2}
    # From the middle of an epoch on, the same.
    assert torch.equal(next(iter(loader.epoch(0, 2))).views, batches[2].views)
    assert not torch.equal(next(iter(loader.epoch(1))).index, batches[0].index)


def test_features_are_drawn_by_the_weights_of_a_table(tmp_path, monkeypatch):
    labels = np.arange(40) % 3
    weights = np.where(labels == 0, 0.5, 1.0) + np.arange(40) % 7
    plan = ReadPlan((View(),), 8, 10, 0, "weighted", drop_last=True)
    features = torch.arange(40).view(40, 1, 1).float()
    loader = FeatureLoader(features, labels, plan, torch.device("cpu"), "train", weights)
    rows = torch.cat([batch.index for batch in loader.epoch(1)]).tolist()
    assert rows == epoch_order(labels, "weighted", 0, 1, row_weights=weights).tolist()
    kept, held_out = np.flatnonzero(np.arange(40) % 5), np.flatnonzero(np.arange(40) % 5 == 0)
    fold = FoldFeatures(features, labels, kept, held_out, torch.device("cpu"), weights).train(plan)
    rows = torch.cat([batch.views[:, 0, 0] for batch in fold.epoch(0)]).long().tolist()
    expected = epoch_order(labels[kept], "weighted", 0, 0, row_weights=weights[kept])
    assert rows == kept[expected][:30].tolist()

    # A run takes them from the table, and so do the heads of its folds.
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    with (tmp_path / "t.csv").open("w") as table:
        print("image,label,weight", file=table)
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / f"{number}.png")
            print(f"{number}.png,{labels[number]},{weights[number]}", file=table)
    source = ("--data.source", f"{{kind: table, path: {tmp_path / 't.csv'}}}", "--data.profile.kind", "none")
    run = trainer(tmp_path, "run", *source, "--data.sampling", "weighted", "--batch_size", "8")
    beton = run.prepared.beton("train")
    names = read_lines(run.prepared.folder / "train.files.txt")
    assert beton.weights.tolist() == [weights[int(name.removesuffix(".png"))] for name in names]
    rows = torch.cat([batch.index for batch in run.train_loaders[0].epoch(1)]).tolist()
    expected = epoch_order(beton.labels, "weighted", run.config.seed, 1, row_weights=beton.weights)
    assert rows == expected[: len(rows)].tolist()
    seen = []

    def order(labels, *arguments):
        seen.append(arguments[-1])
        return epoch_order(labels, *arguments)

    monkeypatch.setattr("cibl_ray.features.loader.epoch_order", order)
    assert len(cross_validate(run, 2).of_each) == 2
    of_folds = [weights for weights in seen if len(weights) < len(beton)]
    assert sorted({*np.concatenate(of_folds).tolist()}) == sorted({*beton.weights.tolist()})
    with pytest.raises(UserError, match="the training images have no weights"):
        trainer(tmp_path, "none", "--data.sampling", "weighted")


def test_a_folder_smaller_than_a_batch_is_one_batch(tmp_path):
    config = configure(tmp_path, "--batch_size", "100000")
    run = Trainer(config, ensure_prepared(config.data, config.seed), tmp_path)
    assert run.train_loaders[0].batches == 1
    assert run.config.train.batch_size == run.prepared.splits["train"].samples


@pytest.mark.parametrize("head", ["{kind: linear}", "{kind: cosine}"])
def test_a_head_of_class_means_finds_the_nearest_mean(folder, head):
    run = trainer(folder, "means", "--head_start", "class_means", "--network.head", head)
    loader = run.train_loaders[0]
    features, labels = loader._features[:, 0], torch.from_numpy(loader._labels.astype(np.int64))
    means = torch.stack([features[labels == label].mean(0) for label in range(10)])
    if "cosine" in head:
        expected = (torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(means).T).argmax(1)
    else:
        expected = torch.cdist(features.double(), means.double()).argmin(1)
    found = run.network.classify(features).argmax(1)
    assert (found == expected).float().mean() > 0.99  # ties of rounding apart
    if "linear" in head:  # of other scales, the labels are less likely
        loss = torch.nn.functional.cross_entropy
        logits = run.network.classify(features)
        assert loss(logits, labels) < min(loss(2 * logits, labels), loss(logits / 2, labels)) + 1e-6


def test_fine_tuning_may_start_from_a_head_that_is_trained_on_features(folder):
    flags = ("--tune", "partial", "--loss", "{kind: balanced_softmax}", "--epochs", "1", "--network.neck", "{hidden: 32}")
    random, started = (trainer(folder, name, *flags, "--head_start", name) for name in ("random", "trained"))
    states = random.network.state_dict(), started.network.state_dict()
    assert {name for name in states[0] if not torch.equal(states[0][name], states[1][name])} == {
        "head.weight",
        "head.bias",
        "neck.layers.1.weight",
        "neck.layers.1.bias",
    }
    loader = trainer(folder, "plain").train_loaders[0]
    features, labels = loader._features[:, 0], torch.from_numpy(loader._labels.astype(np.int64))
    of = [torch.nn.functional.cross_entropy(each.network.eval().classify(features), labels) for each in (random, started)]
    assert of[1] < 0.9 * of[0]
    assert started.network.head.weight.grad is None
    with pytest.raises(UserError, match="head_start 'trained' is for train.tune 'partial' and 'full'"):
        configure(folder, "--head_start", "trained")
