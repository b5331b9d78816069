"""What the markers of a JPEG file tell, without decoding it."""

from __future__ import annotations

import re
from collections.abc import Iterator

_END, _SCAN = 0xD9, 0xDA
# The markers that a length follows, and the end. A decoder steps over all others wherever they stand, and over FF 00 and runs
# of FF, so nothing may hide behind a length that seems to follow them.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")


def _markers(data: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """(marker, where it stands) of each segment of the file that `data` begins with, its end last.

    Segments are walked by their lengths, so that a preview inside a picture counts for nothing.
    """
    at = 2
    while found := _MARKER.search(data, at):
        at = found.start()
        marker = data[at + 1]
        yield marker, at
        if marker == _END:
            return
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def end(data: bytes | bytearray) -> int | None:
    """Where the JPEG file at the start of `data` ends; None where it is not whole."""
    at, whole = walk(data)
    return at if whole else None


def walk(data: bytes | bytearray, at: int = 2) -> tuple[int, bool]:
    """Walk a JPEG file of which more may come, as `end` does.

    Args:
        data: What is there of the file.
        at: Where an earlier walk stopped.

    Returns:
        Where the walk stops, which may be beyond `data`, and whether the file ends there.
    """
    while found := _MARKER.search(data, at):
        at = found.start()
        if data[at + 1] == _END:
            return at + 2, True
        if at + 4 > len(data):
            return at, False
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return max(at, len(data) - 1), False  # the last byte may be the first of a marker


def scans(data: bytes | bytearray, most: int, most_segments: int | None = None) -> int | None:
    """Count the passes over the picture that a decoder makes: one, or several in a progressive file.

    Args:
        data: The JPEG file.
        most: Where counting ends.
        most_segments: How many segments are read; None: all.

    Returns:
        The scans, `most` at most; None where the file has more segments before.
    """
    count = 0
    for number, (marker, _) in enumerate(_markers(data)):
        if number == most_segments:
            return None
        count += marker == _SCAN
        if count >= most:
            break
    return count
