"""The doctor finds what is planted, each in its place, and is silent on clean photographs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from pipelines.common.errors import UserError
from pipelines.config import DataConfig
from pipelines.doctor import __main__ as command
from pipelines.doctor import examine as looking
from pipelines.doctor.content import find_by_content
from pipelines.doctor.examine import examine
from pipelines.doctor.features import image_features, installed
from pipelines.doctor.findings import find, gini
from pipelines.doctor.held_out import judge
from pipelines.doctor.pairs import clusters, near
from pipelines.doctor.report import write_report
from pipelines.pixels import BadImageError
from pipelines.prepare import __main__ as prepare
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.sources import Dataset, Images
from pipelines.prepare.splits import choose
from tests.commands import in_process
from tests.conftest import data_config, unpacked

pytest.importorskip("imagehash")
SIZES = {"ash": 40, "birch": 24, "oak": 12}
HELD_OUT = 6


def photograph(seed: int, side: int = 96) -> Image.Image:
    """A picture with large and small structure that no other seed has."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    noise = random.normal(0, 8, (side, side, 3))
    return Image.fromarray(np.clip(np.asarray(small) + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    for label, (name, count) in enumerate(SIZES.items()):
        for split, images in (("train", count), ("test", HELD_OUT)):
            (folder / split / name).mkdir(parents=True)
            for number in range(images):
                picture = photograph(1000 * label + number + (500 if split == "test" else 0))
                picture.save(folder / split / name / f"{number}.jpg", quality=92)
    return folder


@pytest.fixture
def folder(clean, tmp_path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "images"))


def found(folder: Path, **data: object):
    config = DataConfig.model_validate(
        {"source": {"kind": "folder", "path": str(folder)}, "on_bad_image": "skip", "profile": {"kind": "none"}, **data}
    )
    classes, splits = choose(config.source.open(), config, 0)
    examined = examine(classes, splits, config)
    return examined, {finding.kind: finding for finding in find(examined)}


def test_nothing_is_wrong_with_clean_images(clean):
    _, findings = found(clean)
    assert set(findings) == {"few_shot_classes"}
    assert "oak 8" in findings["few_shot_classes"].advice


@dataclass
class Plant:
    """A fault: what it does to the folder, and which images of which finding it must be."""

    kind: str
    images: set[str] = field(default_factory=set)
    exclude: set[str] = field(default_factory=set)


def _changed(source: Path, target: Path, how) -> None:
    with Image.open(source) as image:
        how(image.convert("RGB")).save(target, quality=60)


def bytes_in_test(folder):
    shutil.copy(folder / "train/ash/3.jpg", folder / "test/ash/copy.jpg")
    return Plant("duplicate_across_splits", {"train/ash/3.jpg", "test/ash/copy.jpg"}, {"train/ash/3.jpg"})


def encoded_again_in_test(folder):
    _changed(folder / "train/ash/3.jpg", folder / "test/ash/again.jpg", lambda image: image)
    return Plant("near_across_splits", {"train/ash/3.jpg", "test/ash/again.jpg"}, {"train/ash/3.jpg"})


def smaller_in_test(folder):
    _changed(folder / "train/oak/3.jpg", folder / "test/oak/small.jpg", lambda image: image.resize((64, 64)))
    return Plant("near_across_splits", {"train/oak/3.jpg", "test/oak/small.jpg"}, {"train/oak/3.jpg"})


def brighter_in_test(folder):
    _changed(
        folder / "train/oak/4.jpg", folder / "test/oak/bright.jpg", lambda image: ImageEnhance.Brightness(image).enhance(1.03)
    )
    return Plant("near_across_splits", {"train/oak/4.jpg", "test/oak/bright.jpg"}, {"train/oak/4.jpg"})


def bytes_in_another_class(folder):
    shutil.copy(folder / "train/ash/5.jpg", folder / "train/oak/wrong.jpg")
    both = {"train/ash/5.jpg", "train/oak/wrong.jpg"}
    return Plant("duplicate_label_conflict", both, both)


def near_in_another_class(folder):
    _changed(folder / "train/ash/5.jpg", folder / "train/oak/wrong.jpg", lambda image: image)
    return Plant("near_label_conflict", {"train/ash/5.jpg", "train/oak/wrong.jpg"})


def conflict_across_splits(folder):
    shutil.copy(folder / "train/ash/6.jpg", folder / "test/birch/wrong.jpg")
    return Plant(
        "duplicate_label_conflict", {"train/ash/6.jpg", "test/birch/wrong.jpg"}, {"train/ash/6.jpg", "test/birch/wrong.jpg"}
    )


def twice_in_a_class(folder):
    shutil.copy(folder / "train/birch/1.jpg", folder / "train/birch/zz.jpg")
    return Plant("duplicate_within_class", {"train/birch/1.jpg", "train/birch/zz.jpg"}, {"train/birch/zz.jpg"})


def nearly_twice_in_a_class(folder):
    _changed(folder / "train/birch/1.jpg", folder / "train/birch/zz.jpg", lambda image: image)
    return Plant("near_within_class", {"train/birch/1.jpg", "train/birch/zz.jpg"})


def truncated(folder):
    path = folder / "train/ash/7.jpg"
    path.write_bytes(path.read_bytes()[:400])
    return Plant("unreadable", {"train/ash/7.jpg"}, {"train/ash/7.jpg"})


def text_as_image(folder):
    (folder / "test/oak/0.jpg").write_text("<html>404</html>")
    return Plant("unreadable", {"test/oak/0.jpg"}, {"test/oak/0.jpg"})


def one_colour(folder):
    Image.new("RGB", (96, 96), (90, 90, 200)).save(folder / "train/ash/8.jpg")
    return Plant("blank", {"train/ash/8.jpg"})


def black(folder):
    picture = ImageEnhance.Brightness(photograph(9007)).enhance(0.07)
    picture.save(folder / "train/ash/8.jpg")
    return Plant("dark", {"train/ash/8.jpg"})


def white(folder):
    pixels = 255 - np.asarray(photograph(9008)) // 12
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "train/ash/8.jpg")
    return Plant("bright", {"train/ash/8.jpg"})


def thumbnail(folder):
    photograph(9009, 20).save(folder / "train/ash/8.jpg")
    return Plant("tiny", {"train/ash/8.jpg"})


def strip(folder):
    photograph(9010, 400).crop((0, 0, 400, 60)).save(folder / "train/ash/8.jpg")
    return Plant("narrow", {"train/ash/8.jpg"})


def turned(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(9011).save(folder / "train/ash/8.jpg", exif=exif)
    return Plant("rotated", {"train/ash/8.jpg"})


def grey(folder):
    photograph(9012).convert("L").save(folder / "train/ash/8.jpg")
    return Plant("odd_mode", {"train/ash/8.jpg"})


def enormous(folder):
    photograph(9013, 96).resize((4200, 4200)).save(folder / "train/ash/8.jpg", quality=30)
    return Plant("huge", {"train/ash/8.jpg"})


def a_class_of_one(folder):
    for number in range(1, SIZES["oak"]):
        (folder / f"train/oak/{number}.jpg").unlink()
    return Plant("single_image_class")


def a_class_without_test(folder):
    shutil.rmtree(folder / "test/oak")
    return Plant("class_not_tested")


def a_darker_test_set(folder):
    for path in (folder / "test").rglob("*.jpg"):
        _changed(path, path, lambda image: ImageEnhance.Brightness(image).enhance(0.6))
    return Plant("split_shift")


PLANTS = [
    bytes_in_test, encoded_again_in_test, smaller_in_test, brighter_in_test, bytes_in_another_class, near_in_another_class,
    conflict_across_splits, twice_in_a_class, nearly_twice_in_a_class, truncated, text_as_image, one_colour, black, white,
    thumbnail, strip, turned, grey, enormous, a_class_of_one, a_class_without_test, a_darker_test_set,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found_and_nothing_else(folder, plant):
    planted = plant(folder)
    examined, findings = found(folder)
    finding = findings[planted.kind]
    assert {examined.name[number] for group in finding.groups for number in group} == planted.images
    assert {examined.name[number] for number in finding.exclude} == planted.exclude
    expected = {planted.kind, "few_shot_classes"}
    if plant is conflict_across_splits:
        expected.add("duplicate_across_splits")
    assert set(findings) == expected


def test_a_decoder_that_fails_in_its_own_way_is_a_finding(folder, monkeypatch):
    """As Pillow's of AVIF does, by a RuntimeError."""
    original, damaged = looking.decode, (folder / "train/ash/3.jpg").read_bytes()

    def decode(data, **more):
        if data == damaged:
            raise RuntimeError("Failed to decode frame 0")
        return original(data, **more)

    monkeypatch.setattr(looking, "decode", decode)
    examined, findings = found(folder)
    (number,) = findings["unreadable"].exclude
    assert examined.name[number] == "train/ash/3.jpg"
    assert "RuntimeError: Failed to decode frame 0" in str(examined.look[number])
    with pytest.raises(BadImageError, match="Failed to decode frame 0"):
        examined.image(number, data_config())


def test_the_command_and_the_list_that_it_writes(folder, tmp_path, monkeypatch, capsys):
    bytes_in_test(folder)
    truncated(folder)
    (folder / "train/ash/<b>&.jpg").write_bytes((folder / "train/ash/9.jpg").read_bytes())
    out = tmp_path / "report"
    source = ["--data.source.path", str(folder), "--val_fraction", "0"]
    monkeypatch.setattr(sys, "argv", ["doctor", "folder", *source, "--features", "none", "--out", str(out)])
    command.main()
    told = capsys.readouterr().out
    assert "fault: 1 image cannot be read" in told
    assert f"3 images to leave out: --data.exclude {out / 'exclude.txt'}" in told
    *lines, last = (out / "exclude.txt").read_text().splitlines()
    assert lines == ["train\ttrain/ash/3.jpg", "train\ttrain/ash/7.jpg"]
    assert last in ("train\ttrain/ash/<b>&.jpg", "train\ttrain/ash/9.jpg")
    page = (out / "doctor.html").read_text()
    assert "train/ash/&lt;b&gt;&amp;.jpg" in page
    assert "<b>" not in page
    assert page.count("data:image/jpeg;base64,") >= 4
    content = json.loads((out / "doctor.json").read_text())
    assert content["images"] == {"train": sum(SIZES.values()) + 1, "test": 3 * HELD_OUT + 1}
    assert content["imbalance"]["few"] == 1
    assert content["findings"][0]["severity"] == "fault"

    data = {
        "source": {"kind": "folder", "path": str(folder)},
        "prepared": str(tmp_path / "p"),
        "exclude": str(out / "exclude.txt"),
    }
    prepared = ensure_prepared(DataConfig.model_validate(data), 0)
    assert prepared.splits["train"].samples == sum(SIZES.values()) - 2
    (out / "exclude.txt").write_text("train/ash/3.jpg\n")  # a person's choice
    command.main()
    assert (out / "exclude.before.txt").read_text() == "train/ash/3.jpg\n"
    assert len((out / "exclude.txt").read_text().splitlines()) == 3

    before = (out / "exclude.txt").read_text()
    (folder / "train/ash/9.jpg").write_bytes(b"no image any more")  # after the list was made
    again = ["--data.exclude", str(out / "exclude.txt"), "--features", "none", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["doctor", "folder", *source, *again])
    command.main()
    told = capsys.readouterr().out
    names = (out / "exclude.txt").read_text()
    assert names.startswith(before)  # what was left out stays left out
    assert "9.jpg" in names
    of_class = sorted(f"train/ash/{path.name}" for path in (folder / "train/ash").iterdir())
    (tmp_path / "class.txt").write_text("\n".join(of_class))
    with pytest.raises(UserError, match="class.txt names every training image of the class 'ash'"):
        ensure_prepared(DataConfig.model_validate({**data, "exclude": str(tmp_path / "class.txt")}), 0)

    (tmp_path / "none.txt").write_text("train/ash/none.jpg\n")
    with pytest.raises(UserError, match="names no image of the source"):
        ensure_prepared(DataConfig.model_validate({**data, "exclude": str(tmp_path / "none.txt")}), 0)


def test_images_to_leave_out_are_known_by_split_and_name(tmp_path, capsys):
    """Two splits may have images of one name; a split that was set aside is of the training images."""
    images = Images(["0", "1", "2", "3"], np.array([0, 0, 1, 1]), pixels=np.zeros((4, 8, 8, 3), np.uint8))
    dataset = Dataset(["a", "b"], images, test=images)
    listed = tmp_path / "exclude.txt"
    data = data_config(exclude=str(listed), val_fraction=0.25)

    def left() -> dict[str, list[str]]:
        _, splits = choose(dataset, data, 0)
        return {
            "train": sorted([*splits["train"].names, *(splits["val"].names if "val" in splits else [])]),
            "test": [*splits["test"].names],
        }

    listed.write_text("test\t1\n")
    assert left() == {"train": ["0", "1", "2", "3"], "test": ["0", "2", "3"]}
    listed.write_text("train\t2\r\ntest\t1\n")
    assert left() == {"train": ["0", "1", "3"], "test": ["0", "2", "3"]}
    assert "2 images are left out" in capsys.readouterr().err
    listed.write_text("val\t2\n")
    assert left() == {"train": ["0", "1", "3"], "test": ["0", "1", "2", "3"]}
    listed.write_text("1\n")
    with pytest.raises(UserError, match=r"names '1', an image of train and one of test; write 'train\\t1' or 'test\\t1'"):
        left()
    dataset = Dataset(["a", "b"], images)
    assert sorted(name for each in choose(dataset, data, 0)[1].values() for name in each.names) == ["0", "2", "3"]


def test_the_doctors_list_is_read_back_whatever_the_names_are(folder, tmp_path):
    odd = os.fsdecode(b"train/ash/f\xfcnf\ttab.jpg")
    (folder / odd).write_bytes(b"no image")
    examined, findings = found(folder)
    write_report(tmp_path / "out", examined, [findings["unreadable"]], data_config())
    data = {"source": {"kind": "folder", "path": str(folder)}, "exclude": str(tmp_path / "out" / "exclude.txt")}
    prepared = ensure_prepared(DataConfig.model_validate({**data, "prepared": str(tmp_path / "p")}), 0)
    assert odd not in prepared.names("train")
    assert prepared.splits["train"].samples == sum(SIZES.values())


def test_preparing_ends_with_what_the_doctor_sees_at_once(folder, tmp_path, capsys):
    shutil.copy(folder / "train/ash/3.jpg", folder / "train/ash/zz.jpg")
    shutil.rmtree(folder / "test/oak")
    options = ["--data.source.path", str(folder), "--data.prepared", str(tmp_path / "with space")]
    done = in_process(prepare.main, "folder", *options)
    assert done.returncode == 0, done.stderr
    told = [line.removeprefix("doctor: ") for line in done.stdout.splitlines() if line.startswith("doctor: ")]
    copies = next((tmp_path / "with space").glob("*/copies.txt"))
    assert told == [
        "3.364 to 1, Gini 0.25",
        "test: 1 class has no image: oak",
        "1 class has fewer than 20 training images (few-shot)",
        f"images with the same bytes are listed in {copies}",
        "a page of near copies, wrong labels and odd images: "
        f"python -m pipelines.doctor folder --data.source.path {folder} --data.prepared '{tmp_path / 'with space'}'",
    ]


def test_names_of_classes_are_text_on_the_page(folder, tmp_path):
    (folder / "train/oak").rename(folder / "train/<i>oak")
    (folder / "test/oak").rename(folder / "test/<i>oak")
    shutil.copy(folder / "train/<i>oak/3.jpg", folder / "test/<i>oak/copy.jpg")
    examined, findings = found(folder)
    write_report(tmp_path / "report", examined, [*findings.values()], DataConfig.model_validate({"source": {"kind": "digits"}}))
    page = (tmp_path / "report" / "doctor.html").read_text()
    assert "&lt;i&gt;oak" in page
    assert "<i>" not in page


def test_near_finds_every_pair_within_four_bits():
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**63, 3000, dtype=np.uint64)
    for pair in range(100):
        flips = random.choice(64, 4, replace=False)
        hashes[2 * pair + 1] = hashes[2 * pair] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64))
    found = near(hashes, np.zeros((3000, 8, 8, 3), dtype=np.uint8))
    by_hand = {(a, b) for a in range(3000) for b in np.flatnonzero(np.bitwise_count(hashes[a] ^ hashes) <= 4).tolist() if a < b}
    assert set(found) == by_hand
    assert len(found) >= 100
    different = near(hashes, np.arange(3000 * 192, dtype=np.uint64).astype(np.uint8).reshape(3000, 8, 8, 3) * np.uint8(37))
    assert set(different) <= set(found)


def test_clusters_and_gini():
    assert clusters([(5, 3), (1, 9), (3, 7), (2, 9)]) == [[1, 2, 9], [3, 5, 7]]
    assert gini(np.array([5, 5, 5])) == pytest.approx(0)
    assert gini(np.array([0, 0, 9])) == pytest.approx(2 / 3)


def test_photographs_have_few_false_alarms(tmp_path):
    """A person looked at all pairs that are found in these photographs: they are the same pictures, cut or coloured anew."""
    unpacked("caltech-lt.zip", tmp_path / "photos")
    _, findings = found(tmp_path / "photos", val_fraction=0)
    assert not [finding for finding in findings.values() if finding.severity == "fault"]
    assert len(findings["near_across_splits"].groups) == 2
    assert sum(len(group) - 1 for group in findings["near_within_class"].groups) == 8
    assert not set(findings) & {"blank", "tiny", "narrow", "near_label_conflict", "class_not_tested", "split_shift"}


def blobs(counts: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of length 1 about a centre a class, and their labels."""
    random = np.random.default_rng(seed)
    centres = random.normal(0, 1, (len(counts), 40))
    labels = np.repeat(np.arange(len(counts)), counts)
    features = centres[labels] + random.normal(0, 0.5, (len(labels), 40))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32), labels


def test_planted_labels_are_doubted_and_no_others():
    features, labels = blobs([200, 60, 20, 8])
    true = labels.copy()
    planted = [3, 70, 205, 262, 281]  # of each class, the smallest too
    labels[planted] = (labels[planted] + 1) % 4
    features[10] = np.nan
    answer = judge(features, labels, 4)
    doubted = np.flatnonzero((answer.best != labels) & (answer.best >= 0))
    assert doubted.tolist() == planted
    assert answer.best[planted].tolist() == true[planted].tolist()
    assert (answer.own[planted] < 0.05).all()
    assert answer.best[10] == -1


def test_a_class_of_one_image_is_not_judged():
    features, labels = blobs([30, 30, 1])
    answer = judge(features, labels, 3)
    assert answer.best[-1] == -1
    assert (answer.best[:-1] == labels[:-1]).all()


def _seen(labels: np.ndarray, split: list[str], classes: int):
    from pipelines.doctor.examine import Examined

    count = len(labels)
    names = [str(number) for number in range(count)]
    return Examined(split, [*range(count)], names, labels, None, [], [f"c{label}" for label in range(classes)], {})


def test_classes_that_look_alike_are_named():
    features, labels = blobs([120, 60, 60])
    labels = np.where(np.arange(240) < 120, np.arange(240) % 2, labels + 1)  # the first class is two, which nothing tells apart
    found = {each.kind: each for each in find_by_content(_seen(labels, ["train"] * 240, 4), features)}
    assert found["classes_alike"].title.startswith("1 pair of classes looks alike: c0 and c1 (")
    assert {int(labels[number]) for number in found["classes_alike"].groups[0]} == {0, 1}
    assert "wrong_label" not in found


def test_a_split_of_other_pictures_is_told():
    features, labels = blobs([80, 80])
    split = ["test" if number % 4 == 0 else "train" for number in range(160)]
    assert not find_by_content(_seen(labels, split, 2), features)
    features[np.array(split) == "test", :3] += 0.5
    found = find_by_content(_seen(labels, split, 2), features)
    assert [each.kind for each in found] == ["content_shift"]


def test_wrong_labels_among_photographs_are_found(tmp_path):
    """A photograph of each of four classes is put into the next one; the pretrained network sees it."""
    if not installed():
        pytest.skip("the weights of the offline backbone are not installed")
    unpacked("caltech-lt.zip", tmp_path / "all")
    kinds = ["chandelier", "dolphin", "helicopter", "watch"]
    planted = {}
    for number, kind in enumerate(kinds):
        target = tmp_path / "photos" / "train" / kind
        target.mkdir(parents=True)
        for path in sorted((tmp_path / "all/train" / kind).iterdir())[:20]:
            shutil.copy(path, target)
        other = sorted((tmp_path / "all/test" / kinds[number - 1]).iterdir())[0]
        shutil.copy(other, target / "wrong.jpg")
        planted[f"train/{kind}/wrong.jpg"] = kinds[number - 1]
    (tmp_path / "photos/train/watch/broken.jpg").write_bytes(b"no image")
    examined, _ = found(tmp_path / "photos", val_fraction=0.05)
    config = DataConfig.model_validate({"source": {"kind": "folder", "path": str(tmp_path / "photos")}})
    findings = {each.kind: each for each in find_by_content(examined, image_features(examined, config))}
    doubted = {examined.name[a]: examined.classes[examined.label[b]] for a, b in findings["wrong_label"].groups}
    assert planted.items() <= doubted.items()
    assert len(doubted) <= len(planted) + 1
    write_report(tmp_path / "report", examined, [*findings.values()], config)
    assert {*(tmp_path / "report/suspects.txt").read_text().splitlines()} == {f"train\t{name}" for name in doubted}
