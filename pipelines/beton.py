"""FFCV's file format (.beton, version 2) with an RGB image and an integer label a sample, written and read by numpy alone.

FFCV's own writer hangs when a worker meets a bad image or a full disk, and needs FFCV; this one raises, and needs neither.
The file can be read by FFCV's Loader, and by `Beton` where FFCV cannot be built.

    header | field descriptions | one record a sample | pages of image data | allocation table
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from pipelines.errors import UserError
from pipelines.images import LARGEST, Packed

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
    """Writes `path` sample by sample; the file appears under its name only when `finish` has flushed all of it to disk.

    capacity: the number of samples at most; the records' place is set aside before the images are known.
    """

    def __init__(self, path: Path, capacity: int) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._file: BinaryIO = self._part.open("wb")
        self._records = np.zeros(capacity, dtype=SAMPLE)
        self._allocations = np.zeros(capacity, dtype=ALLOCATION)
        self.samples = 0
        self._next = -(-(_RECORDS_AT + self._records.nbytes) // PAGE) * PAGE

    def append(self, image: Packed, label: int) -> None:
        """Add one sample. Raises UserError for an image larger than a page."""
        size = len(image.data)
        if size > PAGE:
            raise UserError(f"takes {size:,} bytes, {PAGE:,} at most; set data.store.max_side")
        if self._next % PAGE + size > PAGE:
            self._next += PAGE - self._next % PAGE
        self._file.seek(self._next)
        self._file.write(image.data)
        mode = JPEG if image.jpeg else RAW
        self._records[self.samples] = ((mode, image.width, image.height, self._next), label)
        self._allocations[self.samples] = (self.samples, self._next, size)
        self._next += size
        self.samples += 1

    def finish(self) -> None:
        """Complete the file and give it its name."""
        header = np.zeros(1, dtype=HEADER)
        header[0] = (VERSION, len(_FIELDS), PAGE, self.samples, self._next)
        fields = np.zeros(len(_FIELDS), dtype=FIELD)
        for field, (name, type_id) in zip(fields, _FIELDS, strict=True):
            field["type"] = type_id
            field["name"][: len(name)] = np.frombuffer(name, dtype=np.uint8)
        self._file.seek(0)
        self._file.write(header.tobytes() + fields.tobytes() + self._records[: self.samples].tobytes())
        self._file.seek(self._next)
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


class Beton:
    """A .beton file: `records` (a `SAMPLE` a row), `labels` and `sizes` (int64, bytes), and each image's stored bytes.

    Raises UserError where the file is missing, cut short, or not one that `BetonWriter` wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            header = np.fromfile(path, dtype=HEADER, count=1)
        except OSError as error:
            raise UserError(f"prepared data {str(path)!r} cannot be read: {error}") from error
        fields = np.fromfile(path, dtype=FIELD, count=len(_FIELDS), offset=HEADER.itemsize)
        named = [(bytes(field["name"]).rstrip(b"\0"), int(field["type"])) for field in fields]
        if len(header) != 1 or header["version"][0] != VERSION or header["fields"][0] != len(_FIELDS) or named != [*_FIELDS]:
            raise UserError(f"{str(path)!r} is not a .beton file of images and labels; remove it and prepare again")
        samples, table = int(header["samples"][0]), int(header["allocations"][0])
        if size != table + samples * ALLOCATION.itemsize:
            raise UserError(f"{str(path)!r} is cut short ({size:,} bytes); remove it and prepare again")
        self.records = np.fromfile(path, dtype=SAMPLE, count=samples, offset=_RECORDS_AT)
        if samples == 0 or self.labels.min() < 0:
            raise UserError(f"{str(path)!r} holds no labelled images; remove it and prepare again")
        self.sizes = np.fromfile(path, dtype=ALLOCATION, count=samples, offset=table)["size"].astype(np.int64)
        self._bytes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,)."""
        return self.records["f1"]

    def where(self, index: int) -> str:
        """The place of one image, for an error message: `train.files.txt` names its source in the same line."""
        return f"image {index} of {str(self.path)!r} (line {index + 1} of {self.path.stem}.files.txt)"

    @property
    def stored(self) -> np.ndarray:
        """The whole file, mapped into memory: uint8 (bytes,)."""
        if self._bytes is None:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        return self._bytes

    @property
    def addresses(self) -> np.ndarray:
        """Where in memory each image's stored bytes begin, while this object lives: int64 (N,)."""
        return self.records["f0"]["data_ptr"].astype(np.int64) + self.stored.ctypes.data

    def image(self, index: int) -> np.ndarray:
        """The stored bytes of one image: uint8 (height, width, 3) if raw, else the JPEG file, uint8 (bytes,)."""
        record = self.records["f0"][index]
        start = int(record["data_ptr"])
        data = self.stored[start : start + int(self.sizes[index])]
        return data.reshape(record["height"], record["width"], 3) if record["mode"] == RAW else data
