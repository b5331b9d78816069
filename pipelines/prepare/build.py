"""Write the .beton files of a data configuration, and a sidecar that says what is in them.

The folder's name follows from the data configuration and the seed. Its sidecar, `prepared.json`, is written last: a folder
without one is not whole. Training calls `ensure_prepared` by itself; it writes only what is missing or no longer matches.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.files import locked, need_writable, write_atomically
from pipelines.common.words import plural
from pipelines.config import DataConfig
from pipelines.prepare.doubles import find_copies, refuse_shared_files
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
from pipelines.prepare.sources import Images, open_folder
from pipelines.prepare.sources.addresses import NetworkError
from pipelines.prepare.sources.dataset import AbsentError, class_weights
from pipelines.prepare.splits import Chosen, choose, excluded_names, subset_seed
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
