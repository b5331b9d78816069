"""Class folders that are known by the names of their files alone, in an archive or in a bucket."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import PurePosixPath

import numpy as np

from pipelines.common.errors import UserError
from pipelines.formats import readable_suffixes
from pipelines.image_files import LeftOut, is_leftover
from pipelines.prepare.sources.contents import Content
from pipelines.prepare.sources.dataset import Dataset, Images, classes_of
from pipelines.prepare.sources.names import name_key, refuse_alike
from pipelines.prepare.sources.texts import Codes, taken

SPLITS = ("train", "val", "test")
# Names of folders that are splits under another name, and no classes.
_LIKE_SPLITS = {"train", "training", "trn", "val", "valid", "validation", "dev", "test", "testing", "tst", "eval"}


def is_image(name: str, left_out: LeftOut) -> bool:
    """Whether a file is an image by its name. Hidden files and leftovers are none; what is left out is counted."""
    path = PurePosixPath(name)
    leftover = next((part for part in path.parts if is_leftover(part)), None)
    if leftover is not None:
        left_out.folders[leftover] += 1
    elif any(part.startswith(".") and part not in (".", "..") for part in path.parts):
        pass
    elif path.name.lower().endswith(readable_suffixes()):
        return True
    else:
        left_out.endings[path.suffix.lower() or "without ending"] += 1
    return False


def splits_among(inside: Sequence[str], what: str, place: str) -> list[str]:
    """Which of the folders at the top of a data set are splits. What lies beside them is told.

    Args:
        inside: The folders, and other names that are not read where there are splits.
        what: The data set, for messages.
        place: Where it is.

    Returns:
        Some of `SPLITS`; none where the folders are classes.

    Raises:
        UserError: There is no training split, or a folder looks like a split of another name.
    """
    present = [name for name in SPLITS if name in inside]
    if present and "train" not in present:
        raise UserError(f"{what} has a folder {present[0]!r} and no 'train'; expected train/CLASS/*")
    if not present:
        alike = next((name for name in inside if name.lower() in _LIKE_SPLITS), None)
        if alike is not None:
            raise UserError(f"{f'{place}/{alike}'!r} looks like a split; rename it: the splits are train, val and test")
        return []
    beside = [name for name in inside if name not in SPLITS]
    if beside:
        names = ", ".join(map(repr, beside[:5])) + (" and others" if len(beside) > 5 else "")
        print(f"data: not read of {place!r}: {names}; the splits are the folders train, val and test", file=sys.stderr)
    return present


def class_tree(
    names: Sequence[str], content: Content, what: str, place: str, listed: Mapping[str, str] | None = None
) -> Dataset:
    """The data set of files named `train/CLASS/*`, `val/CLASS/*` and `test/CLASS/*`, or `CLASS/*`, below any folder.

    Classes are in alphabetical order, as those of a folder on a disk.

    Args:
        names: Of the images.
        content: The images.
        what: What holds them, for messages.
        place: Where that is.
        listed: As in `classes_of`; images of other classes are left out.

    Raises:
        UserError: An image is in no class folder, there is no training split, a class has no training image, or two folders
            of a split are spelled alike.
    """
    top = _wrapper(names)
    above = len(top)
    root = "/".join([place, *top])
    inside = Codes(PurePosixPath(name).parts[above] for name in names)
    splitted = splits_among(sorted(inside.values), what, root)
    if splitted and len(inside.values) > len(splitted):
        rows = np.flatnonzero(inside.numbered(dict.fromkeys(splitted, 1), 0))
        names, content = taken(names, rows), content.take(rows)

    def parts() -> Iterator[tuple[str, ...]]:
        return (PurePosixPath(name).parts[above:] for name in names)

    depth = 1 if splitted else 0
    flat = next((name for name, each in zip(names, parts(), strict=True) if len(each) < depth + 2), None)
    if flat is not None:
        raise UserError(f"{what}: {flat!r} is in no class folder; expected CLASS/* or train/CLASS/*")
    folders = Codes(each[depth] for each in parts())
    splits = Codes(each[0] if splitted else "train" for each in parts())
    in_split = {split: splits.codes == number for number, split in enumerate(splits.values)}
    of_split = {
        split: sorted(folders.values[code] for code in np.unique(folders.codes[own])) for split, own in in_split.items()
    }
    of_train = of_split["train"]
    ordered = {name_key(folder): folder for folder in of_train} if listed is None else listed
    classes, label_of = classes_of(of_train, root, ordered)
    by_key = {name_key(folder): label for folder, label in label_of.items()}
    label_of = {folder: by_key[key] for folder in folders.values if (key := name_key(folder)) in by_key}
    for split, own in of_split.items():
        read = [folder for folder in own if folder in label_of]
        refuse_alike(read, [repr(f"{root}/{split}/{folder}") for folder in read])  # those of `train` are told already
    strange = next((folder for folder in folders.values if folder not in label_of), None)
    if strange is not None and listed is None:
        raise UserError(f"{what}: the class {strange!r} is not one of the training classes")
    images = Images(names, folders.numbered(label_of), content=content)
    rows_of = {split: np.flatnonzero(there & (images.labels >= 0)) for split, there in in_split.items()}
    chosen = {split: images.take(rows) if len(rows) < len(images) else images for split, rows in rows_of.items() if rows.size}
    return Dataset(classes, chosen["train"], chosen.get("val"), chosen.get("test"))


def _wrapper(names: Iterable[str]) -> list[str]:
    """The folders that hold everything, as `photos` in `photos/train/cat/1.jpg`."""
    paths = (PurePosixPath(name).parts for name in names)
    shared = [*next(paths)]
    shortest = len(shared)
    for path in paths:
        shortest = min(shortest, len(path))
        while tuple(shared) != path[: len(shared)]:
            shared.pop()
    # What is below has a class folder and a file's name.
    return [*takewhile(lambda folder: folder not in SPLITS, shared[: max(shortest - 2, 0)])]
