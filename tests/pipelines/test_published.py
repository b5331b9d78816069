"""Prepared data in an object store: each worker fetches its own files, whole or not at all, into a cache of limited size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.common.errors import UserError
from pipelines.config import DataConfig, LoaderConfig
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import Batch, Share, eval_plan, train_plan
from pipelines.prepare import __main__ as command
from pipelines.prepare import published as fetching
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.prepared import SIDECAR, Prepared
from pipelines.prepare.publish import BEGUN, publish
from pipelines.prepare.sources import addresses
from tests.commands import in_process
from tests.conftest import REPOSITORY, data_config

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def local(photo_folder, tmp_path_factory) -> tuple[DataConfig, Prepared]:
    """24 raw images in files of a few each, prepared on this machine."""
    data = data_config(
        source={"kind": "folder", "path": str(photo_folder)},
        prepared=str(tmp_path_factory.mktemp("prepared")),
        store={"mode": "raw", "shard_mb": 1, "max_side": 320},
        size=64,
        views=[{"cut": {"kind": "resized"}}] * 2,
    )
    return data, ensure_prepared(data, 0)


@pytest.fixture
def store(local, tmp_path) -> str:
    """The same, published in a folder that stands for a store."""
    publish(local[1], f"file://{tmp_path}/store")
    return f"file://{tmp_path}/store"


def node(local, published: str, folder: Path, **more: object) -> Prepared:
    """The data as a machine sees them that has none of the files, nor the source."""
    data = local[0].model_copy(update={"published": published, "prepared": folder, **more})
    return ensure_prepared(data, 0)


def fetched(folder: Path) -> set[str]:
    """The files in the cache of a machine, without their digests."""
    files = (path.name.partition(".") for path in (folder / "cache").glob("*/*"))
    return {f"{stem.rpartition('-')[0]}.{ending}" for stem, _, ending in files}


def names(prepared: Prepared, numbers: range) -> set[str]:
    return {shard.file for number, shard in enumerate(prepared.splits["train"].shards) if number in numbers}


def batches(prepared: Prepared, data: DataConfig, worker: int) -> list[Batch]:
    """An epoch of one of two workers that read files of their own."""
    loader = make_loader(
        prepared, "train", train_plan(data, 4, 0, Share(worker, 2)), LoaderConfig(kind="torch", part="shards", workers=1)
    )
    return [Batch(batch.views.clone(), batch.labels.clone(), batch.index.clone()) for batch in loader.epoch(0)]


def same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.views, b.views)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.index, b.index)


def test_each_worker_fetches_its_own_files_and_reads_the_same(local, bucket, tmp_path):
    data, prepared = local
    shards = len(prepared.splits["train"].shards)
    assert shards > 3
    publish(prepared, f"{bucket}/prepared")
    for worker in range(2):
        folder = tmp_path / f"node{worker}"
        here = node(local, f"{bucket}/prepared", folder)
        assert here.splits == prepared.splits
        assert here.classes == prepared.classes
        assert fetched(folder) == set()
        same(batches(here, data, worker), batches(prepared, data, worker))
        assert fetched(folder) == names(prepared, range(worker, shards, 2))
        plan = eval_plan(data, 4)
        config = LoaderConfig(kind="torch")
        seen = [batch.views.clone() for batch in make_loader(here, "test", plan, config).epoch(0)]
        expected = [batch.views.clone() for batch in make_loader(prepared, "test", plan, config).epoch(0)]
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
        assert here.names("test") == prepared.names("test")
        tests = {shard.file for shard in prepared.splits["test"].shards} | {"test.files.txt"}
        assert fetched(folder) == names(prepared, range(worker, shards, 2)) | tests
        written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        assert b"hidden" not in written
    kept = fsspec.filesystem("s3").cat_file(f"{bucket}/prepared/{prepared.folder.name}/{SIDECAR}")
    assert kept == (prepared.folder / SIDECAR).read_bytes()
    assert b"hidden" not in kept


def test_what_lies_in_the_cache_is_not_fetched_again(local, store, tmp_path, monkeypatch):
    here = node(local, store, tmp_path / "node")
    expected = local[1].beton("train")
    assert [here.beton("train").image(row).tobytes() for row in range(24)] == [
        expected.image(row).tobytes() for row in range(24)
    ]
    monkeypatch.setattr(fetching, "fetch_part", None)  # whoever fetches now fails
    assert len(node(local, store, tmp_path / "node").beton("train")) == 24


def test_the_machine_that_prepared_uses_its_own_files(local, store, monkeypatch):
    monkeypatch.setattr(fetching, "fetch_part", None)
    here = node(local, store, local[0].prepared)
    assert here.published is None
    assert len(here.beton("train")) == 24


def test_the_cache_keeps_its_limit_and_what_is_in_use(local, store, tmp_path):
    shards = local[1].splits["train"].shards
    room = sum(sorted(shard.bytes for shard in shards[:4])[1:])  # for any three of them
    here = node(local, store, tmp_path / "node", cache_gb=room / 1e9)
    used = here.beton("train", [0])
    for number, time in ((1, 2_000), (2, 1_000)):
        here.beton("train", [number])
        os.utime(next((tmp_path / "node").rglob(f"train-0000{number}-*")), (time, time))
    here.beton("train", [3])  # 0 is older and in use, 2 was used before 1
    assert fetched(tmp_path / "node") == names(local[1], range(2)) | names(local[1], range(3, 4))
    assert used.image(0).tobytes() == local[1].beton("train", [0]).image(0).tobytes()
    del used
    with pytest.raises(UserError, match=r"data\.cache_gb .* is too low: .* GB are to be fetched from file://"):
        here.beton("train")
    held = sum(path.stat().st_size for path in (tmp_path / "node").rglob("*.beton"))
    assert held <= room


@pytest.mark.parametrize("how", ["changed", "short", "gone"])
def test_a_damaged_file_is_named_with_both_digests(local, bucket, tmp_path, how):
    prepared = local[1]
    published = f"{bucket}/{tmp_path.name}"
    publish(prepared, published)
    shard = prepared.splits["train"].shards[1]
    system, place = fsspec.filesystem("s3"), f"{published}/{prepared.folder.name}/{shard.file}"
    content = bytearray(system.cat_file(place))
    content[-100] ^= 1
    if how == "gone":
        system.rm_file(place)
    else:
        system.pipe_file(place, bytes(content[:-8] if how == "short" else content))
    here = node(local, published, tmp_path / "node")
    assert len(here.beton("train", [0])) == prepared.splits["train"].shards[0].samples
    with pytest.raises(UserError) as caught:
        here.beton("train", [1])
    text = str(caught.value)
    assert place in text
    if how == "gone":
        assert "nothing is at this address" in text
    else:
        assert shard.sha256 in text
        assert f"{len(content) - 8 * (how == 'short'):,} bytes, SHA-256 " in text
    assert "\n" not in text
    assert fetched(tmp_path / "node") == names(prepared, range(1))
    assert not [*tmp_path.rglob("*.part")]


def test_what_was_damaged_on_its_way_is_fetched_again_once(local, store, tmp_path, monkeypatch):
    real, calls = fetching.fetch_part, []

    def part(system, address, start, size):
        calls.append(address)
        content = real(system, address, start, size)
        return bytes(len(content)) if len(calls) == 1 else content

    monkeypatch.setattr(fetching, "fetch_part", part)
    here = node(local, store, tmp_path / "node")
    assert here.beton("train", [0]).image(0).tobytes() == local[1].beton("train", [0]).image(0).tobytes()
    assert len(calls) == 2


def test_a_download_that_is_killed_leaves_no_file_and_continues(local, store, tmp_path):
    data = local[0].model_copy(update={"published": store, "prepared": tmp_path / "node"})
    script = f"""
import json, os, signal
from pipelines.config import DataConfig
from pipelines.prepare import published
from pipelines.prepare.build import ensure_prepared

real = published.fetch_part
published._BLOCK = 100_000

def part(system, address, start, size):
    if address.endswith("train-00001.beton") and start:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(system, address, start, size)

published.fetch_part, published._AT_ONCE = part, 1
ensure_prepared(DataConfig.model_validate(json.loads({data.model_dump_json()!r})), 0).beton("train")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (part,) = tmp_path.rglob("*.part")
    assert part.name.startswith("train-00001-")
    assert len([*tmp_path.glob("node/cache/*/*.beton")]) == 1
    here = ensure_prepared(data, 0)
    assert here.beton("train", [0, 1]).image(5).tobytes() == local[1].beton("train", [0, 1]).image(5).tobytes()
    assert fetched(tmp_path / "node") == names(local[1], range(2))
    assert not [*tmp_path.rglob("*.part")]


def test_a_network_that_fails_is_tried_again_and_whole_files_stay(local, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(addresses, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr(fetching, "_BLOCK", 4 << 20)
    prepared, place = local[1], f"{bucket}/{tmp_path.name}"
    publish(prepared, place)
    system = fsspec.filesystem("s3")
    real, calls = system.cat_file, []

    def flaky(path, **between):
        calls.append(path)
        if len(calls) % 3 == 0 or (path.endswith("train-00002.beton") and between["start"]):
            raise ConnectionResetError("the connection is gone")
        return real(path, **between)

    here = node(local, place, tmp_path / "node")
    monkeypatch.setattr(system, "cat_file", flaky)
    with pytest.raises(addresses.NetworkError, match=r"train-00002\.beton: cannot be read after 5 tries: ConnectionResetError"):
        here.beton("train")
    assert names(prepared, range(1)) <= fetched(tmp_path / "node") <= names(prepared, range(9)) - {"train-00002.beton"}
    monkeypatch.setattr(system, "cat_file", real)
    expected = prepared.beton("train")
    assert np.array_equal(here.beton("train").records, expected.records)
    assert not [*tmp_path.rglob("*.part")]


def test_processes_of_a_machine_fetch_a_file_once(local, store, tmp_path, monkeypatch):
    real, calls = fetching.fetch_part, []
    monkeypatch.setattr(fetching, "fetch_part", lambda *where: calls.append(where[1]) or real(*where))
    opened: list[int] = []
    threads = [
        threading.Thread(target=lambda: opened.append(len(node(local, store, tmp_path / "node").beton("train"))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [24] * 3
    assert len(calls) == len(set(calls)) == len(local[1].splits["train"].shards)


@pytest.mark.parametrize("kind", ["file", "s3", "memory"])
def test_publishing_continues_after_a_stop(local, kind, tmp_path, request, monkeypatch):
    place = f"{request.getfixturevalue('bucket')}/{tmp_path.name}" if kind == "s3" else f"{kind}://{tmp_path}"
    prepared = local[1]
    system = fsspec.filesystem(kind)
    real, sent = system.put_file, []

    def put(path, target, **more):
        if len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(Path(path).name)
        return real(path, target, **more)

    monkeypatch.setattr(system, "put_file", put)
    with pytest.raises(KeyboardInterrupt):
        publish(prepared, f"{place}/p")
    with pytest.raises(UserError, match="nothing is published at"):
        node(local, f"{place}/p", tmp_path / "node")
    first = [*sent]
    monkeypatch.setattr(
        system, "put_file", lambda path, target, **more: sent.append(Path(path).name) or real(path, target, **more)
    )
    publish(prepared, f"{place}/p")
    shards = [shard.file for split in prepared.splits.values() for shard in split.shards]
    assert sorted(sent) == sorted([*shards, *(f"{split}.files.txt" for split in prepared.splits)])
    assert sent[:2] == first
    publish(prepared, f"{place}/p")
    assert len(sent) == len(set(sent))
    there = {path.rpartition("/")[2] for path in system.find(f"{place}/p")}
    assert there == {*sent, SIDECAR}
    assert BEGUN not in there


def test_other_data_under_the_same_name_replace_all(local, tmp_path):
    prepared = local[1]
    place = f"file://{tmp_path}/p"
    publish(prepared, place)
    folder = tmp_path / "p" / prepared.folder.name
    other = json.loads((folder / SIDECAR).read_text())
    other["splits"]["train"]["shards"][0]["sha256"] = 64 * "0"
    (folder / SIDECAR).write_text(json.dumps(other))
    (folder / "train-00000.beton").write_bytes(bytes(prepared.splits["train"].shards[0].bytes))  # of the same size
    (folder / "train-99999.beton").write_bytes(b"an earlier one's")
    publish(prepared, place)
    assert (folder / "train-00000.beton").read_bytes() == prepared.paths("train")[0].read_bytes()
    assert not (folder / "train-99999.beton").exists()


def test_weights_are_published_and_new_ones_alone_are_copied(photo_folder, tmp_path, capsys):
    files = sorted((photo_folder / "train").rglob("*.jpg"))
    table, place = tmp_path / "photos.csv", f"file://{tmp_path}/store"
    data = data_config(
        source={"kind": "table", "path": str(table), "root": str(photo_folder)}, prepared=str(tmp_path / "here"),
        store={"mode": "raw"}, sampling="weighted", size=32, val_fraction=0.2, published=place,
    )  # fmt: skip
    here = data.model_copy(update={"published": None})
    for times in (1, 3):
        lines = [
            f"{file.relative_to(photo_folder)},{file.parent.name},{1 + number % times}" for number, file in enumerate(files)
        ]
        table.write_text("\n".join(["image,label,weight", *lines]) + "\n")
        prepared = ensure_prepared(here, 0)
        capsys.readouterr()
        publish(prepared, place)
        assert f"publishing {5 if times == 1 else 1} of 5 files" in capsys.readouterr().err
        there = ensure_prepared(data.model_copy(update={"prepared": tmp_path / "there"}), 0)
        there.require_weights("train")
        mine, theirs = prepared.beton("train").weights, there.beton("train").weights
        assert mine is not None
        assert theirs is not None
        assert mine.tolist() == theirs.tolist()
        assert mine.max() == times


def test_a_folder_of_an_earlier_version_opens_and_gets_digests_when_it_is_published(photo_folder, tmp_path):
    data = data_config(
        source={"kind": "folder", "path": str(photo_folder)}, prepared=str(tmp_path / "here"), store={"mode": "raw"}, size=32
    )
    prepared = ensure_prepared(data, 0)
    new = (prepared.folder / SIDECAR).read_text()
    content = json.loads(new)
    for split in content["splits"].values():
        del split["tables"]
        for shard in split["shards"]:
            del shard["sha256"]
    (prepared.folder / SIDECAR).write_text(json.dumps(content))
    old = ensure_prepared(data, 0)
    assert old == prepared
    assert len(old.beton("train")) == 24
    publish(old, f"file://{tmp_path}/store")
    assert (prepared.folder / SIDECAR).read_text() == new
    here = ensure_prepared(data.model_copy(update={"published": f"file://{tmp_path}/store", "prepared": tmp_path / "b"}), 0)
    assert here.beton("train").image(0).tobytes() == old.beton("train").image(0).tobytes()


def test_the_command_publishes_and_others_are_told_where_nothing_is(photo_folder, tmp_path):
    options = ["folder", "--data.source.path", str(photo_folder), "--published", f"file://{tmp_path}/store"]
    done = in_process(command.main, *options, "--data.prepared", str(tmp_path / "here"))
    assert done.returncode == 0, done.stderr
    folder = next((tmp_path / "store").iterdir())
    assert f"published: file://{folder}\n" in done.stdout
    assert (folder / SIDECAR).is_file()
    data = data_config(
        source={"kind": "digits"}, prepared=str(tmp_path / "there"), published=f"file://{tmp_path}/store", size=16
    )
    with pytest.raises(UserError, match=r"nothing is published at file://.*/digits-none-.*--data\.published file://.*/store"):
        ensure_prepared(data, 0)
    with pytest.raises(UserError, match="put credentials into the environment"):
        data_config(source={"kind": "digits"}, published="s3://me:secret@bucket/x")
    with pytest.raises(UserError, match=r"published = 'folder/x': .*an address such as s3://bucket/folder"):
        data_config(source={"kind": "digits"}, published="folder/x")
