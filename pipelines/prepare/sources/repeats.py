"""Rows that say the same as an earlier one, found among many in little more memory than their keys take."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_AT_ONCE = 1 << 20  # rows
_ODD = np.uint64(0x9E3779B97F4A7C15)


def repeated(keys: np.ndarray) -> Iterator[tuple[int, int]]:
    """Rows whose key stands in an earlier row.

    Args:
        keys: uint64 (N, 2).

    Yields:
        The first row with the key, and this row; in order of this row.
    """
    mixed = _mixed(keys)
    mixed.sort()
    twice = np.unique(mixed[1:][mixed[1:] == mixed[:-1]])
    del mixed
    if not twice.size:
        return
    rows = np.concatenate([_among(twice, keys, begin) for begin in range(0, len(keys), _AT_ONCE)])
    some = keys[rows]
    order = np.lexsort((some[:, 1], some[:, 0]))  # stable: equal keys stay in order
    ordered = some[order]
    fresh = np.ones(len(rows), dtype=bool)
    fresh[1:] = (ordered[1:] != ordered[:-1]).any(1)
    starts, again = np.flatnonzero(fresh), np.flatnonzero(~fresh)
    firsts = rows[order[starts[np.searchsorted(starts, again, side="right") - 1]]]
    found = rows[order[again]]
    by_row = np.argsort(found)
    for begin in range(0, len(by_row), _AT_ONCE):
        some = by_row[begin : begin + _AT_ONCE]
        yield from zip(firsts[some].tolist(), found[some].tolist(), strict=True)


def _mixed(keys: np.ndarray) -> np.ndarray:
    """Equal for equal keys, uint64 (N,), and seldom for others: files of one disk differ in the second half alone."""
    mixed = keys[:, 0] * _ODD
    mixed ^= keys[:, 1]
    return mixed


def _among(twice: np.ndarray, keys: np.ndarray, begin: int) -> np.ndarray:
    """Which of the rows from `begin` on are among sorted mixed keys."""
    mixed = _mixed(keys[begin : begin + _AT_ONCE])
    at = np.searchsorted(twice, mixed).clip(max=len(twice) - 1)
    return np.flatnonzero(twice[at] == mixed) + begin
