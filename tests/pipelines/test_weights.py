"""Weights of images: a column of the table, kept beside the labels, and how often each image is drawn by them."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from pipelines.common.errors import UserError
from pipelines.config import LoaderConfig
from pipelines.loaders.cuts import epoch_order, worker_weights
from pipelines.loaders.make import _own_files, make_loader
from pipelines.loaders.reading import Share, train_plan
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.prepared import WEIGHTS
from pipelines.prepare.sources import TableSource
from pipelines.prepare.writer import read_lines
from tests.conftest import data_config, needs_ffcv

COUNTS = np.array([200, 45, 10, 0, 3])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), COUNTS))
WEIGHT = np.random.default_rng(1).choice([0.0, 0.25, 1.0, 3.0], len(LABELS)) + (LABELS == 4)


def drawn(epoch=0, seed=0):
    return epoch_order(LABELS, "weighted", seed, epoch, row_weights=WEIGHT)


def test_an_epoch_draws_each_image_and_each_class_by_its_weight():
    expected = len(LABELS) * WEIGHT / WEIGHT.sum()
    times = np.array([np.bincount(drawn(epoch), minlength=len(LABELS)) for epoch in range(1000)])
    assert (times.sum(1) == len(LABELS)).all()
    assert (np.abs(times - expected) < 1).all()  # rounded up or down, never further
    assert (times[:, WEIGHT == 0] == 0).all()
    assert times.mean(0) == pytest.approx(expected, abs=0.06)  # what is rounded away one epoch comes in another
    of_class = np.stack([times[:, label == LABELS].sum(1) for label in range(5)], axis=1)
    assert (np.abs(of_class - np.bincount(LABELS, expected)) < 1).all()


def test_the_seed_and_the_epoch_decide():
    assert (drawn(3) == drawn(3)).all()
    assert (drawn(3) != drawn(4)).any()
    assert (drawn(3) != drawn(3, seed=1)).any()
    assert len({*LABELS[drawn()][:60].tolist()}) >= 3  # shuffled, not class by class


def test_equal_weights_take_every_image_once():
    for weight in (1.0, 0.1, 1e-300, 1e300):
        order = epoch_order(LABELS, "weighted", 0, 0, row_weights=np.full(len(LABELS), weight))
        assert sorted(order) == [*range(len(LABELS))]
    with pytest.raises(UserError, match="no training image here has a weight above 0"):
        epoch_order(LABELS, "weighted", 0, 0, row_weights=np.zeros(len(LABELS)))


def write_table(path, rows) -> None:
    """A Parquet file with PNG files in it."""
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)


def config(path, prepared, **more):
    return data_config(
        source={"kind": "table", "path": str(path)}, prepared=str(prepared), store={"square": 64}, size=64, **more
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Digits of three classes in a table: a class's k-th image has the weight k modulo 4, and 1 where that is 0."""
    from sklearn.datasets import load_digits

    digits, rows = load_digits(), []
    for label, count in enumerate((150, 90, 30)):
        for number, pixels in enumerate(digits.images[digits.target == label][:count]):
            file = io.BytesIO()
            Image.fromarray((pixels * 15).astype(np.uint8)).save(file, "PNG")
            split = "test" if number % 10 == 9 else "train"
            weight = None if split == "test" else float(max(1, number % 4))
            rows.append({"image": file.getvalue(), "label": "abc"[label], "split": split, "weight": weight})
    path = tmp_path_factory.mktemp("table") / "digits.parquet"
    write_table(path, rows)
    return path, rows


@pytest.fixture(scope="module")
def in_files(table, tmp_path_factory):
    """The table prepared in three files."""
    data = config(table[0], tmp_path_factory.mktemp("prepared"), sampling="weighted")
    data = data.model_copy(update={"store": data.store.model_copy(update={"shard_mb": 1})})
    return data, ensure_prepared(data, 0)


def weights_by_name(prepared) -> dict[str, float]:
    weights = np.load(prepared.folder / WEIGHTS)
    return dict(zip(read_lines(prepared.folder / "train.files.txt"), weights.tolist(), strict=True))


def of_rows(path, rows) -> dict[str, float]:
    return {f"{path.name}/{number}": row["weight"] for number, row in enumerate(rows, 1) if row["split"] == "train"}


def test_weights_lie_beside_the_labels_in_the_order_of_the_files(table, in_files, capsys):
    path, rows = table
    data, prepared = in_files
    assert weights_by_name(prepared) == of_rows(path, rows)
    labels, weights = prepared.beton("train").labels, np.load(prepared.folder / WEIGHTS)
    assert prepared.class_weights("train").tolist() == np.bincount(labels, weights).tolist()
    assert len(prepared.splits["train"].shard_weights) == len(prepared.splits["train"].shards) == 3
    assert prepared.beton("train", [1]).weights.tolist() == weights[prepared.beton("train", [1]).rows].tolist()
    assert prepared.beton("test").weights is None
    assert ensure_prepared(data, 0).digests == prepared.digests
    assert "weight = 'weight'" in capsys.readouterr().err


def test_other_weights_are_written_without_encoding_again(table, tmp_path, capsys):
    rows = table[1]
    folder = tmp_path / "files"
    folder.mkdir()
    listed = []
    for number, row in enumerate(rows[:40] + rows[-40:]):
        (folder / f"{number}.png").write_bytes(row["image"])
        listed.append({**row, "image": f"files/{number}.png"})
    by_path = tmp_path / "paths.parquet"
    write_table(by_path, listed)
    data = config(by_path, tmp_path / "prepared")
    first = ensure_prepared(data, 0)
    files = {file: file.stat().st_mtime_ns for file in first.paths("train")}
    capsys.readouterr()
    write_table(by_path, [{**row, "weight": row["weight"] and 5 * row["weight"]} for row in listed])
    again = ensure_prepared(data, 0)
    assert "get other weights" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in again.paths("train")} == files
    expected = {row["image"]: 5 * row["weight"] for row in listed if row["split"] == "train"}
    assert weights_by_name(again) == expected
    assert again.class_weights("train").sum() == sum(expected.values())
    # A run of the other weights does not resume with these, one from before there were weights does.
    before, now = first.splits["train"], again.splits["train"]
    assert now.digest != before.digest
    assert not now.has(before.digest)
    assert now.has(before.content)
    assert again.splits["test"].digest == first.splits["test"].digest
    write_table(by_path, [{name: value for name, value in row.items() if name != "weight"} for row in listed])
    without = ensure_prepared(data, 0)
    assert without.folder == again.folder
    assert not (without.folder / WEIGHTS).exists()
    assert without.splits["train"].digest == before.content


def test_an_image_that_cannot_be_read_takes_its_weight_along(table, tmp_path):
    rows = table[1]
    damaged = [*rows[:6], {**rows[6], "image": b"no image"}, *rows[7:]]
    write_table(tmp_path / "t.parquet", damaged)
    prepared = ensure_prepared(config(tmp_path / "t.parquet", tmp_path / "p", on_bad_image="skip"), 0)
    expected = of_rows(tmp_path / "t.parquet", damaged)
    del expected["t.parquet/7"]
    assert weights_by_name(prepared) == expected
    kinds = LoaderConfig(kind="torch", workers=1)
    plan = replace(train_plan(config(tmp_path / "t.parquet", tmp_path / "p"), 20, 0), sampling="weighted")
    loader = make_loader(prepared, "train", plan, kinds)
    rows_drawn = torch.cat([batch.index.clone() for batch in loader.epoch(2)])
    expected_order = plan.order(prepared.beton("train"), 2)
    assert rows_drawn.tolist() == expected_order[: len(rows_drawn)].tolist()
    loader.close()


@needs_ffcv
def test_loaders_and_workers_draw_the_same(in_files):
    data, prepared = in_files
    of = {
        kind: [
            batch.index.clone()
            for batch in make_loader(prepared, "train", train_plan(data, 30, 0), LoaderConfig(kind=kind)).epoch(1, start=2)
        ]
        for kind in ("ffcv", "resident")
    }
    halves = [
        make_loader(prepared, "train", train_plan(data, 30, 0, Share(worker, 2)), LoaderConfig(kind="ffcv")).epoch(1, 2)
        for worker in (0, 1)
    ]
    together = [torch.cat([a.index, b.index]) for a, b in zip(*halves, strict=True)]
    for a, b, c in zip(of["ffcv"], of["resident"], together, strict=True):
        assert a.tolist() == b.tolist() == c.tolist()


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_with_their_own_files_draw_by_weight(in_files, workers):
    data, prepared = in_files
    plan, epochs = train_plan(data, 12, 0, Share(0, workers)), 1500
    times = np.zeros(prepared.splits["train"].samples)
    for worker in range(workers):
        files, own = _own_files(prepared, "train", replace(plan, share=Share(worker, workers)))
        beton = prepared.beton("train", files)
        positions = own.positions(len(beton))
        for epoch in range(epochs):
            times += np.bincount(beton.rows[own.order(beton, epoch)[positions]], minlength=len(times))
    whole = prepared.beton("train")
    share, weights = times / times.sum(), whole.weights / whole.weights.sum()
    assert np.bincount(whole.labels, share) == pytest.approx(np.bincount(whole.labels, weights), rel=0.02)
    # Within a worker's files by weight; between workers, as far as files are random samples of the data.
    files = range(workers)
    for worker in files:
        own = np.isin(whole.shard, [number for number in range(3) if number % workers == worker])
        for label in range(3):
            rows = own & (whole.labels == label)
            assert share[rows] / share[rows].sum() == pytest.approx(weights[rows] / weights[rows].sum(), rel=0.12)


def test_classes_of_workers_weigh_what_their_images_weigh():
    sums = np.array([[30.5, 9.0, 0.0], [25.0, 1.5, 0.25]])
    shares, got = worker_weights(sums, "weighted", [4, 4])
    assert got == pytest.approx(1)
    assert shares.mean(0) == pytest.approx(sums.sum(0) / sums.sum())


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "row 3: the column 'importance' is empty; expected a weight, a number of at least 0"),
        ("", "row 3: the column 'importance' is empty"),
        ("much", "row 3: the column 'importance' is 'much'"),
        ("-1", "row 3: the column 'importance' is '-1'"),
        ("nan", "row 3: the column 'importance' is 'nan'"),
        ("inf", "row 3: the column 'importance' is 'inf'"),
    ],
)
def test_a_weight_that_is_none_is_told_with_its_row(table, tmp_path, cell, message):
    rows = [{**row, "importance": cell if number == 2 else "1.5"} for number, row in enumerate(table[1][:160])]
    write_table(tmp_path / "t.parquet", rows)
    with pytest.raises(UserError, match=message):
        TableSource(kind="table", path=tmp_path / "t.parquet", weight="importance").open()


def test_a_column_of_that_name_that_holds_no_weights_is_not_taken(table, tmp_path):
    write_table(tmp_path / "t.parquet", [{**row, "weight": "12 kg"} for row in table[1]])
    data = config(tmp_path / "t.parquet", tmp_path / "p")
    assert data.source.open().train.weights is None
    with pytest.raises(UserError, match=r"'weighted', but the training images have no weights; .* data.source.weight"):
        ensure_prepared(data.model_copy(update={"sampling": "weighted"}), 0)
    prepared = ensure_prepared(data, 0)
    plan = replace(train_plan(data, 10, 0), sampling="weighted")
    with pytest.raises(UserError, match="the training images have no weights"):
        make_loader(prepared, "train", plan, LoaderConfig(kind="torch"))


def test_classes_and_workers_without_weight_are_refused(table, in_files, tmp_path, monkeypatch):
    write_table(tmp_path / "t.parquet", [{**row, "weight": 0 if row["label"] == "b" else row["weight"]} for row in table[1]])
    data = config(tmp_path / "t.parquet", tmp_path / "p")
    assert ensure_prepared(data, 0).class_weights("train")[1] == 0  # of no interest to other samplings
    with pytest.raises(UserError, match="all training images of class 'b' have weight 0"):
        ensure_prepared(data.model_copy(update={"sampling": "weighted"}), 0)
    data, prepared = in_files
    entry = replace(prepared.splits["train"], shard_weights=[[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    with pytest.raises(UserError, match="all images in the files of worker 1 of 3 have weight 0"):
        _own_files(replace(prepared, splits={"train": entry}), "train", train_plan(data, 12, 0, Share(0, 3)))
    away = tmp_path / "away.npy"
    shutil.move(prepared.folder / WEIGHTS, away)
    try:
        with pytest.raises(UserError, match=r"train\.weights\.npy' is not on this machine; bring it"):
            make_loader(prepared, "train", train_plan(data, 12, 0), LoaderConfig(kind="torch"))
        away_file = np.load(away)[:-1]
        np.save(prepared.folder / WEIGHTS, away_file)
        with pytest.raises(UserError, match=r"train\.weights\.npy' is not the file that prepared\.json describes"):
            prepared.beton("train")
    finally:
        shutil.move(away, prepared.folder / WEIGHTS)


def test_folders_of_tables_keep_their_names():
    """A table whose weights are found by the column's name has the folder that it had before there were weights."""
    assert "weight" not in TableSource(kind="table", path="a.csv").identity()
    assert TableSource(kind="table", path="a.csv", weight="w").identity()["weight"] == "w"
