"""Which code trained: a digest, where a version number or a commit may be missing or be wrong."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

_PACKAGES = ("cibl_ray", "pipelines")  # what decides a run's result
_ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def code_digest() -> str:
    """Of the source files that train, as this process first saw them: 12 hexadecimal digits. The same wherever they lie."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((_ROOT / package).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(_ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]
