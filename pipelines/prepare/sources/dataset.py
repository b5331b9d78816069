"""What a source of images gives: its classes, and labelled images that are read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.common.settings import Settings
from pipelines.prepare.sources.names import refuse_alike


@dataclass(frozen=True)
class Images:
    """Labelled images that are read one at a time.

    Attributes:
        names: One a sample, unique within a split, the same on every machine: a path below the source's root, or a number.
        labels: int64 (N,).
        files: Paths to read, or None where `pixels` holds the images.
        pixels: uint8 (N, H, W, 3).
        missing: Names that a list has and the disk has not.
    """

    names: list[str]
    labels: np.ndarray
    files: list[Path] | None = None
    pixels: np.ndarray | None = None
    missing: tuple[str, ...] = ()

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


class SourceConfig(Settings):
    """Base of a source's configuration. A source is one file with a subclass, and one line in the union `Source`."""

    def open(self) -> Dataset:
        """List the images; none is decoded yet.

        Raises:
            UserError: Something that the source promises is missing.
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
