"""Images that are in the data twice: one file in two places is refused, copies of its bytes are reported."""

import os
import shutil

import pytest

from pipelines.common.errors import UserError
from pipelines.prepare.build import COPIES, ensure_prepared
from tests.pipelines.test_prepare import folder_config


def test_a_test_folder_that_is_a_link_to_the_training_images(image_folder, tmp_path):
    shutil.rmtree(image_folder / "test")
    (image_folder / "test").symlink_to(image_folder / "train")
    with pytest.raises(UserError, match=r"19 test images are also in train: the same files, such as 'train/.*' and 'test/"):
        ensure_prepared(folder_config(image_folder, tmp_path), 0)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_links_to_single_images(image_folder, tmp_path, link):
    link(image_folder / "train" / "one" / "0.png", image_folder / "test" / "one" / "another.png")
    link(image_folder / "train" / "one" / "1.png", image_folder / "test" / "two" / "another.png")
    with pytest.raises(UserError, match=r"2 test images are also in train: the same files, such as 'train/one/"):
        ensure_prepared(folder_config(image_folder, tmp_path), 0)


def test_a_class_folder_that_is_a_link_to_another(image_folder, tmp_path):
    (image_folder / "train" / "three").symlink_to(image_folder / "train" / "two")
    with pytest.raises(UserError, match=r"5 train images are in two classes: the same files, such as '.*(two|three)/"):
        ensure_prepared(folder_config(image_folder, tmp_path), 0)


def test_a_path_written_in_two_ways(image_folder, tmp_path):
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("train/nought/0.png 0\ntrain/one/0.png 1\n")
    test.write_text("train/one/../one/0.png 1\ntest/one/0.png 1\n")
    source = {"kind": "lists", "root": str(image_folder), "train": str(train), "test": str(test)}
    config = folder_config(image_folder, tmp_path).model_dump(mode="json") | {"source": source}
    with pytest.raises(UserError, match="in both lists"):
        ensure_prepared(type(folder_config(image_folder, tmp_path)).model_validate(config), 0)


def test_copies_are_counted_and_listed(image_folder, tmp_path, capsys):
    one, two = image_folder / "train" / "one", image_folder / "train" / "two"
    for number in range(3):
        shutil.copy(one / f"{number}.png", image_folder / "test" / "one" / f"copy{number}.png")
    shutil.copy(one / "4.png", two / "copy.png")
    shutil.copy(two / "0.png", two / "again.png")
    os.link(two / "1.png", two / "link.png")  # in one class, no more than a copy
    prepared = ensure_prepared(folder_config(image_folder, tmp_path), 0)
    counts = "3 test images are also in train, 1 train image is also in another class, 2 train images are twice in a class"
    assert f"data: copies of the same image: {counts}; listed in {prepared.folder / COPIES}\n" in capsys.readouterr().err
    lines = (prepared.folder / COPIES).read_text().splitlines()
    assert len(lines) == 6
    assert {*lines} >= {f"test test/one/copy{number}.png\ttrain train/one/{number}.png" for number in range(3)}
    for number in range(3):
        (image_folder / "test" / "one" / f"copy{number}.png").unlink()
    (two / "copy.png").unlink()
    (two / "again.png").unlink()
    (two / "link.png").unlink()
    assert not (ensure_prepared(folder_config(image_folder, tmp_path), 0).folder / COPIES).exists()


def test_numbers_of_files_that_a_file_system_gives_twice(image_folder, tmp_path, monkeypatch):
    """One link a file, and other paths: two files, whatever their numbers."""
    monkeypatch.setattr("pipelines.prepare.doubles._identity", lambda stat: (0, 0))
    assert ensure_prepared(folder_config(image_folder, tmp_path), 0).train_counts.tolist() == [8, 6, 5]
