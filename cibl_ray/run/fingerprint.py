"""Which code trained: a digest, where a version number or a commit may be missing or be wrong."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import pipelines


@functools.cache
def code_digest() -> str:
    """Of the source files that train, as this process first saw them: 12 hexadecimal digits. The same wherever they lie."""
    digest = hashlib.sha256()
    # What decides a run's result. On a cluster's nodes each package lies in a folder of its own.
    for folder in (Path(__file__).parents[1], Path(pipelines.__file__ or "").parent):
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder.parent).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]
