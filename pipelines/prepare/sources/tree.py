"""Class folders that are known by the names of their files alone, in an archive or in a bucket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np

from pipelines.common.errors import UserError
from pipelines.formats import readable_suffixes
from pipelines.image_files import LeftOut, is_leftover
from pipelines.prepare.sources.contents import Content
from pipelines.prepare.sources.dataset import Dataset, Images, classes_of

SPLITS = ("train", "val", "test")


def image_names(names: Iterable[str], left_out: LeftOut) -> Iterator[str]:
    """The names of images, without hidden files and leftovers, which are counted."""
    suffixes = readable_suffixes()
    for name in names:
        path = PurePosixPath(name)
        leftover = next((part for part in path.parts if is_leftover(part)), None)
        if leftover is not None:
            left_out.folders[leftover] += 1
        elif any(part.startswith(".") and part not in (".", "..") for part in path.parts):
            continue
        elif path.name.lower().endswith(suffixes):
            yield name
        else:
            left_out.endings[path.suffix.lower() or "without ending"] += 1


def class_tree(
    names: Sequence[str], content: Content, what: str, place: str, listed: Mapping[str, str] | None = None
) -> Dataset:
    """The data set of files named `train/CLASS/*`, `val/CLASS/*` and `test/CLASS/*`, or `CLASS/*`, below any folder.

    Args:
        names: Of the images.
        content: The images.
        what: What holds them, for messages.
        place: Where that is.
        listed: As in `classes_of`; images of other classes are left out.

    Raises:
        UserError: An image is in no class folder, there is no training split, or a class has no training image.
    """
    parts, top = _below_wrapper([PurePosixPath(name).parts for name in names])
    splitted = all(each[0] in SPLITS and len(each) > 2 for each in parts)
    depth = 1 if splitted else 0
    flat = next((name for name, each in zip(names, parts, strict=True) if len(each) < depth + 2), None)
    if flat is not None:
        raise UserError(f"{what}: {flat!r} is in no class folder; expected CLASS/* or train/CLASS/*")
    classes_there = [each[depth] for each in parts]
    splits = [each[0] if splitted else "train" for each in parts]
    if "train" not in splits:
        raise UserError(f"{what} has a folder {splits[0]!r} and no 'train'; expected train/CLASS/*")
    of_train = {name for name, split in zip(classes_there, splits, strict=True) if split == "train"}
    classes, label_of = classes_of(of_train, f"{place}/{top}", listed)
    strange = next((name for name in classes_there if name not in label_of), None)
    if strange is not None and listed is None:
        raise UserError(f"{what}: the class {strange!r} is not one of the training classes")
    labels = np.array([label_of.get(name, -1) for name in classes_there], dtype=np.int64)
    images = Images([*names], labels, content=content)
    of_split = {split: np.flatnonzero((np.array(splits) == split) & (labels >= 0)) for split in SPLITS}
    chosen = {split: images.take(rows) for split, rows in of_split.items() if rows.size}
    return Dataset(classes, chosen["train"], chosen.get("val"), chosen.get("test"))


def _below_wrapper(parts: list[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], str]:
    """Paths without the folders that hold everything, as `photos/` in `photos/train/cat/1.jpg`, and those folders."""
    top: list[str] = []
    while len({each[0] for each in parts}) == 1 and parts[0][0] not in SPLITS and all(len(each) > 2 for each in parts):
        top.append(parts[0][0])
        parts = [each[1:] for each in parts]
    return parts, "/".join(top)
