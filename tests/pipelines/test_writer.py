"""Splits in several files, gone on with after a stop, and stored in every mode."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pipelines.common.errors import UserError
from pipelines.prepare import writer
from pipelines.prepare.beton import BetonWriter
from pipelines.prepare.build import ensure_prepared, prepared_folder
from pipelines.prepare.images import RAW_SIDE
from pipelines.prepare.prepared import SIDECAR
from tests.conftest import REPOSITORY, data_config


@pytest.fixture
def config(photo_folder, tmp_path):
    def make(**store):
        source = {"kind": "folder", "path": str(photo_folder)}
        return data_config(source=source, prepared=str(tmp_path / "prepared"), store=store, size=96)

    return make


def contents(prepared, split="train"):
    beton = prepared.beton(split)
    return [(beton.image(row).tobytes(), int(beton.labels[row])) for row in range(len(beton))]


def test_several_files_hold_what_one_does(config):
    whole = ensure_prepared(config(mode="raw"), 0)
    split = ensure_prepared(config(mode="raw", shard_mb=1), 0)
    assert len(whole.splits["train"].shards) == 1
    assert len(split.splits["train"].shards) > 2
    assert [path.name for path in split.paths("train")][:2] == ["train-00000.beton", "train-00001.beton"]
    assert contents(whole) == contents(split)
    assert split.train_counts.tolist() == whole.train_counts.tolist()
    names = [(prepared.folder / "train.files.txt").read_text() for prepared in (whole, split)]
    assert names[0] == names[1]
    assert whole.digests == split.digests


def test_some_of_the_files_know_their_rows(config):
    prepared = ensure_prepared(config(mode="raw", shard_mb=1), 0)
    whole, part = prepared.beton("train"), prepared.beton("train", only=[1])
    assert part.rows.tolist() == list(range(prepared.splits["train"].shards[0].samples, part.rows[-1] + 1))
    assert part.image(0).tobytes() == whole.image(int(part.rows[0])).tobytes()
    assert f"line {part.rows[0] + 1} of train.files.txt" in part.where(0)


@pytest.mark.parametrize("place", ["between", "at a border", "before the journal", "late"])
def test_a_kill_at_any_moment_is_gone_on_with(config, monkeypatch, capsys, place):
    """Planted exceptions that nothing catches stand for the kill: the files stay as they are at that moment."""
    undisturbed = ensure_prepared(config(mode="raw"), 0)
    expected = contents(undisturbed)
    data = config(mode="raw", shard_mb=1)
    monkeypatch.setattr(writer._Files, "failed", writer._Files.leave)
    shards, steps = [], []
    originals = writer._Files._close_shard, writer._Files.step, writer._Files.save

    def close(self):
        originals[0](self)
        shards.append(1)
        if place == "before the journal" and len(shards) == 2:
            raise ZeroDivisionError

    def step(self):
        originals[1](self)
        steps.append(len(shards))
        if (place == "between" and len(steps) == 3) or (place == "at a border" and len(shards) == 2):
            raise ZeroDivisionError
        if place == "late" and steps[-3:] == [2, 2, 2]:
            raise ZeroDivisionError

    if place == "before the journal":  # and a journal that knows of a part of that file
        monkeypatch.setattr(writer, "_JOURNAL_SECONDS", -1.0)
    monkeypatch.setattr(writer._Files, "_close_shard", close)
    monkeypatch.setattr(writer._Files, "step", step)
    with pytest.raises(ZeroDivisionError):
        ensure_prepared(data, 0)
    monkeypatch.undo()
    capsys.readouterr()
    prepared = ensure_prepared(data, 0)
    assert ("goes on after" in capsys.readouterr().err) == (place != "between")
    assert contents(prepared) == expected
    assert prepared.digests == undisturbed.digests
    names = (prepared.folder / "train.files.txt").read_text().split()
    assert len(names) == len(set(names)) == 24


def test_ctrl_c_waits_for_the_image_in_hand(config, monkeypatch, capsys):
    expected = contents(ensure_prepared(config(mode="raw"), 0))
    data = config(mode="raw", shard_mb=1)
    original, calls = BetonWriter.append, []

    def append(self, image, label):
        original(self, image, label)
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    monkeypatch.setattr(BetonWriter, "append", append)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        ensure_prepared(data, 0)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    capsys.readouterr()
    prepared = ensure_prepared(data, 0)
    assert "train goes on after 7 of 24 images" in capsys.readouterr().err
    assert contents(prepared) == expected


@pytest.mark.parametrize(("mode", "kinds"), [("raw", {0}), ("jpeg", {1}), ("auto", {1}), ("mixed", {0, 1})])
def test_modes(config, mode, kinds, capsys):
    prepared = ensure_prepared(config(mode=mode), 0)
    assert {int(record["mode"] == 0) for record in prepared.beton("train").records["f0"]} == kinds
    report = capsys.readouterr().err
    assert "data: train: 24 images" in report
    for word, kind in (("raw pixels", 0), ("as they were", 1)):
        assert (word in report.partition("data: train")[2].partition("\n")[0]) == (kind in kinds)
    # Evaluation sees what a server would see, however training's images lie.
    assert {int(mode) for mode in prepared.beton("test").records["f0"]["mode"]} == ({1} if mode == "raw" else {0})


def test_the_share_of_raw_images(config):
    shares = [
        (ensure_prepared(config(mode="mixed", raw_share=share), 0).beton("train").records["f0"]["mode"] == 1).mean()
        for share in (0.0, 0.25, 1.0)
    ]
    assert shares[0] == 0
    assert 0 < shares[1] < 0.6
    assert shares[2] == 1
    assert RAW_SIDE < 150  # the photographs are larger, so 'auto' would store none raw


def test_a_stop_from_the_keyboard_is_gone_on_with(config, monkeypatch, capsys):
    expected = contents(ensure_prepared(config(mode="raw"), 0))
    data = config(mode="raw", shard_mb=1)
    original, calls = writer._Files.step, []

    def step(self):
        original(self)
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt

    monkeypatch.setattr(writer._Files, "step", step)
    with pytest.raises(KeyboardInterrupt):
        ensure_prepared(data, 0)
    folder = prepared_folder(data, 0)
    assert not (folder / SIDECAR).exists()
    capsys.readouterr()
    prepared = ensure_prepared(data, 0)
    assert "train goes on after 13 of 24 images" in capsys.readouterr().err
    assert contents(prepared) == expected
    assert not [*folder.glob("*.part"), *folder.glob("*.journal")]


def test_a_killed_writer_is_gone_on_with(config, monkeypatch, capsys, tmp_path):
    data = config(mode="raw")
    code = f"""
import json, time
from pipelines.prepare import writer
from pipelines.prepare.beton import BetonWriter
from pipelines.config import DataConfig
from pipelines.prepare.build import ensure_prepared
writer._JOURNAL_SECONDS = 0.0
original = writer._Files.step
def step(self):
    original(self)
    if self.progress.done == 9:
        open({str(tmp_path / "now")!r}, "w").close()
        time.sleep(60)
writer._Files.step = step
ensure_prepared(DataConfig.model_validate(json.loads({data.model_dump_json()!r})), 0)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "now").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    prepared = ensure_prepared(data, 0)
    assert "train goes on after 9 of 24 images" in capsys.readouterr().err
    assert contents(prepared) == contents(ensure_prepared(config(mode="raw", quality=91), 0))


@pytest.mark.parametrize("how", ["cut short", "of other images"])
def test_a_journal_that_does_not_fit_is_not_believed(config, monkeypatch, capsys, how, photo_folder):
    data = config(mode="raw")
    monkeypatch.setattr(writer._Files, "step", _stop_after(5, writer._Files.step))
    with pytest.raises(KeyboardInterrupt):
        ensure_prepared(data, 0)
    monkeypatch.undo()
    journal = prepared_folder(data, 0) / "train.journal"
    if how == "cut short":
        journal.write_bytes(journal.read_bytes()[:-50])
    else:  # an image has been replaced since
        changed = next((photo_folder / "train").rglob("*.jpg"))
        os.utime(changed, ns=(1, time.time_ns()))
    capsys.readouterr()
    assert len(ensure_prepared(data, 0).beton("train")) == 24
    assert "goes on" not in capsys.readouterr().err


def _stop_after(count, original):
    def step(self):
        original(self)
        if self.progress.done == count:
            raise KeyboardInterrupt

    return step


def test_a_bad_image_leaves_nothing(config, monkeypatch):
    data = config(mode="raw", shard_mb=1)
    monkeypatch.setattr(writer, "pack", _bad_after(15, writer.pack))
    with pytest.raises(UserError, match=r"unreadable image \(planted\)"):
        ensure_prepared(data, 0)
    assert [path.name for path in prepared_folder(data, 0).iterdir()] == [".lock"]


def _bad_after(count, original):
    calls = []

    def pack(*arguments, **more):
        calls.append(1)
        if len(calls) == count:
            raise writer.BadImageError("planted")
        return original(*arguments, **more)

    return pack


def test_the_sidecar_is_plain(config):
    prepared = ensure_prepared(config(mode="raw", shard_mb=1), 0)
    content = json.loads((prepared.folder / SIDECAR).read_text())
    shards = content["splits"]["train"]["shards"]
    assert [shard["file"] for shard in shards] == [path.name for path in prepared.paths("train")]
    assert np.sum([shard["samples"] for shard in shards]) == 24
