"""Sources list what is there, and say what is missing."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import formats
from pipelines.common.errors import UserError
from pipelines.pixels import decode, to_rgb
from pipelines.prepare.sources import Cifar10Source, Dataset, DigitsSource, FolderSource, ListsSource, class_counts, open_folder
from tests.conftest import REPOSITORY


def test_folder(image_folder):
    dataset = FolderSource(kind="folder", path=image_folder).open()
    assert dataset.classes == ["nought", "one", "two"]
    assert class_counts(dataset.train.labels, 3).tolist() == [8, 6, 5]
    assert dataset.val is None
    assert dataset.test is not None
    assert dataset.test.names[0] == "test/nought/0.png"


def test_folder_mistakes(image_folder, tmp_path):
    def error(path=image_folder):
        with pytest.raises(UserError) as caught:
            FolderSource(kind="folder", path=path).open()
        return str(caught.value)

    assert "does not exist" in error(tmp_path / "nowhere")
    (image_folder / "train").rename(image_folder / "Training")
    assert "and no 'train'" in error()
    (image_folder / "test").rename(image_folder / "Testing")
    assert "'Testing' looks like a split; rename it" in error().replace(f"{image_folder}/", "")
    (image_folder / "Testing").rename(image_folder / "test")
    (image_folder / "Training").rename(image_folder / "train")
    (image_folder / "test" / "three").mkdir()
    assert "'three' is not one of the training classes" in error()
    (image_folder / "test" / "three").rmdir()
    (image_folder / "train" / "empty").mkdir()
    (image_folder / "train" / "empty" / "notes.txt").write_text("not an image")
    assert "has no images (.jpg, .png, .tif and the like); move it out, or name the others in a file: data.so" in error()
    assert "empty" in error()


@pytest.fixture
def without_heif(monkeypatch):
    monkeypatch.setattr(formats, "HEIF_MODULE", "absent")
    formats.readable_suffixes.cache_clear()
    yield
    formats.readable_suffixes.cache_clear()


def test_what_is_hidden_or_no_image_is_left_out(image_folder, capsys, without_heif):
    one = image_folder / "train" / "one"
    for place in (".ipynb_checkpoints", "inside/.thumbnails"):
        shutil.copytree(image_folder / "train" / "two", one / place)
    shutil.copy(one / "0.png", one / ".1.png")
    shutil.copy(one / "0.png", one / "7.JFIF")
    for name in ("8.heic", "9.HEIC", "notes", ".DS_Store"):
        (one / name).write_bytes(b"")
    names = FolderSource(kind="folder", path=image_folder).open().train.names
    assert [name for name in names if "/one/" in name] == [
        f"train/one/{name}" for name in (*(f"{i}.png" for i in range(6)), "7.JFIF")
    ]
    message = f"data: left out of {str(image_folder)!r}: 2 .heic, 1 without ending, not among the endings of images; for HEIC"
    message += ": pip install 'cibl-ray[heic]'\n"
    assert capsys.readouterr().err == message


def test_images_outside_the_classes_of_a_split_are_told(image_folder, capsys):
    two = image_folder / "train" / "two"
    shutil.copytree(image_folder / "test", image_folder / "valid")
    shutil.copytree(two, image_folder / ".cache")
    shutil.copy(two / "0.png", image_folder / "train")
    FolderSource(kind="folder", path=image_folder).open()
    assert capsys.readouterr().err.splitlines() == [
        f"data: not read of {str(image_folder)!r}: 'valid'; the splits are the folders train, val and test",
        f"data: 1 image of {str(image_folder / 'train')!r} is in no class folder, and not read",
    ]


def test_links_to_folders_are_followed_once(image_folder, tmp_path):
    two, elsewhere = image_folder / "train" / "two", tmp_path / "elsewhere"
    (two / "0.png").rename(two / "inside.png")
    elsewhere.mkdir()
    (two / "inside.png").rename(elsewhere / "0.png")
    (two / "a").symlink_to(two / "z")
    (two / "linked").symlink_to(elsewhere)
    (two / "z").mkdir()
    (two / "1.png").rename(two / "z" / "1.png")
    (two / "z" / "up").symlink_to(two)
    (two / "z" / "top").symlink_to(image_folder / "train")
    names = FolderSource(kind="folder", path=image_folder).open().train.names
    assert [name.partition("/two/")[2] for name in names if "/two/" in name] == [
        "2.png", "3.png", "4.png", "linked/0.png", "z/1.png"
    ]  # fmt: skip


def test_digest_changes_with_the_images(image_folder):
    def digest():
        return FolderSource(kind="folder", path=image_folder).open().train.digest()

    before = digest()
    assert digest() == before
    file = image_folder / "train" / "one" / "0.png"
    file.write_bytes(file.read_bytes() + b"\0")
    assert digest() != before


def test_a_class_folder_whose_name_is_no_text(image_folder):
    (image_folder / "train" / "two").rename(os.fsdecode(bytes(image_folder / "train") + b"/f\xfcnf"))
    with pytest.raises(UserError, match=r"f\\udcfcnf' has a name that is not UTF-8; rename it"):
        FolderSource(kind="folder", path=image_folder).open()


@pytest.fixture
def lists(image_folder, tmp_path):
    train = tmp_path / "train.txt"
    train.write_text("train/nought/0.png 0\ntrain/one/0.png 1\n\ntrain/nought/1.png 0\n")
    return ListsSource(kind="lists", root=image_folder, train=train), train


def test_lists(lists):
    dataset = lists[0].open()
    assert dataset.classes == ["nought", "one"]
    assert dataset.train.labels.tolist() == [0, 1, 0]
    assert dataset.test is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train/one/0.png one", r"train.txt:5: .* is not 'path label'"),
        ("train/one/0.png 7", r"no image has label 2"),
    ],
)
def test_list_mistakes(lists, line, message):
    source, train = lists
    train.write_text(train.read_text() + line + "\n")
    with pytest.raises(UserError, match=message):
        source.open()


def test_class_names_of_another_encoding(lists, tmp_path):
    names = tmp_path / "classes.txt"
    source = lists[0].model_copy(update={"classes": names})
    names.write_text("nought\nfünf\n", encoding="utf-8")
    assert source.open().classes == ["nought", "fünf"]
    names.write_text("nought\nfünf\n", encoding="latin-1")
    with pytest.raises(UserError, match=r"class names '.*classes\.txt' cannot be read: .*; save it as UTF-8"):
        source.open()


def test_an_image_is_listed_once(lists, tmp_path):
    source, train = lists
    test, lines = tmp_path / "test.txt", train.read_text()
    test.write_text("test/one/0.png 1\ntest/nought/0.png 0\n")
    both = source.model_copy(update={"test": test})
    assert len(both.open().test) == 2
    test.write_text(test.read_text() + "./train/nought/1.png 0\n")
    with pytest.raises(UserError, match=r"'\./train/nought/1\.png' is in both lists '.*/train\.txt' and '.*/test\.txt'"):
        both.open()
    with pytest.raises(UserError, match=r"'train/nought/0\.png' is in both lists '.*/train\.txt' and '.*/train\.txt'"):
        source.model_copy(update={"val": train}).open()
    train.write_text(lines + "train/nought/0.png 0\n")
    with pytest.raises(UserError, match=r"'train/nought/0\.png' is listed twice in '.*/train\.txt'; leave it in one of these"):
        source.open()


def test_lists_may_be_separated_by_tabs_and_need_two_classes(lists):
    source, train = lists
    train.write_text("train/nought/0.png\t0\ntrain/one/0.png\t1\n")
    assert source.open().train.labels.tolist() == [0, 1]
    train.write_text("train/nought/0.png 0\n")
    with pytest.raises(UserError, match="at least 2 are needed"):
        source.open()


def test_lists_without_one_folder_a_class_are_numbered(lists, image_folder):
    source, train = lists
    train.write_text("train/nought/0.png 0\ntrain/one/1.png 0\ntrain/one/0.png 1\n")
    assert source.open().classes == ["0", "1"]


def test_cifar_through_torchvision(tmp_path, monkeypatch):
    """Its file format, with few images: the download's checksum is torchvision's business."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 20, 3072), dtype=np.uint8)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        content = {"data": pixels[number], "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    dataset = Cifar10Source(kind="cifar10", path=tmp_path, download=False).open()
    assert class_counts(dataset.train.labels, 10).tolist() == [10] * 10
    assert dataset.classes[3] == "class 3"
    assert (dataset.train.read(0) == pixels[0, 0].reshape(3, 32, 32).transpose(1, 2, 0)).all()


def test_cifar_absent_names_the_fix(tmp_path):
    with pytest.raises(UserError, match=r"CIFAR10 is not in .*--data.source.kind folder"):
        Cifar10Source(kind="cifar10", path=tmp_path, download=False).open()


def test_digits():
    dataset = DigitsSource(kind="digits").open()
    assert dataset.test is not None
    assert len(dataset.train) + len(dataset.test) == 1797
    assert not set(dataset.train.names) & set(dataset.test.names)
    image = dataset.train.read(0)
    assert isinstance(image, np.ndarray)
    assert image.shape == (8, 8, 3)
    assert image.max() == 239  # 15 of 16


def test_a_list_of_another_length_than_expected(lists):
    source, _ = lists
    assert len(source.model_copy(update={"expect": {"train": 3, "test": 5}}).open().train) == 3
    message = r"train\.txt' names 3 images, 115,846 are expected; .* --data\.source\.expect null"
    with pytest.raises(UserError, match=message):
        source.model_copy(update={"expect": {"train": 115846}}).open()


@pytest.mark.parametrize("name", ["imagenet_lt", "recipes/imagenet_lt_90", "recipes/imagenet_lt_180"])
def test_imagenet_lt_is_the_communitys(name, tmp_path):
    """The lists' true names; one cut short is noticed before a single image is looked for."""
    from pipelines.prepare.command import load_data

    source = load_data(name, []).data.source
    assert [path.name for path in (source.train, source.val, source.test)] == [
        f"ImageNet_LT_{split}.txt" for split in ("train", "val", "test")
    ]
    assert source.expect == {"train": 115_846, "val": 20_000, "test": 50_000}
    short = tmp_path / "ImageNet_LT_train.txt"
    short.write_text("train/n01440764/n01440764_190.JPEG 0\n" * 115_845)
    with pytest.raises(UserError, match="names 115,845 images, 115,846 are expected"):
        source.model_copy(update={"train": short, "root": tmp_path}).open()


def test_a_folder_that_cannot_be_read_is_refused(image_folder, monkeypatch):
    """Skipped, its images would be missing without a word."""
    scandir = os.scandir

    def broken(path):
        if str(path).endswith("inside"):
            raise OSError(5, "Input/output error", str(path))
        return scandir(path)

    config = FolderSource(kind="folder", path=image_folder)
    place = sorted((image_folder / "train").iterdir())[0] / "inside"
    place.mkdir()
    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(UserError, match=r"inside' cannot be read: Input/output error"):
        config.open()


def test_the_current_folder_has_images_like_any_other(image_folder, monkeypatch):
    classes = sorted(entry.name for entry in (image_folder / "train").iterdir())
    named = open_folder(image_folder / "train", classes)
    monkeypatch.chdir(image_folder / "train")
    here = open_folder(Path(), classes)
    assert [f"train/{name}" for name in here.names] == named.names
    assert [file.read_bytes() for file in here.files] == [file.read_bytes() for file in named.files]


def test_digits_are_read_without_importing_scikit_learn():
    code = """
import sys
from pipelines.prepare.sources import DigitsSource
digits = DigitsSource(kind="digits").open()
assert "sklearn" not in sys.modules
from sklearn.datasets import load_digits
whole = load_digits()
assert len(digits.train) + len(digits.test) == len(whole.target) == 1797
assert (digits.train.pixels[0, ..., 0] == (whole.images[0] * 255 / 16).round()).all()
assert digits.train.labels[:10].tolist() == whole.target[:10].tolist()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


def folder_source(path, **more):
    return FolderSource(kind="folder", path=path, **more)


def test_a_folder_of_classes_without_splits(image_folder):
    dataset = folder_source(image_folder / "train").open()
    assert dataset.classes == ["nought", "one", "two"]
    assert class_counts(dataset.train.labels, 3).tolist() == [8, 6, 5]
    assert dataset.train.names[0] == "nought/0.png"
    assert dataset.val is dataset.test is None


def test_images_beside_no_class_are_told_where_they_belong(image_folder):
    with pytest.raises(
        UserError, match="0 class folders; at least 2 are needed; 6 images are directly in it: put those of each"
    ):
        folder_source(image_folder / "train" / "one").open()
    with pytest.raises(UserError, match="6 images directly in it, without classes; expected '.*/one/CLASS'/"):
        open_folder(image_folder / "train" / "one", ["one", "two"])


@pytest.mark.parametrize(
    "leftover", ["@eaDir", "lost+found", "__MACOSX", "$RECYCLE.BIN", "#recycle", "System Volume Information"]
)
def test_folders_that_systems_leave_are_no_data(image_folder, capsys, leftover):
    before = folder_source(image_folder).open()
    for place in ("", "train", "test", "train/one", "train/one/inside"):
        shutil.copytree(image_folder / "train" / "two", image_folder / place / leftover, dirs_exist_ok=True)
    after = folder_source(image_folder).open()
    assert after.classes == before.classes
    assert after.train.names == before.train.names
    assert f"folders that systems leave there: 4 {leftover}\n" in capsys.readouterr().err
    assert len(open_folder(image_folder / "train", before.classes)) == len(before.train)
    assert folder_source(image_folder / "train").open().classes == before.classes


CAFE = ("caf\u00e9", "cafe\u0301")  # composed, and decomposed as macOS writes it


def test_accents_are_compared_by_what_they_look_like(image_folder):
    (image_folder / "train" / "two").rename(image_folder / "train" / CAFE[0])
    (image_folder / "test" / "two").rename(image_folder / "test" / CAFE[1])
    dataset = folder_source(image_folder).open()
    assert dataset.classes == [CAFE[0], "nought", "one"]
    assert class_counts(dataset.test.labels, 3).tolist() == [3, 3, 3]
    assert class_counts(open_folder(image_folder / "test", dataset.classes).labels, 3).tolist() == [3, 3, 3]
    (image_folder / "train" / "one").rename(image_folder / "train" / CAFE[1])
    for call in (lambda: folder_source(image_folder).open(), lambda: open_folder(image_folder / "train", ["nought", CAFE[0]])):
        with pytest.raises(UserError, match=r"differ only in .* accents .*'cafe\\u0301' and 'caf\\xe9'; rename one"):
            call()


def test_a_byte_order_mark_is_no_part_of_a_list(lists, tmp_path):
    source, train = lists
    names = tmp_path / "classes.txt"
    names.write_text("nought\none\n", encoding="utf-8-sig")
    train.write_text(train.read_text(), encoding="utf-8-sig")
    dataset = source.model_copy(update={"classes": names}).open()
    assert dataset.classes == ["nought", "one"]
    assert dataset.train.names[0] == "train/nought/0.png"


def test_a_list_may_write_accents_in_another_way_than_the_disk(lists, image_folder):
    source, train = lists
    (image_folder / "train" / "one").rename(image_folder / "train" / CAFE[1])
    train.write_text(f"train/nought/0.png 0\ntrain/{CAFE[0]}/0.png 1\ntrain/{CAFE[1]}/1.png 1\n")
    dataset = source.open()
    assert dataset.classes == ["nought", CAFE[0]]
    assert all(file.is_file() for file in dataset.train.files)
    assert not dataset.train.missing
    train.write_text(train.read_text() + f"train/{CAFE[1]}/0.png 1\n")
    with pytest.raises(UserError, match="listed twice"):
        source.open()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("Oak\n\nOak\n", r"classes\.txt:3: the class 'Oak' stands twice, first in .*classes\.txt:1;"),
        ("Oak\nO\u200bak\n", r"classes\.txt:2: two classes differ only in invisible characters"),
        (f"{CAFE[0]}\n{CAFE[1]}\n", r"classes\.txt:2: two classes differ only in invisible"),
    ],
)
def test_a_class_name_twice(lists, tmp_path, names, message):
    path = tmp_path / "classes.txt"
    path.write_text(names, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        lists[0].model_copy(update={"classes": path}).open()


def test_a_class_name_twice_is_refused_wherever_classes_come_from(image_folder):
    with pytest.raises(UserError, match="class 2: the class 'one' stands twice, first in class 1"):
        open_folder(image_folder / "train", ["nought", "one", "one"])
    with pytest.raises(UserError, match="stands twice"):
        Dataset(["one", "one"], folder_source(image_folder).open().train)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path label\ntrain/one/0.png 1\n", r"train\.txt:1: 'path label' looks like a header; remove it"),
        (b"train/one/0.png,1\n", r"train\.txt:1: .* has a comma; write 'path label', with a space"),
        (
            b"PK\x03\x04\xff\xff",
            r"train\.txt' cannot be read: it is a zip archive; unpack it, or set data.source.kind: archive",
        ),
        (b"README" + b"\0" * 251 + b"ustar" + b"\0" * 300, r"train\.txt' cannot be read: it is a tar archive; unpack it"),
        (b"\xff\xfet\0r\0", r"train\.txt' cannot be read: it is UTF-16 text; save it as UTF-8"),
        (b"train/one/0.png 99999999999999999999\n", r"train\.txt:1: the label 99999999999999999999 is too large"),
        (b"train/one/0.png 3000000000\n", r"train\.txt:1: the label 3000000000 is too large"),
        (b"train/one/77.png 0\ntrain/one/78.png 1\n", r"no image of it, such as 'train/one/77\.png', is below"),
    ],
)
def test_what_a_list_is_instead(lists, content, message):
    source, train = lists
    train.write_bytes(content)
    with pytest.raises(UserError, match=message):
        source.open()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "s3://bucket/photos",
            r"s3://\.\.\. is an address: copy the data to a folder, mount it, or list the images in a table",
        ),
        ("file:///photos", "write the path without file://"),
        ("photos.zip", "it is a zip archive; unpack it, or set data.source.kind: archive"),
        ("list.txt", r"it is a file; set data\.source\.kind: lists"),
        ("photos.CSV", r"it is a table; set data\.source\.kind: table"),
    ],
)
def test_what_a_folder_is_instead(tmp_path, monkeypatch, place, message):
    monkeypatch.chdir(tmp_path)
    Path("photos.zip").write_bytes(b"PK\x03\x04")
    Path("list.txt").write_text("a/0.jpg 0\n")
    Path("photos.CSV").write_text("a/0.jpg,0\n")
    with pytest.raises(UserError, match=message):
        folder_source(Path(place).absolute()).open()


def test_the_folder_below_is_named_where_it_has_the_classes(image_folder, tmp_path):
    (tmp_path / "outer").mkdir()
    shutil.copytree(image_folder / "train", tmp_path / "outer" / "photos")
    with pytest.raises(UserError, match=r"has 1 class folder; at least 2 are needed; '.*/outer/photos' has several: name that"):
        folder_source(tmp_path / "outer").open()


def test_missing_files_of_a_list_are_counted(lists):
    source, train = lists
    train.write_text(train.read_text() + "".join(f"train/one/{number}.png 1\n" for number in (1, 90, 91, 92, 93)))
    assert source.open().train.missing == tuple(f"train/one/{number}.png" for number in (90, 91, 92, 93))


def test_classes_by_a_file(image_folder, tmp_path, capsys):
    path = tmp_path / "classes.txt"
    path.write_text("two\tZwei\n\nnought\n", encoding="utf-8-sig")
    source = folder_source(image_folder, classes=path)
    dataset = source.open()
    assert dataset.classes == ["Zwei", "nought"]
    assert class_counts(dataset.train.labels, 2).tolist() == [5, 8]
    assert {name.split("/")[1] for name, label in zip(dataset.test.names, dataset.test.labels, strict=True) if label == 0} == {
        "two"
    }
    assert "2 of 3 class folders, as" in capsys.readouterr().err
    (image_folder / "test" / "one").rename(tmp_path / "away")
    images = open_folder(image_folder / "test", dataset.classes, source.class_names())
    assert class_counts(images.labels, 2).tolist() == [3, 3]
    path.write_text("two Zwei\nnought\n")
    with pytest.raises(UserError, match="names 'two Zwei', which is no folder in .*; write FOLDER, or FOLDER, a tab and NAME"):
        source.open()
    path.write_text("two\tA\nnought\tA\n")
    with pytest.raises(UserError, match=r"classes\.txt:2: the class 'A' stands twice, first in .*:1"):
        source.open()


@pytest.mark.parametrize("suffix", [".avif", ".jp2", ".jpe", ".pnm", ".tga"])
def test_what_pillow_reads_is_read(image_folder, suffix):
    file = image_folder / "train" / "one" / f"more{suffix}"
    Image.new("RGB", (8, 8), (200, 10, 10)).save(file)
    assert f"train/one/more{suffix}" in folder_source(image_folder).open().train.names
    assert np.abs(np.asarray(to_rgb(decode(file.read_bytes()))).astype(int) - (200, 10, 10)).max() < 12


def test_paths_of_a_folder_are_made_when_they_are_needed(image_folder):
    train = folder_source(image_folder).open().train
    assert not isinstance(train.files, list)
    assert len(train.files) == len(train)
    assert [*train.files] == [image_folder / name for name in train.names]
    some = train.take(np.array([5, 2]))
    assert some.files[:2] == [image_folder / train.names[5], image_folder / train.names[2]]
    assert some.read(0) == (image_folder / train.names[5]).read_bytes()


def test_two_folders_of_a_split_that_are_spelled_alike_are_refused(image_folder, tmp_path):
    """Else the images of one of them would be left out without a word."""
    (image_folder / "train" / "two").rename(image_folder / "train" / CAFE[0])
    (image_folder / "test" / "two").rename(image_folder / "test" / CAFE[0])
    (image_folder / "test" / "one").rename(image_folder / "test" / CAFE[1])
    with pytest.raises(
        UserError, match=r"/test/café'.*: two classes differ only in .*'cafe\\u0301' and 'caf\\xe9'; rename one"
    ):
        folder_source(image_folder).open()
    (image_folder / "test" / CAFE[1]).rename(tmp_path / "away")
    (image_folder / "train" / "one").rename(image_folder / "train" / CAFE[1])
    path = tmp_path / "classes.txt"
    path.write_text(f"{CAFE[0]}\nnought\n")
    with pytest.raises(UserError, match=r"/train/café'.*: two classes differ only in"):
        folder_source(image_folder, classes=path).open()
    path.write_text("nought\none\n")
    (image_folder / "train" / "extra").mkdir()
    (image_folder / "train" / CAFE[1]).rename(image_folder / "train" / "one")
    (image_folder / "train" / "extra").rename(image_folder / "train" / CAFE[1])
    assert folder_source(image_folder, classes=path).open().classes == ["nought", "one"]  # both are left out


def test_two_folders_of_one_class_are_refused_in_evaluation(image_folder):
    test = image_folder / "test"
    (test / "two").rename(test / "n01")
    names = {"n01": "one", "n02": "nought", "n03": "two"}
    with pytest.raises(
        UserError, match=r"test/one': the class 'one' has two folders, 'n01' and 'one'; put .* into one of them"
    ):
        open_folder(test, ["one", "nought", "two"], names)
    (test / "one").rename(test / "two")
    images = open_folder(test, ["one", "nought", "two"], names)  # each folder by the one or the other name
    assert class_counts(images.labels, 3).tolist() == [3, 3, 3]


def test_folders_with_the_names_of_other_classes_are_those_of_training(image_folder):
    """Folders 1, 2 and 3 may hold the classes 0, 1 and 2."""
    test = image_folder / "test"
    for number, name in enumerate(("nought", "one", "two"), start=1):
        (test / name).rename(test / str(number))
    images = open_folder(test, ["0", "1", "2"], {"1": "0", "2": "1", "3": "2"})
    assert {(name.split("/")[1], int(label)) for name, label in zip(images.names, images.labels, strict=True)} == {
        ("1", 0),
        ("2", 1),
        ("3", 2),
    }
    (test / "3").rename(test / "0")
    images = open_folder(test, ["0", "1", "2"], {"1": "0", "2": "1", "3": "2"})  # by the classes' own names
    assert {(name.split("/")[1], int(label)) for name, label in zip(images.names, images.labels, strict=True)} == {
        ("0", 0),
        ("1", 1),
        ("2", 2),
    }
