"""A prepared folder: its .beton files, and the sidecar that says what is in them."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.files import write_atomically
from pipelines.prepare.beton import Beton
from pipelines.prepare.published import Published
from pipelines.prepare.sources import class_counts
from pipelines.prepare.sources.dataset import refuse_useless_weights
from pipelines.prepare.writer import Shard, lines_of, names_file

# 2: evaluation splits are stored without loss; 3: a split may have several files; 4: large images of evaluation are scaled
FORMAT, EARLIER_FORMAT = 4, 3  # the earlier one is still read where its source is gone
SIDECAR = "prepared.json"
WEIGHTS = "train.weights.npy"  # in a prepared folder: of each training image, in the order of the files


@dataclass(frozen=True)
class Split:
    """The .beton files of a split, and what they hold.

    Attributes:
        shards: The files.
        counts: Images of each class.
        source_digest: Of the source, by size and time of change: whether to prepare again.
        skipped: The unreadable images that were left out.
        shard_counts: Of each file, its images of each class; empty where an earlier version prepared the data.
        content: Digest of names, labels and images alone, which a copy of the source has too; empty as above.
        reasons: Why each of `skipped` was unreadable; empty as above.
        weights: Digest of the source's weights; empty where it has none.
        shard_weights: Of each file, the sum of the weights of each class; empty without weights.
        tables: The small files beside them, with names and weights; empty as above.
    """

    shards: list[Shard]
    counts: list[int]
    source_digest: str
    skipped: list[str]
    shard_counts: list[list[int]] = field(default_factory=list)
    content: str = ""
    reasons: list[str] = field(default_factory=list)
    weights: str = ""
    shard_weights: list[list[float]] = field(default_factory=list)
    tables: list[Shard] = field(default_factory=list, compare=False)

    @property
    def digest(self) -> str:
        """Equal for two runs that see the same images, with the same weights where they have any."""
        images = self.content or self.source_digest
        return hashlib.sha256(f"{images} {self.weights}".encode()).hexdigest() if self.weights else images

    def has(self, digest: str | None) -> bool:
        """Whether a run with this digest, an earlier version's too, saw these images."""
        return digest in (self.digest, self.content or self.source_digest, self.source_digest)

    @property
    def samples(self) -> int:
        """Images of all files."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class Prepared:
    """What the sidecar says: all that training and evaluation need without the source.

    Attributes:
        folder: The prepared folder.
        classes: C names, in label order.
        seed: Of the subset and of the order on disk.
        profile: The long-tail profile.
        splits: 'train', and 'val' and 'test' where they exist.
        published: Where the files are fetched from as they are needed; None: they lie in `folder`.
    """

    folder: Path
    classes: list[str]
    seed: int
    profile: dict[str, object]
    splits: dict[str, Split]
    published: Published | None = None

    def beton(self, split: str, only: list[int] | None = None) -> Beton:
        """Open the files of a split and check them against the sidecar. Published ones are fetched where they are not here.

        If another command prepares the folder again later, the open files keep their content.

        Args:
            split: 'train', 'val' or 'test'.
            only: Numbers of the files; None: all.

        Raises:
            UserError: A file is missing or damaged, cannot be fetched, or the folder was prepared again since the sidecar was
                read.
        """
        entry = self.splits[split]
        numbers = list(range(len(entry.shards))) if only is None else only
        firsts = np.cumsum([0, *(shard.samples for shard in entry.shards)])
        rows = np.concatenate([np.arange(firsts[number], firsts[number + 1]) for number in numbers])
        chosen = [entry.shards[number] for number in numbers]
        if self.published is not None:
            paths, files = self.published.open(chosen)
            beton = Beton(*paths, rows=rows, files=files)
        else:
            beton = Beton(*(self.folder / shard.file for shard in chosen), rows=rows)
        sizes = [os.fstat(file).st_size for file in beton.files]
        weights = self._weights(split)
        if self.published is None:
            now = read_sidecar(self.folder)  # gone before the first file is replaced, and back after the last
            if now is None or now.splits != self.splits:
                raise UserError(f"{str(self.folder)!r} was prepared again while this command ran; run it again")
        whole = only is not None or class_counts(beton.labels, len(self.classes)).tolist() == entry.counts
        if not whole or len(beton) != len(rows) or sizes != [shard.bytes for shard in chosen]:
            raise UserError(
                f"{str(beton.paths[0])!r} is not the file that {SIDECAR} describes; remove the folder and prepare again"
            )
        beton.weights = None if weights is None else weights[rows]
        return beton

    def part(self, labels: dict[str, np.ndarray]) -> Prepared:
        """Some of these images as splits of their own, for training on their features. No file may be read of it.

        Args:
            labels: The labels of each split, int64 (N,).
        """
        splits = {
            name: Split([Shard("", len(own), 0)], class_counts(own, len(self.classes)).tolist(), "", [])
            for name, own in labels.items()
        }
        return replace(self, splits=splits)

    def shard_counts(self, split: str) -> np.ndarray:
        """Images of each class in each file of a split.

        Returns:
            int64 (files, C).

        Raises:
            UserError: An earlier version prepared the data, and a file is not on this machine.
        """
        entry = self.splits[split]
        if entry.shard_counts:
            return np.array(entry.shard_counts, dtype=np.int64)
        if missing := [path for path in self.paths(split) if not path.is_file()]:
            raise UserError(
                f"{str(self.folder / SIDECAR)!r}, of an earlier version, does not say which classes {str(missing[0])!r} holds, "
                "and that is not here; prepare again, or set loader.part: all"
            )
        beton = self.beton(split)
        return counts_of_files(beton.labels, entry.shards, len(self.classes))

    def class_weights(self, split: str) -> np.ndarray | None:
        """Sum of the weights of each class's images, float64 (C,); None where the source has no weights."""
        found = self.splits[split].shard_weights
        return np.array(found).sum(0) if found else None

    def require_weights(self, split: str) -> None:
        """Refuse images that data.sampling 'weighted' cannot draw.

        Raises:
            UserError: They have no weights, a class would never be drawn, or the file of the weights is missing.
        """
        refuse_useless_weights(self.class_weights(split), self.classes)
        if self.published is None and not (self.folder / WEIGHTS).is_file():
            raise UserError(f"data.sampling is 'weighted', but {str(self.folder / WEIGHTS)!r} is not on this machine; bring it")

    def _weights(self, split: str) -> np.ndarray | None:
        """The weight of each image, float64 (N,); None without weights, or where the file was not brought to this machine."""
        path, entry = self.folder / WEIGHTS, self.splits[split]
        content = self._table(split, WEIGHTS) if entry.weights else None
        if content is None:
            return None
        try:
            weights = np.load(io.BytesIO(content))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{str(path)!r} is damaged ({error}); remove the folder and prepare again") from error
        if weights.shape != (entry.samples,):
            raise UserError(f"{str(path)!r} is not the file that {SIDECAR} describes; remove the folder and prepare again")
        return np.asarray(weights, dtype=np.float64)

    def paths(self, split: str) -> list[Path]:
        """The files of a split."""
        return [self.folder / shard.file for shard in self.splits[split].shards]

    def names(self, split: str) -> list[str]:
        """The name of each image of a split in its source, in the order of the files; empty where the list is gone.

        Raises:
            UserError: The list is published, and cannot be fetched.
        """
        content = self._table(split, names_file(split))
        return [] if content is None else lines_of(content)

    def _table(self, split: str, name: str) -> bytes | None:
        """A small file of the folder; None where it is gone."""
        if self.published is None:
            path = self.folder / name
            return path.read_bytes() if path.is_file() else None
        entry = next((table for table in self.splits[split].tables if table.file == name), None)
        if entry is None:
            return None
        _, (descriptor,) = self.published.open([entry])
        with os.fdopen(descriptor, "rb") as file:
            return file.read()

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each split's images."""
        return {name: split.digest for name, split in self.splits.items()}

    @property
    def train_counts(self) -> np.ndarray:
        """Training images of each class, int64 (C,)."""
        return np.array(self.splits["train"].counts, dtype=np.int64)


def read_sidecar(folder: Path) -> Prepared | None:
    """Read the sidecar of a prepared folder.

    Returns:
        What it says; None where the folder has none, or one of another format.

    Raises:
        UserError: It is damaged.
    """
    try:
        return parse_sidecar((folder / SIDECAR).read_bytes(), folder, str(folder / SIDECAR))
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_sidecar(text: bytes, folder: Path, place: str) -> Prepared | None:
    """What a sidecar says.

    Args:
        text: Its content.
        folder: Of the prepared data.
        place: Where it was found, for messages.

    Returns:
        The prepared data; None where the sidecar is of another format.

    Raises:
        UserError: It is damaged.
    """
    try:
        content = json.loads(text)
        if content["format"] not in (FORMAT, EARLIER_FORMAT):
            return None
        return Prepared(
            folder,
            content["classes"],
            content["seed"],
            content["profile"],
            {name: _split(split) for name, split in content["splits"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place!r} is damaged ({error!r}); remove the folder and prepare again") from error


def _split(content: dict[str, Any]) -> Split:
    files = {key: [Shard(**file) for file in content.get(key, [])] for key in ("shards", "tables")}
    return Split(**{**content, **files})


def write_sidecar(prepared: Prepared) -> None:
    """Write the sidecar of a prepared folder.

    Args:
        prepared: What it says.
    """
    content = {
        "format": FORMAT,
        "classes": prepared.classes,
        "seed": prepared.seed,
        "profile": prepared.profile,
        "splits": {name: asdict(split) for name, split in prepared.splits.items()},
    }
    write_atomically(prepared.folder / SIDECAR, json.dumps(content, indent=1))


def is_whole(prepared: Prepared) -> bool:
    """Whether all files of a prepared folder are there, of the size that the sidecar has."""
    files = [(prepared.folder / shard.file, shard) for split in prepared.splits.values() for shard in split.shards]
    return all(path.is_file() and path.stat().st_size == shard.bytes for path, shard in files)


def counts_of_files(labels: np.ndarray, shards: list[Shard], classes: int) -> np.ndarray:
    """Count the images of each class in each file.

    Args:
        labels: Of a split, in the order of its files, int64 (N,).
        shards: The files.
        classes: C.

    Returns:
        int64 (files, C).
    """
    ends = np.cumsum([shard.samples for shard in shards])
    return np.stack([class_counts(part, classes) for part in np.split(labels, ends[:-1])])
