"""Sources list what is there, and say what is missing."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.common.errors import UserError
from pipelines.config import Cifar10Source, DigitsSource, FolderSource, ListsSource
from pipelines.prepare.sources import class_counts, open_folder, open_source
from tests.conftest import REPOSITORY


def test_folder(image_folder):
    dataset = open_source(FolderSource(kind="folder", path=image_folder))
    assert dataset.classes == ["nought", "one", "two"]
    assert class_counts(dataset.train.labels, 3).tolist() == [8, 6, 5]
    assert dataset.val is None
    assert dataset.test is not None
    assert dataset.test.names[0] == "test/nought/0.png"


def test_folder_mistakes(image_folder, tmp_path):
    def error(path=image_folder):
        with pytest.raises(UserError) as caught:
            open_source(FolderSource(kind="folder", path=path))
        return str(caught.value)

    assert "does not exist" in error(tmp_path / "nowhere")
    assert "no folder 'train'" in error(image_folder / "train")
    (image_folder / "test" / "three").mkdir()
    assert "'three' is not one of the training classes" in error()
    (image_folder / "test" / "three").rmdir()
    (image_folder / "train" / "empty").mkdir()
    (image_folder / "train" / "empty" / "notes.txt").write_text("not an image")
    assert "has no images" in error()
    assert "empty" in error()


def test_what_is_hidden_or_no_image_is_left_out(image_folder, capsys):
    one = image_folder / "train" / "one"
    for place in (".ipynb_checkpoints", "inside/.thumbnails"):
        shutil.copytree(image_folder / "train" / "two", one / place)
    shutil.copy(one / "0.png", one / ".1.png")
    shutil.copy(one / "0.png", one / "7.JFIF")
    for name in ("8.heic", "9.HEIC", "notes", ".DS_Store"):
        (one / name).write_bytes(b"")
    names = open_source(FolderSource(kind="folder", path=image_folder)).train.names
    assert [name for name in names if "/one/" in name] == [
        f"train/one/{name}" for name in (*(f"{i}.png" for i in range(6)), "7.JFIF")
    ]
    message = f"data: left out of {str(image_folder)!r}, as not among the endings of images: 2 .heic, 1 without ending\n"
    assert capsys.readouterr().err == message


def test_images_outside_the_classes_of_a_split_are_told(image_folder, capsys):
    two = image_folder / "train" / "two"
    shutil.copytree(image_folder / "test", image_folder / "valid")
    shutil.copytree(two, image_folder / ".cache")
    shutil.copy(two / "0.png", image_folder / "train")
    open_source(FolderSource(kind="folder", path=image_folder))
    assert capsys.readouterr().err.splitlines() == [
        f"data: not read of {str(image_folder)!r}: 'valid'; the splits are the folders train, val and test",
        f"data: 1 images of {str(image_folder / 'train')!r} are in no class folder, and not read",
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
    names = open_source(FolderSource(kind="folder", path=image_folder)).train.names
    assert [name.partition("/two/")[2] for name in names if "/two/" in name] == [
        "2.png", "3.png", "4.png", "linked/0.png", "z/1.png"
    ]  # fmt: skip


def test_digest_changes_with_the_images(image_folder):
    def digest():
        return open_source(FolderSource(kind="folder", path=image_folder)).train.digest()

    before = digest()
    assert digest() == before
    file = image_folder / "train" / "one" / "0.png"
    file.write_bytes(file.read_bytes() + b"\0")
    assert digest() != before


def test_a_class_folder_whose_name_is_no_text(image_folder):
    (image_folder / "train" / "two").rename(os.fsdecode(bytes(image_folder / "train") + b"/f\xfcnf"))
    with pytest.raises(UserError, match=r"f\\udcfcnf' has a name that is not UTF-8; rename it"):
        open_source(FolderSource(kind="folder", path=image_folder))


@pytest.fixture
def lists(image_folder, tmp_path):
    train = tmp_path / "train.txt"
    train.write_text("train/nought/0.png 0\ntrain/one/0.png 1\n\ntrain/nought/1.png 0\n")
    return ListsSource(kind="lists", root=image_folder, train=train), train


def test_lists(lists):
    dataset = open_source(lists[0])
    assert dataset.classes == ["nought", "one"]
    assert dataset.train.labels.tolist() == [0, 1, 0]
    assert dataset.test is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train/one/99.png 1", r"names 'train/one/99.png'"),
        ("train/one/0.png one", r"train.txt:5: .* is not 'path label'"),
        ("train/one/0.png 7", r"no image has label 2"),
    ],
)
def test_list_mistakes(lists, line, message):
    source, train = lists
    train.write_text(train.read_text() + line + "\n")
    with pytest.raises(UserError, match=message):
        open_source(source)


def test_class_names_of_another_encoding(lists, tmp_path):
    names = tmp_path / "classes.txt"
    source = lists[0].model_copy(update={"classes": names})
    names.write_text("nought\nfünf\n", encoding="utf-8")
    assert open_source(source).classes == ["nought", "fünf"]
    names.write_text("nought\nfünf\n", encoding="latin-1")
    with pytest.raises(UserError, match=r"class names '.*classes\.txt' cannot be read: .*; save them as UTF-8"):
        open_source(source)


def test_an_image_is_listed_once(lists, tmp_path):
    source, train = lists
    test, lines = tmp_path / "test.txt", train.read_text()
    test.write_text("test/one/0.png 1\ntest/nought/0.png 0\n")
    both = source.model_copy(update={"test": test})
    assert len(open_source(both).test) == 2
    test.write_text(test.read_text() + "./train/nought/1.png 0\n")
    with pytest.raises(UserError, match=r"'\./train/nought/1\.png' is in both lists '.*/train\.txt' and '.*/test\.txt'"):
        open_source(both)
    with pytest.raises(UserError, match=r"'train/nought/0\.png' is in both lists '.*/train\.txt' and '.*/train\.txt'"):
        open_source(source.model_copy(update={"val": train}))
    train.write_text(lines + "train/nought/0.png 0\n")
    with pytest.raises(UserError, match=r"'train/nought/0\.png' is listed twice in '.*/train\.txt'; leave it in one of these"):
        open_source(source)


def test_lists_may_be_separated_by_tabs_and_need_two_classes(lists):
    source, train = lists
    train.write_text("train/nought/0.png\t0\ntrain/one/0.png\t1\n")
    assert open_source(source).train.labels.tolist() == [0, 1]
    train.write_text("train/nought/0.png 0\n")
    with pytest.raises(UserError, match="at least 2 are needed"):
        open_source(source)


def test_lists_without_one_folder_a_class_are_numbered(lists, image_folder):
    source, train = lists
    train.write_text("train/nought/0.png 0\ntrain/one/1.png 0\ntrain/one/0.png 1\n")
    assert open_source(source).classes == ["0", "1"]


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
    dataset = open_source(Cifar10Source(kind="cifar10", path=tmp_path, download=False))
    assert class_counts(dataset.train.labels, 10).tolist() == [10] * 10
    assert dataset.classes[3] == "class 3"
    assert (dataset.train.read(0) == pixels[0, 0].reshape(3, 32, 32).transpose(1, 2, 0)).all()


def test_cifar_absent_names_the_fix(tmp_path):
    with pytest.raises(UserError, match=r"CIFAR10 is not in .*--data.source.kind folder"):
        open_source(Cifar10Source(kind="cifar10", path=tmp_path, download=False))


def test_digits():
    dataset = open_source(DigitsSource(kind="digits"))
    assert dataset.test is not None
    assert len(dataset.train) + len(dataset.test) == 1797
    assert not set(dataset.train.names) & set(dataset.test.names)
    image = dataset.train.read(0)
    assert isinstance(image, np.ndarray)
    assert image.shape == (8, 8, 3)
    assert image.max() == 239  # 15 of 16


def test_a_list_of_another_length_than_expected(lists):
    source, _ = lists
    assert len(open_source(source.model_copy(update={"expect": {"train": 3, "test": 5}})).train) == 3
    message = r"train\.txt' names 3 images, 115,846 are expected; .* --data\.source\.expect null"
    with pytest.raises(UserError, match=message):
        open_source(source.model_copy(update={"expect": {"train": 115846}}))


@pytest.mark.parametrize("name", ["imagenet_lt", "recipes/imagenet_lt_90", "recipes/imagenet_lt_180"])
def test_imagenet_lt_is_the_communitys(name, tmp_path):
    """The lists' true names; one cut short is noticed before a single image is looked for."""
    from pipelines.prepare.build import load_data

    source = load_data(name, []).data.source
    assert [path.name for path in (source.train, source.val, source.test)] == [
        f"ImageNet_LT_{split}.txt" for split in ("train", "val", "test")
    ]
    assert source.expect == {"train": 115_846, "val": 20_000, "test": 50_000}
    short = tmp_path / "ImageNet_LT_train.txt"
    short.write_text("train/n01440764/n01440764_190.JPEG 0\n" * 115_845)
    with pytest.raises(UserError, match="names 115,845 images, 115,846 are expected"):
        open_source(source.model_copy(update={"train": short, "root": tmp_path}))


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
        open_source(config)


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
from pipelines.config import DigitsSource
from pipelines.prepare.sources import open_source
digits = open_source(DigitsSource(kind="digits"))
assert "sklearn" not in sys.modules
from sklearn.datasets import load_digits
whole = load_digits()
assert len(digits.train) + len(digits.test) == len(whole.target) == 1797
assert (digits.train.pixels[0, ..., 0] == (whole.images[0] * 255 / 16).round()).all()
assert digits.train.labels[:10].tolist() == whole.target[:10].tolist()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
