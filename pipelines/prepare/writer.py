"""One split into .beton files: packed in threads, in several files where one would be too large, and resumable.

While it writes, a journal beside the files says every few seconds how far it has come. After a stop (Ctrl-C, a killed process)
the same command goes on there, and after a full disk too; after a user's mistake nothing half-written is left.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from tqdm import tqdm

from pipelines.common.errors import UserError
from pipelines.common.seeding import stream
from pipelines.config import DataConfig, Store
from pipelines.pixels import BadImageError
from pipelines.prepare.beton import BetonWriter, Written, part_of, shard_name
from pipelines.prepare.images import Packed, pack
from pipelines.prepare.sources import Images

_JOURNAL_SECONDS = 10.0
NO_CONTENT = "0" * 64
_SMALLEST = 1024  # bytes that an image takes at least, for the number of records set aside in one of several files


@dataclass(frozen=True)
class Shard:
    """One finished .beton file: its samples, and its size in bytes."""

    file: str
    samples: int
    bytes: int


@dataclass
class Progress:
    """How far a split is written.

    done: images of the split's order that are written or skipped. how: images by kind. stored: bytes of all images.
    digest: of the source, by size and time of change. content: of the images so far (`add_content`); an earlier version's
    journal has none, and is not gone on with.
    sealed: done, names, skipped, stored, how and content as they were when the last of `shards` was finished.
    """

    digest: str
    content: str
    done: int = 0
    shards: list[Shard] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    how: dict[str, int] = field(default_factory=dict)
    stored: int = 0
    sealed: tuple[int, int, int, int, dict[str, int], str] = (0, 0, 0, 0, {}, NO_CONTENT)

    def seal(self, shard: Shard) -> None:
        self.shards.append(shard)
        self.sealed = (self.done, len(self.names), len(self.skipped), self.stored, dict(self.how), self.content)

    def back_to_shards(self) -> None:
        """Forget what came after the last finished file."""
        self.done, names, skipped, self.stored, self.how, self.content = self.sealed
        self.names, self.labels, self.skipped = self.names[:names], self.labels[:names], self.skipped[:skipped]

    def consistent(self, open_samples: int) -> bool:
        """Whether all parts tell of the same moment, `open_samples` being in the file that is not finished."""
        written = sum(shard.samples for shard in self.shards) + open_samples
        return written == len(self.names) == len(self.labels) == self.done - len(self.skipped)


class _Files:
    """The files of a split, one open at a time. Between two images (`step`) all parts tell of the same moment."""

    def __init__(self, folder: Path, split: str, capacity: int, store: Store, digest: str) -> None:
        self._folder, self._split, self._capacity = folder, split, capacity
        self._limit = None if store.shard_mb is None else store.shard_mb << 20
        self._journal = folder / f"{split}.journal"
        self._writer: BetonWriter | None = None
        self._saved = time.monotonic()
        resumed = self._resume(digest)
        if resumed is None:  # whatever lies there is of other images
            for file in (*folder.glob(f"{split}*.beton"), *folder.glob(f"{split}*.part")):
                file.unlink()
        self.progress = resumed or Progress(digest, NO_CONTENT)

    def append(self, image: Packed, label: int, name: str, source: bytes) -> None:
        """source: the digest of what the image was made of."""
        if self._writer is None:
            self._writer = BetonWriter(self._path(), self._room())
        self._writer.append(image, label)
        progress = self.progress
        progress.names.append(name)
        progress.labels.append(label)
        progress.content = add_content(progress.content, name, label, source)
        progress.stored += len(image.data)
        progress.how[image.how] = progress.how.get(image.how, 0) + 1

    def step(self) -> None:
        """One image is done, written or skipped."""
        self.progress.done += 1
        writer = self._writer
        if self._limit is not None and writer is not None and (writer.image_bytes >= self._limit or writer.full):
            self._close_shard()
            self.save()
        elif time.monotonic() - self._saved > _JOURNAL_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the journal: everything before this moment is on disk."""
        written = self._writer.pause() if self._writer is not None else Written(np.zeros(0), np.zeros(0), 0)
        content = np.frombuffer(json.dumps(asdict(self.progress)).encode(), np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, progress=content, records=written.records, allocations=written.allocations, next=written.next)
        part = part_of(self._journal)
        part.write_bytes(buffer.getvalue())
        part.replace(self._journal)
        self._saved = time.monotonic()

    def finish(self) -> None:
        if self._writer is not None:
            self._close_shard()
        self.save()  # whole: not written again if another split fails

    def stopped(self) -> None:
        """Keep all for the next run; between two moments, what the last journal knows of."""
        if self.progress.consistent(0 if self._writer is None else self._writer.samples):
            self.save()
        self.leave()

    def leave(self) -> None:
        """Close the file in hand, and keep it."""
        if self._writer is not None:
            self._writer.leave()

    def failed(self) -> None:
        """Leave nothing of the split."""
        self._journal.unlink(missing_ok=True)
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
        for shard in self.progress.shards:
            (self._folder / shard.file).unlink(missing_ok=True)

    def _path(self) -> Path:
        return self._folder / shard_name(self._split, None if self._limit is None else len(self.progress.shards))

    def _room(self) -> int:
        """Records set aside in the file after the finished ones."""
        left = self._capacity - sum(shard.samples for shard in self.progress.shards)
        return left if self._limit is None else min(left, max(1, self._limit // _SMALLEST))

    def _close_shard(self) -> None:
        assert self._writer is not None
        path, samples = self._path(), self._writer.samples
        self._writer.finish()
        self._writer = None
        self.progress.seal(Shard(path.name, samples, path.stat().st_size))

    def _resume(self, digest: str) -> Progress | None:
        """What an earlier run has left, if it is of these images and whole."""
        try:
            with np.load(io.BytesIO(self._journal.read_bytes()), allow_pickle=False) as content:
                kept = json.loads(content["progress"].tobytes())
                written = Written(content["records"], content["allocations"], int(content["next"]))
            kept["shards"] = [Shard(**shard) for shard in kept["shards"]]
            progress = Progress(**kept)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):  # none, or one cut short
            return None
        whole = all(_size(self._folder / shard.file) == shard.bytes for shard in progress.shards)
        if progress.digest != digest or not whole or not progress.consistent(len(written.records)):
            return None
        self.progress = progress
        if len(written.records) and _size(part_of(self._path())) >= written.next:
            self._writer = BetonWriter(self._path(), self._room(), written)
        elif len(written.records):  # the file was finished, or lost, after the journal
            progress.back_to_shards()
        return progress


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def add_content(content: str, name: str, label: int, source: bytes) -> str:
    """The digest of some images with one more: a sum, so that neither the order on disk nor a stop in between changes it."""
    image = hashlib.sha256(f"{name}\0{label}\0".encode("utf-8", "surrogateescape") + source).digest()
    return f"{(int(content, 16) + int.from_bytes(image)) % (1 << 256):064x}"


def line_of(name: str) -> str:
    """An image's name as its line of `SPLIT.files.txt`: rows are found by counting lines, so none may begin another."""
    return name.replace("\n", "\\n").replace("\r", "\\r")


def read_lines(path: Path) -> list[str]:
    """The lines of a `SPLIT.files.txt`, one a row. A name may hold what str.splitlines takes for an end too (U+2028, say)."""
    return path.read_text(errors="surrogateescape").removesuffix("\n").split("\n")


def forget_journals(folder: Path) -> None:
    """The data are whole: there is nothing to go on with."""
    for journal in folder.glob("*.journal"):
        journal.unlink()


def write_split(folder: Path, split: str, images: Images, data: DataConfig, seed: int) -> Progress:
    """The images of a split in a seeded order into `folder`. Raises UserError for a bad image that is not to be skipped."""
    order = stream(seed, "write", split).permutation(len(images))
    files = _Files(folder, split, len(images), data.store, images.digest())
    progress = files.progress
    began, first = time.monotonic(), progress.done
    if first:
        print(f"data: {split} goes on after {first:,} of {len(order):,} images", file=sys.stderr)
    stop = _Interrupt()
    try:
        packed = _pack_all(images, order[first:], data, seed, lossless=split != "train")
        bar = tqdm(packed, total=len(order), initial=first, desc=f"{split}.beton", unit="img", leave=False, disable=None)
        for index, result in bar:
            if isinstance(result, BadImageError):
                place = _place(images, index, split)
                if data.on_bad_image == "error":
                    raise UserError(f"{place}: unreadable image ({result}); mend or remove it, or set data.on_bad_image: skip")
                progress.skipped.append(place)
            else:
                try:
                    files.append(result[0], int(images.labels[index]), images.names[index], result[1])
                except UserError as error:
                    raise UserError(f"{_place(images, index, split)} {error}") from error
            files.step()
            stop.check()
        if not progress.names:
            raise UserError(f"the {split} split has no readable image")
        files.finish()
        stop.check()
    except KeyboardInterrupt:
        files.stopped()
        raise
    except OSError:  # a full disk: what the journal knows of stays, and the next run goes on with it
        with contextlib.suppress(OSError):
            files.leave()
        raise
    except BaseException:
        files.failed()
        raise
    finally:
        stop.end()
    lines = "".join(f"{line_of(name)}\n" for name in progress.names)
    (folder / f"{split}.files.txt").write_text(lines, errors="surrogateescape")
    _report(split, progress, len(order) - first, time.monotonic() - began)
    return progress


class _Interrupt:
    """Ctrl-C waits until the image in hand is done, so that what is kept tells of one moment."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():  # others cannot be interrupted
            self._before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:  # the second time at once
            raise KeyboardInterrupt
        self._asked = True

    def check(self) -> None:
        if self._asked:
            raise KeyboardInterrupt

    def end(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def _report(split: str, progress: Progress, images: int, seconds: float) -> None:
    size, count = sum(shard.bytes for shard in progress.shards), len(progress.names)
    kinds = ", ".join(f"{number:,} {how}" for how, number in sorted(progress.how.items()))
    files = f" in {len(progress.shards)} files" if len(progress.shards) > 1 else ""
    each = progress.stored / count / 1e3
    print(
        f"data: {split}: {count:,} images ({kinds}), {size / 1e6:,.1f} MB{files}, {each:,.1f} kB an image, "
        f"{seconds:,.1f} s ({images / max(seconds, 1e-9):,.0f} images/s)",
        file=sys.stderr,
    )


def _place(images: Images, index: int, split: str) -> str:
    return str(images.files[index]) if images.files else f"{split} image {images.names[index]}"


_Result = tuple[Packed, bytes] | BadImageError  # an image, and the digest of what it was made of


def _pack_all(images: Images, order: np.ndarray, data: DataConfig, seed: int, lossless: bool) -> Iterator[tuple[int, _Result]]:
    """Pack in threads (decoding and encoding leave Python's lock), a bounded number ahead, and yield in order."""
    draws = stream(seed, "raw").random(len(images))  # of mode 'mixed'

    def work(index: int) -> _Result:
        try:
            source = images.read(index)
            packed = pack(source, data.store, lossless, bool(draws[index] < data.store.raw_share), data.max_pixels, data.window)
            return packed, hashlib.sha256(source if isinstance(source, bytes) else source.tobytes()).digest()
        except BadImageError as error:
            return error
        except OSError as error:
            return BadImageError(str(error.strerror))

    workers = len(os.sched_getaffinity(0))
    todo = iter(order.tolist())
    with ThreadPoolExecutor(workers) as pool:
        pending: list[tuple[int, Future[_Result]]] = [(i, pool.submit(work, i)) for i in islice(todo, 16 * workers)]
        try:
            while pending:
                index, future = pending.pop(0)
                result = future.result()
                pending += [(i, pool.submit(work, i)) for i in islice(todo, 1)]
                yield index, result
        finally:
            for _, future in pending:
                future.cancel()
