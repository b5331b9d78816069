"""WebDataset shards: tar files in which members with the same stem are one sample."""

from __future__ import annotations

import glob
import json
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from pipelines.common.errors import UserError
from pipelines.formats import readable_suffixes
from pipelines.prepare.sources.contents import Slices
from pipelines.prepare.sources.dataset import Dataset, Images, SourceConfig, classes_of

_LABEL_ENDINGS = ("cls", "cls.txt", "label")
_JSON_KEYS = ("label", "cls", "class", "class_name", "category", "target")
_LABEL_BYTES = 1 << 20  # of a .json file; a label is small


class WebDatasetSource(SourceConfig):
    """Tar shards with an image (`KEY.jpg`, `.png`, `.webp`) and a label (`KEY.cls`, or a field of `KEY.json`) a sample."""

    kind: Literal["webdataset"]
    train: Path = Field(description="the training shards: a path, a glob, or braces as in train-{000..146}.tar")
    val: Path | None = Field(default=None, description="the validation shards")
    test: Path | None = Field(default=None, description="the test shards")
    label: str | None = Field(
        default=None, description="field of the .json file that names the class; null: .cls, or a field named label or the like"
    )

    def open(self) -> Dataset:
        """List the samples of all shards.

        Raises:
            UserError: A shard is missing or damaged, or a sample lacks its image or its label.
        """
        found = {split: _Samples(self.label) for split in self._patterns()}
        for split, pattern in self._patterns().items():
            for shard in _shards(pattern):
                found[split].add(shard)
        classes, label_of = classes_of(found["train"].labels, str(self.train))
        for split, samples in found.items():
            strange = next((label for label in samples.labels if label not in label_of), None)
            if strange is not None:
                raise UserError(f"{self._patterns()[split]}: the class {strange!r} is not one of the training classes")
        images = {split: samples.images(label_of) for split, samples in found.items()}
        return Dataset(classes, images["train"], images.get("val"), images.get("test"))

    def present(self) -> bool:
        """Whether there is a training shard."""
        return any(Path(path).is_file() for path in _expanded(str(self.train)))

    def _patterns(self) -> dict[str, str]:
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {split: str(pattern) for split, pattern in named.items() if pattern is not None}


@dataclass
class _Samples:
    """The samples of a split's shards, in their order."""

    label_field: str | None
    shards: list[Path] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)  # shard, first byte, bytes

    def add(self, shard: Path) -> None:
        """Read a shard's index and its labels."""
        number = len(self.shards)
        self.shards.append(shard)
        suffixes = readable_suffixes()
        images: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, str] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    folder, _, base = member.name.rpartition("/")
                    stem, _, ending = base.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    ending = ending.lower()
                    if f".{ending}".endswith(suffixes):
                        if key in images:
                            raise UserError(f"{shard}: the sample {key!r} has two images; which one is meant is not known")
                        images[key] = member
                    elif (ending in _LABEL_ENDINGS and self.label_field is None) or (ending == "json" and key not in labels):
                        label = self._label(archive, member, ending, shard)
                        if label is not None:
                            labels[key] = label
        except tarfile.ReadError as error:
            compressed = "; unpack it first: gunzip" if shard.suffix in (".gz", ".tgz") else ""
            raise UserError(f"shard {str(shard)!r} cannot be read: {error}{compressed}") from error
        except OSError as error:
            raise UserError(f"shard {str(shard)!r} cannot be read: {error.strerror or error}") from error
        for key, member in images.items():
            if key not in labels:
                what = f"field {self.label_field!r} in its .json" if self.label_field else ".cls, and no label in a .json"
                raise UserError(f"{shard}: the sample {key!r} has no {what}; set data.source.label to the field that has it")
            self.names.append(f"{shard.name}/{member.name}")
            self.labels.append(labels[key])
            self.places.append((number, member.offset_data, member.size))
        if not images:
            raise UserError(f"shard {str(shard)!r} has no images")

    def images(self, label_of: dict[str, int]) -> Images:
        """The samples with their labels."""
        places = np.array(self.places, dtype=np.int64)
        content = Slices(self.shards, self.names, places[:, 0].astype(np.int32), places[:, 1], places[:, 2])
        labels = np.array([label_of[label] for label in self.labels], dtype=np.int64)
        return Images(self.names, labels, content=content)

    def _label(self, archive: tarfile.TarFile, member: tarfile.TarInfo, ending: str, shard: Path) -> str | None:
        if member.size > _LABEL_BYTES:
            raise UserError(f"{shard}: {member.name!r} has {member.size:,} bytes, too many for a label")
        file = archive.extractfile(member)
        text = file.read().decode("utf-8-sig", "replace").strip() if file is not None else ""
        if ending != "json":
            return text or None
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UserError(f"{shard}: {member.name!r} is not JSON: {error}") from error
        if not isinstance(content, dict):
            content = {"label": content}
        keys = _JSON_KEYS if self.label_field is None else (self.label_field,)
        value = next((content[key] for key in keys if content.get(key) is not None), None)
        return None if value is None else str(value).strip() or None


def _expanded(pattern: str) -> list[str]:
    """The paths that a pattern means: braces `{000..146}` and `{a,b}`, then a glob."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        path = str(Path(pattern).expanduser())
        return sorted(glob.glob(path)) or [path]  # noqa: PTH207 - the pattern may be absolute
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers is not None:
        width, first, last = len(numbers[1]), int(numbers[1]), int(numbers[2])
        if last - first >= 1_000_000:
            raise UserError(f"{pattern!r} means more than a million shards")
        each = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        each = match[1].split(",")
    return [path for text in each for path in _expanded(pattern[: match.start()] + text + pattern[match.end() :])]


def _shards(pattern: str) -> list[Path]:
    paths = [Path(path) for path in _expanded(pattern)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"shard {str(missing[0])!r} does not exist; {len(missing):,} of {len(paths):,} shards are missing")
    return paths
