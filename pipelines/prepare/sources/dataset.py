"""What a source of images gives: its classes, and labelled images that are read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from pipelines.common.errors import UserError, in_the_file
from pipelines.common.settings import Settings
from pipelines.common.words import plural
from pipelines.prepare.sources.contents import Content, cannot_read
from pipelines.prepare.sources.names import name_key, refuse_alike
from pipelines.prepare.sources.texts import Texts, joined, taken


class Below(Sequence[Path]):
    """Files below a folder, made into paths one at a time: a path takes four times the memory of its name.

    Args:
        root: The folder.
        names: Paths relative to it.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._root, self._names = root, names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...

    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self._root / name for name in self._names[index]]
        return self._root / self._names[index]

    def take(self, indices: np.ndarray) -> Below:
        """Some of the files."""
        return Below(self._root, taken(self._names, indices))


@dataclass(frozen=True)
class Images:
    """Labelled images that are read one at a time.

    Attributes:
        names: One a sample, unique within a split, the same on every machine: a path below the source's root, or a number.
        labels: int64 (N,).
        files: Paths to read, or None where `pixels` or `content` holds the images.
        pixels: uint8 (N, H, W, 3).
        content: Encoded images in an archive, in a table or behind addresses.
        groups: int64 (N,), the patient, camera or site of each; None where the source does not tell.
        missing: Names that a list has and the disk has not.
        weights: float64 (N,), at least 0, how often each is drawn by data.sampling 'weighted'; None where the source does not
            tell.
    """

    names: Sequence[str]
    labels: np.ndarray
    files: Sequence[Path] | None = None
    pixels: np.ndarray | None = None
    content: Content | None = None
    groups: np.ndarray | None = None
    missing: tuple[str, ...] = ()
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.names, Texts):
            object.__setattr__(self, "names", Texts(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: np.ndarray) -> Images:
        """The images at `indices`, in that order."""
        return Images(
            names=taken(self.names, indices),
            labels=self.labels[indices],
            files=self._files(indices),
            pixels=None if self.pixels is None else self.pixels[indices],
            content=None if self.content is None else self.content.take(indices),
            groups=None if self.groups is None else self.groups[indices],
            missing=self._missing(indices),
            weights=None if self.weights is None else self.weights[indices],
        )

    def _files(self, indices: np.ndarray) -> Sequence[Path] | None:
        if isinstance(self.files, Below):
            return self.files.take(indices)
        return None if self.files is None else [self.files[i] for i in indices]

    def _missing(self, indices: np.ndarray) -> tuple[str, ...]:
        if not self.missing:
            return ()
        kept = {self.names[i] for i in indices}
        return tuple(name for name in self.missing if name in kept)

    def place(self, index: int, split: str) -> str:
        """Where an image is, for messages: its file, or its split and name."""
        if self.files is not None:
            return str(self.files[index])
        return self.content.place(index) if self.content is not None else f"{split} image {self.names[index]}"

    def read(self, index: int) -> bytes | np.ndarray:
        """The encoded file, or the pixels, of one image.

        Raises:
            OSError: The image cannot be read; others may.
            UserError: Reading fails by no fault of the image: of the machine, a disk or the network.
        """
        try:
            if self.files is not None:
                return self.files[index].read_bytes()
            if self.content is not None:
                return self.content.read(index)
        except OSError as error:
            if in_the_file(error):
                raise
            raise cannot_read(self.place(index, "image"), error) from error
        assert self.pixels is not None
        return self.pixels[index]

    def digest(self) -> str:
        """Changes when an image is added, removed, relabelled or replaced (files: by size and time of change)."""
        state = hashlib.sha256(self.labels.tobytes())
        if self.pixels is not None:
            state.update(np.ascontiguousarray(self.pixels).tobytes())
        if self.content is not None:
            _update(state, joined(self.names))
            _update(state, self.content.stamp())
        for name, file in zip(self.names, self.files or (), strict=False):
            try:
                stat = file.stat()
                line = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
            except OSError as error:  # a bad image, which the writer will name or skip
                if not in_the_file(error):
                    raise cannot_read(str(file), error) from error
                line = f"{name}\0unreadable\n"
            state.update(line.encode("utf-8", "surrogateescape"))
        return state.hexdigest()

    def weights_digest(self) -> str:
        """Changes when an image gets another weight; empty without weights."""
        if self.weights is None:
            return ""
        state = hashlib.sha256()
        _update(state, joined(self.names))
        state.update(self.weights.astype("<f8").tobytes())
        return state.hexdigest()


def _update(state: Any, parts: Iterable[bytes]) -> None:
    for part in parts:
        state.update(part)


@dataclass(frozen=True)
class Dataset:
    """A source's splits. `val` and `test` are None where the source has none.

    Raises:
        UserError: Two classes have the same name.
    """

    classes: list[str]
    train: Images
    val: Images | None = None
    test: Images | None = None

    def __post_init__(self) -> None:
        refuse_alike(self.classes, [f"class {number}" for number in range(len(self.classes))])


class AbsentError(UserError):
    """The source is not on this machine, and not within its reach. What was prepared of it can be used."""


class SourceConfig(Settings):
    """Base of a source's configuration. A source is one file with a subclass, and one line in the union `Source`."""

    def open(self) -> Dataset:
        """List the images; none is decoded yet.

        Raises:
            UserError: Something that the source promises is missing.
            AbsentError: All of it is missing.
            NetworkError: The network does not answer.
        """
        raise NotImplementedError

    def present(self) -> bool:
        """Whether the source is on this machine, so that prepared data can be compared with it."""
        return True

    def identity(self) -> dict[str, object]:
        """What decides which images the source has, as JSON; the name of the prepared folder follows from it."""
        return self.model_dump(mode="json")

    def class_names(self) -> dict[str, str]:
        """The class of each folder of images that has another name than its class."""
        return {}


def class_counts(labels: np.ndarray | Sequence[int], classes: int) -> np.ndarray:
    """Images of each class, int64 (classes,)."""
    return np.bincount(np.asarray(labels, dtype=np.int64), minlength=classes)


def class_weights(labels: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    """Sum of the weights of each class's images, float64 (classes,)."""
    return np.bincount(np.asarray(labels, dtype=np.int64), weights, classes)


def refuse_useless_weights(sums: np.ndarray | None, classes: Sequence[str]) -> None:
    """Refuse weights by which data.sampling 'weighted' cannot draw.

    Args:
        sums: Of each class's training images, float64 (C,); None: the images have no weights.
        classes: C names.

    Raises:
        UserError: There are no weights, or a class would never be drawn.
    """
    if sums is None:
        raise UserError(
            "data.sampling is 'weighted', but the training images have no weights; name the table's column by "
            "data.source.weight, or set data.sampling to instance, square_root or class_balanced"
        )
    if not sums.all():
        raise UserError(
            f"data.sampling is 'weighted', but all training images of class {classes[int(sums.argmin())]!r} have weight 0; "
            "give one of them a weight, or leave the class out (data.source.classes)"
        )


def numbered(values: Iterable[str]) -> dict[str, int]:
    """Numbers from 0 for the different values, in the order of their first occurrence."""
    return {value: number for number, value in enumerate(dict.fromkeys(values))}


def classes_of(found: Iterable[str], place: str, listed: Mapping[str, str] | None = None) -> tuple[list[str], dict[str, int]]:
    """Classes in label order, from the values that stand at the images.

    Args:
        found: The values that occur.
        place: Where they stand, for messages.
        listed: Class names by `name_key` of the value, in label order; other values are left out. None: all values, numbers
            by size, else by name.

    Returns:
        The classes, and the label of each value that has one.

    Raises:
        UserError: There are fewer than two classes, two look alike, or a listed one does not occur.
    """
    by_key: dict[str, list[str]] = {}
    for value in sorted({*found}):
        by_key.setdefault(name_key(value), []).append(value)
    alike = next((values for values in by_key.values() if len(values) > 1), None)
    if alike is not None:
        refuse_alike(alike, [place] * len(alike))
    if listed is not None:
        absent = next((key for key in listed if key not in by_key), None)
        if absent is not None:
            raise UserError(f"{place}: no image is of the class {absent!r}, which the file of classes names")
        keys, classes = [*listed], [*listed.values()]
    else:
        numbers = all(key.isdecimal() for key in by_key)
        keys = sorted(by_key, key=int) if numbers else sorted(by_key)
        classes = [by_key[key][0] for key in keys]
    if len(classes) < 2:
        raise UserError(f"{place}: {plural(len(classes), 'class', 'are')} there; at least 2 are needed")
    return classes, {value: label for label, key in enumerate(keys) for value in by_key[key]}
