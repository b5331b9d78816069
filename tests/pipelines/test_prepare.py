"""Prepared data are whole, of their source, and written once."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace

import pytest
from PIL import Image

from pipelines.common.errors import UserError
from pipelines.common.files import locked
from pipelines.config import ExpProfile
from pipelines.library_warnings import collected_warnings
from pipelines.prepare import __main__ as prepare
from pipelines.prepare.build import ensure_prepared, prepare_folder, prepared_folder
from pipelines.prepare.prepared import EARLIER_FORMAT, SIDECAR
from tests.commands import in_process
from tests.conftest import REPOSITORY, data_config, digits_config


def folder_config(image_folder, tmp_path, **more):
    return data_config(source={"kind": "folder", "path": str(image_folder)}, prepared=str(tmp_path / "prepared"), **more)


def test_sidecar_says_what_is_there(digits):
    content = json.loads((digits.folder / SIDECAR).read_text())
    assert content["classes"] == [str(i) for i in range(10)]
    assert content["profile"] == {"kind": "exp", "imbalance": 20.0, "largest": None, "subset": "seeded"}
    assert content["splits"]["train"]["counts"] == digits.train_counts.tolist()
    assert digits.train_counts.tolist() == sorted(digits.train_counts, reverse=True)
    assert set(content["splits"]) == {"train", "val", "test"}
    for split in content["splits"].values():
        assert len(split["source_digest"]) == len(split["content"]) == 64
        for shard in split["shards"]:
            assert (digits.folder / shard["file"]).stat().st_size == shard["bytes"]
        assert sum(shard["samples"] for shard in split["shards"]) == sum(split["counts"])
    assert (digits.folder / "class_counts.png").stat().st_size > 5000
    assert not [*digits.folder.glob("*.part"), *digits.folder.glob("*.journal")]


def test_rows_are_shuffled_and_named(digits):
    beton = digits.beton("train")
    assert beton.labels.tolist() != sorted(beton.labels)
    names = (digits.folder / "train.files.txt").read_text().split()
    assert len(set(names)) == len(beton)


def test_written_once_and_again_when_the_source_changes(image_folder, tmp_path):
    data = folder_config(image_folder, tmp_path)
    first = ensure_prepared(data, 0)
    stamp = first.paths("train")[0].stat().st_mtime_ns
    assert ensure_prepared(data, 0) == first
    assert first.paths("train")[0].stat().st_mtime_ns == stamp
    (image_folder / "train" / "one" / "0.png").unlink()
    again = ensure_prepared(data, 0)
    assert again.train_counts.tolist() == [8, 5, 5]
    assert len(again.beton("train")) == 18


def test_the_digest_is_of_names_labels_and_images_alone(image_folder, tmp_path):
    data = folder_config(image_folder, tmp_path)
    first = ensure_prepared(data, 0)
    digests = [split.digest for split in first.splits.values()]
    os.utime(image_folder / "train" / "one" / "0.png", (1, 1))
    again = ensure_prepared(data, 0)
    assert again.splits["train"].source_digest != first.splits["train"].source_digest
    assert again.digests == first.digests == ensure_prepared(data, 1).digests  # in another order on disk
    (image_folder / "train" / "one" / "0.png").rename(image_folder / "train" / "one" / "renamed.png")
    digests.append(ensure_prepared(data, 0).digests["train"])
    (image_folder / "train" / "one" / "renamed.png").rename(image_folder / "train" / "two" / "renamed.png")
    digests.append(ensure_prepared(data, 0).digests["train"])
    assert len({*digests}) == 4
    assert first.splits["train"].has(first.splits["train"].source_digest)
    assert not first.splits["train"].has(None)
    earlier = replace(first.splits["train"], content="")
    assert earlier.digest == earlier.source_digest


def test_damaged_files_are_written_again(image_folder, tmp_path):
    data = folder_config(image_folder, tmp_path)
    prepared = ensure_prepared(data, 0)
    os.truncate(prepared.paths("train")[0], 1000)
    assert len(ensure_prepared(data, 0).beton("train")) == 19


def test_source_gone_uses_what_was_prepared(image_folder, tmp_path, capsys):
    data = folder_config(image_folder, tmp_path)
    prepared = ensure_prepared(data, 0)
    image_folder.rename(tmp_path / "moved")
    assert ensure_prepared(data, 0) == prepared
    assert "not on this machine" in capsys.readouterr().err


def test_data_that_an_earlier_version_prepared_are_read_where_their_source_is_gone(image_folder, tmp_path, capsys):
    data = folder_config(image_folder, tmp_path)
    prepared = ensure_prepared(data, 0)
    earlier = prepared_folder(data, 0, EARLIER_FORMAT)
    sidecar = json.loads((prepared.folder / SIDECAR).read_text())
    prepared.folder.rename(earlier)
    (earlier / SIDECAR).write_text(json.dumps({**sidecar, "format": EARLIER_FORMAT}))
    assert ensure_prepared(data, 0).folder == prepared.folder  # prepared again from the source
    shutil.rmtree(prepared.folder)
    image_folder.rename(tmp_path / "moved")
    found = ensure_prepared(data, 0)
    assert found.folder == earlier
    assert len(found.beton("train")) == 19


def test_the_earlier_versions_folder_has_its_name():
    data = data_config(source={"kind": "folder", "path": "/photos"}, prepared="/prepared")
    assert str(prepared_folder(data, 0, EARLIER_FORMAT)) == "/prepared/folder-none-315b289352f1"


def test_what_changes_the_images_changes_the_folder(tmp_path):
    base = digits_config(tmp_path)
    assert prepared_folder(base, 0) != prepared_folder(base, 1)
    pinned = base.model_copy(update={"subset_seed": 0})
    assert prepared_folder(pinned, 0) == prepared_folder(pinned, 1) == prepared_folder(base, 0)
    views_only = base.model_copy(update={"views": base.views[:1]})
    assert prepared_folder(views_only, 0) == prepared_folder(base, 0)
    profiles = [ExpProfile(kind="exp", imbalance=10, subset=subset) for subset in ("seeded", "field")]
    assert len({prepared_folder(base.model_copy(update={"profile": profile}), 0) for profile in profiles}) == 2


def test_bad_image_is_named(image_folder, tmp_path):
    bad = image_folder / "train" / "one" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(UserError, match=r"train/one/3\.png: unreadable image .*data\.on_bad_image: skip"):
        ensure_prepared(folder_config(image_folder, tmp_path), 0)
    assert not list(tmp_path.rglob(SIDECAR))
    assert not list(tmp_path.rglob("*.part"))


def test_what_a_command_without_settings_cannot_set_is_not_advised(image_folder, tmp_path):
    """`evaluate --data FOLDER`, and a run's own data that evaluation prepares again."""
    config = folder_config(image_folder, tmp_path, max_pixels=100)
    (image_folder / "test" / "one" / "0.png").write_bytes(b"GIF89a no")
    Image.new("RGB", (40, 30)).save(image_folder / "test" / "two" / "0.png")
    for act in (
        lambda: prepare_folder(image_folder / "test", ["nought", "one", "two"], config),
        lambda: ensure_prepared(config, 0, settable=False),
    ):
        with pytest.raises(UserError, match=r"unreadable image \(.*\); mend it, or take it out$") as refused:
            act()
        assert "data." not in str(refused.value)
    (image_folder / "test" / "one" / "0.png").unlink()
    with pytest.raises(UserError, match=r"40x30 pixels, 100 at most\); .*, or set data.max_pixels: 1200, or data.on"):
        ensure_prepared(config, 0)


def test_bad_image_is_skipped_listed_and_counted(image_folder, tmp_path, capsys):
    bad = image_folder / "train" / "one" / "3.png"
    bad.write_bytes(b"GIF89a no")
    prepared = ensure_prepared(folder_config(image_folder, tmp_path, on_bad_image="skip"), 0)
    assert prepared.train_counts.tolist() == [8, 5, 5]
    assert prepared.splits["train"].skipped == [str(bad)]
    assert len(prepared.beton("train")) == 18
    assert str(bad) in capsys.readouterr().err


def test_a_class_of_bad_images_only(image_folder, tmp_path):
    for file in (image_folder / "train" / "two").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="class 'two' has no readable training image"):
        ensure_prepared(folder_config(image_folder, tmp_path, on_bad_image="skip"), 0)


def test_a_source_without_val_and_test_gets_a_val_split(image_folder, tmp_path, capsys):
    (image_folder / "test").rename(tmp_path / "away")
    prepared = ensure_prepared(folder_config(image_folder, tmp_path), 0)
    assert "20% of each class's images are set aside as 'val' (data.val_fraction)" in capsys.readouterr().err
    assert {name: split.counts for name, split in prepared.splits.items()} == {"train": [6, 5, 4], "val": [2, 1, 1]}
    prepared = ensure_prepared(folder_config(image_folder, tmp_path, val_fraction=0.4), 0)
    assert {name: split.counts for name, split in prepared.splits.items()} == {"train": [5, 4, 3], "val": [3, 2, 2]}


def test_the_source_s_own_splits_are_used_before_any_share(image_folder, tmp_path, capsys):
    (image_folder / "test").rename(image_folder / "val")
    prepared = ensure_prepared(folder_config(image_folder, tmp_path, val_fraction=0.2), 0)
    assert {name: split.counts for name, split in prepared.splits.items()} == {"train": [8, 6, 5], "val": [3, 3, 3]}
    assert "the source's own 'val' split is used; data.val_fraction is for sources without one" in capsys.readouterr().err
    prepared = ensure_prepared(folder_config(image_folder, tmp_path, val_fraction=0.2, test_fraction=0.2), 0)
    assert {name: split.counts for name, split in prepared.splits.items()} == {
        "train": [6, 5, 4],
        "val": [3, 3, 3],
        "test": [2, 1, 1],
    }


def test_a_folder_as_it_lies_is_split_in_three(tmp_path, capsys):
    images = {"many": 20, "three": 3, "two": 2, "one": 1}
    for number, (name, count) in enumerate(images.items()):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for image in range(count):
            Image.new("RGB", (8, 8), (image, number, 0)).save(tmp_path / "photos" / name / f"{image}.png")
    data = folder_config(tmp_path / "photos", tmp_path, val_fraction=0.1, test_fraction=0.2)
    prepared = ensure_prepared(data, 0)
    assert prepared.classes == ["many", "one", "three", "two"]
    assert {name: split.counts for name, split in prepared.splits.items()} == {
        "train": [14, 1, 1, 1],
        "val": [2, 0, 1, 1],
        "test": [4, 0, 1, 0],
    }
    names = [set((prepared.folder / f"{split}.files.txt").read_text().split()) for split in ("train", "val", "test")]
    assert len(set.union(*names)) == sum(map(len, names)) == 26
    said = capsys.readouterr().err
    assert "data: test: 5 images, 20% of each class, are set aside (data.test_fraction)" in said
    assert "data: test: 2 of 4 classes are too small to have an image in it: 'one', 'two'" in said
    assert "data: val: 1 of 4 classes are too small to have an image in it: 'one'" in said
    with pytest.raises(ValueError, match="leave no image to train on; their sum must be less than 1"):
        folder_config(tmp_path / "photos", tmp_path, val_fraction=0.5, test_fraction=0.5)


def test_a_folder_for_evaluation(image_folder, tmp_path):
    data = folder_config(image_folder, tmp_path)
    prepared = prepare_folder(image_folder / "test", ["one", "two", "three", "nought"], data)
    assert prepared.splits["test"].counts == [3, 3, 0, 3]
    with pytest.raises(UserError, match="'two' is not one of the training classes"):
        prepare_folder(image_folder / "test", ["one", "nought"], data)


def run(*arguments):
    return in_process(prepare.main, *arguments)


def test_the_command(tmp_path):
    done = run("quickstart", "--prepared", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train: 398 images, 10 classes, 5 to 118 a class" in done.stdout
    assert "█" in done.stdout
    assert run("quickstart", "--prepared", tmp_path, "--count").stdout.splitlines()[:5] == done.stdout.splitlines()[:5]
    mistake = run("quickstart", "--data.source.kind", "folder", "--data.source.path", "nowhere")
    assert mistake.returncode == 2
    assert mistake.stderr.startswith("error: image folder")
    assert len(mistake.stderr.splitlines()) == 1


def test_ctrl_c_says_how_to_continue(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "ensure_prepared", stop)
    done = run("quickstart", "--prepared", tmp_path)
    assert done.returncode == 130
    assert done.stderr == "stopped; finished files are kept: run the same command again to continue\n"


def test_a_killed_run_leaves_nothing_that_looks_whole(photo_folder, tmp_path):
    """Killed at many moments: what is left is either prepared or prepared again, and then whole."""
    data = data_config(source={"kind": "folder", "path": str(photo_folder)}, prepared=str(tmp_path), store={"max_side": 100})
    arguments = ["--data.source.kind", "folder", "--data.source.path", photo_folder, "--data.store", "{max_side: 100}"]
    for delay in (0.0, 0.02, 0.05):
        command = [sys.executable, "-m", "pipelines.prepare", "quickstart", "--val_fraction", "0", "--profile", "{kind: none}"]
        process = subprocess.Popen([*command, *map(str, arguments), "--prepared", str(tmp_path)], cwd=REPOSITORY)
        while process.poll() is None and not list(tmp_path.rglob("*.part")):
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not list(tmp_path.rglob(SIDECAR)):
            break
    prepared = ensure_prepared(data, 0)
    assert list(tmp_path.iterdir()) == [prepared.folder]
    assert len(prepared.beton("train")) == 24
    assert not list(prepared.folder.glob("*.part"))


def test_odd_names_of_classes_and_files(image_folder, tmp_path):
    (image_folder / "train" / "one").rename(image_folder / "train" / "a$_$")
    (image_folder / "test" / "one").rename(image_folder / "test" / "a$_$")
    odd = os.fsdecode(bytes(image_folder / "train" / "two") + b"/\xff.png")
    (image_folder / "train" / "two" / "0.png").rename(odd)
    prepared = ensure_prepared(folder_config(image_folder, tmp_path), 0)
    assert prepared.classes == ["a$_$", "nought", "two"]
    assert (prepared.folder / "class_counts.png").exists()
    assert b"\xff.png" in (prepared.folder / "train.files.txt").read_bytes()


def test_what_cannot_be_opened_is_a_bad_image_too(image_folder, tmp_path):
    (image_folder / "train" / "one" / "gone.png").symlink_to(tmp_path / "nowhere")
    (image_folder / "train" / "one" / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"one/gone\.png: unreadable image"):
        ensure_prepared(folder_config(image_folder, tmp_path), 0)
    prepared = ensure_prepared(folder_config(image_folder, tmp_path, on_bad_image="skip"), 0)
    assert prepared.train_counts.tolist() == [8, 6, 5]
    assert len(prepared.splits["train"].skipped) == 1


def test_a_split_without_a_readable_image(image_folder, tmp_path):
    for file in (image_folder / "test").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="the test split has no readable image"):
        ensure_prepared(folder_config(image_folder, tmp_path, on_bad_image="skip"), 0)


def test_read_only_prepared_data_can_be_used(image_folder, tmp_path, monkeypatch):
    data = folder_config(image_folder, tmp_path)
    prepared = ensure_prepared(data, 0)
    (prepared.folder / ".lock").unlink()
    monkeypatch.setattr("pipelines.prepare.build.locked", None)  # root may write anywhere, so: not even tried
    assert ensure_prepared(data, 0) == prepared


@pytest.mark.parametrize(("flags", "message"), [(["--seed", "-1"], "seed"), ([], "unknown key 'datta'; did you mean 'data'?")])
def test_prepare_refuses_what_train_refuses(tmp_path, flags, message):
    (tmp_path / "c.yaml").write_text("seed: 0" if flags else "datta: {}")
    done = run(tmp_path / "c.yaml", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_missing_files_of_a_list(image_folder, tmp_path):
    lists = {"train": "train/nought/0.png 0\ntrain/one/0.png 1\n" + "".join(f"gone/{n}.png 1\n" for n in range(5))}
    lists["test"] = "test/one/0.png 1\n"
    for split, lines in lists.items():
        (tmp_path / f"{split}.txt").write_text(lines)
    source = {"kind": "lists", "root": str(image_folder), **{split: str(tmp_path / f"{split}.txt") for split in lists}}
    with pytest.raises(
        UserError, match=r"5 listed images are missing, such as 'gone/0.png', 'gone/1.png', 'gone/2.png' and others"
    ):
        ensure_prepared(data_config(source=source, prepared=str(tmp_path / "prepared")), 0)
    split = ensure_prepared(data_config(source=source, prepared=str(tmp_path / "prepared"), on_bad_image="skip"), 0).splits[
        "train"
    ]
    assert split.counts == [1, 1]
    assert sorted(split.skipped) == [str(image_folder / f"gone/{n}.png") for n in range(5)]
    assert split.reasons == ["No such file or directory"] * 5


def test_warnings_of_decoders_are_one_line(image_folder, tmp_path, capsys):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x9286, 7, 0xFFFFFF, 0xFFFF) * 2
    for number in range(3):
        Image.new("RGB", (9, 9)).save(image_folder / "train" / "one" / f"warned{number}.jpg", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        ensure_prepared(folder_config(image_folder, tmp_path), 0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "with a warning" in line]
    assert len(lines) == 1
    assert re.match(r"data: 3 images were read with a warning of the decoder, such as .*/one/warned\d\.jpg: ", lines[0])


def test_other_warnings_are_shown_as_before():
    with collected_warnings() as warned, pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", UserWarning, stacklevel=1)
    assert warned.text() == ""


def test_a_second_command_says_that_it_waits(image_folder, tmp_path, capsys):
    data = folder_config(image_folder, tmp_path)
    folder = prepared_folder(data, 0)
    folder.mkdir(parents=True)
    with locked(folder / ".lock"):
        process = threading.Thread(target=ensure_prepared, args=(data, 0))
        process.start()
        deadline = time.monotonic() + 60
        said = ""
        while "waiting" not in said and time.monotonic() < deadline:
            said += capsys.readouterr().err
            time.sleep(0.01)
        assert not (folder / SIDECAR).exists()
    process.join()
    assert said.count(f"data: another command prepares {folder}; waiting for it") == 1
    assert (folder / SIDECAR).exists()
