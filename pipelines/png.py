"""What the chunks of a PNG file tell, without decoding it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_METADATA = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, where its content begins, its length in bytes) of each chunk, as far as the file goes."""
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at + 8, length
        at += 12 + length


def depth(data: bytes) -> tuple[int, int]:
    """Bits of a sample, and how many of them the file says are significant (sBIT; 0: it does not say)."""
    bits, significant = data[24] if len(data) > 24 else 0, 0
    for kind, at, length in chunks(data):
        if kind == b"sBIT" and length:
            significant = max(data[at : at + min(length, 3)])
        if kind == b"IDAT":
            break
    return bits, significant


def without_large_metadata(data: bytes) -> bytes:
    """The file without the text and colour profiles that inflate beyond what Pillow reads, or that are damaged."""
    kept, text = [data[: len(SIGNATURE)]], 0
    for kind, at, length in chunks(data):
        if kind in _METADATA:
            content = data[at : at + length]
            size = _inflated(kind, content)
            whole = zlib.crc32(kind + content) == int.from_bytes(data[at + length : at + length + 4], "big")
            if (
                size is None
                or size >= PngImagePlugin.MAX_TEXT_CHUNK
                or text + size > PngImagePlugin.MAX_TEXT_MEMORY
                or not whole
            ):
                continue
            text += size
        kept.append(data[at - 8 : at + length + 4])
    return b"".join(kept)


def _inflated(kind: bytes, content: bytes) -> int | None:
    """Bytes of a metadata chunk once it is inflated, counted up to the limit; None where it is damaged."""
    _, _, rest = content.partition(b"\0")
    if kind == b"tEXt":
        return len(rest)
    if kind == b"iTXt":
        compressed, rest = rest[:1] == b"\1", rest[2:].partition(b"\0")[2].partition(b"\0")[2]
        if not compressed:
            return len(rest)
    else:
        rest = rest[1:]  # the method
    try:
        return len(zlib.decompressobj().decompress(rest, PngImagePlugin.MAX_TEXT_CHUNK))
    except zlib.error:
        return None
