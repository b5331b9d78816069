"""The page's own files, read once, with their entity tags and gzip."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

STATIC = Path(__file__).resolve().parent / "static"
INDEX = "index.html"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}
# The browser loads nothing from another host and runs no inline code. WebAssembly may be compiled.
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; worker-src 'self'; media-src 'self' blob:; manifest-src 'self'; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Asset:
    """One file of the page.

    Attributes:
        content: Its bytes.
        packed: The same under gzip; None if that saves nothing.
        kind: Its content type.
        tag: Its entity tag.
    """

    content: bytes
    packed: bytes | None
    kind: str
    tag: bytes


@cache
def asset(name: str) -> Asset | None:
    """Read a file of the page.

    Args:
        name: Its path below `static/`, such as "page.js".

    Returns:
        The file; None if there is none of that name.
    """
    if name not in names():
        return None
    content = (STATIC / name).read_bytes()
    packed = gzip.compress(content, 6, mtime=0)
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'.encode()
    return Asset(content, packed if len(packed) < len(content) else None, TYPES[Path(name).suffix], tag)


@cache
def names() -> frozenset[str]:
    """The paths of all files that a browser may load, below `static/`."""
    return frozenset(
        path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.suffix in TYPES and path.is_file()
    )
