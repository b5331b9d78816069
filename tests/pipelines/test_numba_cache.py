"""Where numba keeps compiled code in a container without a home, whose installation is read-only."""

import os
import stat
from pathlib import Path

import numba

from pipelines.common import numba_cache


def test_compiled_code_has_a_private_folder_where_nothing_else_is_writable(monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/dev/null")  # no folder can be made below it, not even by root
    numba_cache.ensure_numba_cache()
    assert numba.config.CACHE_DIR == ""  # beside the code there is a place
    monkeypatch.setattr(numba_cache, "__file__", "/dev/null/numba_cache.py")
    numba_cache.ensure_numba_cache()
    folder = numba.config.CACHE_DIR
    assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700
    assert os.environ["NUMBA_CACHE_DIR"] == folder
    numba_cache.ensure_numba_cache()
    assert folder == numba.config.CACHE_DIR
    twice = numba.njit(cache=True)(lambda x: 2 * x)
    assert twice(21) == 42
    assert [*Path(folder).rglob("*.nbi")]
