"""Folders and lists behind addresses: in memory, on a disk, in a bucket, on a web server."""

from __future__ import annotations

import http.server
import os
from pathlib import Path

import numpy as np
import pytest

from pipelines.common.errors import UserError
from pipelines.config import DataConfig
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.sources import FolderSource, ListsSource, addresses, read_list
from tests.conftest import data_config
from tests.serve.conftest import free_port
from tests.sources import same, served

fsspec = pytest.importorskip("fsspec")


def copied(folder: Path, address: str) -> str:
    """The files of a folder, written behind an address by fsspec itself."""
    system, root = fsspec.core.url_to_fs(address)
    for path in folder.rglob("*.png"):
        target = f"{root}/{path.relative_to(folder).as_posix()}"
        if not address.startswith(("s3:", "gs:")):  # which have no folders
            system.makedirs(target.rpartition("/")[0], exist_ok=True)
        system.pipe_file(target, path.read_bytes())
    return address


@pytest.fixture
def web(image_folder):
    """A web server that lists its folders."""
    handler = type("Handler", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with served(handler, image_folder) as address:
        yield address


@pytest.fixture
def gs_bucket(monkeypatch):
    """A bucket of a local server that speaks Google Cloud Storage's interface."""
    server_module = pytest.importorskip("gcp_storage_emulator.server")
    gcsfs = pytest.importorskip("gcsfs")
    port = free_port()
    server = server_module.create_server("127.0.0.1", port, in_memory=True, default_bucket="trees")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield "gs://trees"
    server.stop()
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.mark.parametrize("kind", ["memory", "file", "s3", "gs", "http"])
def test_a_folder_gives_the_same_wherever_it_is(image_folder, tmp_path, kind, request):
    if kind in ("s3", "gs", "http"):
        pytest.importorskip({"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp"}[kind])
        place = request.getfixturevalue({"s3": "bucket", "gs": "gs_bucket", "http": "web"}[kind])
    else:
        place = f"{kind}://{tmp_path}"
    address = place if kind == "http" else copied(image_folder, f"{place}/photos")
    source = FolderSource(kind="folder", path=address)
    assert source.path == address
    assert source.present()
    same(source.open(), FolderSource(kind="folder", path=image_folder).open())


def test_names_on_a_web_server_are_those_of_the_disk(image_folder, web):
    """A page of links encodes them: `great%20tit`."""
    pytest.importorskip("aiohttp")
    for split in ("train", "test"):
        (image_folder / split / "one").rename(image_folder / split / "great tit")
        (image_folder / split / "two").rename(image_folder / split / "caf\u00e9")
    (image_folder / "train" / "great tit" / "0.png").rename(image_folder / "train" / "great tit" / "50% & #1.png")
    (image_folder / "train" / "great tit" / "1.png").rename(image_folder / "train" / "great tit" / "50-1.png")
    (image_folder / "train" / "@eaDir").mkdir()  # no class
    (image_folder / "train" / "@eaDir" / "1.png").write_bytes(b"thumbnail")
    dataset = FolderSource(kind="folder", path=web).open()
    assert dataset.classes == ["caf\u00e9", "great tit", "nought"]
    same(dataset, FolderSource(kind="folder", path=image_folder).open())
    (image_folder / "names.txt").write_text("great tit\tParus major\nnought\n")
    chosen = FolderSource(kind="folder", path=web, classes=image_folder / "names.txt").open()
    assert chosen.classes == ["Parus major", "nought"]
    for split in ("train", "test"):
        (image_folder / split / "nought").rename(os.fsdecode(bytes(image_folder / split) + b"/caf\xe9"))
    with pytest.raises(UserError, match=r"class folder 'caf\\udc.*' of 'http://.*' has a name that is not UTF-8; rename it"):
        FolderSource(kind="folder", path=web).open()


def test_a_change_behind_an_address_is_noticed(image_folder, bucket, tmp_path):
    address = copied(image_folder, f"{bucket}/photos")
    data = DataConfig.model_validate({"source": {"kind": "folder", "path": address}, "prepared": str(tmp_path / "p")})
    first = ensure_prepared(data, 0)
    assert ensure_prepared(data, 0).digests == first.digests
    other = next((image_folder / "train" / "two").iterdir()).read_bytes()
    fsspec.filesystem("s3").pipe_file(f"{bucket}/photos/train/one/0.png", other)
    assert ensure_prepared(data, 0).digests["train"] != first.digests["train"]
    written = b"".join(file.read_bytes() for file in first.folder.rglob("*") if file.is_file())
    assert b"hidden" not in written


def test_lists_and_their_images_behind_addresses(image_folder, bucket):
    plain = FolderSource(kind="folder", path=image_folder).open()
    assert plain.test is not None
    address = copied(image_folder, f"{bucket}/photos")
    for name, images in (("train", plain.train), ("test", plain.test)):
        lines = "".join(f"{path} {label}\n" for path, label in zip(images.names, images.labels, strict=True))
        fsspec.filesystem("s3").pipe_file(f"{bucket}/lists/{name}.txt", lines.encode())
    source = ListsSource(kind="lists", root=address, train=f"{bucket}/lists/train.txt", test=f"{bucket}/lists/test.txt")
    assert source.present()
    same(source.open(), plain)
    with pytest.raises(UserError, match=r"list 's3://trees/lists/none.txt' cannot be read: nothing is at this address"):
        ListsSource(kind="lists", root=address, train=f"{bucket}/lists/none.txt").open()


def test_chosen_classes_and_files_that_are_no_images(image_folder, tmp_path, capsys):
    address = copied(image_folder, f"memory://{tmp_path}/photos")
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"{tmp_path}/photos/train/one/notes.txt", b"text")
    memory.pipe_file(f"{tmp_path}/photos/train/one/.hidden.png", b"text")
    (tmp_path / "classes.txt").write_text("two\tpair\nnought\n")
    dataset = FolderSource(kind="folder", path=address, classes=tmp_path / "classes.txt").open()
    assert dataset.classes == ["pair", "nought"]
    assert np.bincount(dataset.train.labels).tolist() == [5, 8]
    assert "1 .txt, not among the endings" in capsys.readouterr().err


def test_splits_behind_an_address_are_those_of_a_plain_folder(image_folder, tmp_path, capsys):
    (image_folder / "test").rename(image_folder / "valid")
    address = copied(image_folder, f"memory://{tmp_path}/roboflow")
    dataset = FolderSource(kind="folder", path=address).open()
    told = capsys.readouterr().err
    assert "'valid'; the splits are the folders train, val and test" in told
    assert (dataset.classes, dataset.val, dataset.test) == (["nought", "one", "two"], None, None)
    FolderSource(kind="folder", path=image_folder).open()
    assert capsys.readouterr().err == told.replace(address, str(image_folder))
    (image_folder / "train").rename(image_folder / "training")
    with pytest.raises(UserError, match="/training' looks like a split; rename it"):
        FolderSource(kind="folder", path=copied(image_folder, f"memory://{tmp_path}/other")).open()


def test_keys_with_an_empty_part_are_listed(bucket):
    s3 = fsspec.filesystem("s3")
    keys = ["train/cat/1.jpg", "train/dog/1.jpg", "train//cow/2.jpg", "/train/cat/3.jpg", "train/cat//4.jpg"]
    for key in keys:
        s3.pipe_file(f"{bucket}/ds/{key}", b"x")
    found = [name for name, _ in addresses.listed(f"{bucket}/ds")]
    assert found == sorted(keys, key=lambda key: key.split("/"))
    s3.pipe_file(f"{bucket}/ds/train/", b"")  # as consoles mark a folder
    assert [name for name, _ in addresses.listed(f"{bucket}/ds/train/dog")] == ["1.jpg"]


def test_what_was_listed_before_is_listed_again(image_folder, bucket):
    address = copied(image_folder, f"{bucket}/photos")
    fsspec.filesystem("s3").ls(address)
    boto3 = pytest.importorskip("boto3")
    image = (image_folder / "train" / "one" / "0.png").read_bytes()
    boto3.client("s3").put_object(Bucket="trees", Key="photos/val/one/0.png", Body=image)
    dataset = FolderSource(kind="folder", path=address).open()
    assert dataset.val is not None
    assert dataset.val.names == ["val/one/0.png"]


def test_pages_that_link_further_than_one_folder(tmp_path, monkeypatch):
    pages = {
        "/ds/": ["a/", "a/x.jpg", "a-b/x.jpg", "b/x.jpg", "a/sub/", ".git/"], "/ds/a/": ["x.jpg", "sub/"],
        "/ds/a/sub/": ["z.jpg"],
    }  # fmt: skip

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            links = pages.get(self.path)
            self.send_response(404 if links is None else 200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write("".join(f'<a href="{link}">{link}</a>' for link in links or ()).encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(addresses, "_FIRST_WAIT", 0.001)
    with served(Handler, tmp_path) as address:
        assert [name for name, _ in addresses.listed(f"{address}/ds")] == ["a/sub/z.jpg", "a/x.jpg", "a-b/x.jpg", "b/x.jpg"]
        pages["/ds/"].append("gone/")
        with pytest.raises(UserError, match=r"image folder 'http://.*/ds/gone': nothing is at this address"):
            [*addresses.listed(f"{address}/ds")]


@pytest.mark.parametrize("ends", ["\r", "\r\n", "\n"])
def test_a_list_behind_an_address_has_any_line_ends(tmp_path, ends):
    (tmp_path / "list.txt").write_bytes(f"a/1.jpg 0{ends}b/2 3.jpg 1{ends}".encode())
    for place in (tmp_path / "list.txt", f"file://{tmp_path}/list.txt"):
        names, labels = read_list(place)
        assert names == ["a/1.jpg", "b/2 3.jpg"]
        assert labels.tolist() == [0, 1]


def test_what_is_wrong_with_an_address_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(addresses, "_FIRST_WAIT", 0.001)
    with pytest.raises(UserError, match="has no files|nothing is at this address"):
        FolderSource(kind="folder", path=f"memory://{tmp_path}/none").open()
    with pytest.raises(UserError, match=r"gopher://\.\.\. is no address that can be read"):
        FolderSource(kind="folder", path="gopher://somewhere/x").open()
    with pytest.raises(UserError, match="cannot be read after 5 tries") as caught:
        FolderSource(kind="folder", path="http://127.0.0.1:9/x").open()
    assert "tries: " in str(caught.value)
    for secret in ("s3://me:secret@bucket/x", "https://host/x?token=secret"):
        with pytest.raises(ValueError, match="put credentials into the environment"):
            FolderSource(kind="folder", path=secret)
        with pytest.raises(UserError, match="put credentials into the environment") as caught:
            data_config(source={"kind": "folder", "path": secret})
        assert "secret" not in str(caught.value)


def test_files_without_end_and_without_content_are_bad_images(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr(addresses, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr(addresses, "LARGEST", 1000)
    for system, place in ((fsspec.filesystem("memory"), f"memory://{tmp_path}"), (fsspec.filesystem("s3"), bucket)):
        system.pipe_file(f"{place}/a.jpg", b"x" * 1001)
        system.pipe_file(f"{place}/b.jpg", b"x" * 1000)
        system.pipe_file(f"{place}/c.jpg", b"")
        images = addresses.Remote([f"{place}/{name}.jpg" for name in "abcd"])
        with pytest.raises(OSError, match="more than 1,000 bytes"):
            images.read(0)
        assert images.read(1) == b"x" * 1000
        with pytest.raises(OSError, match="is empty"):
            images.read(2)
        with pytest.raises(FileNotFoundError, match="nothing is at this address"):
            images.read(3)
