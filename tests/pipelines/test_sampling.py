"""How often an epoch shows a class, and that every sampling reads the same file."""

import numpy as np
import pytest
import torch

from pipelines.batch import make_loader, train_reading
from pipelines.config import LoaderConfig
from pipelines.cuts import epoch_order
from tests.conftest import digits_config, needs_ffcv

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
    reading = train_reading(data, 64, seed=0)
    ffcv, plain = (make_loader(digits, "train", reading, LoaderConfig(kind=kind)) for kind in ("ffcv", "torch"))
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
