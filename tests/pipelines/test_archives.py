"""Images in archives, WebDataset shards and Hugging Face data sets, as those libraries write them."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipelines.common.errors import UserError
from pipelines.config import DataConfig
from pipelines.pixels import decode, to_rgb
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.originals import original_images
from pipelines.prepare.sources import ArchiveSource, FolderSource, HuggingFaceSource, WebDatasetSource, contents
from tests.conftest import archive

CLASSES = ["nought", "one", "two"]


def pixels(images) -> list[bytes]:
    return [to_rgb(decode(images.read(index))).tobytes() for index in range(len(images))]


def packed(folder: Path, path: Path, top: str = "") -> Path:
    """A folder as an archive, in the kind that the path's ending says."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for file in files:
                target.write(file, f"{top}{file.relative_to(folder)}")
        return path
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as target:
        for file in files:
            target.add(file, f"{top}{file.relative_to(folder)}")
    return path


@pytest.mark.parametrize("top", ["", "trees/2024/"])
@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_an_archive_gives_what_its_folder_gives(image_folder, tmp_path, name, top):
    path = packed(image_folder, tmp_path / name, top)
    source = ArchiveSource(kind="archive", path=path)
    dataset, plain = source.open(), FolderSource(kind="folder", path=image_folder).open()
    assert dataset.classes == plain.classes == CLASSES
    assert dataset.val is None
    for images, other in ((dataset.train, plain.train), (dataset.test, plain.test)):
        assert images.labels.tolist() == other.labels.tolist()
        assert images.names == [f"{top}{each}" for each in other.names]
        assert pixels(images) == pixels(other)
    assert source.open().train.digest() == dataset.train.digest()


def test_class_folders_alone_and_what_is_no_image(image_folder, tmp_path, capsys):
    (image_folder / "train" / "one" / "notes.txt").write_text("no image")
    (image_folder / "train" / "__MACOSX").mkdir()
    (image_folder / "train" / "__MACOSX" / "._0.png").write_bytes(b"thumbnail")
    dataset = ArchiveSource(kind="archive", path=packed(image_folder / "train", tmp_path / "flat.zip")).open()
    assert dataset.classes == CLASSES
    assert dataset.test is None
    assert "1 .txt" in (told := capsys.readouterr().err)
    assert "1 __MACOSX" in told


def test_archives_that_cannot_be_used(image_folder, tmp_path):
    def error(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            ArchiveSource(kind="archive", path=path).open()
        return str(caught.value)

    assert "does not exist" in error(tmp_path / "none.zip")
    (tmp_path / "text.zip").write_text("not an archive")
    assert "cannot be read" in error(tmp_path / "text.zip")
    whole = packed(image_folder, tmp_path / "whole.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in error(tmp_path / "cut.zip")
    with zipfile.ZipFile(tmp_path / "loose.zip", "w") as target:
        target.writestr("a.png", b"x")
        target.writestr("one/b.png", b"x")
    assert "'a.png' is in no class folder" in error(tmp_path / "loose.zip")
    with zipfile.ZipFile(tmp_path / "strange.zip", "w") as target:
        for name in ("train/a/1.png", "train/b/1.png", "test/c/1.png"):
            target.writestr(name, b"x")
    assert "the class 'c' is not one of the training classes" in error(tmp_path / "strange.zip")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_of_two_members_with_one_name_the_later_counts(image_folder, tmp_path, name):
    before, later = ((image_folder / "train" / label / "0.png").read_bytes() for label in ("one", "two"))
    with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as target:
        for path, image in (("b/1.png", before), ("a/1.png", before), ("c/1.png", before), ("b/1.png", later)):
            member = tarfile.TarInfo(path)
            member.size = len(image)
            target.addfile(member, io.BytesIO(image))
    train = ArchiveSource(kind="archive", path=tmp_path / name).open().train
    assert train.names == ["a/1.png", "b/1.png", "c/1.png"]
    assert [train.read(row) for row in range(3)] == [before, later, before]


def test_a_zip_with_a_name_twice_gives_the_later_image(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as target:
        target.writestr("a/1.png", b"before")
        target.writestr("b/1.png", b"other")
        with pytest.warns(UserWarning, match="Duplicate name"):
            target.writestr("a/1.png", b"later")
    train = ArchiveSource(kind="archive", path=tmp_path / "a.zip").open().train
    assert train.names == ["a/1.png", "b/1.png"]
    assert [train.read(row) for row in range(2)] == [b"later", b"other"]


def tar_of(path: Path, members: dict[str, bytes | tuple[bytes, str]]) -> Path:
    """A tar of files, and of links: their type, and where they lead."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as target:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                target.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                target.addfile(member)
    return path


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_links_in_a_tar_are_followed_and_broken_ones_counted(tmp_path, name, capsys):
    path = tar_of(tmp_path / name, {
        "./a/0.png": (tarfile.SYMTYPE, "../b/later.png"),
        "./a/1.png": b"one",
        "./a/2.png": (tarfile.LNKTYPE, "./a/1.png"),
        "./a/3.png": (tarfile.SYMTYPE, "2.png"),
        "./a/4.png": (tarfile.SYMTYPE, "/elsewhere/4.png"),
        "./a/5.png": (tarfile.SYMTYPE, "5.png"),
        "./b/later.png": b"two",
    })  # fmt: skip
    with tarfile.open(path, "a" if name == "a.tar" else "r") as target:
        if name == "a.tar":  # as tar does with a file that it is given twice
            member = tarfile.TarInfo("./a/1.png")
            member.type, member.linkname = tarfile.LNKTYPE, "./a/1.png"
            target.addfile(member)
    train = ArchiveSource(kind="archive", path=path).open().train
    found = {name: train.read(row) for row, name in enumerate(train.names)}
    assert found == {
        "./a/0.png": b"two",
        "./a/1.png": b"one",
        "./a/2.png": b"one",
        "./a/3.png": b"one",
        "./b/later.png": b"two",
    }
    assert "2 links to files that are not in it" in capsys.readouterr().err


def test_links_in_a_shard_are_followed(tmp_path):
    members = {"0.png": b"zero", "0.cls": b"0", "1.cls": b"1", "1.png": (tarfile.LNKTYPE, "0.png"), "2.cls": b"2"}
    path = tar_of(tmp_path / "links.tar", {**members, "2.png": (tarfile.SYMTYPE, "3.png"), "3.png": b"three", "3.cls": b"0"})
    train = WebDatasetSource(kind="webdataset", train=path).open().train
    found = dict(zip([name.partition("/")[2] for name in train.names], train.labels.tolist(), strict=True))
    assert found == {"0.png": 0, "1.png": 1, "2.png": 2, "3.png": 0}
    assert sorted(train.read(row) for row in range(4)) == [b"three", b"three", b"zero", b"zero"]
    broken = tar_of(tmp_path / "broken.tar", {**members, "2.png": (tarfile.SYMTYPE, "4.png")})
    with pytest.raises(UserError, match=r"broken.tar: '2.png' is a link to '4.png', which is not in the shard"):
        WebDatasetSource(kind="webdataset", train=broken).open()


def _archive_of(names, path):
    with zipfile.ZipFile(path, "w") as target:
        for name in names:
            target.writestr(name, name)
    return ArchiveSource(kind="archive", path=path)


def test_accents_in_an_archive_are_compared_by_what_they_look_like(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    names = [f"train/{composed}/1.png", "train/tea/1.png", f"test/{apart}/1.png", "test/tea/2.png"]
    dataset = _archive_of(names, tmp_path / "a.zip").open()
    assert dataset.classes == [composed, "tea"]
    assert [*zip(dataset.test.names, dataset.test.labels.tolist(), strict=True)] == [(names[2], 0), (names[3], 1)]
    with pytest.raises(
        UserError, match=r"b\.zip/test/café': two classes differ only in .*'cafe\\u0301' and 'caf\\xe9'; rename"
    ):
        _archive_of([*names, f"test/{composed}/3.png"], tmp_path / "b.zip").open()


@pytest.mark.parametrize("split", ["training", "Valid", "testing"])
def test_an_archive_whose_folders_look_like_splits_is_refused(tmp_path, split):
    path = tar_of(tmp_path / "a.tar", {f"photos/{split}/cat/1.png": b"x", "photos/other/dog/1.png": b"x"})
    with pytest.raises(UserError, match=rf"a.tar/photos/{split}' looks like a split; rename it"):
        ArchiveSource(kind="archive", path=path).open()


@pytest.mark.parametrize("top", ["", "photos/"])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
def test_what_lies_beside_the_splits_of_an_archive_is_told(tmp_path, name, top, capsys):
    names = [f"{split}/{label}/1.png" for split in ("train", "valid", "test", "unlabeled") for label in ("cat", "dog")]
    if name == "a.zip":
        with zipfile.ZipFile(tmp_path / name, "w") as target:
            for each in names:
                target.writestr(top + each, each)
    else:
        tar_of(tmp_path / name, {top + each: each.encode() for each in names})
    dataset = ArchiveSource(kind="archive", path=tmp_path / name).open()
    assert dataset.classes == ["cat", "dog"]
    assert dataset.val is None
    assert [dataset.train.read(row) for row in range(2)] == [b"train/cat/1.png", b"train/dog/1.png"]
    assert dataset.test.names == [f"{top}test/cat/1.png", f"{top}test/dog/1.png"]
    place = str(tmp_path / name / top)
    assert capsys.readouterr().err == (
        f"data: not read of {place!r}: 'unlabeled', 'valid'; the splits are the folders train, val and test\n"
    )


def test_numbers_as_class_folders_have_the_order_of_a_plain_folder(image_folder, tmp_path):
    for number, name in enumerate(("nought", "one", "two")):
        for split in ("train", "test"):
            (image_folder / split / name).rename(image_folder / split / ("10", "2", "1")[number])
    packed_classes = ArchiveSource(kind="archive", path=packed(image_folder, tmp_path / "a.tar")).open().classes
    assert packed_classes == FolderSource(kind="folder", path=image_folder).open().classes == ["1", "10", "2"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_an_archive_without_images(tmp_path, name):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="has no images"):
        ArchiveSource(kind="archive", path=packed(tmp_path / "some", tmp_path / name)).open()


def test_a_damaged_member_is_a_bad_image(image_folder, tmp_path):
    path = packed(image_folder, tmp_path / "damaged.zip")
    with zipfile.ZipFile(path) as source:
        member = source.getinfo("train/one/1.png")
    data = bytearray(path.read_bytes())
    data[member.header_offset + 30 + len(member.filename) + 8] ^= 0xFF
    path.write_bytes(data)
    content = {"source": {"kind": "archive", "path": str(path)}, "val_fraction": 0.2, "prepared": str(tmp_path / "prepared")}
    with pytest.raises(UserError, match=r"damaged.zip/train/one/1.png: unreadable image"):
        ensure_prepared(DataConfig.model_validate(content), 0)
    prepared = ensure_prepared(DataConfig.model_validate({**content, "on_bad_image": "skip"}), 0)
    assert [Path(name).name for split in prepared.splits.values() for name in split.skipped] == ["1.png"]


def test_a_compressed_tar_that_is_cut_or_has_no_room(image_folder, tmp_path, monkeypatch):
    path = packed(image_folder, tmp_path / "a.tar.gz")
    images = ArchiveSource(kind="archive", path=path).open().train
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"a\.tar\.gz/.*: damaged: .*; fetch it again"):
        images.read(0)

    # Cut within the header of a member: tarfile reads the end of the archive there.
    path = packed(image_folder, tmp_path / "c.tar.gz")
    images = ArchiveSource(kind="archive", path=path).open().train
    with tarfile.open(path) as whole_tar:
        header = whole_tar.getmember(images.names[-1]).offset
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[: header + 100]))
    with pytest.raises(UserError, match=r"c\.tar\.gz/.*: damaged: it ends after [\d,]+ of [\d,]+ images; fetch it again"):
        images.read(0)

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    whole = ArchiveSource(kind="archive", path=packed(image_folder, tmp_path / "b.tar.gz")).open().train
    monkeypatch.setattr(contents.tempfile, "TemporaryFile", Full)
    with pytest.raises(UserError, match=r"No space left on device; free some room there, or set TMPDIR"):
        whole.read(0)

    def nowhere():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(contents.tempfile, "TemporaryFile", nowhere)
    with pytest.raises(UserError, match=r"No usable temporary directory found; set TMPDIR to a folder with some room"):
        whole.read(0)


def test_photographs_from_the_archive_itself(tmp_path):
    path = archive("imagewoof-sample.zip")
    dataset = ArchiveSource(kind="archive", path=path).open()
    with zipfile.ZipFile(path) as whole:
        names = {name for name in whole.namelist() if not name.endswith("/")}
        assert {*dataset.train.names} | ({*dataset.val.names} if dataset.val else set()) | (
            {*dataset.test.names} if dataset.test else set()
        ) == {name for name in names if name.lower().endswith(".jpeg")}
        assert dataset.train.read(5) == whole.read(dataset.train.names[5])


@pytest.mark.parametrize("label", ["cls", "json"])
def test_shards_as_webdataset_writes_them(image_folder, tmp_path, label):
    webdataset = pytest.importorskip("webdataset")
    plain = FolderSource(kind="folder", path=image_folder).open()
    with webdataset.ShardWriter(str(tmp_path / "train-%03d.tar"), maxcount=7, verbose=0) as writer:
        for row in range(len(plain.train)):
            own = (
                {"cls": int(plain.train.labels[row])}
                if label == "cls"
                else {"json": {"species": CLASSES[plain.train.labels[row]]}}
            )
            writer.write({"__key__": f"a/{row:04d}", "png": plain.train.read(row), **own})
    pattern = tmp_path / "train-{000..002}.tar"
    source = WebDatasetSource(kind="webdataset", train=pattern, label=None if label == "cls" else "species")
    dataset = source.open()
    assert dataset.classes == (["0", "1", "2"] if label == "cls" else CLASSES)
    assert dataset.train.labels.tolist() == plain.train.labels.tolist()
    assert pixels(dataset.train) == pixels(plain.train)
    by_glob = WebDatasetSource(kind="webdataset", train=tmp_path / "train-*.tar", label=source.label).open()
    assert by_glob.train.digest() == dataset.train.digest()
    with pytest.raises(UserError, match=r"train-003.tar' does not exist; 1 of 4 shards are missing"):
        WebDatasetSource(kind="webdataset", train=tmp_path / "train-{000..003}.tar", label=source.label).open()
    if label == "json":
        with pytest.raises(UserError, match=r"the sample 'a/0000' has no \.cls"):
            WebDatasetSource(kind="webdataset", train=pattern).open()


def test_shards_that_are_cut_or_ambiguous(tmp_path):
    def shard(name: str, members: dict[str, bytes]) -> Path:
        with tarfile.open(tmp_path / name, "w") as target:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                target.addfile(info, io.BytesIO(data))
        return tmp_path / name

    two = shard("two.tar", {"x.jpg": b"1", "x.png": b"2", "x.cls": b"0"})
    with pytest.raises(UserError, match="'x' has two images"):
        WebDatasetSource(kind="webdataset", train=two).open()
    wrong = shard("wrong.tar", {"x.jpg": b"1", "x.json": b"{"})
    with pytest.raises(UserError, match=r"'x.json' is not JSON"):
        WebDatasetSource(kind="webdataset", train=wrong).open()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(two.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        WebDatasetSource(kind="webdataset", train=cut).open()


@pytest.mark.parametrize("named", [True, False])
def test_a_data_set_of_hugging_face_from_disk(image_folder, tmp_path, named):
    datasets = pytest.importorskip("datasets")
    plain = FolderSource(kind="folder", path=image_folder).open()

    def rows(images) -> object:
        labels = images.labels.tolist() if named else [CLASSES[label] for label in images.labels]
        cells = [{"bytes": images.read(index), "path": None} for index in range(len(images))]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES) if named else datasets.Value("string")}
        )
        return datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)

    folder = tmp_path / "set"
    datasets.DatasetDict({"train": rows(plain.train), "validation": rows(plain.test)}).save_to_disk(str(folder))
    source = HuggingFaceSource(kind="huggingface", path=str(folder))
    dataset = source.open()
    assert dataset.classes == CLASSES
    assert dataset.test is None
    assert dataset.train.labels.tolist() == plain.train.labels.tolist()
    assert dataset.val.labels.tolist() == plain.test.labels.tolist()
    assert pixels(dataset.train) == pixels(plain.train)
    assert pixels(dataset.train.take(np.array([4, 2]))) == [pixels(plain.train)[4], pixels(plain.train)[2]]
    sent = pickle.loads(pickle.dumps(dataset.train.take(np.array([4, 2]))))  # as to another node
    assert pixels(sent) == [pixels(plain.train)[4], pixels(plain.train)[2]]
    assert source.open().train.digest() == dataset.train.digest()
    mapped = HuggingFaceSource(kind="huggingface", path=str(folder), splits={"train": "train", "test": "validation"}).open()
    assert mapped.val is None
    assert len(mapped.test) == len(plain.test)
    with pytest.raises(UserError, match=r"has no split 'holdout'; it has train, validation"):
        HuggingFaceSource(kind="huggingface", path=str(folder), splits={"train": "holdout"}).open()
    with pytest.raises(UserError, match=r"has no column 'photo'; it has image, label"):
        HuggingFaceSource(kind="huggingface", path=str(folder), image="photo").open()
    with pytest.raises(UserError, match=r"data.source.group: .* has no column 'patient'; it has image, label"):
        HuggingFaceSource(kind="huggingface", path=str(folder), group="patient").open()


def test_class_labels_of_hugging_face_may_be_written_in_any_way(image_folder, tmp_path):
    """With an outer space, or an accent that is a letter of its own."""
    datasets = pytest.importorskip("datasets")
    names = [" space ", "unused", "fru\u0302he"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    image = {"bytes": (image_folder / "train" / "one" / "0.png").read_bytes(), "path": None}
    rows = {"image": [image] * 3, "label": [2, 0, 2]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    dataset = HuggingFaceSource(kind="huggingface", path=str(tmp_path / "set")).open()
    assert dataset.classes == [names[0], names[2]]
    assert dataset.train.labels.tolist() == [1, 0, 1]


def test_a_data_set_is_prepared_once(image_folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    plain = FolderSource(kind="folder", path=image_folder).open()
    cells = [{"bytes": plain.train.read(index), "path": None} for index in range(len(plain.train))]
    table = datasets.Dataset.from_dict({"photo": cells, "label": plain.train.labels.tolist()}).cast_column(
        "photo", datasets.Image()
    )
    table.save_to_disk(str(tmp_path / "set"))
    content = {"source": {"kind": "huggingface", "path": str(tmp_path / "set")}, "prepared": str(tmp_path / "prepared")}
    first = ensure_prepared(DataConfig.model_validate(content), 0)
    written = (first.folder / "prepared.json").stat().st_mtime_ns
    again = ensure_prepared(DataConfig.model_validate(content), 0)
    assert (again.folder / "prepared.json").stat().st_mtime_ns == written
    assert json.loads((again.folder / "prepared.json").read_text())["classes"] == ["0", "1", "2"]


def test_what_was_prepared_of_the_hub_is_used_without_it(image_folder, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    plain = FolderSource(kind="folder", path=image_folder).open()
    cells = [{"bytes": plain.train.read(index), "path": None} for index in range(len(plain.train))]
    table = datasets.Dataset.from_dict({"photo": cells, "label": plain.train.labels.tolist()}).cast_column(
        "photo", datasets.Image()
    )
    content = {"source": {"kind": "huggingface", "path": "someone/trees"}, "prepared": str(tmp_path / "prepared")}
    data = DataConfig.model_validate(content)

    def away(path, name):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", away)
    with pytest.raises(UserError, match="'someone/trees' cannot be opened: Couldn't reach the Hub; give a folder"):
        ensure_prepared(data, 0)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name: table)
    prepared = ensure_prepared(data, 0)
    assert "not on this machine" not in capsys.readouterr().err
    monkeypatch.setattr(datasets, "load_dataset", away)
    assert ensure_prepared(data, 0) == prepared
    assert f"the source is not on this machine; using {prepared.folder} as it was prepared" in capsys.readouterr().err
    assert len([*original_images(prepared, "train", data, 0, 3)]) == 3
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    assert ensure_prepared(data, 0) == prepared
    monkeypatch.undo()
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name: table.rename_column("label", "other"))
    with pytest.raises(UserError, match="which column is the label"):  # it is there, and has changed
        ensure_prepared(data, 0)


def test_shards_of_one_name_in_several_folders_have_names_of_their_own(image_folder, tmp_path):
    """Those that no other shard shares a name with keep the file's, and so their digests."""
    images = sorted((image_folder / "train" / "one").iterdir())
    for number, place in enumerate(("x/b/000.tar", "y/b/000.tar", "x/a/000.tar", "x/b/001.tar")):
        path = tmp_path / "shards" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as target:
            target.add(images[number], "1.png")
            label = tarfile.TarInfo("1.cls")
            label.size = 1
            target.addfile(label, io.BytesIO(str(number % 2).encode()))
    found = WebDatasetSource(kind="webdataset", train=tmp_path / "shards" / "*" / "*" / "*.tar").open().train
    names = dict(zip(found.names, pixels(found), strict=True))
    assert {*names} == {"x/b/000.tar/1.png", "y/b/000.tar/1.png", "a/000.tar/1.png", "001.tar/1.png"}
    assert names["x/b/000.tar/1.png"] != names["y/b/000.tar/1.png"]


def test_there_may_be_more_shards_than_files_that_a_process_may_open(image_folder, tmp_path):
    images = sorted((image_folder / "train").rglob("*.png"))
    for number, image in enumerate(images):
        with tarfile.open(tmp_path / f"{number:03d}.tar", "w") as target:
            target.add(image, "1.png")
            label = tarfile.TarInfo("1.cls")
            label.size = 1
            target.addfile(label, io.BytesIO(str(number % 2).encode()))
    found = WebDatasetSource(kind="webdataset", train=tmp_path / "*.tar").open().train
    before = len([*Path("/dev/fd").iterdir()])
    assert [found.read(row) for row in range(len(found))] == [image.read_bytes() for image in images]
    assert len([*Path("/dev/fd").iterdir()]) == before


def test_the_place_of_an_image_in_a_shard_names_the_shard_once():
    for file in ("/data/x/b/000.tar", "s3://bucket/x/b/000.tar"):
        for name in ("000.tar/a/1.png", "b/000.tar/a/1.png", "x/b/000.tar/a/1.png", "a/1.png"):
            assert contents.place_in(file, name) == f"{file}/a/1.png"


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO])
def test_an_image_on_its_way_to_another_process_is_not_lost_by_the_machines_fault(code):
    class Failing:
        def read(self, index):
            raise OSError(code, os.strerror(code))

        def place(self, index):
            return "trees, row 7"

    with pytest.raises(UserError, match=rf"trees, row 7: cannot be read: {os.strerror(code)}; "):
        contents.held(Failing(), 1)
