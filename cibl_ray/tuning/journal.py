"""The search's memory: Optuna's journal in the sweep folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from cibl_ray.run.folder import set_aside
from cibl_ray.tuning.config import Choice, SweepConfig
from cibl_ray.tuning.folder import JOURNAL, read_trials
from pipelines.common.errors import UserError
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


def check_choices(folder: Path, sweep: SweepConfig, in_process: bool) -> None:
    """Check that a search can continue in the way it is started now: in this process, or on Ray.

    In this process a choice stands in the journal by its number, on Ray by its value. Optuna does not mix them in one study.

    Args:
        folder: The sweep folder. The caller holds its lock.
        sweep: The sweep.
        in_process: Whether its trials would run in this process.

    Raises:
        UserError: The search began in the other way.
    """
    for key, choices in _kept_choices(folder / JOURNAL):
        space = sweep.search.get(key)
        if not isinstance(space, Choice):
            continue
        numbers = tuple(range(len(space.values)))
        mine, other = (numbers, space.values) if in_process else (space.values, numbers)
        if choices == other != mine:
            began, fix = ("with Ray", "add --address") if in_process else ("in the command's process", "leave --address out")
            raise UserError(f"--resume {folder}: this sweep began {began}, and its journal fits no other search; {fix}")


def _kept_choices(path: Path) -> list[tuple[str, tuple[Any, ...]]]:
    """The choices of each trial in a journal, by key; none where it is missing, or damaged, as `open_journal` reports."""
    if not path.is_file():
        return []
    try:
        storage = _open(path)
        trials = storage.get_all_trials(storage.get_study_id_from_name(STUDY))
    except Exception:
        return []
    spaces = [item for trial in trials for item in trial.distributions.items()]
    return [(key, space.choices) for key, space in spaces if isinstance(space, CategoricalDistribution)]


def _open(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


def _drop_torn_line(path: Path) -> None:
    """Drop a last line that a kill cut short: Optuna would append to it, and then read neither."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        write_atomically(path, content[: content.rfind(b"\n") + 1])
