"""Cross-validated heads: every image is scored once, by a head that was not trained on it."""

import json

import numpy as np
import pytest
import torch

from cibl_ray.config import load_config
from cibl_ray.evaluation.metrics import score, table
from cibl_ray.features.folds import ALWAYS_TRAINED, FoldFeatures, fold_numbers, fold_rows
from cibl_ray.hardware import resolve
from cibl_ray.run.folder import BEST, CHECKPOINTS
from cibl_ray.run.progress import Silent
from cibl_ray.run.shift import chosen_shift
from cibl_ray.run.which import checkpoint
from cibl_ray.training.fit import fit
from cibl_ray.training.folds import cross_validate, few_validation_images, folds_of
from cibl_ray.training.setup import settle
from cibl_ray.training.trainer import Trainer
from cibl_ray.world import World
from pipelines.common.errors import UserError
from pipelines.prepare.build import ensure_prepared

FLAGS = ["--tune", "head", "--epochs", "2", "--warmup_epochs", "0", "--batch_size", "32", "--loader.kind", "torch"]
FLAGS += ["--precision", "fp32", "--loss", "{kind: balanced_softmax}"]


class Told(Silent):
    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("folds")


def configure(folder, *more):
    return resolve(load_config("quickstart", [*FLAGS, "--data.prepared", str(folder / "prepared"), *more]))


def test_folds_hold_every_image_out_once_and_share_each_class():
    labels = np.repeat(np.arange(5), [23, 10, 5, 2, 1])
    numbers = fold_numbers(labels, 5, seed=3)
    assert numbers[-1] == ALWAYS_TRAINED  # the only image of its class
    for label, most in ((0, 5), (1, 2), (2, 1), (3, 1)):
        dealt = np.bincount(numbers[labels == label], minlength=5)
        assert dealt.max() == most
        assert dealt.max() - dealt.min() <= 1
    assert np.ptp(np.bincount(numbers[:-1], minlength=5)) <= 1  # sizes are alike, although classes are small
    scored = []
    for train, held_out in fold_rows(numbers):
        assert sorted([*train, *held_out]) == [*range(41)]
        assert set(labels[train]) == {0, 1, 2, 3, 4}
        scored += [*held_out]
    assert sorted(scored) == [*range(40)]
    assert not np.array_equal(numbers, fold_numbers(labels, 5, seed=4))


def test_a_fold_is_the_run_that_would_have_these_images_alone(folder, monkeypatch):
    """The head of a fold is, to the bit, the one that a run on the fold's images trains."""
    config = configure(folder)
    run = Trainer(config, ensure_prepared(config.data, config.seed), folder / "run")
    features, labels = run.features.features("train"), run.features.labels("train")
    alone = []
    monkeypatch.setattr("cibl_ray.training.folds.World", lambda **given: alone.append(given) or World())
    found = cross_validate(run, 3)
    assert alone == 3 * [{"alone": True}]  # of a run with several workers, rank 0 does this by itself
    numbers = fold_numbers(labels, 3, config.seed)
    rows, held_out = next(fold_rows(numbers))
    part = run.prepared.part({"train": labels[rows], "val": labels[held_out]})
    assert part.train_counts.tolist() == np.bincount(labels[rows], minlength=10).tolist()
    alone = Trainer(config, part, folder, features=FoldFeatures(features, labels, rows, held_out, run.device))
    for _ in range(config.train.epochs):
        alone.train_epoch()
    logits = alone.network.eval().classify(features[torch.from_numpy(held_out), 0])
    expected = score(logits.detach(), torch.from_numpy(labels[held_out]), run.prepared.train_counts)
    assert found.of_each[0].overall == expected.overall
    assert found.of_each[0].loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.pooled.samples == sum(fold.samples for fold in found.of_each) == len(labels)
    right = sum(fold.overall * fold.samples for fold in found.of_each)
    assert found.pooled.overall == pytest.approx(right / len(labels))
    # The run's own network is as it was.
    assert torch.equal(run.network.head.weight, Trainer(config, run.prepared, folder).network.head.weight)


def test_the_run_keeps_the_last_epoch_and_takes_the_shift_of_the_folds(folder, caplog):
    config, told = configure(folder, "--folds", "3"), Told()
    with caplog.at_level("INFO"):
        result = fit(config, folder / "crossed", False, World(), told)
    assert "best" not in result
    assert checkpoint(folder / "crossed").name == "last.safetensors"
    assert not (folder / "crossed" / CHECKPOINTS / BEST).exists()
    written = json.loads((folder / "crossed" / "result.json").read_text())
    assert written["folds"]["count"] == 3
    assert written["folds"]["scores"]["samples"] == written["last"]["tail_shift"]["images"] > 100
    assert written["folds"]["spread"]["overall"] > 0
    assert chosen_shift(checkpoint(folder / "crossed")) == written["folds"]["tail_shift"]["shift"]
    text = "\n".join(told.lines)
    assert "Accuracy on the training images, by 3 heads that were not trained on them" in text
    overall, spread = (100 * written["folds"][part]["overall"] for part in ("scores", "spread"))
    assert f"{overall:.1f} ± {spread:.1f}" in text
    assert "No validation split" not in text


@pytest.mark.parametrize(("accumulate", "expected"), [("1", 50), ("4", 48)])
def test_a_batch_of_too_few_images_is_lowered_to_what_its_parts_share(folder, accumulate, expected):
    """So that a fold, which has fewer images than the run, is trained where the run was."""
    config = configure(folder, "--batch_size", "64", "--accumulate", accumulate)
    few = ensure_prepared(config.data, config.seed).part({"train": np.repeat(np.arange(10), 5)})
    assert settle(config, few, World()).train.batch_size == expected


def test_automatic_folds_where_validation_is_too_small(folder):
    auto = configure(folder, "--folds", "auto")
    prepared = ensure_prepared(auto.data, auto.seed)
    assert min(prepared.splits["val"].counts) > 2
    assert folds_of(auto, prepared) == 0
    few = prepared.part({"train": np.repeat(np.arange(10), 30), "val": np.array([*range(10), *range(5, 10), *range(5, 10)])})
    assert folds_of(auto, few) == 5
    assert few_validation_images(few) == 5
    assert folds_of(auto, prepared.part({"train": np.repeat(np.arange(10), 30)})) == 5  # no validation split at all
    assert folds_of(configure(folder, "--folds", "auto", "--tune", "full"), few) == 0
    assert folds_of(configure(folder), few) == 0
    single = prepared.part({"train": np.arange(10)})  # one image a class: nothing can be held out
    assert folds_of(auto, single) == 0
    with pytest.raises(UserError, match="train.folds 3: no class has two training images"):
        folds_of(configure(folder, "--folds", "3"), single)
    with pytest.raises(UserError, match="train.folds 3 with train.start: the head there has seen the images of every fold"):
        folds_of(configure(folder, "--folds", "3", "--train.start", str(folder)), prepared)
    with pytest.raises(UserError, match="with train.start: the head there"):
        fit(configure(folder, "--folds", "3", "--train.start", str(folder)), folder / "refused", False, World(), Silent())
    assert not (folder / "refused").exists()
    with pytest.raises(UserError, match="train.folds 5 is for train.tune 'head'"):
        configure(folder, "--folds", "5", "--tune", "full")
    with pytest.raises(UserError, match="one fold leaves nothing to train on"):
        configure(folder, "--folds", "1")


def test_a_table_shows_the_spread():
    scores = [
        score(torch.eye(4)[torch.tensor(answers)], torch.tensor([0, 1, 2, 3]), np.full(4, 50))
        for answers in ([0, 1, 2, 3], [0, 1, 2, 0])
    ]
    row = table({"both": scores[0]}, {"both": scores}).splitlines()[1]
    assert row.split()[:4] == ["both", "100.0", "±", "17.7"]
    assert table({"both": scores[0]}).splitlines()[1].split()[1] == "100.0"
