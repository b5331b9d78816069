"""WebDataset shards: tar files in which members with the same stem are one sample."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import os
import posixpath
import re
import tarfile
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import IO, Literal

import numpy as np
from pydantic import Field

from pipelines.common.errors import UserError
from pipelines.common.files import write_atomically
from pipelines.common.threads import in_threads
from pipelines.formats import readable_suffixes
from pipelines.prepare.sources.addresses import Location, RemoteFile, RemoteSlices, Stream, described, matching, there
from pipelines.prepare.sources.contents import Slices, is_file_or_link, link_target
from pipelines.prepare.sources.dataset import Dataset, Images, SourceConfig, classes_of
from pipelines.prepare.sources.texts import Codes, Texts

_LABEL_ENDINGS = ("cls", "cls.txt", "label")
_JSON_KEYS = ("label", "cls", "class", "class_name", "category", "target")
_LABEL_BYTES = 1 << 20  # of a .json file; a label is small
_ASKED, _READ = (
    16,
    4,
)  # shards behind addresses that are asked about at once, and read; tarfile keeps a shard's headers in memory
_INDEX_FORMAT = 2  # of the kept index of a shard; 2: links are followed


class WebDatasetSource(SourceConfig):
    """Tar shards with an image (`KEY.jpg`, `.png`, `.webp`) and a label (`KEY.cls`, or a field of `KEY.json`) a sample."""

    kind: Literal["webdataset"]
    train: Location = Field(
        description="the training shards: a path or an address, a glob, or braces as in train-{000..146}.tar"
    )
    val: Location | None = Field(default=None, description="the validation shards, likewise")
    test: Location | None = Field(default=None, description="the test shards, likewise")
    label: str | None = Field(
        default=None, description="field of the .json file that names the class; null: .cls, or a field named label or the like"
    )

    def open(self) -> Dataset:
        """List the samples of all shards.

        Raises:
            UserError: A shard is missing or damaged, or a sample lacks its image or its label.
            NetworkError: The network does not answer.
        """
        found = {split: _Samples() for split in self._patterns()}
        for split, pattern in self._patterns().items():
            shards = _shards(pattern)
            remote = any(isinstance(shard, RemoteFile) for shard in shards)
            if not all(isinstance(shard, RemoteFile) is remote for shard in shards):
                raise UserError(f"{pattern}: addresses and paths are mixed; give either addresses or paths")
            # What waits for the network is read at once, what waits for a disk in turn.
            with contextlib.closing(in_threads(self._index, shards, _READ if remote else 1)) as each:
                for shard, name, index in zip(shards, _distinct(shards), each, strict=True):
                    found[split].add(shard, name, index)
        classes, label_of = classes_of(found["train"].labels.values, str(self.train))
        for split, samples in found.items():
            strange = next((label for label in samples.labels.values if label not in label_of), None)
            if strange is not None:
                raise UserError(f"{self._patterns()[split]}: the class {strange!r} is not one of the training classes")
        images = {split: samples.images(label_of) for split, samples in found.items()}
        return Dataset(classes, images["train"], images.get("val"), images.get("test"))

    def present(self) -> bool:
        """Whether there is a training shard."""
        try:
            places = _expanded(str(self.train))
        except UserError:  # the network is away
            return False
        return there(places[0]) if isinstance(self.train, str) else any(Path(path).is_file() for path in places)

    def _index(self, shard: Path | RemoteFile) -> _Index:
        return _index_of(shard, self.label)

    def _patterns(self) -> dict[str, str]:
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {split: str(pattern) for split, pattern in named.items() if pattern is not None}


@dataclass(frozen=True)
class _Index:
    """The samples of one shard, in their order: names, labels as text, first bytes, sizes."""

    names: list[str]
    labels: list[str]
    starts: list[int]
    sizes: list[int]


@dataclass
class _Samples:
    """The samples of a split's shards, in their order."""

    shards: list[Path | RemoteFile] = field(default_factory=list)
    names: Texts = field(default_factory=Texts)
    labels: Codes = field(default_factory=Codes)
    file: array[int] = field(default_factory=lambda: array("i"))  # which of the shards
    start: array[int] = field(default_factory=lambda: array("q"))
    size: array[int] = field(default_factory=lambda: array("q"))

    def add(self, shard: Path | RemoteFile, name: str, index: _Index) -> None:
        """Add the samples of a shard, which the split's others do not share `name` with."""
        self.file.extend(repeat(len(self.shards), len(index.names)))
        self.shards.append(shard)
        # A shard whose file's name is its own has the names of its index already.
        self.names.extend(index.names if "/" not in name else [f"{name}/{each.partition('/')[2]}" for each in index.names])
        self.labels.extend(index.labels)
        self.start.extend(index.starts)
        self.size.extend(index.sizes)

    def images(self, label_of: dict[str, int]) -> Images:
        """The samples with their labels."""
        file, start = np.frombuffer(self.file, np.int32), np.frombuffer(self.start, np.int64)
        size = np.frombuffer(self.size, np.int64)
        remote = [shard for shard in self.shards if isinstance(shard, RemoteFile)]
        local = [shard for shard in self.shards if isinstance(shard, Path)]
        content = (
            RemoteSlices(remote, self.names, file, start, size) if remote else Slices(local, self.names, file, start, size)
        )
        return Images(self.names, self.labels.numbered(label_of), content=content)


def _distinct(shards: list[Path | RemoteFile]) -> list[str]:
    """A name of each shard: of its file, with as many of the folders above as tell it from the others of that name."""
    parts = [(shard.address if isinstance(shard, RemoteFile) else str(shard)).split("/") for shard in shards]
    length = [1] * len(parts)
    while len({*(names := ["/".join(of[-count:]) for of, count in zip(parts, length, strict=True)])}) < len(names):
        counts = Counter(names)
        longer = [count + (counts[name] > 1 and count < len(of)) for of, count, name in zip(parts, length, names, strict=True)]
        if longer == length:  # a shard that is named twice
            break
        length = longer
    return names


def _index_of(shard: Path | RemoteFile, label_field: str | None) -> _Index:
    """The index of a shard. That of one behind an address is kept, because it takes reading the shard from first to last."""
    if isinstance(shard, Path):
        return _read_index(shard, None, shard.name, str(shard), label_field)
    kept = _kept_index(shard, label_field)
    if kept is not None:
        with contextlib.suppress(OSError, ValueError, TypeError):  # none, or a damaged one
            return _Index(**json.loads(kept.read_text()))
    name = shard.address.rpartition("/")[2]
    with io.BufferedReader(Stream(shard), 1 << 16) as stream:
        index = _read_index(None, stream, name, shard.address, label_field)
    ends = np.array(index.starts) + np.array(index.sizes)
    if ends.max() > shard.size:
        raise UserError(f"shard {shard.address!r} is cut short ({shard.size:,} bytes); copy it again")
    if kept is not None:
        with contextlib.suppress(OSError):  # a home that cannot be written: the shard is read again next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, json.dumps(asdict(index)))
    return index


def _kept_index(shard: RemoteFile, label_field: str | None) -> Path | None:
    """The file that keeps a shard's index; None where the storage does not tell when the shard changes."""
    if not shard.stamp:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME") or "/") / ".cache")
    key = json.dumps([_INDEX_FORMAT, shard.address, shard.size, shard.stamp, label_field])
    return cache / "cibl_ray" / "shards" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read_index(path: Path | None, stream: IO[bytes] | None, name: str, place: str, label_field: str | None) -> _Index:
    """Read a shard from first to last: where its images are, and their labels.

    Args:
        path: The file, or None.
        stream: The open file, or None.
        name: Of the shard, for the names of its images.
        place: Where it is, for messages.
        label_field: Of the .json files; None: .cls, or a usual one.
    """
    suffixes = readable_suffixes()
    images: dict[str, tuple[str, tarfile.TarInfo]] = {}  # the name, and the member that has the bytes
    labels: dict[str, str] = {}

    def add(archive: tarfile.TarFile, member: tarfile.TarInfo, target: tarfile.TarInfo | None) -> None:
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        ending = ending.lower()
        is_image = f".{ending}".endswith(suffixes)
        is_label = (ending in _LABEL_ENDINGS and label_field is None) or (ending == "json" and key not in labels)
        if (is_image or is_label) and target is None:
            raise UserError(f"{place}: {member.name!r} is a link to {member.linkname!r}, which is not in the shard")
        if is_image and target is not None:
            if key in images:
                raise UserError(f"{place}: the sample {key!r} has two images; which one is meant is not known")
            images[key] = member.name, target
        elif is_label and target is not None:
            label = _label(archive, target, ending, place, label_field)
            if label is not None:
                labels[key] = label

    try:
        with tarfile.open(path, "r:", stream) as archive:
            links: list[tarfile.TarInfo] = []
            for member in archive:
                if member.isfile():
                    add(archive, member, member)
                elif is_file_or_link(member):
                    links.append(member)
            if links:  # what a link leads to may come after it
                files = {posixpath.normpath(member.name): member for member in archive if is_file_or_link(member)}
                for member in links:
                    add(archive, member, link_target(member, files))
    except tarfile.ReadError as error:
        compressed = "; unpack it first: gunzip" if name.endswith((".gz", ".tgz")) else ""
        raise UserError(f"shard {place!r} cannot be read: {error}{compressed}") from error
    except OSError as error:
        raise UserError(f"shard {place!r} cannot be read: {error.strerror or error}") from error
    for key in images:
        if key not in labels:
            what = f"field {label_field!r} in its .json" if label_field else ".cls, and no label in a .json"
            raise UserError(f"{place}: the sample {key!r} has no {what}; set data.source.label to the field that has it")
    if not images:
        raise UserError(f"shard {place!r} has no images")
    return _Index(
        [f"{name}/{own}" for own, _ in images.values()],
        [labels[key] for key in images],
        [member.offset_data for _, member in images.values()],
        [member.size for _, member in images.values()],
    )


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, ending: str, place: str, label_field: str | None) -> str | None:
    if member.size > _LABEL_BYTES:
        raise UserError(f"{place}: {member.name!r} has {member.size:,} bytes, too many for a label")
    file = archive.extractfile(member)
    text = file.read().decode("utf-8-sig", "replace").strip() if file is not None else ""
    if ending != "json":
        return text or None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: {member.name!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        content = {"label": content}
    keys = _JSON_KEYS if label_field is None else (label_field,)
    value = next((content[key] for key in keys if content.get(key) is not None), None)
    return None if value is None else str(value).strip() or None


def _expanded(pattern: str) -> list[str]:
    """The paths or addresses that a pattern means: braces `{000..146}` and `{a,b}`, then a glob."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        if "://" in pattern:
            return (matching(pattern) or [pattern]) if glob.has_magic(pattern) else [pattern]
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


def _shards(pattern: str) -> list[Path | RemoteFile]:
    places = _expanded(pattern)
    with contextlib.closing(in_threads(_shard, places, _ASKED)) as each:
        found = [*each]
    missing = [place for place, shard in zip(places, found, strict=True) if shard is None]
    if missing:
        raise UserError(f"shard {missing[0]!r} does not exist; {len(missing):,} of {len(places):,} shards are missing")
    return [shard for shard in found if shard is not None]


def _shard(place: str) -> Path | RemoteFile | None:
    """One shard; None where it does not exist."""
    if "://" not in place:
        return Path(place) if Path(place).is_file() else None
    try:
        return described(place)
    except FileNotFoundError:
        return None
