"""Write the .beton files of a data configuration, and a sidecar that says what is in them.

The folder's name follows from the data configuration and the seed. Its sidecar, `prepared.json`, is written last: a folder
without one is not whole. Training calls `ensure_prepared` by itself; it writes only what is missing or no longer matches.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
from pydantic import Field

from pipelines.common.command_line import ConfigParser, print_config
from pipelines.common.config_file import find_config, read_content
from pipelines.common.errors import UserError
from pipelines.common.fields import nearest
from pipelines.common.files import locked, need_writable, write_atomically
from pipelines.common.settings import Settings, build
from pipelines.common.words import agreed, plural
from pipelines.config import DataConfig
from pipelines.prepare.doubles import find_copies, refuse_shared_files
from pipelines.prepare.longtail import apply_profile, carve
from pipelines.prepare.pictures import save_histogram
from pipelines.prepare.prepared import (
    EARLIER_FORMAT,
    FORMAT,
    SIDECAR,
    WEIGHTS,
    Prepared,
    Split,
    counts_of_files,
    is_whole,
    read_sidecar,
    write_sidecar,
)
from pipelines.prepare.publish import open_published
from pipelines.prepare.sources import Dataset, Images, class_counts, open_folder
from pipelines.prepare.sources.addresses import NetworkError
from pipelines.prepare.sources.dataset import AbsentError, class_weights, refuse_useless_weights
from pipelines.prepare.sources.names import read_text
from pipelines.prepare.sources.tree import SPLITS
from pipelines.prepare.split_groups import grouped, refuse_shared_groups
from pipelines.prepare.writer import (
    Packer,
    Progress,
    file_entry,
    forget_records,
    line_of,
    names_file,
    write_split,
)

COPIES = "copies.txt"  # in a prepared folder: images with the same bytes
_SET_ASIDE = 0.2  # of the images of a source without val and test
_STORED = {"on_bad_image", "max_pixels", "window", "store"}  # what decides how a source's images are stored


def prepared_folder(data: DataConfig, seed: int, file_format: int = FORMAT) -> Path:
    """The folder for the data of a configuration. Its name depends on all that changes the stored images or their choice.

    Args:
        data: The data configuration.
        seed: The run's seed.
        file_format: With an earlier one, the folder of an earlier version.
    """
    content = data.model_dump(mode="json", include={"profile", "val_fraction", *_STORED})
    content["source"] = data.source.identity()
    if content["profile"].get("subset") == "seeded":  # folders of earlier versions keep their names
        del content["profile"]["subset"]
    if data.test_fraction:
        content["test_fraction"] = data.test_fraction
    if data.exclude is not None:
        content["exclude"] = sorted(excluded_names(data.exclude))
    if data.split_by is not None:
        content["split_by"] = data.split_by
    if data.store.mode != "mixed":
        del content["store"]["raw_share"]
    if file_format < 4:  # which had no such fields
        del content["max_pixels"], content["window"]
    content["seed"] = subset_seed(data, seed)
    return data.prepared / f"{data.source.kind}-{data.profile.kind}-{_key(content, file_format)}"


def subset_seed(data: DataConfig, seed: int) -> int:
    """The seed of the subset and of the order on disk: `data.subset_seed` where it is set, else the run's."""
    return seed if data.subset_seed is None else data.subset_seed


def ensure_prepared(data: DataConfig, seed: int, settable: bool = True, packer: Packer | None = None) -> Prepared:
    """Prepare the data of a configuration, if they are missing or the source has changed. Published data are used as they are.

    Args:
        data: The data configuration.
        seed: The run's seed.
        settable: Whether the command takes fields of `data`, so that an error may advise one.
        packer: As in `write_split`.

    Returns:
        The prepared data.

    Raises:
        UserError: The source is missing or has a fault that the message names, or nothing is published.
    """
    folder = prepared_folder(data, seed)
    if data.published is not None:
        return open_published(data.published, folder, data.cache_gb)
    found = None if data.source.present() else _as_prepared(data, seed)
    if found is not None:
        return found
    if not (folder / SIDECAR).is_file():
        _need_room(folder, data, settable)  # before a source is listed, which may take long
    try:
        dataset = data.source.open()
    except (AbsentError, NetworkError):  # which is known of some sources only now
        found = _as_prepared(data, seed)
        if found is None:
            raise
        return found
    draw = subset_seed(data, seed)
    return _up_to_date(folder, choose(dataset, data, draw, settable), data, draw, settable, packer)


def _as_prepared(data: DataConfig, seed: int) -> Prepared | None:
    """What was prepared of a source that is gone, which is said; None where nothing was."""
    found = read_sidecar(prepared_folder(data, seed)) or read_sidecar(prepared_folder(data, seed, EARLIER_FORMAT))
    if found is not None:
        print(f"data: the source is not on this machine; using {found.folder} as it was prepared", file=sys.stderr)
    return found


def prepare_folder(images: Path, classes: list[str], data: DataConfig) -> Prepared:
    """Prepare the images of `images/CLASS/*` as a test split.

    Args:
        images: The folder.
        classes: The network's classes, in label order.
        data: How images are stored.

    Returns:
        The prepared data, with the split 'test' alone.

    Raises:
        UserError: The folder has a class that is not among them, or an image is unreadable.
    """
    content = {"images": str(images), **data.model_dump(mode="json", include=_STORED)}
    names = data.source.class_names()
    if names:
        content["names"] = names
    chosen = (classes, {"test": open_folder(images, classes, names)})
    return _up_to_date(data.prepared / f"images-{_key(content)}", chosen, data, seed=0, settable=False)


Chosen = tuple[list[str], dict[str, Images]]


def _up_to_date(
    folder: Path, chosen: Chosen, data: DataConfig, seed: int, settable: bool, packer: Packer | None = None
) -> Prepared:
    """The content of `folder` if it is whole and of these images; else it is written now."""
    found = read_sidecar(folder)
    if found is not None and _matches(found, chosen) and _same_weights(found, chosen):
        return found
    _need_room(folder, data, settable)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", waiting=f"data: another command prepares {folder}; waiting for it"):
        found = read_sidecar(folder)  # another process may have written it while this one waited
        if found is not None and _matches(found, chosen):
            return found if _same_weights(found, chosen) else _weigh_again(found, chosen)
        return _write(folder, chosen, data, seed, settable, packer)


def _need_room(folder: Path, data: DataConfig, settable: bool) -> None:
    """Raise UserError where a prepared folder cannot be written."""
    fix = "name another folder: --data.prepared FOLDER" if settable else "make it writable"
    need_writable(folder, f"data.prepared {str(data.prepared)!r}", fix)


def _key(content: Mapping[str, object], file_format: int = FORMAT) -> str:
    return hashlib.sha256(json.dumps({**content, "format": file_format}, sort_keys=True).encode()).hexdigest()[:12]


def choose(dataset: Dataset, data: DataConfig, seed: int, settable: bool = True) -> tuple[list[str], dict[str, Images]]:
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


def _matches(found: Prepared, chosen: Chosen) -> bool:
    classes, splits = chosen
    same = {name: images.digest() for name, images in splits.items()}
    known = {name: split.source_digest for name, split in found.splits.items()}
    return is_whole(found) and found.classes == classes and same == known


def _same_weights(found: Prepared, chosen: Chosen) -> bool:
    train = chosen[1].get("train")
    return train is None or found.splits["train"].weights == train.weights_digest()


def _weigh_again(found: Prepared, chosen: Chosen) -> Prepared:
    """The same images with other weights."""
    classes, splits = chosen
    print(f"data: the images in {found.folder} get other weights", file=sys.stderr)
    (found.folder / SIDECAR).unlink()
    row_of = {line_of(name): row for row, name in enumerate(splits["train"].names)}
    rows = np.array([row_of[line] for line in found.names("train")])
    train = _weighted(found.folder, found.splits["train"], splits["train"], rows, len(classes))
    prepared = replace(found, splits={**found.splits, "train": train})
    write_sidecar(prepared)
    return prepared


def _weighted(folder: Path, split: Split, images: Images, rows: np.ndarray, classes: int) -> Split:
    """The training split with its images' weights, written beside the files. rows: of the images, in the order of the files."""
    path = folder / WEIGHTS
    tables = [table for table in split.tables if table.file != WEIGHTS]
    if images.weights is None:
        path.unlink(missing_ok=True)
        return replace(split, weights="", shard_weights=[], tables=tables)
    weights, labels = images.weights[rows].astype("<f8"), images.labels[rows]

    def save(file: IO[bytes]) -> None:
        np.save(file, weights)

    write_atomically(path, save)
    ends = np.cumsum([shard.samples for shard in split.shards])[:-1]
    parts = zip(np.split(labels, ends), np.split(weights, ends), strict=True)
    of_files = [class_weights(*part, classes).tolist() for part in parts]
    tables.append(file_entry(path, len(weights)))
    return replace(split, weights=images.weights_digest(), shard_weights=of_files, tables=tables)


def _write(folder: Path, chosen: Chosen, data: DataConfig, seed: int, settable: bool, packer: Packer | None) -> Prepared:
    classes, splits = chosen
    refuse_shared_files(splits)
    (folder / SIDECAR).unlink(missing_ok=True)
    print(f"data: preparing {sum(len(images) for images in splits.values()):,} images in {folder}", file=sys.stderr)
    progress = {name: write_split(folder, name, images, data, seed, settable, packer) for name, images in splits.items()}
    written = {name: _split(folder, progress[name], name, images, classes) for name, images in splits.items()}
    if "train" in written:
        rows = np.array(progress["train"].rows)
        written["train"] = _weighted(folder, written["train"], splits["train"], rows, len(classes))
    prepared = Prepared(folder, classes, seed, data.profile.model_dump(mode="json"), written)
    write_sidecar(prepared)
    forget_records(folder)
    for name, split in written.items():
        if split.skipped:
            count = plural(len(split.skipped), "unreadable image")
            print(f"data: {count} left out of {name}, listed with their reasons in {folder / SIDECAR}:", file=sys.stderr)
            for path, reason in [*zip(split.skipped, split.reasons, strict=True)][:10]:
                print(f"  {path}: {reason}", file=sys.stderr)
    copies = find_copies(splits, {name: (each.rows, each.sources) for name, each in progress.items()})
    (folder / COPIES).unlink(missing_ok=True)
    if copies.lines:
        copies.write(folder / COPIES)
        print(f"data: copies of the same image: {copies.text()}; listed in {folder / COPIES}", file=sys.stderr)
    if "train" in written and importlib.util.find_spec("matplotlib") is not None:
        save_histogram(folder / "class_counts.png", classes, prepared.train_counts)
    return prepared


def _split(folder: Path, progress: Progress, name: str, images: Images, classes: list[str]) -> Split:
    of_files = counts_of_files(np.array(progress.labels), progress.shards, len(classes))
    counts = of_files.sum(axis=0)
    if name == "train" and not counts.all():
        raise UserError(f"class {classes[int(counts.argmin())]!r} has no readable training image")
    # Of images that are no files, the source's digest is one of their content already, and recorded results have it.
    content = progress.digest if images.files is None else progress.content
    return Split(
        progress.shards,
        counts.tolist(),
        progress.digest,
        progress.skipped,
        of_files.tolist(),
        content,
        progress.reasons,
        tables=[file_entry(folder / names_file(name), len(progress.rows))],
    )


class PrepareConfig(Settings):
    """The part of a run's configuration that preparing reads."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="decides the subset and the order of the images on disk")
    data: DataConfig


def load_data(name: str, overrides: list[str]) -> PrepareConfig:
    """The data of a run's configuration.

    Args:
        name: A path, or the name of a shipped configuration. Its other parts are not read.
        overrides: The command line's `--field value`.

    Raises:
        UserError: The file cannot be read, or a value is invalid.
    """
    path = find_config(name)
    content = read_content(path, PrepareConfig)
    others = [key for key in content if key not in PrepareConfig.model_fields]
    misspelt = "" if "data" in content else nearest("data", [key for key in others if isinstance(key, str)])
    if misspelt:
        raise UserError(f"{path}: unknown key {misspelt!r}; did you mean 'data'?")
    return build(PrepareConfig, {key: content[key] for key in content if key not in others}, overrides, str(path))


def from_command_line(parser: ConfigParser, example: str = "quickstart") -> tuple[PrepareConfig, argparse.Namespace] | None:
    """What the command line of prepare, preview or doctor asks for.

    Args:
        parser: With the command's own options.
        example: What to write behind the command, for the message.

    Returns:
        The data, and the command's own options; None where `--help` or `--print-config` has been answered.

    Raises:
        UserError: No configuration is named, it cannot be read, or a value is invalid.
    """
    name, arguments, overrides = parser.split()
    if parser.helped(name, "quickstart", arguments, overrides):
        return None
    if name is None:
        raise UserError(f"name a configuration first: {parser.prog} {example}")
    config = load_data(name, overrides)
    if arguments.print_config:
        print_config(config)
        return None
    return config, arguments
