"""Where images and labels come from: an image folder, split lists, CIFAR through torchvision, scikit-learn's digits."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, assert_never

import numpy as np

from pipelines.common.errors import UserError
from pipelines.config import Cifar10Source, Cifar100Source, DigitsSource, FolderSource, ListsSource, Source

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Images:
    """Labelled images that are read one at a time.

    names: one a sample, unique within a split, the same on every machine (a path below the source's root, or a number).
    labels: int64 (N,).
    files: paths to read, or None where `pixels` holds the images, uint8 (N, H, W, 3).
    """

    names: list[str]
    labels: np.ndarray
    files: list[Path] | None = None
    pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: np.ndarray) -> Images:
        """The images at `indices`, in that order."""
        return Images(
            names=[self.names[i] for i in indices],
            labels=self.labels[indices],
            files=None if self.files is None else [self.files[i] for i in indices],
            pixels=None if self.pixels is None else self.pixels[indices],
        )

    def read(self, index: int) -> bytes | np.ndarray:
        """The encoded file, or the pixels, of one image."""
        if self.files is not None:
            return self.files[index].read_bytes()
        assert self.pixels is not None
        return self.pixels[index]

    def digest(self) -> str:
        """Changes when an image is added, removed, relabelled or replaced (files: by size and time of change)."""
        state = hashlib.sha256(self.labels.tobytes())
        if self.pixels is not None:
            state.update(np.ascontiguousarray(self.pixels).tobytes())
        for name, file in zip(self.names, self.files or (), strict=False):
            try:
                stat = file.stat()
                line = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
            except OSError:  # a bad image, which the writer will name or skip
                line = f"{name}\0unreadable\n"
            state.update(line.encode("utf-8", "surrogateescape"))
        return state.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A source's splits. `val` and `test` are None where the source has none."""

    classes: list[str]
    train: Images
    val: Images | None
    test: Images | None


def open_source(source: Source) -> Dataset:
    """List a source's images; none is decoded yet. Raises UserError where something that the source promises is missing."""
    match source:
        case FolderSource():
            return _folder(source.path)
        case ListsSource():
            return _lists(source)
        case Cifar10Source() | Cifar100Source():
            return _cifar(source)
        case DigitsSource():
            return _digits()
    assert_never(source)


def source_present(source: Source) -> bool:
    """Whether the source's files are on this machine, so that prepared data can be compared with them."""
    match source:
        case FolderSource():
            return source.path.is_dir()
        case ListsSource():
            return source.train.is_file() and source.root.is_dir()
        case Cifar10Source():
            return (source.path / "cifar-10-batches-py").is_dir()
        case Cifar100Source():
            return (source.path / "cifar-100-python").is_dir()
        case DigitsSource():
            return True
    assert_never(source)


def _folder(root: Path) -> Dataset:
    if not root.is_dir():
        raise UserError(f"image folder {str(root)!r} does not exist; set data.source.path to a folder with train/CLASS/*")
    if not (root / "train").is_dir():
        raise UserError(f"image folder {str(root)!r} has no folder 'train'; expected train/CLASS/*.jpg and the like")
    classes = sorted(entry.name for entry in (root / "train").iterdir() if _class_folder(entry))
    if len(classes) < 2:
        raise UserError(f"{str(root / 'train')!r} has {len(classes)} class folders; at least 2 are needed")
    for name in classes:
        if not _is_text(name):
            raise UserError(f"class folder {str(root / 'train' / name)!r} has a name that is not UTF-8; rename it")
    present = [name for name in SPLITS if (root / name).is_dir()]
    _tell_unread(root, present)
    others: Counter[str] = Counter()
    splits = {name: _folder_split(root, name, classes, others, every_class=name == "train") for name in present}
    _tell_left_out(root, others)
    return Dataset(classes, splits["train"], splits.get("val"), splits.get("test"))


def open_folder(folder: Path, classes: list[str]) -> Images:
    """The images of `folder/CLASS/*`, labelled by the given class names. Raises UserError for a class not among them."""
    if not folder.is_dir():
        raise UserError(f"image folder {str(folder)!r} does not exist")
    for split in ("test", "val", "train"):
        if split not in classes and (folder / split).is_dir():
            raise UserError(f"{str(folder)!r} has splits; name one of them, as {str(folder / split)!r}")
    others: Counter[str] = Counter()
    images = _folder_split(folder.parent, folder.name, classes, others, every_class=False)
    _tell_left_out(folder, others)
    return images


def _tell_unread(root: Path, present: list[str]) -> None:
    """Say what looks like images and is none of a class of a split: a folder `valid`, files beside the class folders."""
    beside = sorted(entry.name for entry in root.iterdir() if _class_folder(entry) and entry.name not in SPLITS)
    if beside:
        names = ", ".join(map(repr, beside[:5])) + (" and others" if len(beside) > 5 else "")
        print(f"data: not read of {str(root)!r}: {names}; the splits are the folders train, val and test", file=sys.stderr)
    for split in present:
        entries = (entry for entry in (root / split).iterdir() if not entry.name.startswith("."))
        loose = sum(entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file() for entry in entries)
        if loose:
            print(f"data: {loose:,} images of {str(root / split)!r} are in no class folder, and not read", file=sys.stderr)


def _tell_left_out(folder: Path, others: Counter[str]) -> None:
    if others:
        kinds = ", ".join(f"{count:,} {ending}" for ending, count in sorted(others.items()))
        print(f"data: left out of {str(folder)!r}, as not among the endings of images: {kinds}", file=sys.stderr)


def _image_files(folder: Path, others: Counter[str]) -> list[str]:
    """The image files anywhere below a folder, relative to it, in the order of their parts; none where it is no folder.

    Hidden files and folders are none. Links are followed; a folder that is reached twice is read once. others: counts the
    files left out by their ending.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename!r} cannot be read: {error.strerror}; make it readable or take it out") from error

    found: list[str] = []
    if not folder.is_dir():
        return found
    seen = {_identity(parent) for parent in folder.resolve().parents}  # a link upwards would bring in other classes
    # Strings: a hundred thousand objects of pathlib take seconds.
    for place, inner, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (identity := _identity(Path(place))) in seen:
            inner.clear()
            continue
        seen.add(identity)
        # Links last, else by name: which of two names a folder is read under is the same on every machine.
        folders = [name for name in inner if not name.startswith(".")]
        inner[:] = sorted(folders, key=lambda name: (Path(place, name).is_symlink(), name))
        inside = os.path.relpath(place, folder)
        names = [name for name in names if not name.startswith(".")]
        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        if len(images) < len(names):
            others.update(Path(name).suffix.lower() or "without ending" for name in {*names} - {*images})
        found += images if inside == "." else [f"{inside}/{name}" for name in images]
    return sorted(found, key=lambda path: path.split("/"))


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def _is_text(name: str) -> bool:
    """Whether a file's name can be written and drawn: bytes of other encodings stand in it as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _class_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _folder_split(root: Path, split: str, classes: list[str], others: Counter[str], every_class: bool) -> Images:
    strangers = sorted({entry.name for entry in (root / split).iterdir() if _class_folder(entry)} - set(classes))
    if strangers:
        raise UserError(f"{str(root / split / strangers[0])!r}: the class {strangers[0]!r} is not one of the training classes")
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _image_files(root / split / name, others)
        if not found and every_class:
            folder = root / split / name
            raise UserError(f"class folder {str(folder)!r} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}); remove it")
        place = (Path(split) / name).as_posix()  # split is empty where root is "."
        names += [f"{place}/{path}" for path in found]
        labels += [label] * len(found)
    if not names:
        raise UserError(f"{str(root / split)!r} has no images; remove the folder or fill it")
    return Images(names, np.array(labels, dtype=np.int64), files=[root / name for name in names])


def read_list(path: Path) -> tuple[list[str], np.ndarray]:
    """A split list's paths and labels: one "path label" a line, blank lines skipped."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"split list {str(path)!r} cannot be read: {error}") from error
    names: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, *label = line.strip().rsplit(maxsplit=1)
        if len(label) != 1 or not label[0].isdecimal():
            raise UserError(f"{path}:{number}: {line!r} is not 'path label', the label a number from 0 on")
        names.append(name)
        labels.append(int(label[0]))
    if not names:
        raise UserError(f"split list {str(path)!r} names no image")
    return names, np.array(labels, dtype=np.int64)


def _lists(source: ListsSource) -> Dataset:
    if not source.root.is_dir():
        raise UserError(f"the lists' root folder {str(source.root)!r} does not exist; set data.source.root")
    named = {"train": source.train, "val": source.val, "test": source.test}
    expected = {str(split): count for split, count in (source.expect or {}).items()}
    splits = {split: _list_split(source.root, path, expected.get(split)) for split, path in named.items() if path is not None}
    train = splits["train"]
    count = int(train.labels.max()) + 1
    if count < 2:
        raise UserError(f"{source.train} has labels of one class only; at least 2 are needed")
    absent = np.flatnonzero(np.bincount(train.labels, minlength=count) == 0)
    if absent.size:
        raise UserError(f"{source.train}: no image has label {absent[0]}, though labels go up to {count - 1}")
    for split, images in splits.items():
        if images.labels.max() >= count:
            raise UserError(f"{named[split]}: label {images.labels.max()} does not occur in {source.train}")
    _refuse_repeats(splits, named)
    return Dataset(_class_names(source, train, count), train, splits.get("val"), splits.get("test"))


def _refuse_repeats(splits: dict[str, Images], lists: dict[str, Path | None]) -> None:
    """Raises UserError for the first image that is listed twice: it would be trained on and then scored."""
    seen: dict[str, str] = {}
    for split, images in splits.items():
        for name, file in zip(images.names, images.files or (), strict=True):
            before = seen.get(str(file))
            if before is not None:
                one, other = str(lists[before]), str(lists[split])
                place = f"listed twice in {one!r}" if before == split else f"in both lists {one!r} and {other!r}"
                raise UserError(f"image {name!r} is {place}; leave it in one of these lines")
            seen[str(file)] = split


def _list_split(root: Path, path: Path, expected: int | None) -> Images:
    names, labels = read_list(path)
    if expected is not None and len(names) != expected:
        raise UserError(
            f"split list {str(path)!r} names {len(names):,} images, {expected:,} are expected; fetch the list anew, "
            "or, for a list of your own, set --data.source.expect null"
        )
    files = [root / name for name in names]
    for number, file in enumerate(files):
        if not file.is_file():
            raise UserError(f"split list {str(path)!r} names {names[number]!r}, which is not below {str(root)!r}")
    return Images(names, labels, files=files)


def _class_names(source: ListsSource, train: Images, count: int) -> list[str]:
    """The names in the `classes` file; else the images' folders, where each label has one of its own; else the numbers."""
    if source.classes is not None:
        try:
            names = source.classes.read_text().split("\n")
        except OSError as error:
            raise UserError(f"class names {str(source.classes)!r} cannot be read: {error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"class names {str(source.classes)!r} cannot be read: {error}; save them as UTF-8") from error
        names = [name.strip() for name in names if name.strip()]
        if len(names) != count:
            raise UserError(f"{source.classes} names {len(names)} classes, the lists have {count}")
        return names
    folders: dict[int, set[str]] = {}
    for name, label in zip(train.names, train.labels, strict=True):
        folders.setdefault(int(label), set()).add(Path(name).parent.name)
    single = [next(iter(folders[label])) for label in range(count) if len(folders[label]) == 1]
    return single if len(set(single)) == count and all(single) else [str(label) for label in range(count)]


def _cifar(source: Cifar10Source | Cifar100Source) -> Dataset:
    from torchvision import datasets

    name = "CIFAR10" if isinstance(source, Cifar10Source) else "CIFAR100"
    parts: dict[bool, Any] = {}
    for train in (True, False):
        try:
            parts[train] = getattr(datasets, name)(str(source.path), train=train, download=source.download)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{name} is not in {str(source.path)!r} and could not be downloaded ({error}); "
                "download it there, or use an image folder: --data.source.kind folder --data.source.path FOLDER"
            ) from error
    return Dataset(list(parts[True].classes), _from_arrays(parts[True]), None, _from_arrays(parts[False]))


def _from_arrays(part: Any) -> Images:
    return Images([str(i) for i in range(len(part.data))], np.array(part.targets, np.int64), pixels=np.asarray(part.data))


def _digits() -> Dataset:
    table = _digits_table()
    images, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    pixels = np.repeat((images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=-1)
    # Every fourth image of each class is for testing: fixed, so that no seed moves images between the splits.
    rank = np.zeros(len(labels), dtype=np.int64)
    for label in range(10):
        rank[labels == label] = np.arange((labels == label).sum())
    everything = Images([str(i) for i in range(len(labels))], labels, pixels=pixels)
    train, test = np.flatnonzero(rank % 4 != 3), np.flatnonzero(rank % 4 == 3)
    return Dataset([str(i) for i in range(10)], everything.take(train), None, everything.take(test))


def _digits_table() -> np.ndarray:
    """Pixels from 0 to 16 and label of each digit, (1797, 65). From scikit-learn's file, which its function reads too: to
    import scikit-learn takes two seconds, in every process of a run."""
    package = find_spec("sklearn")
    if package is not None and package.origin is not None:
        file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.exists():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack((digits.data, digits.target))


def class_counts(labels: np.ndarray | Sequence[int], classes: int) -> np.ndarray:
    """Images of each class, int64 (classes,)."""
    return np.bincount(np.asarray(labels, dtype=np.int64), minlength=classes)
