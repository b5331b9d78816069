"""The search's memory: Optuna's journal in the sweep folder."""

from __future__ import annotations

import logging
from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from cibl_ray.run.folder import set_aside
from cibl_ray.tuning.folder import JOURNAL, read_trials
from pipelines.common.files import write_atomically

log = logging.getLogger(__name__)

STUDY = "sweep"


def open_journal(folder: Path) -> JournalStorage:
    """Open the journal of a sweep. A damaged one is set aside, and the search starts without it; a warning says so.

    Args:
        folder: The sweep folder. The caller holds its lock.

    Returns:
        Optuna's storage. Its study is `STUDY`, which may not exist yet.
    """
    path = folder / JOURNAL
    lock = path.with_name(f"{path.name}.lock")
    if lock.is_symlink():  # Optuna's, of a driver that was killed: the folder's own lock lets no other driver in
        lock.unlink()
    try:
        _open(path)
    except OSError:
        raise
    except Exception as error:  # whatever Optuna meets in a file that it did not write
        log.warning("%s is damaged (%s: %s); it is kept as %s", path, type(error).__name__, error, set_aside(path))
    _drop_torn_line(path)
    storage = _open(path)
    if read_trials(folder) and not storage.get_all_studies():
        log.warning("%s knows no trial: the search proposes others without what the ended ones taught it", path)
    return storage


def _open(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


def _drop_torn_line(path: Path) -> None:
    """Drop a last line that a kill cut short: Optuna would append to it, and then read neither."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        write_atomically(path, content[: content.rfind(b"\n") + 1])
