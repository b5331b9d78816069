"""Which images are in which split, and which of the training images a long-tail profile keeps."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.words import agreed, plural
from pipelines.config import DataConfig
from pipelines.prepare.longtail import apply_profile, carve
from pipelines.prepare.sources import Dataset, Images, class_counts
from pipelines.prepare.sources.dataset import class_weights, refuse_useless_weights
from pipelines.prepare.sources.names import read_text
from pipelines.prepare.sources.tree import SPLITS
from pipelines.prepare.split_groups import grouped, refuse_shared_groups
from pipelines.prepare.writer import line_of

_SET_ASIDE = 0.2  # of the images of a source without val and test
Chosen = tuple[list[str], dict[str, Images]]  # the classes, and the images of each split


def subset_seed(data: DataConfig, seed: int) -> int:
    """The seed of the subset and of the order on disk: `data.subset_seed` where it is set, else the run's."""
    return seed if data.subset_seed is None else data.subset_seed


def choose(dataset: Dataset, data: DataConfig, seed: int, settable: bool = True) -> Chosen:
    """Split a source: test and validation images first, then the long-tail profile for the training images.

    Args:
        dataset: The source.
        data: The data configuration.
        seed: Of the subset, as `subset_seed` gives it.
        settable: Whether the command takes fields of `data`, so that an error may advise one.

    Returns:
        The classes, and the images of each split.

    Raises:
        UserError: Listed images are missing, the profile or a fraction asks for more images than there are, or
            `data.sampling` needs weights that the images do not have.
    """
    train, val, test = _carved(dataset, data, seed)
    splits = {"train": apply_profile(data.profile, train, len(dataset.classes), seed, dataset.classes)}
    if len(splits["train"]) < len(train):
        kept = f"{len(splits['train']):,} of {len(train):,} training images"
        print(f"data: profile {data.profile.kind!r} keeps {kept}; --data.profile '{{kind: none}}' keeps all", file=sys.stderr)
    splits |= {name: images for name, images in (("val", val), ("test", test)) if images is not None}
    for images in (train, val, test):
        if images is not None and images.missing and data.on_bad_image == "error":
            some = ", ".join(map(repr, images.missing[:3])) + (" and others" if len(images.missing) > 3 else "")
            raise UserError(
                f"{plural(len(images.missing), 'listed image', 'are')} missing, such as {some}; "
                + ("correct the list or data.source.root, or set data.on_bad_image: skip" if settable else "bring them back")
            )
    if data.sampling == "weighted":
        refuse_useless_weights(_class_weights(splits["train"], dataset.classes), dataset.classes)
    return dataset.classes, splits


def _class_weights(images: Images, classes: list[str]) -> np.ndarray | None:
    return None if images.weights is None else class_weights(images.labels, images.weights, len(classes))


def _carved(dataset: Dataset, data: DataConfig, seed: int) -> tuple[Images, Images | None, Images | None]:
    """Training, validation and test images, before any profile: the source's own splits, or stratified shares, which are said.

    Raises:
        UserError: Validation images are asked for, and no class has two images.
    """
    train, val, test, classes = dataset.train, dataset.val, dataset.test, dataset.classes
    if data.exclude is not None:
        train, val, test = _without(data.exclude, classes, train, val, test)
    if data.split_by is not None:
        train = grouped(train, data.split_by)
        val, test = (grouped(images, data.split_by) if images is not None else None for images in (val, test))
        refuse_shared_groups({"train": train, "val": val, "test": test})
    has_groups = data.split_by is None and train.groups is not None
    if data.split_by is None:
        train = replace(train, groups=None)
    val_share, test_share = data.val_fraction, data.test_fraction
    if val_share == test_share == 0 and val is None and test is None:
        val_share = _SET_ASIDE
        _say(
            f"the source has neither a 'val' nor a 'test' split; {val_share:.0%} of each class's images are set aside as "
            "'val' (data.val_fraction)"
        )
    for name, images in (("val", val), ("test", test)):
        if images is not None and getattr(data, f"{name}_fraction") > 0:
            _say(f"the source's own {name!r} split is used; data.{name}_fraction is for sources without one")
    if has_groups and ((test_share > 0 and test is None) or (val_share > 0 and val is None)):
        _say("each image by itself, although the source has groups; for whole groups set data.split_by: group")
    if test_share > 0 and test is None:
        train, test = carve(train, len(classes), test_share, seed, "test split", keep=2 if val is None and val_share > 0 else 1)
        if test is None:
            raise UserError(f"data.test_fraction: no class has two {_unit(train)}, so none can be set aside for the test")
        _say_aside("test", test, test_share, classes)
    if val_share > 0 and val is None:
        train, val = carve(train, len(classes), val_share, seed)
        if val is None:
            raise UserError(f"data.val_fraction: no class has two {_unit(train)}, so none can be set aside for validation")
        _say_aside("val", val, val_share, classes)
    return train, val, test


def _unit(train: Images) -> str:
    """What is set aside whole."""
    return "training images" if train.groups is None else "groups of training images (data.split_by)"


def excluded_names(path: Path) -> list[str]:
    """The lines of a file of images to leave out (`data.exclude`), each once.

    Raises:
        UserError: The file cannot be read.
    """
    lines = read_text(path, "list of images to leave out", errors="surrogateescape").split("\n")
    return list(dict.fromkeys(line.removesuffix("\r") for line in lines if line.strip()))


def _without(
    path: Path, classes: list[str], train: Images, val: Images | None, test: Images | None
) -> tuple[Images, Images | None, Images | None]:
    """The splits without the images that a file names: by split, a tab and the name, or by the name alone.

    Raises:
        UserError: The source has none of them, or all of a split's or of a class's training images are named, or a name alone
            is that of images in two splits.
    """
    own = {split: images for split, images in (("train", train), ("val", val), ("test", test)) if images is not None}
    of_split: dict[str, set[str]] = {split: set() for split in own}
    alone: set[str] = set()
    for line in excluded_names(path):
        split, tab, name = line.partition("\t")
        if tab and split in SPLITS:  # one that the source does not have was set aside from its training images
            of_split[split if split in own else "train"].add(name)
        else:
            alone.add(line)
    kept: dict[str, Images] = {}
    first: dict[str, str] = {}  # the split of each name that stands alone
    for split, images in own.items():
        rows = []
        for row, name in enumerate(map(line_of, images.names)):
            if name in alone and (other := first.setdefault(name, split)) != split:
                both = " or ".join(repr(f"{each}\t{name}") for each in (other, split))
                raise UserError(f"data.exclude: {path} names {name!r}, an image of {other} and one of {split}; write {both}")
            if name not in alone and name not in of_split[split]:
                rows.append(row)
        if not rows:
            raise UserError(f"data.exclude: {path} names every image of the {split} split")
        kept[split] = images.take(np.array(rows, dtype=np.int64))
    gone = np.setdiff1d(train.labels, kept["train"].labels)
    if len(gone):
        raise UserError(f"data.exclude: {path} names every training image of the class {classes[int(gone[0])]!r}")
    dropped = sum(len(images) - len(kept[split]) for split, images in own.items())
    if not dropped and (alone or any(of_split.values())):
        raise UserError(f"data.exclude: {path} names no image of the source; names are as in SPLIT.files.txt")
    _say(f"{plural(dropped, 'image', 'are')} left out, as {path} says (data.exclude)")
    return kept["train"], kept.get("val"), kept.get("test")


def _say(text: str) -> None:
    print(f"data: {text}", file=sys.stderr)


def _say_aside(split: str, images: Images | None, share: float, classes: list[str]) -> None:
    """Say what was set aside, and which classes are too small for it."""
    counts = class_counts(images.labels, len(classes)) if images is not None else np.zeros(len(classes), np.int64)
    of = f", of {plural(len(np.unique(images.groups)), 'group')}" if images is not None and images.groups is not None else ""
    total = int(counts.sum())
    aside = f"{share:.0%} of each class, {agreed(total, 'are')} set aside (data.{split}_fraction)"
    _say(f"{split}: {plural(total, 'image')}{of}, {aside}")
    without = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if without:
        some = ", ".join(map(repr, without[:5])) + (" and others" if len(without) > 5 else "")
        _say(f"{split}: {len(without)} of {len(classes)} classes are too small to have an image in it: {some}")
