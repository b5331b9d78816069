"""How often an epoch shows a class, and that every sampling reads the same file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.common.errors import UserError
from pipelines.config import LoaderConfig
from pipelines.loaders.cuts import epoch_order, worker_weights
from pipelines.loaders.make import _own_files, make_loader
from pipelines.loaders.reading import Share, train_plan
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.prepared import SIDECAR
from tests.conftest import data_config, digits_config, needs_ffcv

COUNTS = np.array([400, 90, 10, 0, 3])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), COUNTS))


def drawn(sampling, epoch=0, seed=0):
    return epoch_order(LABELS, sampling, seed, epoch)


def test_instance_takes_every_row_once():
    assert sorted(drawn("instance")) == list(range(len(LABELS)))


@pytest.mark.parametrize(("sampling", "power"), [("square_root", 0.5), ("class_balanced", 0.0)])
def test_an_epoch_has_each_class_its_share(sampling, power):
    weights = np.where(COUNTS > 0, COUNTS.astype(float) ** power, 0)
    expected = len(LABELS) * weights / weights.sum()
    seen = np.array([np.bincount(LABELS[drawn(sampling, epoch)], minlength=5) for epoch in range(400)])
    assert (seen.sum(1) == len(LABELS)).all()
    assert (np.abs(seen - expected) < 1).all()
    assert seen.mean(0) == pytest.approx(expected, abs=0.1)  # what is rounded away one epoch comes in another


@pytest.mark.parametrize("sampling", ["square_root", "class_balanced"])
def test_within_a_class_rows_come_evenly(sampling):
    times = np.bincount(drawn(sampling), minlength=len(LABELS))
    for label in (0, 1, 2, 4):
        of_class = times[label == LABELS]
        assert of_class.max() - of_class.min() <= 1


@pytest.mark.parametrize("sampling", ["instance", "square_root", "class_balanced"])
def test_the_seed_and_the_epoch_decide(sampling):
    assert (drawn(sampling, 3) == drawn(sampling, 3)).all()
    assert (drawn(sampling, 3) != drawn(sampling, 4)).any()
    assert (drawn(sampling, 3) != drawn(sampling, 3, seed=1)).any()
    halves = LABELS[drawn(sampling)][: len(LABELS) // 2]
    assert len(set(halves.tolist())) >= 3  # shuffled, not class by class


def test_no_sampling_is_the_files_order():
    assert (drawn(None) == np.arange(len(LABELS))).all()


@needs_ffcv
@pytest.mark.parametrize("sampling", ["class_balanced", "square_root"])
def test_repeated_rows_are_cut_anew_and_alike_by_both_loaders(digits, tmp_path, sampling):
    data = digits_config(tmp_path, sampling=sampling)
    plan = train_plan(data, 64, seed=0)
    ffcv, plain = (make_loader(digits, "train", plan, LoaderConfig(kind=kind)) for kind in ("ffcv", "torch"))
    views, rows = [], []
    for a, b in zip(ffcv.epoch(1), plain.epoch(1), strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.views, b.views)
        views.append(a.views.clone())
        rows.append(a.index.clone())
    pixels, index = torch.cat(views), torch.cat(rows)
    repeated = int(index.bincount().argmax())
    of_row = pixels[index == repeated].flatten(1)
    assert len(of_row) > 1
    assert len(of_row.unique(dim=0)) > 1


@pytest.fixture(scope="module")
def digits_in_files(tmp_path_factory):
    """Long-tailed digits of 12 kB in five files: the rarest class has 7 images, and lies in some of them only."""
    data = data_config(
        source={"kind": "digits"},
        profile={"kind": "exp", "imbalance": 20},
        val_fraction=0.1,
        store={"square": 64, "shard_mb": 1},
        size=64,
        prepared=str(tmp_path_factory.mktemp("prepared")),
    )
    return data, ensure_prepared(data, 0)


def drawn_by_class(prepared, plan, epochs):
    """Draws of each class in an epoch, over all of the plan's workers: their mean."""
    draws = np.zeros(len(prepared.classes))
    for worker in range(plan.share.workers):
        files, own = None, replace(plan, share=Share(worker, plan.share.workers))
        if own.share.workers > 1:
            files, own = _own_files(prepared, "train", own)
        beton = prepared.beton("train", files)
        positions = own.positions(len(beton))
        for epoch in range(epochs):
            draws += np.bincount(beton.labels[own.order(beton, epoch)[positions]], minlength=len(draws))
    return draws / epochs


@pytest.mark.parametrize("sampling", ["square_root", "class_balanced"])
@pytest.mark.parametrize("workers", [2, 3, 5])
def test_workers_with_their_own_files_draw_as_one_with_all(digits_in_files, sampling, workers):
    _, prepared = digits_in_files
    counts = prepared.shard_counts("train")
    assert len(counts) == 5
    assert (counts[:, -1] == 0).any()  # a worker that balanced over its own classes alone would leave the rarest short
    plan = replace(train_plan(digits_in_files[0], 16, 0), sampling=sampling)
    together = drawn_by_class(prepared, replace(plan, share=Share(0, workers)), 1000)
    alone = drawn_by_class(prepared, plan, 1000)
    assert together / together.sum() == pytest.approx(alone / alone.sum(), rel=0.05)


def test_instance_sampling_needs_no_weights(digits_in_files):
    data, prepared = digits_in_files
    assert _own_files(prepared, "train", train_plan(data, 16, 0, Share(1, 2)))[1].weights is None


def test_every_worker_fills_its_batches_and_every_class_has_its_share():
    counts = np.array([[30, 9, 2, 0], [25, 0, 3, 1], [45, 3, 0, 1]])
    drawn, got = worker_weights(counts, "class_balanced", [5, 5, 6])
    assert drawn.sum(1) == pytest.approx(1)
    assert got == pytest.approx(1)
    assert np.array([5, 5, 6]) @ drawn / 16 == pytest.approx(0.25)
    assert ((drawn == 0) == (counts == 0)).all()
    # Workers whose files are alike draw what each of them alone would.
    alike, _ = worker_weights(np.array([[90, 9, 1]] * 2), "square_root", [4, 4])
    assert alike == pytest.approx(np.array([[90, 9, 1]] * 2) ** 0.5 / (90**0.5 + 3 + 1))


def test_files_that_cannot_give_every_class_its_share_are_told(digits_in_files, monkeypatch, caplog):
    """Two of three classes in the files of one of two workers: it draws half of all, not two thirds."""
    drawn, got = worker_weights(np.array([[5, 0, 0], [5, 1, 1]]), "class_balanced", [1, 1])
    assert drawn.sum(1) == pytest.approx(1)
    assert got == pytest.approx([1.5, 0.75, 0.75])
    data, prepared = digits_in_files
    counts = np.zeros((5, 10), np.int64)
    counts[0] = 1
    counts[1:, 0] = 1
    monkeypatch.setattr(type(prepared), "shard_counts", lambda *_: counts)
    _own_files(prepared, "train", train_plan(data.model_copy(update={"sampling": "class_balanced"}), 16, 0, Share(0, 2)))
    assert "class '0' is drawn 5.00 times as often as data.sampling 'class_balanced' says" in caplog.text


def test_counts_of_files_that_an_earlier_version_wrote(digits_in_files, tmp_path):
    data, prepared = digits_in_files
    counts = prepared.shard_counts("train")
    assert counts.sum(0).tolist() == prepared.train_counts.tolist()
    path = prepared.folder / SIDECAR
    content, away = path.read_text(), prepared.paths("train")[1]
    earlier = json.loads(content)
    for split in earlier["splits"].values():
        del split["shard_counts"]
    path.write_text(json.dumps(earlier))
    try:
        old = ensure_prepared(data, 0)
        assert (old.shard_counts("train") == counts).all()
        away.rename(tmp_path / away.name)
        with pytest.raises(UserError, match=r"which classes '.*train-00001\.beton' holds, and that is not here; prepare again"):
            old.shard_counts("train")
    finally:
        (tmp_path / away.name).rename(away)
        path.write_text(content)
