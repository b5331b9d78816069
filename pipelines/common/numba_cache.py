"""A place for the code that numba compiles, on machines where it finds none."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numba


def ensure_numba_cache() -> None:
    """Let numba keep its compiled code in a private temporary folder, where it finds no other place.

    numba raises an error where it can write neither beside the installed code nor in the user's cache folder: in a container
    with a read-only installation and a user without a home. The folder serves this process and its children, and is removed at
    the end of this process. Call this before functions are declared with `cache=True`.
    """
    config: Any = numba.config  # which has its values from the environment
    if config.CACHE_DIR:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME") or "/") / ".cache")
    if _writable(Path(__file__).parent / "__pycache__") or _writable(cache / "numba"):
        return
    folder = tempfile.mkdtemp(prefix="cibl_ray_numba_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = config.CACHE_DIR = folder


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
