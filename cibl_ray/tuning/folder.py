"""The sweep folder: the names of its files, its record of trials, and what is done where a file was damaged."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cibl_ray.config import build_config
from cibl_ray.run.folder import (
    BEST,
    BEST_RESULT,
    SWEEP,
    SWEEP_RUNS,
    is_run,
    only_files,
    only_folders,
    resume_command,
    set_aside,
)
from cibl_ray.tuning.config import SweepConfig
from cibl_ray.tuning.sweep import Trial, objectives
from pipelines.common.errors import UserError
from pipelines.common.files import need_writable, write_atomically
from pipelines.common.validation import validate
from pipelines.common.words import plural

log = logging.getLogger(__name__)

RECORD, JOURNAL = "trials.jsonl", "search.journal"
RUNS, OF_RAY = SWEEP_RUNS, ".ray"
TABLE, BEST_CONFIG, TRADE_OFF, OVER_SKEW = "trials.csv", "best.yaml", "trade_off.png", "tail_skew.png"
_BASE = "base_content"
_STATES = ("completed", "stopped", "failed")
_FIX = "restore it from a copy, or start the sweep again with another --name"


def sweep_text(sweep: SweepConfig, base: dict[str, Any]) -> str:
    """The content of sweep.json: the sweep, and the configuration that all its trials start from, even if the file changes."""
    return json.dumps({**sweep.model_dump(mode="json"), _BASE: base}, indent=1)


def read_sweep(folder: Path) -> tuple[SweepConfig, dict[str, Any] | None]:
    """Read the sweep.json of a sweep folder.

    Returns:
        The sweep, and the configuration that its trials start from; None for a sweep of an earlier version.

    Raises:
        UserError: The file is missing or damaged.
    """
    path = folder / SWEEP
    if not path.is_file():
        raise UserError(f"--resume {folder} {_no_sweep(folder)}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, not valid JSON: {error}; {_FIX}") from error
    missing = [key for key in ("base", "search", "trials") if not (isinstance(content, dict) and key in content)]
    if missing:  # each has a default, which is not what this sweep searched
        raise UserError(f"{path} is damaged: it lacks {missing[0]!r}; {_FIX}")
    base = content.pop(_BASE, None)
    if base is not None:
        if not isinstance(base, dict):
            raise UserError(f"{path} is damaged: {_BASE!r} is not a mapping; {_FIX}")
        base = build_config(base, [], f"{path}, {_BASE}").model_dump(mode="json")
    return validate(SweepConfig, content, str(path)), base


def _no_sweep(folder: Path) -> str:
    """Why `folder` is no sweep folder, and what to name in its place."""
    if not os.path.lexists(folder):
        return "does not exist; name a sweep folder"
    if not folder.is_dir():
        return f"is a file; name {f'the sweep folder: {folder.parent}' if folder.name == SWEEP else 'a sweep folder'}"
    if is_run(folder):
        return f"is a run; this resumes it: {resume_command(folder)}"
    return f"is not a sweep folder: it has no {SWEEP}"


def need_new(folder: Path) -> None:
    """Check that no sweep folder is there yet, and that one can be made.

    Raises:
        UserError: `folder` exists, or its place cannot be written.
    """
    if not os.path.lexists(folder):
        need_writable(folder, f"sweep folder {str(folder)!r}", "name another place: --sweeps FOLDER")
    else:
        way = f"continue it with --resume {folder}, or " if (folder / SWEEP).is_file() else "it holds no sweep: "
        raise UserError(f"sweep folder {str(folder)!r} already exists; {way}choose another --name")


def read_trials(folder: Path) -> list[Trial]:
    """The trials of a sweep folder that have ended. Lines that are no trial are left out."""
    return _read(folder / RECORD)[0]


def record_trial(folder: Path, sweep: SweepConfig, trial: Trial) -> None:
    """Append a trial that has ended to the sweep's record, and print it.

    Args:
        folder: The sweep folder.
        sweep: The sweep.
        trial: The trial.
    """
    with (folder / RECORD).open("a") as file:
        file.write(_line(trial))
        file.flush()
        os.fsync(file.fileno())
    objective = f", objective {objectives(sweep, trial.scores)[0]:.4f}" if trial.scores else ""
    more = f": {trial.error}" if trial.error else f"  {json.dumps(trial.params)}"
    count = f"{len(read_trials(folder))}/{sweep.trials}"
    print(f"trial {count} {trial.name} {trial.state} after {trial.epochs} epochs{objective}{more}", flush=True)


def mend(folder: Path) -> None:
    """Mend a sweep folder before its search continues. What cannot be used is kept under another name, with a warning.

    The caller holds the folder's lock. The search's journal is mended as it is opened, by `open_journal`.

    Args:
        folder: The sweep folder, which may be new.
    """
    _make_room(folder)
    path = folder / RECORD
    begun = (folder / SWEEP).exists()
    trials, damaged = _read(path)
    if damaged:
        log.warning(
            "%s is damaged: %s of it can be read; it is kept as %s", path, plural(len(trials), "trial"), set_aside(path)
        )
    elif begun and not path.exists():
        log.warning("%s is missing: the trials of this sweep run again, from their checkpoints where these are left", path)
    write_atomically(path, "".join(map(_line, trials)))  # without a last line that a kill cut short


def _make_room(folder: Path) -> None:
    """Set aside what is of another kind than what a sweep writes in its place."""
    runs = folder / RUNS
    only_folders([runs, folder / OF_RAY])
    only_files(folder / name for name in (SWEEP, RECORD, JOURNAL, TABLE, BEST_CONFIG, BEST, BEST_RESULT, TRADE_OFF, OVER_SKEW))
    there = [*runs.iterdir()] if runs.is_dir() else []
    only_folders(path for path in there if not path.suffix)
    only_files(path for path in there if path.suffix in (".json", ".lock", ".error"))


def _read(path: Path) -> tuple[list[Trial], bool]:
    """The trials of a record, and whether it is damaged: beyond a last line that a kill cut short."""
    if not path.is_file():
        return [], False
    *lines, torn = path.read_bytes().split(b"\n")
    trials = [_trial(line) for line in lines]
    last = _trial(torn)
    whole = [trial for trial in (*trials, last) if trial is not None]
    return whole, None in trials


def _trial(line: bytes) -> Trial | None:
    try:
        trial = Trial(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = trial.scores.values() if isinstance(trial.scores, dict) else [None]
    right = (
        isinstance(trial.name, str)
        and isinstance(trial.params, dict)
        and trial.state in _STATES
        and isinstance(trial.epochs, int)
        and all(isinstance(number, int | float) for number in numbers)
        and isinstance(trial.error, str | None)
    )
    return trial if right else None


def _line(trial: Trial) -> str:
    return json.dumps(asdict(trial)) + "\n"
