"""Split lists: ImageNet-LT, Places-LT, iNaturalist, and the user's own."""

from __future__ import annotations

import os
import unicodedata
from array import array
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from pipelines.common.errors import UserError
from pipelines.prepare.sources.addresses import Location, Remote, there
from pipelines.prepare.sources.dataset import Below, Dataset, Images, SourceConfig
from pipelines.prepare.sources.names import hint_for, name_key, read_lines, read_text, refuse_alike
from pipelines.prepare.sources.repeats import repeated
from pipelines.prepare.sources.texts import Texts

_MAX_CLASSES = 1_000_000  # a label beyond is a mistake, and would take gigabytes


class ListsSource(SourceConfig):
    """Split lists, one "path label" a line, paths relative to `root`: ImageNet-LT, Places-LT, iNaturalist."""

    kind: Literal["lists"]
    root: Location = Field(description="folder that the paths in the lists are relative to: a path, or s3://bucket/folder")
    train: Location = Field(description="list of the training images")
    val: Location | None = Field(default=None, description="list of the validation images")
    test: Location | None = Field(default=None, description="list of the test images")
    classes: Location | None = Field(default=None, description="class names, one a line, in label order")
    expect: dict[Literal["train", "val", "test"], int] | None = Field(
        default=None, description="images that each list must name: a list cut short or of another year is noticed"
    )

    def open(self) -> Dataset:
        """Read the lists.

        Raises:
            UserError: A list cannot be read, its labels have gaps, or an image is listed twice.
        """
        if isinstance(self.root, Path) and not self.root.is_dir():
            raise UserError(
                f"the lists' root folder {str(self.root)!r} does not exist{hint_for(self.root) or '; set data.source.root'}"
            )
        named = {"train": self.train, "val": self.val, "test": self.test}
        expected = {str(split): count for split, count in (self.expect or {}).items()}
        splits = {split: _split(self.root, path, expected.get(split)) for split, path in named.items() if path is not None}
        train = splits["train"]
        count = int(train.labels.max()) + 1
        if count < 2:
            raise UserError(f"{self.train} has labels of one class only; at least 2 are needed")
        absent = np.flatnonzero(np.bincount(train.labels, minlength=count) == 0)
        if absent.size:
            raise UserError(f"{self.train}: no image has label {absent[0]}, though labels go up to {count - 1}")
        for split, images in splits.items():
            if images.labels.max() >= count:
                raise UserError(f"{named[split]}: label {images.labels.max()} does not occur in {self.train}")
        _refuse_repeats(splits, named)
        return Dataset(self._names(train, count), train, splits.get("val"), splits.get("test"))

    def present(self) -> bool:
        """Whether the training list and the images' folder exist."""
        lists = there(self.train) if isinstance(self.train, str) else self.train.is_file()
        return lists and (there(self.root) if isinstance(self.root, str) else self.root.is_dir())

    def identity(self) -> dict[str, object]:
        """The fields, without `expect`: it checks the lists and changes nothing."""
        return self.model_dump(mode="json", exclude={"expect"})

    def _names(self, train: Images, count: int) -> list[str]:
        """The names in the `classes` file; else the images' folders, where each label has one of its own; else numbers."""
        if self.classes is not None:
            lines = enumerate(read_text(self.classes, "class names").split("\n"), start=1)
            named = [(number, line.strip()) for number, line in lines if line.strip()]
            refuse_alike([name for _, name in named], [f"{self.classes}:{number}" for number, _ in named])
            if len(named) != count:
                raise UserError(f"{self.classes} names {len(named)} classes, the lists have {count}")
            return [name for _, name in named]
        folders: dict[int, dict[str, str]] = {}
        for name, label in zip(train.names, train.labels, strict=True):
            folder = Path(name).parent.name
            folders.setdefault(int(label), {}).setdefault(name_key(folder), folder)
        single = [next(iter(folders[label].values())) for label in range(count) if len(folders[label]) == 1]
        distinct = len({name_key(name) for name in single}) == count
        return single if distinct and all(single) else [str(label) for label in range(count)]


def read_list(path: Location) -> tuple[Texts, np.ndarray]:
    """Read a split list: one "path label" a line, blank lines skipped.

    Args:
        path: The list.

    Returns:
        N paths, and their labels, int64 (N,).

    Raises:
        UserError: The file cannot be read, a line is wrong, or no image is listed.
    """
    names = Texts()
    labels = array("q")
    for number, line in enumerate(read_lines(path, "split list"), start=1):
        line = line.rstrip("\r\n")
        if not line.strip():
            continue
        name, *label = line.strip().rsplit(maxsplit=1)
        if len(label) != 1 or not label[0].isdecimal():
            raise UserError(f"{path}:{number}: {_wrong_line(line, number)}")
        if len(label[0]) > 7 or int(label[0]) >= _MAX_CLASSES:
            raise UserError(
                f"{path}:{number}: the label {label[0][:30]} is too large; labels are numbers from 0 on, without gaps"
            )
        names.append(name)
        labels.append(int(label[0]))
    if not names:
        raise UserError(f"split list {str(path)!r} names no image")
    return names, np.frombuffer(labels, dtype=np.int64)


def _wrong_line(line: str, number: int) -> str:
    shown = repr(line if len(line) < 200 else line[:200] + "...")
    if number == 1 and not any(letter.isdigit() for letter in line):
        return f"{shown} looks like a header; remove it: a list has one 'path label' a line"
    if "," in line and line.rpartition(",")[2].strip().isdecimal():
        return f"{shown} has a comma; write 'path label', with a space between"
    return f"{shown} is not 'path label', the label a number from 0 on"


def _refuse_repeats(splits: dict[str, Images], lists: dict[str, Location | None]) -> None:
    """Raises UserError for the first image that is listed twice: it would be trained on and then scored."""
    paths = Texts()
    for images in splits.values():
        paths.extend(map(os.path.normpath, images.names if images.files is None else map(str, images.files)))
    ends = dict(zip(splits, accumulate(map(len, splits.values())), strict=True))

    def split_of(row: int) -> str:
        return next(split for split, end in ends.items() if row < end)

    for first, row in repeated(paths.digests()):
        before, split = split_of(first), split_of(row)
        one, other = str(lists[before]), str(lists[split])
        place = f"listed twice in {one!r}" if before == split else f"in both lists {one!r} and {other!r}"
        name = splits[split].names[row - ends[split]]  # from the end
        raise UserError(f"image {name!r} is {place}; leave it in one of these lines")


def _split(root: Location, path: Location, expected: int | None) -> Images:
    names, labels = read_list(path)
    if expected is not None and len(names) != expected:
        raise UserError(
            f"split list {str(path)!r} names {len(names):,} images, {expected:,} are expected; fetch the list again, "
            "or, for a list of your own, set --data.source.expect null"
        )
    if isinstance(root, str):
        return Images(names, labels, content=Remote(names, below=f"{root}/"))
    files = names if all(map(str.isascii, names)) else Texts(_on_disk(root, name) for name in names)
    missing = tuple(name for name, file in zip(names, files, strict=True) if not (root / file).is_file())
    if len(missing) == len(names):
        raise UserError(f"split list {str(path)!r}: no image of it, such as {names[0]!r}, is below {str(root)!r}")
    return Images(names, labels, files=Below(root, files), missing=missing)


def _on_disk(root: Path, name: str) -> str:
    """The name of a listed file on the disk, which may write accents in another way."""
    if name.isascii() or (root / name).is_file():
        return name
    others = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return next((other for other in others if (root / other).is_file()), name)
