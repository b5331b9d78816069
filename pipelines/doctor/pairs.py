"""Pairs of images that are the same, or nearly: by digests, and by perceptual hashes that a million images can share."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

DISTANCE = 4  # bits of 64 in which the hashes of near duplicates may differ
_BANDS = np.array([13, 13, 13, 13, 12])  # bits; two hashes with DISTANCE differing bits agree in one of five bands
_DIFFERENCE = 6.0  # mean difference of the small copies' values, 0 to 255
_CROWD = 200  # images of one band's value, of which each is compared with so many that follow


def same_bytes(digests: list[bytes | None]) -> list[tuple[int, int]]:
    """Pairs with the same bytes: each image with the first that has them.

    Args:
        digests: One an image; None is left out.
    """
    first: dict[bytes, int] = {}
    return [
        (before, number)
        for number, digest in enumerate(digests)
        if digest is not None and (before := first.setdefault(digest, number)) != number
    ]


def near(hashes: np.ndarray, small: np.ndarray) -> list[tuple[int, int]]:
    """Pairs whose hashes differ in at most four bits, and whose small copies look the same.

    Two hashes with four differing bits agree in at least one of five bands of bits, so only images that share a band are
    compared. Time and memory grow with the images, not with their pairs.

    Args:
        hashes: uint64 (N,).
        small: uint8 (N, 8, 8, 3).

    Returns:
        Pairs (a, b), a < b, sorted.
    """
    found: set[tuple[int, int]] = set()
    shift = 0
    for bits in _BANDS.tolist():
        band = (hashes >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
        shift += bits
        order = np.argsort(band, kind="stable")
        ordered = band[order]
        for step in range(1, _CROWD + 1):
            same = np.flatnonzero(ordered[step:] == ordered[:-step])
            if not same.size:
                break
            one, other = order[same], order[same + step]
            close = np.bitwise_count(hashes[one] ^ hashes[other]) <= DISTANCE
            one, other = one[close], other[close]
            for begin in range(0, len(one), 4096):
                a, b = one[begin : begin + 4096], other[begin : begin + 4096]
                alike = np.abs(small[a].astype(np.int16) - small[b]).mean((1, 2, 3)) <= _DIFFERENCE
                found.update((min(x, y), max(x, y)) for x, y in zip(a[alike].tolist(), b[alike].tolist(), strict=True))
    return sorted(found)


def clusters(pairs: list[tuple[int, int]]) -> list[list[int]]:
    """The images that pairs join, each cluster sorted, by their first images.

    Args:
        pairs: Two numbers of images each.
    """
    parent: dict[int, int] = {}

    def root(number: int) -> int:
        while parent.setdefault(number, number) != number:
            parent[number] = number = parent[parent[number]]
        return number

    for one, other in pairs:
        a, b = root(one), root(other)
        parent[max(a, b)] = min(a, b)
    members: dict[int, list[int]] = defaultdict(list)
    for number in sorted(parent):
        members[root(number)].append(number)
    return [members[first] for first in sorted(members)]
