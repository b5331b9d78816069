"""One split into .beton files: packed in threads, in several files where one would be too large.

Each finished file has a record beside it until the whole split is written. After a stop (Ctrl-C, a killed process, a full disk,
a network that is away) the same command continues after the last finished file. A bad image that is not skipped leaves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from array import array
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.common.errors import Interrupted, UserError
from pipelines.common.files import write_atomically
from pipelines.common.progress import counted
from pipelines.common.seeding import stream
from pipelines.common.threads import in_threads
from pipelines.common.words import plural
from pipelines.config import DataConfig, Store
from pipelines.library_warnings import Warned, collected_warnings
from pipelines.pixels import BadImageError
from pipelines.prepare.beton import BetonWriter, shard_name
from pipelines.prepare.images import Packed, pack
from pipelines.prepare.sources import Images

NO_CONTENT = "0" * 64
_SMALLEST = 1024  # bytes that an image takes at least, for the number of records set aside in one of several files
_SAMPLED = 256  # images after which the room that the split needs is known well enough


@dataclass(frozen=True)
class Shard:
    """One finished .beton file.

    Attributes:
        file: Its name.
        samples: Images in it.
        bytes: Its size.
        sha256: Of its bytes; empty where an earlier version prepared the data.
    """

    file: str
    samples: int
    bytes: int
    sha256: str = field(default="", compare=False)


@dataclass
class Progress:
    """How far a split is written.

    Attributes:
        digest: Of the source, by size and time of change.
        content: Digest of the images so far (`add_content`).
        done: Images of the split's order that are written or skipped.
        shards: The finished files.
        rows: Of the written images in the source's split, in the order of the files.
        labels: Of the same.
        sources: The first 16 bytes of each image's SHA-256, one after another: of the file, or of the pixels.
        skipped: Places of the unreadable images.
        reasons: Why each was unreadable.
        how: Images by what was done to them.
        stored: Bytes of all images.
    """

    digest: str
    content: str = NO_CONTENT
    done: int = 0
    shards: list[Shard] = field(default_factory=list)
    rows: array[int] = field(default_factory=lambda: array("I"))
    labels: array[int] = field(default_factory=lambda: array("i"))
    sources: bytearray = field(default_factory=bytearray)
    skipped: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    how: dict[str, int] = field(default_factory=dict)
    stored: int = 0


_SOURCE = 16  # bytes of a digest in `Progress.sources`


@dataclass
class _Record:
    """What is kept beside a finished file: what the progress has become since the file before."""

    digest: str
    content: str
    done: int
    shards: list[dict[str, Any]]
    names: list[str]
    labels: list[int]
    sources: list[str]
    skipped: list[str]
    reasons: list[str]
    how: dict[str, int]
    stored: int


class _UnusableImageError(UserError):
    """An image of the source has to be mended, removed or skipped."""


class _Files:
    """The files of a split, one open at a time."""

    def __init__(self, folder: Path, split: str, images: Images, order: np.ndarray, store: Store) -> None:
        self._folder, self._split, self._images, self._capacity = folder, split, images, len(images)
        self._limit = None if store.shard_mb is None else store.shard_mb << 20
        self._writer: BetonWriter | None = None
        self.progress = self._resumed(images.digest(), order)
        kept = {name for shard in self.progress.shards for name in (shard.file, record_of(shard.file))}
        for file in (*folder.glob(f"{split}*.beton"), *folder.glob(f"{split}*.part"), *folder.glob(f"{split}*.done")):
            if file.name not in kept:
                file.unlink()
        self._recorded = len(self.progress.rows), len(self.progress.skipped)

    def append(self, image: Packed, row: int, source: bytes) -> None:
        """Add an image of the source. source: the digest of what it was made of."""
        label, name = int(self._images.labels[row]), self._images.names[row]
        if self._writer is None:
            self._writer = BetonWriter(self._folder / self._name(), self._room())
        self._writer.append(image, label)
        progress = self.progress
        progress.rows.append(row)
        progress.labels.append(label)
        progress.sources += source[:_SOURCE]
        progress.content = add_content(progress.content, name, label, source)
        progress.stored += len(image.data)
        progress.how[image.how] = progress.how.get(image.how, 0) + 1

    def step(self) -> None:
        """Count an image as done, written or skipped."""
        self.progress.done += 1
        writer = self._writer
        if self._limit is not None and writer is not None and (writer.image_bytes >= self._limit or writer.full):
            self._close_shard()

    def finish(self) -> None:
        if self._writer is not None:
            self._close_shard()

    def stopped(self) -> None:
        """Keep the finished files for the next run."""
        if self._writer is not None:
            with contextlib.suppress(OSError):  # a full disk fails again
                self._writer.__exit__(None, None, None)

    def failed(self) -> None:
        """Leave nothing of the split."""
        self.stopped()
        for shard in self.progress.shards:
            (self._folder / shard.file).unlink(missing_ok=True)
            (self._folder / record_of(shard.file)).unlink(missing_ok=True)

    @property
    def kept(self) -> int:
        """Images that are in finished files."""
        return sum(shard.samples for shard in self.progress.shards)

    def _name(self) -> str:
        return shard_name(self._split, None if self._limit is None else len(self.progress.shards))

    def _room(self) -> int:
        """Samples that the next file may hold."""
        left = self._capacity - self.kept
        return left if self._limit is None else min(left, max(1, self._limit // _SMALLEST))

    def _close_shard(self) -> None:
        """Finish the file, and write its record: what the progress has become since the file before."""
        assert self._writer is not None
        path, samples = self._folder / self._name(), self._writer.samples
        self._writer.finish()
        self._writer = None
        progress = self.progress
        shard = file_entry(path, samples)
        rows, skipped = self._recorded
        record = _Record(
            progress.digest,
            progress.content,
            progress.done,
            [asdict(shard)],
            [self._images.names[row] for row in progress.rows[rows:]],
            progress.labels[rows:].tolist(),
            [progress.sources[at : at + _SOURCE].hex() for at in range(rows * _SOURCE, len(progress.sources), _SOURCE)],
            progress.skipped[skipped:],
            progress.reasons[skipped:],
            progress.how,
            progress.stored,
        )
        write_atomically(self._folder / record_of(path.name), json.dumps(asdict(record)))
        progress.shards.append(shard)
        self._recorded = len(progress.rows), len(progress.skipped)

    def _resumed(self, digest: str, order: np.ndarray) -> Progress:
        """What an earlier run finished of the same images."""
        progress = Progress(digest)
        while True:
            name = shard_name(self._split, None if self._limit is None else len(progress.shards))
            try:
                record = _Record(**json.loads((self._folder / record_of(name)).read_text()))
                (shard,) = (Shard(**shard) for shard in record.shards)
                sources = bytes.fromhex("".join(record.sources))
                rows = self._rows(record.names, order[progress.done : record.done])
            except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or a damaged one
                return progress
            whole = shard.file == name and _size(self._folder / name) == shard.bytes
            agree = shard.samples == len(rows) == len(record.labels) == len(sources) // _SOURCE
            if record.digest != digest or not whole or not agree:
                return progress
            if shard.samples + len(record.skipped) != record.done - progress.done:
                return progress
            progress.rows.extend(rows)
            progress.labels.extend(record.labels)
            progress.sources += sources
            progress.skipped += record.skipped
            progress.reasons += record.reasons
            progress.content, progress.done = record.content, record.done
            progress.how, progress.stored = record.how, record.stored
            progress.shards.append(shard)
            if self._limit is None:
                return progress

    def _rows(self, names: list[str], order: np.ndarray) -> list[int]:
        """The rows of the images with these names, among those that were written or skipped, in their order."""
        rest = iter(order.tolist())
        rows = [next((row for row in rest if self._images.names[row] == name), -1) for name in names]
        return [row for row in rows if row >= 0]


def file_entry(path: Path, samples: int) -> Shard:
    """What the sidecar keeps of a file.

    Args:
        path: The finished file.
        samples: Images in it, or lines of a list.
    """
    with path.open("rb") as file:
        return Shard(path.name, samples, os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def names_file(split: str) -> str:
    """The file name of a split's list: the source of each image, a line each."""
    return f"{split}.files.txt"


def record_of(file: str) -> str:
    """The name of the record of a finished file."""
    return f"{file}.done"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def add_content(content: str, name: str, label: int, source: bytes) -> str:
    """Add an image to a digest. The digest is a sum: neither the order on disk nor a stop in between changes it.

    Args:
        content: The digest so far, 64 hexadecimal digits.
        name: The image's name.
        label: Its class.
        source: SHA-256 of its file or pixels.

    Returns:
        The digest with this image.
    """
    image = hashlib.sha256(f"{name}\0{label}\0".encode("utf-8", "surrogateescape") + source).digest()
    return f"{(int(content, 16) + int.from_bytes(image)) % (1 << 256):064x}"


def line_of(name: str) -> str:
    """An image's name as a line of `SPLIT.files.txt`. Ends of lines are escaped, because rows are found by counting lines."""
    return name.replace("\n", "\\n").replace("\r", "\\r")


def read_lines(path: Path) -> list[str]:
    """The lines of a `SPLIT.files.txt`, one a row."""
    return lines_of(path.read_bytes())


def lines_of(content: bytes) -> list[str]:
    """The same of its content. Only a line feed ends a line: names may contain U+2028 and its like."""
    return content.decode(errors="surrogateescape").removesuffix("\n").split("\n")


def forget_records(folder: Path) -> None:
    """Remove the records of finished files, when all splits are written."""
    for record in (*folder.glob("*.done"), *folder.glob("*.journal")):  # the latter are an earlier version's
        record.unlink()


def write_split(
    folder: Path,
    split: str,
    images: Images,
    data: DataConfig,
    seed: int,
    settable: bool = True,
    packer: Packer | None = None,
) -> Progress:
    """Write the images of a split in a seeded order.

    Args:
        folder: Where the .beton files are written.
        split: 'train', 'val' or 'test'.
        images: The images.
        data: How they are stored, and what happens with bad ones.
        seed: Of the order.
        settable: Whether the command takes fields of `data`, so that an error may advise one.
        packer: What reads and encodes the images; by default `pack_all`, in threads of this process.

    Returns:
        What was written.

    Raises:
        UserError: An image is bad and is not to be skipped: nothing is left. Or the network, a node or a disk fails: the
            finished files are kept.
        Interrupted: Ctrl-C; the finished files are kept.
    """
    order = stream(seed, "write", split).permutation(len(images))
    files = _Files(folder, split, images, order, data.store)
    progress = files.progress
    began, first = time.monotonic(), progress.done
    if first:
        print(f"data: {split} continues after {first:,} of {len(order):,} images", file=sys.stderr)
    packed = (packer or pack_all)(images, order[first:], data, seed, split != "train")
    try:
        for index, result in counted(packed, len(order), f"data: {split}", first):
            if isinstance(result, BadImageError):
                place = images.place(index, split)
                if data.on_bad_image == "error":
                    raise _UnusableImageError(f"{place}: unreadable image ({result}); {_advice(result, settable)}")
                progress.skipped.append(place)
                progress.reasons.append(with_setting(result))
            else:
                try:
                    files.append(result[0], index, result[1])
                except UserError as error:
                    raise _UnusableImageError(f"{images.place(index, split)} {error}") from error
            files.step()
            if progress.done == first + _SAMPLED:
                _check_room(folder, split, progress, len(order), settable)
        if not progress.rows:
            raise _UnusableImageError(f"the {split} split has no readable image")
        files.finish()
    except KeyboardInterrupt as error:
        files.stopped()
        status = error.status if isinstance(error, Interrupted) else 130  # a scheduler's signal has its own
        raise Interrupted(_stopped(split, files.kept, len(order), data.store, settable), status) from error
    except _UnusableImageError:
        files.failed()
        raise
    except UserError as error:  # of the network, a node, a disk or a temporary folder
        files.stopped()
        raise UserError(f"{error}; {_stopped(split, files.kept, len(order), data.store, settable)}") from error
    except OSError as error:
        files.stopped()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{_full(folder, split, progress, len(order), settable)}; "
            f"{_stopped(split, files.kept, len(order), data.store, settable)}"
        ) from error
    except BaseException:
        files.stopped()
        raise
    finally:
        packed.close()
    with (folder / names_file(split)).open("w", encoding="utf-8", errors="surrogateescape") as lines:
        lines.writelines(f"{line_of(images.names[row])}\n" for row in progress.rows)
    _report(split, progress, len(order) - first, time.monotonic() - began)
    return progress


def with_setting(error: BadImageError) -> str:
    """What is wrong with an image, and the setting by which it would be read, if there is one."""
    return f"{error}, or set {error.setting}" if error.setting else str(error)


def _advice(error: BadImageError, settable: bool) -> str:
    if not settable:
        return "mend it, or take it out"
    return f"mend or remove it, or set {f'{error.setting}, or ' if error.setting else ''}data.on_bad_image: skip"


def _stopped(split: str, kept: int, total: int, store: Store, settable: bool) -> str:
    if kept:
        return f"stopped: {kept:,} of {total:,} {split} images are in finished files; the same command continues there"
    hint = (
        ""
        if store.shard_mb or not settable
        else " (with data.store.shard_mb, files of that size are kept as they are finished)"
    )
    return f"stopped before a file of the {split} split was finished; the same command starts it again{hint}"


def _need(progress: Progress, total: int) -> int:
    """Bytes that the images still to come will take, by the mean of those so far."""
    return round(progress.stored / max(1, progress.done) * (total - progress.done))


def _check_room(folder: Path, split: str, progress: Progress, total: int, settable: bool) -> None:
    if _need(progress, total) > shutil.disk_usage(folder).free:
        raise UserError(_full(folder, split, progress, total, settable))


def _full(folder: Path, split: str, progress: Progress, total: int, settable: bool) -> str:
    fields = ", set data.prepared to a folder elsewhere, or lower data.store.max_side" if settable else ""
    free = shutil.disk_usage(folder).free
    return (
        f"the disk of {str(folder)!r} has {free / 1e9:,.2f} GB free, and the {split} split needs about "
        f"{_need(progress, total) / 1e9:,.2f} GB more; free some{fields}"
    )


def _report(split: str, progress: Progress, images: int, seconds: float) -> None:
    size, count = sum(shard.bytes for shard in progress.shards), len(progress.rows)
    kinds = ", ".join(f"{number:,} {how}" for how, number in sorted(progress.how.items()))
    files = f" in {len(progress.shards)} files" if len(progress.shards) > 1 else ""
    each = progress.stored / count / 1e3
    print(
        f"data: {split}: {plural(count, 'image')} ({kinds}), {size / 1e6:,.1f} MB{files}, {each:,.1f} kB an image, "
        f"{seconds:,.1f} s ({images / max(seconds, 1e-9):,.0f} images/s)",
        file=sys.stderr,
    )


Result = tuple[Packed, bytes] | BadImageError  # an image, and the digest of what it was made of
Packer = Callable[[Images, np.ndarray, DataConfig, int, bool], Generator[tuple[int, Result], None, None]]  # as `pack_all`


def pack_all(
    images: Images, order: np.ndarray, data: DataConfig, seed: int, lossless: bool
) -> Generator[tuple[int, Result], None, None]:
    """Pack images in threads, a bounded number ahead. Decoding and encoding release Python's lock.

    Args:
        images: The images of a split.
        order: Which of them, int64.
        data: How they are stored.
        seed: Of the draw which images are raw, in mode 'mixed'.
        lossless: For evaluation.

    Yields:
        Each image's index and its result, in that order. Warnings of the decoders are counted and printed at the end.
    """
    raw = stream(seed, "raw").random(len(images)) < data.store.raw_share  # of mode 'mixed'
    with collected_warnings() as warned:

        def work(index: int) -> Result:
            return pack_one(images, index, bool(raw[index]), data, lossless, warned)

        with contextlib.closing(in_threads(work, map(int, order))) as results:
            yield from zip(map(int, order), results, strict=True)
    if warned.text():
        print(f"data: {warned.text()}", file=sys.stderr)


def pack_one(images: Images, index: int, raw: bool, data: DataConfig, lossless: bool, warned: Warned) -> Result:
    """Pack one image.

    Args:
        images: The images.
        index: Which of them.
        raw: Whether mode 'mixed' stores it raw.
        data: How it is stored.
        lossless: For evaluation.
        warned: Gets the decoder's warnings.

    Returns:
        The image and the digest of its source, or why it cannot be read.
    """
    warned.begin(images.place(index, "image"))
    try:
        source = images.read(index)
        packed = pack(source, data.store, lossless, raw, data.max_pixels, data.window)
        return packed, hashlib.sha256(source if isinstance(source, bytes) else source.tobytes()).digest()
    except BadImageError as error:
        return error
    except OSError as error:
        return BadImageError(str(error.strerror or error))
