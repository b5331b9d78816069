"""FFCV's file format (.beton, version 2) with an RGB image and an integer label a sample, written and read by numpy alone.

FFCV's own writer hangs when a worker meets a bad image or a full disk, and needs FFCV; this one raises, and needs neither.
The file can be read by FFCV's Loader, and by `Beton` where FFCV cannot be built.

    header | field descriptions | one record a sample | pages of image data | allocation table
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from pipelines.common.errors import UserError
from pipelines.prepare.images import LARGEST, LARGEST_SQUARE, Packed

VERSION = 2
PAGE = LARGEST  # No image crosses a page border, so that FFCV's process cache works too.
JPEG, RAW = 0, 1
_INT, _IMAGE = 1, 2
_FIELDS = ((b"image", _IMAGE), (b"label", _INT))

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("allocations", "<u8")], align=True
)
FIELD = np.dtype([("type", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", 1024))], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("f0", IMAGE), ("f1", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_RECORDS_AT = HEADER.itemsize + len(_FIELDS) * FIELD.itemsize


class BetonWriter:
    """Writes a .beton file sample by sample. It appears under its name when `finish` has flushed all of it to disk.

    Args:
        path: The file.
        capacity: The largest number of samples. Space for their records is reserved before the images are known.
    """

    def __init__(self, path: Path, capacity: int) -> None:
        self._path = path
        self._part = part_of(path)
        self._records = np.zeros(capacity, dtype=SAMPLE)
        self._allocations = np.zeros(capacity, dtype=ALLOCATION)
        self.samples = 0
        self.next = -(-(_RECORDS_AT + self._records.nbytes) // PAGE) * PAGE
        self._first = self.next
        self._file: BinaryIO = self._part.open("wb")

    @property
    def image_bytes(self) -> int:
        """Bytes of all images so far."""
        return self.next - self._first

    @property
    def full(self) -> bool:
        """Whether the file has as many samples as it can hold."""
        return self.samples == len(self._records)

    def append(self, image: Packed, label: int) -> None:
        """Add one sample.

        Args:
            image: The image.
            label: Its class.

        Raises:
            UserError: The image is larger than a page, or has a side of 65536 pixels or more.
        """
        size = len(image.data)
        if max(image.width, image.height) >= 1 << 16:
            raise UserError(f"has {image.width}x{image.height} pixels, 65535 a side at most; set data.store.max_side")
        if size > PAGE:
            raise UserError(f"takes {size:,} bytes, {PAGE:,} at most; {_smaller(image)}")
        if self.next % PAGE + size > PAGE:
            self.next += PAGE - self.next % PAGE
        self._file.seek(self.next)
        self._file.write(image.data)
        mode = JPEG if image.jpeg else RAW
        self._records[self.samples] = ((mode, image.width, image.height, self.next), label)
        self._allocations[self.samples] = (self.samples, self.next, size)
        self.next += size
        self.samples += 1

    def finish(self) -> None:
        """Complete the file and give it its name."""
        header = np.zeros(1, dtype=HEADER)
        header[0] = (VERSION, len(_FIELDS), PAGE, self.samples, self.next)
        fields = np.zeros(len(_FIELDS), dtype=FIELD)
        for field, (name, type_id) in zip(fields, _FIELDS, strict=True):
            field["type"] = type_id
            field["name"][: len(name)] = np.frombuffer(name, dtype=np.uint8)
        self._file.seek(0)
        self._file.write(header.tobytes() + fields.tobytes() + self._records[: self.samples].tobytes())
        self._file.seek(self.next)
        self._file.write(self._allocations[: self.samples].tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self._path)

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._file.close()  # on a full disk, writes the rest again and fails again
        finally:
            self._part.unlink(missing_ok=True)


def _smaller(image: Packed) -> str:
    """How an image that is larger than a page would fit."""
    if image.jpeg:
        return "lower data.store.max_side or data.store.quality"
    short, long = sorted((image.width, image.height))
    # The shorter side is rounded, here and where the image is scaled.
    larger = range(long, LARGEST_SQUARE, -1)
    side = next((side for side in larger if 3 * side * (side * (short + 0.5) / long + 0.5) <= PAGE), LARGEST_SQUARE)
    return f"set data.store.max_side to {side} or less (with {LARGEST_SQUARE} every image fits)"


def part_of(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(path.name + ".part")


class Beton:
    """One or several .beton files as one sequence of N images.

    All files are opened once and stay open: another command may prepare the folder again and replace them.

    Args:
        paths: The files, in order.
        rows: Each image's row in the split, int64 (N,), where the files are a part of it; None: 0 to N - 1.
        files: Descriptors of the files, where they are open already. They are closed with this object.

    Attributes:
        paths: The files, in order.
        files: Their descriptors, open while this object lives.
        records: One `SAMPLE` for each image, (N,).
        sizes: Stored bytes of each image, int64 (N,).
        shard: Which of the files holds each image, int32 (N,).
        is_raw: Whether each image is stored as pixels, not as a JPEG file, bool (N,).
        rows: Each image's row in the split, int64 (N,).
        weights: How often data.sampling 'weighted' draws each image, float64 (N,), where the folder's source says it.

    Raises:
        UserError: A file is missing, cut short, or not one that `BetonWriter` wrote.
    """

    def __init__(self, *paths: Path, rows: np.ndarray | None = None, files: Sequence[int] = ()) -> None:
        self.paths = paths
        self.files: list[int] = [*files]
        weakref.finalize(self, _close, self.files).atexit = False  # a thread may still read then
        for path in paths[len(self.files) :]:
            self.files.append(_open(path))
        parts = [_read(path, file) for path, file in zip(paths, self.files, strict=True)]
        self.records = np.concatenate([records for records, _ in parts])
        self.sizes = np.concatenate([sizes for _, sizes in parts])
        self.shard = np.repeat(np.arange(len(paths), dtype=np.int32), [len(records) for records, _ in parts])
        self.is_raw = self.records["f0"]["mode"] == RAW
        self.rows = np.arange(len(self.records)) if rows is None else rows
        self.weights: np.ndarray | None = None
        self._maps: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> np.ndarray:
        """The class of each image, int64 (N,)."""
        return self.records["f1"]

    @property
    def heights(self) -> np.ndarray:
        """The height of each image, pixels, uint16 (N,)."""
        return self.records["f0"]["height"]

    @property
    def widths(self) -> np.ndarray:
        """The width of each image, pixels, uint16 (N,)."""
        return self.records["f0"]["width"]

    @property
    def starts(self) -> np.ndarray:
        """The place of each image in its file, bytes, uint64 (N,)."""
        return self.records["f0"]["data_ptr"]

    @property
    def pages(self) -> np.ndarray:
        """The page of `PAGE` bytes that holds each image, numbered over all files, int64 (N,)."""
        within = self.starts.astype(np.int64) // PAGE
        return self.shard * (int(within.max()) + 1) + within

    def where(self, index: int) -> str:
        """The place of one image, for an error message: a line of `train.files.txt` names its source."""
        path, row = self.paths[self.shard[index]], int(self.rows[index])
        return f"image {row} of {str(path)!r} (line {row + 1} of {split_of(path)}.files.txt)"

    def damaged(self, index: int, error: Exception) -> UserError:
        """The error that says that one image cannot be read, and why."""
        return UserError(f"{self.where(index)} is damaged ({error}); remove the folder and prepare again")

    @property
    def stored(self) -> list[np.ndarray]:
        """The whole files, mapped into memory: uint8 (bytes,) each."""
        if self._maps is None:
            self._maps = [_mapped(path, file) for path, file in zip(self.paths, self.files, strict=True)]
        return self._maps

    @property
    def addresses(self) -> np.ndarray:
        """The memory address of each image's stored bytes, valid while this object lives, int64 (N,)."""
        bases = np.array([stored.ctypes.data for stored in self.stored], dtype=np.int64)
        return self.starts.astype(np.int64) + bases[self.shard]

    def image(self, index: int) -> np.ndarray:
        """The stored bytes of one image: uint8 (height, width, 3) if raw, else the JPEG file, uint8 (bytes,)."""
        record = self.records["f0"][index]
        start = int(record["data_ptr"])
        data = self.stored[self.shard[index]][start : start + int(self.sizes[index])]
        return data.reshape(record["height"], record["width"], 3) if record["mode"] == RAW else data


def shard_name(split: str, number: int | None) -> str:
    """The file name of a split's .beton file. With `number` None it is the only one, else one of several."""
    return f"{split}.beton" if number is None else f"{split}-{number:05d}.beton"


def split_of(path: Path) -> str:
    """The split that a file belongs to."""
    return path.stem.partition("-")[0]


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _unreadable(path, error) from error


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _mapped(path: Path, file: int) -> np.ndarray:
    try:
        return np.frombuffer(mmap.mmap(file, 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    hint = "; raise the limit (ulimit -n), or data.store.shard_mb" if error.errno == errno.EMFILE else ""
    return UserError(f"prepared data {str(path)!r} cannot be read: {error.strerror}{hint}")


def _read(path: Path, file: int) -> tuple[np.ndarray, np.ndarray]:
    """(records, sizes) of one file."""

    def read(dtype: np.dtype, count: int, offset: int) -> np.ndarray:
        stream.seek(offset)
        return np.fromfile(stream, dtype=dtype, count=count)

    with os.fdopen(file, "rb", closefd=False) as stream:
        header, fields = read(HEADER, 1, 0), read(FIELD, len(_FIELDS), HEADER.itemsize)
        named = [(bytes(field["name"]).rstrip(b"\0"), int(field["type"])) for field in fields]
        if len(header) != 1 or header["version"][0] != VERSION or header["fields"][0] != len(_FIELDS) or named != [*_FIELDS]:
            raise UserError(f"{str(path)!r} is not a .beton file of images and labels; remove it and prepare again")
        size, samples, table = os.fstat(file).st_size, int(header["samples"][0]), int(header["allocations"][0])
        if size != table + samples * ALLOCATION.itemsize:
            raise UserError(f"{str(path)!r} is cut short ({size:,} bytes); remove it and prepare again")
        records = read(SAMPLE, samples, _RECORDS_AT)
        if samples == 0 or records["f1"].min() < 0:
            raise UserError(f"{str(path)!r} holds no labelled images; remove it and prepare again")
        return records, read(ALLOCATION, samples, table)["size"].astype(np.int64)
