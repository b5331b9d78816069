"""Columns of many rows in flat buffers: a Python string takes some 50 bytes more than its characters, a list 8 more."""

from __future__ import annotations

import mmap
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice, pairwise
from typing import IO, Any, overload

import numpy as np

from pipelines.common.errors import UserError

_AT_ONCE = 1 << 16  # rows
_IN_MEMORY = 1 << 24  # bytes of text


class Texts(Sequence[str]):
    """Text of many rows as UTF-8 in one buffer; bytes that are not UTF-8 are kept (surrogateescape).

    What is beyond 16 MiB lies in a temporary file, mapped into memory: the system keeps of it what memory it has to spare.

    Args:
        texts: One a row.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._mapped: mmap.mmap | bytes = b""  # the first rows
        self._buffer = bytearray()  # the others
        self._ends = array("q", [0])
        self._file: IO[bytes] | None = None
        self._taken: tuple[bytes, weakref.ref[Texts]] | None = None  # what was taken last, by a digest of the rows
        self.extend(texts)

    def append(self, text: str) -> None:
        """Add a row."""
        self._buffer += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._mapped) + len(self._buffer))
        if len(self._buffer) > _IN_MEMORY:
            self._spill()

    def extend(self, texts: Iterable[str]) -> None:
        """Add rows.

        Raises:
            UserError: The temporary file has no room.
        """
        rows = iter(texts)
        while some := [*islice(rows, _AT_ONCE)]:
            self._add(some)

    def _add(self, texts: list[str]) -> None:
        some = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum([len(text) for text in some], dtype=np.int64) + self._ends[-1]
        self._buffer += b"".join(some)
        self._ends.frombytes(ends.tobytes())
        if len(self._buffer) > _IN_MEMORY:
            self._spill()

    def _spill(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open as long as it is mapped
            left = memoryview(self._buffer)
            while left:
                left = left[self._file.write(left) :]
            self._mapped = mmap.mmap(self._file.fileno(), self._ends[-1], access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(
                f"the names of the images cannot be written to a temporary file: {error.strerror}; set TMPDIR to a folder "
                "with some room"
            ) from error
        self._buffer = bytearray()

    def _bytes(self, begin: int, end: int) -> bytes | bytearray:
        """A part of the text that lies on one side."""
        there = len(self._mapped)
        return self._mapped[begin:end] if begin < there else self._buffer[begin - there : end - there]

    def digests(self) -> np.ndarray:
        """16 bytes of a digest of each row, uint64 (N, 2): equal rows have equal ones."""
        found = bytearray()
        for begin, end in pairwise(self._ends):
            found += blake2b(self._bytes(begin, end), digest_size=16).digest()
        return np.frombuffer(found, dtype=np.uint64).reshape(-1, 2)

    def take(self, rows: np.ndarray) -> Texts:
        """Some of the rows. The same rows give the same object as before: names and addresses are often one.

        Args:
            rows: int64 (M,).
        """
        key = blake2b(rows.tobytes()).digest()
        last = self._taken
        if last is not None and last[0] == key and (before := last[1]()) is not None:
            return before
        taken = Texts(self._each(rows))
        self._taken = key, weakref.ref(taken)
        return taken

    def _each(self, rows: np.ndarray) -> Iterator[str]:
        for begin in range(0, len(rows), _AT_ONCE):
            yield from map(self.__getitem__, rows[begin : begin + _AT_ONCE].tolist())

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (bytes(self._mapped[:]) + self._buffer, self._ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> list[str]: ...

    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self._bytes(self._ends[row], self._ends[row + 1]).decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Texts | list | tuple)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    __hash__ = None  # type: ignore[assignment]  # it can grow

    def __repr__(self) -> str:
        return f"Texts({self[:3]}{'...' if len(self) > 3 else ''}, {len(self):,} rows)"


def _restored(characters: bytes | bytearray, ends: array[int]) -> Texts:
    texts = Texts()
    texts._buffer, texts._ends = bytearray(characters), ends
    if len(characters) > _IN_MEMORY:
        texts._spill()
    return texts


class Codes:
    """Text of many rows that has few different values, as numbers.

    Args:
        texts: One a row.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._numbers: dict[str, int] = {}
        self._codes = array("i")
        self.extend(texts)

    def extend(self, texts: Iterable[str]) -> None:
        """Add rows."""
        numbers = self._numbers
        self._codes.extend(numbers.setdefault(text, len(numbers)) for text in texts)

    @property
    def values(self) -> list[str]:
        """Each value once, in the order of its first row."""
        return [*self._numbers]

    @property
    def codes(self) -> np.ndarray:
        """The number of each row's value, int32 (N,)."""
        return np.frombuffer(self._codes, dtype=np.int32) if self._codes else np.zeros(0, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._codes)

    def numbered(self, number: Mapping[str, int], other: int = -1) -> np.ndarray:
        """Each row by another numbering of the values, int64 (N,).

        Args:
            number: Of each value.
            other: For values without one.
        """
        return np.array([number.get(value, other) for value in self.values], dtype=np.int64)[self.codes]


def taken(texts: Sequence[str], rows: np.ndarray) -> Sequence[str]:
    """Some of the rows.

    Args:
        texts: One a row.
        rows: int64 (M,).
    """
    return texts.take(rows) if isinstance(texts, Texts) else [texts[row] for row in rows]


def joined(texts: Sequence[str], before: str = "") -> Iterator[bytes]:
    """The rows with a zero byte between two of them, in parts.

    Args:
        texts: One a row.
        before: Stands before each row.
    """
    for begin in range(0, len(texts), _AT_ONCE):
        some = "\0".join(before + text for text in texts[begin : begin + _AT_ONCE])
        yield ("\0" * (begin > 0) + some).encode("utf-8", "surrogateescape")
