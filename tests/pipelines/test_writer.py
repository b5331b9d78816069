"""Splits in several files, continued after a stop, and stored in every mode."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines.common.errors import Interrupted, UserError
from pipelines.prepare import writer
from pipelines.prepare.beton import BetonWriter
from pipelines.prepare.build import ensure_prepared, prepared_folder
from pipelines.prepare.images import RAW_SIDE
from pipelines.prepare.prepared import SIDECAR
from pipelines.prepare.sources.addresses import NetworkError
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


@pytest.mark.parametrize("place", ["in the first file", "at a border", "before the record", "in a later file"])
def test_a_kill_at_any_moment_costs_the_file_in_hand(config, monkeypatch, capsys, place):
    """Planted exceptions that nothing catches stand for the kill: the files stay as they are at that moment."""
    undisturbed = ensure_prepared(config(mode="raw"), 0)
    expected = contents(undisturbed)
    data = config(mode="raw", shard_mb=1)
    monkeypatch.setattr(writer._Files, "stopped", lambda self: self._writer and self._writer._file.close())
    close, step, record = writer._Files._close_shard, writer._Files.step, writer.write_atomically
    shards, steps = [], []

    def planted_close(self):
        close(self)
        shards.append(self.kept)

    def planted_step(self):
        step(self)
        steps.append(len(shards))
        if (place == "in the first file" and len(steps) == 3) or (place == "at a border" and len(shards) == 2):
            raise ZeroDivisionError
        if place == "in a later file" and steps[-3:] == [2, 2, 2]:
            raise ZeroDivisionError

    def planted_record(path, content):
        if place == "before the record" and len(shards) == 1:  # of the second file
            raise ZeroDivisionError
        record(path, content)

    monkeypatch.setattr(writer, "write_atomically", planted_record)
    monkeypatch.setattr(writer._Files, "_close_shard", planted_close)
    monkeypatch.setattr(writer._Files, "step", planted_step)
    with pytest.raises(ZeroDivisionError):
        ensure_prepared(data, 0)
    monkeypatch.undo()
    capsys.readouterr()
    prepared = ensure_prepared(data, 0)
    report = capsys.readouterr().err
    after = shards[0] if place == "before the record" else shards[-1] if shards else 0
    assert (f"train continues after {after} of 24 images" in report) if after else ("continues" not in report)
    assert contents(prepared) == expected
    assert prepared.digests == undisturbed.digests
    names = (prepared.folder / "train.files.txt").read_text().split()
    assert len(names) == len(set(names)) == 24
    assert not [*prepared.folder.glob("*.part"), *prepared.folder.glob("*.done")]


def test_a_schedulers_signal_keeps_its_status(config, monkeypatch):
    """75 says that the job should be started again; Ctrl-C is 130."""
    for stop, status in ((Interrupted("stopped", 75), 75), (KeyboardInterrupt(), 130)):

        def append(self, image, label, stop=stop):
            raise stop

        monkeypatch.setattr(BetonWriter, "append", append)
        with pytest.raises(Interrupted, match="the same command starts it again") as caught:
            ensure_prepared(config(mode="raw"), 0)
        assert caught.value.status == status


@pytest.mark.parametrize("shard_mb", [1, None])
def test_ctrl_c_says_how_to_go_on(config, monkeypatch, capsys, shard_mb):
    expected = contents(ensure_prepared(config(mode="raw"), 0))
    data = config(mode="raw", shard_mb=shard_mb, quality=91)
    original, calls = BetonWriter.append, []

    def append(self, image, label):
        original(self, image, label)
        calls.append(1)
        if len(calls) == 17:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    monkeypatch.setattr(BetonWriter, "append", append)
    with pytest.raises(Interrupted) as caught:
        ensure_prepared(data, 0)
    monkeypatch.undo()
    capsys.readouterr()
    prepared = ensure_prepared(data, 0)
    if shard_mb:
        kept = re.fullmatch(r"stopped: (\d+) of 24 train images are in finished files; .*", str(caught.value))[1]
        assert 0 < int(kept) < 17
        assert f"train continues after {kept} of 24 images" in capsys.readouterr().err
    else:
        assert "the same command starts it again (with data.store.shard_mb" in str(caught.value)
        assert "continues" not in capsys.readouterr().err
    assert contents(prepared) == expected


def test_splits_that_are_whole_are_not_written_again(config, monkeypatch, capsys):
    data = config(mode="raw")
    original = writer.pack
    monkeypatch.setattr(writer, "pack", lambda *given, **more: original(*given, **more) if not given[2] else _fail())
    with pytest.raises(UserError, match="planted"):
        ensure_prepared(data, 0)
    monkeypatch.undo()
    capsys.readouterr()
    ensure_prepared(data, 0)
    assert "train continues after 24 of 24 images" in capsys.readouterr().err


def _fail():
    raise writer.BadImageError("planted")


def test_a_disk_without_room_is_told_before_it_is_full(config, monkeypatch):
    free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(writer, "_SAMPLED", 6)
    data = config(mode="raw")
    with pytest.raises(UserError, match=r"the disk of '.*' has 0\.00 GB free, and the train split needs about 0\.\d+ GB more"):
        ensure_prepared(data, 0)
    assert [path.name for path in prepared_folder(data, 0).iterdir()] == [".lock"]


def test_a_full_disk_says_place_and_need(config, monkeypatch):
    original, calls = BetonWriter.append, []

    def append(self, image, label):
        original(self, image, label)
        calls.append(1)
        if len(calls) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(BetonWriter, "append", append)
    with pytest.raises(
        UserError, match=r"the disk of .* GB free, .* data\.prepared .*; stopped: \d+ of 24 train images are in"
    ):
        ensure_prepared(config(mode="raw", shard_mb=1), 0)


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.EMFILE, r"raise the limit of open files \(ulimit -n\)"),
        (errno.EIO, "check its disk, or take the image out"),
        (errno.ESTALE, "check its disk"),
        (errno.ENOMEM, "check its disk"),
    ],
)
def test_what_is_no_fault_of_the_image_stops_the_command_and_keeps_finished_files(config, monkeypatch, capsys, code, fix):
    expected = ensure_prepared(config(mode="raw"), 0)
    failing = expected.names("train")[20]
    data = config(mode="raw", shard_mb=1).model_copy(update={"on_bad_image": "skip"})
    original = Path.read_bytes

    def read_bytes(self):
        if str(self).endswith(failing):
            raise OSError(code, os.strerror(code), str(self))
        return original(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    stopped = rf"{failing}: cannot be read: {os.strerror(code)}; {fix}.*; stopped: \d+ of 24 train images are in finished files"
    with pytest.raises(UserError, match=stopped):
        ensure_prepared(data, 0)
    monkeypatch.undo()
    capsys.readouterr()
    prepared = ensure_prepared(data, 0)
    assert "train continues after" in capsys.readouterr().err
    assert prepared.splits["train"].skipped == []
    assert contents(prepared) == contents(expected)


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


def test_a_killed_writer_is_continued(config, capsys, tmp_path):
    data = config(mode="raw", shard_mb=1)
    code = f"""
import json, time
from pipelines.prepare import writer
from pipelines.config import DataConfig
from pipelines.prepare.build import ensure_prepared
original = writer._Files.step
def step(self):
    original(self)
    if len(self.progress.shards) == 2:
        open({str(tmp_path / "now")!r}, "w").write(str(self.kept))
        time.sleep(60)
writer._Files.step = step
ensure_prepared(DataConfig.model_validate(json.loads({data.model_dump_json()!r})), 0)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "now").exists() and (tmp_path / "now").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    prepared = ensure_prepared(data, 0)
    assert f"train continues after {(tmp_path / 'now').read_text()} of 24 images" in capsys.readouterr().err
    assert contents(prepared) == contents(ensure_prepared(config(mode="raw", quality=91), 0))


@pytest.mark.parametrize("how", ["record cut short", "file cut short", "of other images"])
def test_a_record_that_does_not_fit_is_not_believed(config, monkeypatch, capsys, how, photo_folder):
    data = config(mode="raw", shard_mb=1)
    monkeypatch.setattr(writer._Files, "step", _stop_after(12, writer._Files.step))
    with pytest.raises(Interrupted):
        ensure_prepared(data, 0)
    monkeypatch.undo()
    file = prepared_folder(data, 0) / "train-00000.beton"
    record = file.with_name("train-00000.beton.done")
    if how == "of other images":  # one has been replaced since
        os.utime(next((photo_folder / "train").rglob("*.jpg")), ns=(1, time.time_ns()))
    else:
        os.truncate(file if how == "file cut short" else record, 50)
    capsys.readouterr()
    assert len(ensure_prepared(data, 0).beton("train")) == 24
    assert "continues" not in capsys.readouterr().err


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


@pytest.mark.parametrize(
    "error",
    [UserError("no room in TMPDIR"), NetworkError("access is refused"), MemoryError(), ZeroDivisionError()],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_fault_of_an_image_keeps_the_finished_files(config, monkeypatch, capsys, error):
    data = config(mode="raw", shard_mb=1)
    original, calls = writer.pack_one, []

    def pack_one(*arguments):
        calls.append(1)
        if len(calls) == 15:
            raise error
        return original(*arguments)

    monkeypatch.setattr(writer, "pack_one", pack_one)
    with pytest.raises(UserError if isinstance(error, UserError) else type(error)) as caught:
        ensure_prepared(data, 0)
    if isinstance(error, UserError):
        assert re.match(rf"{error}; stopped: \d+ of 24 train images are in finished files; the same command", str(caught.value))
    monkeypatch.undo()
    capsys.readouterr()
    ensure_prepared(data, 0)
    assert re.search(r"train continues after \d+ of 24 images", capsys.readouterr().err)


def test_a_disk_that_is_still_too_small_keeps_the_finished_files(config, monkeypatch):
    data = config(mode="raw", shard_mb=1)
    monkeypatch.setattr(writer._Files, "step", _stop_after(12, writer._Files.step))
    with pytest.raises(Interrupted):
        ensure_prepared(data, 0)
    monkeypatch.undo()
    kept = {path.name: path.read_bytes() for path in prepared_folder(data, 0).glob("train*")}
    assert kept
    free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(writer, "_SAMPLED", 2)
    with pytest.raises(UserError, match=r"the disk of .* 0\.00 GB free, .*; stopped: \d+ of 24 train images are in finished"):
        ensure_prepared(data, 0)
    assert {path.name: path.read_bytes() for path in prepared_folder(data, 0).glob("train*")}.items() >= kept.items()


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
