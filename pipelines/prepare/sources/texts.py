"""Columns of many rows in flat buffers: a Python string takes some 50 bytes more than its characters, a list 8 more."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice, pairwise
from typing import overload

import numpy as np

_AT_ONCE = 1 << 16  # rows


class Texts(Sequence[str]):
    """Text of many rows as UTF-8 in one buffer; bytes that are not UTF-8 are kept (surrogateescape).

    Args:
        texts: One a row.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._buffer = bytearray()
        self._ends = array("q", [0])
        self.extend(texts)

    def append(self, text: str) -> None:
        """Add a row."""
        self._buffer += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._buffer))

    def extend(self, texts: Iterable[str]) -> None:
        """Add rows."""
        rows = iter(texts)
        while some := [text.encode("utf-8", "surrogateescape") for text in islice(rows, _AT_ONCE)]:
            ends = np.cumsum([len(text) for text in some], dtype=np.int64) + len(self._buffer)
            self._buffer += b"".join(some)
            self._ends.frombytes(ends.tobytes())

    def digests(self) -> np.ndarray:
        """16 bytes of a digest of each row, uint64 (N, 2): equal rows have equal ones."""
        found = bytearray()
        for begin, end in pairwise(self._ends):
            found += blake2b(memoryview(self._buffer)[begin:end], digest_size=16).digest()
        return np.frombuffer(found, dtype=np.uint64).reshape(-1, 2)

    def take(self, rows: np.ndarray) -> Texts:
        """Some of the rows.

        Args:
            rows: int64 (M,).
        """
        return Texts(self._each(rows))

    def _each(self, rows: np.ndarray) -> Iterator[str]:
        for begin in range(0, len(rows), _AT_ONCE):
            yield from map(self.__getitem__, rows[begin : begin + _AT_ONCE].tolist())

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
        return self._buffer[self._ends[row] : self._ends[row + 1]].decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Texts):
            return self._ends == other._ends and self._buffer == other._buffer
        return (
            isinstance(other, list | tuple)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]  # it can grow

    def __repr__(self) -> str:
        return f"Texts({self[:3]}{'...' if len(self) > 3 else ''}, {len(self):,} rows)"


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


def joined(texts: Sequence[str]) -> Iterator[bytes]:
    """The rows with a zero byte between two of them, in parts."""
    for begin in range(0, len(texts), _AT_ONCE):
        some = "\0".join(texts[begin : begin + _AT_ONCE])
        yield ("\0" * (begin > 0) + some).encode("utf-8", "surrogateescape")
