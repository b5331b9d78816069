"""WebDataset shards in buckets and on web servers, as the library writes them."""

from __future__ import annotations

import http.server
import io
import pickle
import re
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from pipelines.common.errors import UserError
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.sources import FolderSource, WebDatasetSource, addresses
from tests.conftest import data_config
from tests.sources import same, served

fsspec = pytest.importorskip("fsspec")
webdataset = pytest.importorskip("webdataset")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(addresses, "_FIRST_WAIT", 0.001)


@pytest.fixture
def shards(image_folder, tmp_path):
    """A folder with three shards of training images and one of test images."""
    plain, folder = FolderSource(kind="folder", path=image_folder).open(), tmp_path / "shards"
    folder.mkdir()
    assert plain.test is not None
    for split, images in (("train", plain.train), ("test", plain.test)):
        with webdataset.ShardWriter(str(folder / f"{split}-%03d.tar"), maxcount=7, verbose=0) as writer:
            for row in range(len(images)):
                label = plain.classes[images.labels[row]]
                writer.write({"__key__": f"a/{row:04d}", "png": images.read(row), "json": {"label": label}})
    return folder


class Web(http.server.SimpleHTTPRequestHandler):
    """A web server that sends parts of files, counts requests, and may break connections or be away."""

    breaks: ClassVar[dict[str, int]] = {}
    parts: ClassVar[list[tuple[str, int, int]]] = []
    away_after: ClassVar[int | None] = None
    broken_first = 0
    whole_files = False

    def do_HEAD(self) -> None:
        if not self.broken():
            super().do_HEAD()

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.broken():
            return
        if wanted is None or self.whole_files:
            super().do_GET()
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        first, last = int(wanted[1]), int(wanted[2])
        self.parts.append((self.path, first, last))
        data = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def broken(self) -> bool:
        """Whether this connection breaks: the first ones for each part, and all where the server is away."""
        key = f"{self.command} {self.path} {self.headers.get('Range')}"
        self.breaks[key] = self.breaks.get(key, 0) + 1
        away = self.away_after is not None and len(self.parts) >= self.away_after
        broken = away or self.breaks[key] <= self.broken_first
        self.close_connection = self.close_connection or broken
        return broken

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(shards):
    pytest.importorskip("aiohttp")
    handler = type("Handler", (Web,), {"breaks": {}, "parts": []})
    with served(handler, shards) as address:
        yield address, handler


@pytest.mark.parametrize("kind", ["s3", "memory", "http"])
@pytest.mark.parametrize("pattern", ["train-{000..002}.tar", "train-*.tar"])
def test_shards_give_the_same_wherever_they_are(shards, tmp_path, kind, pattern, request, monkeypatch):
    monkeypatch.setattr(addresses, "_BLOCK", 3000)  # a shard takes several
    if kind == "http":
        place, _ = request.getfixturevalue("web")
    else:
        place = f"{request.getfixturevalue('bucket')}/d" if kind == "s3" else f"memory://{tmp_path}"
        for path in shards.iterdir():
            fsspec.filesystem(kind).pipe_file(f"{place}/{path.name}", path.read_bytes())
    source = WebDatasetSource(kind="webdataset", train=f"{place}/{pattern}", test=f"{place}/test-*.tar")
    assert source.present()
    local = WebDatasetSource(kind="webdataset", train=shards / pattern, test=shards / "test-*.tar").open()
    found = source.open()
    same(found, local)
    assert found.train.place(3, "train") == f"{place}/train-000.tar/a/0003.png"
    some = pickle.loads(pickle.dumps(found.train.take(np.array([17, 2]))))  # as tasks of Ray get it
    assert [some.read(0), some.read(1)] == [local.train.read(17), local.train.read(2)]
    with pytest.raises(UserError, match=r"shard '.*/train-003\.tar' does not exist; 1 of 4 shards are missing"):
        WebDatasetSource(kind="webdataset", train=f"{place}/train-{{000..003}}.tar").open()
    with pytest.raises(UserError, match=r"shard '.*/none-\*\.tar' does not exist"):
        WebDatasetSource(kind="webdataset", train=f"{place}/none-*.tar").open()


def test_a_shard_is_indexed_once_and_again_when_it_changes(shards, bucket, tmp_path):
    storage = fsspec.filesystem("s3")

    def put(name: str) -> None:
        storage.pipe_file(f"{bucket}/{name}", (shards / name).read_bytes())

    for number in range(3):
        put(f"train-00{number}.tar")
    source = {"kind": "webdataset", "train": f"{bucket}/train-{{000..002}}.tar"}
    data = data_config(source=source, prepared=str(tmp_path / "p"))
    first = ensure_prepared(data, 0)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "cibl_ray" / "shards").iterdir()}
    assert len(kept) == 3
    assert ensure_prepared(data, 0).digests == first.digests
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "cibl_ray" / "shards").iterdir()} == kept
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"hidden" not in written
    # A damaged index is made again, and so is that of a shard which is no longer the same.
    next(iter(kept)).write_text("{")
    assert data.source.open().train.digest() == data.source.open().train.digest()
    with webdataset.ShardWriter(str(shards / "train-%03d.tar"), start_shard=2, maxcount=9, verbose=0) as writer:
        writer.write({"__key__": "b", "png": data.source.open().train.read(0), "cls": "two"})
    put("train-002.tar")
    again = ensure_prepared(data, 0)
    assert sum(split.samples for split in again.splits.values()) == 15
    assert len([*(tmp_path / "cache" / "cibl_ray" / "shards").iterdir()]) == 4


def test_a_broken_network_is_tried_again_and_preparing_continues_where_it_stopped(shards, web, tmp_path):
    place, handler = web
    source = {"kind": "webdataset", "train": f"{place}/train-{{000..002}}.tar", "test": f"{place}/test-{{000..001}}.tar"}
    store = {"square": 256, "shard_mb": 1, "mode": "raw"}
    data = data_config(source=source, store=store, prepared=str(tmp_path / "p"))
    handler.broken_first = 2
    handler.away_after = 5 + 12  # the five shards, each in one part, and 12 images
    with pytest.raises(UserError, match=rf"{place}/train-00\d\.tar: cannot be read after 5 tries: .*; stopped: ") as caught:
        ensure_prepared(data, 0)
    stopped = re.search(r"stopped: (6|12) of 19 train images are in finished files; the same command", str(caught.value))
    assert stopped is not None
    assert not any(path.name == "prepared.json" for path in (tmp_path / "p").rglob("*"))
    handler.away_after = None
    read = len(handler.parts)
    prepared = ensure_prepared(data, 0)
    # What was finished is not read again, and no shard is indexed again.
    assert len(handler.parts) - read == 19 - int(stopped[1]) + 9
    local = {**source, "train": str(shards / "train-{000..002}.tar"), "test": str(shards / "test-{000..001}.tar")}
    by_disk = ensure_prepared(data_config(source=local, store=store, prepared=str(tmp_path / "q")), 0)
    for split in ("train", "test"):
        assert [a.read_bytes() for a in prepared.paths(split)] == [b.read_bytes() for b in by_disk.paths(split)]
    handler.away_after = 0
    assert ensure_prepared(data, 0).digests == prepared.digests  # without a network, what was prepared is used


def test_a_server_that_sends_whole_files_only_is_refused(web):
    place, handler = web
    handler.whole_files = True
    with pytest.raises(UserError, match=r"train-000\.tar: the server sends whole files only, no parts") as caught:
        addresses.fetch_part(addresses.file_system("http"), f"{place}/train-000.tar?token=secret", 512, 100)
    assert "secret" not in str(caught.value)


def test_shards_that_are_cut_and_images_that_are_too_large(shards, tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    whole = (shards / "train-000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        last = [member for member in archive if member.name.endswith(".png")][-1]
    for name, data, message in (
        ("cut", whole[: last.offset_data + last.size // 2], "cut short|cannot be read"),
        ("no", b"x" * 5000, "cannot be read"),
        ("zip.tar.gz", b"\x1f\x8b" + b"x" * 5000, "cannot be read: .*; unpack it first: gunzip"),
        ("empty", b"", "cannot be read"),
    ):
        memory.pipe_file(f"{tmp_path}/{name}", data)
        with pytest.raises(UserError, match=rf"shard 'memory://{tmp_path}/{name}' .*({message})"):
            WebDatasetSource(kind="webdataset", train=f"memory://{tmp_path}/{name}").open()
    memory.pipe_file(f"{tmp_path}/a.tar", whole)
    memory.pipe_file(f"{tmp_path}/b.tar", (shards / "train-001.tar").read_bytes())
    source = WebDatasetSource(kind="webdataset", train=f"memory://{tmp_path}/{{a,b}}.tar")
    images = source.open().train
    monkeypatch.setattr(addresses, "LARGEST", 100)
    with pytest.raises(OSError, match="too large for an image behind an address"):
        images.read(0)
    with pytest.raises(UserError, match="put credentials into the environment"):
        data_config(source={"kind": "webdataset", "train": "https://host/train-000.tar?token=secret"})
