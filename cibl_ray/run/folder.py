"""The run folder: the names of its files, whether one is a run, what is no file where one belongs, and its lock."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.common.files import locked, need_writable

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
RESULT = "result.json"
RESULT_BEFORE = "result.before.json"  # while a finished run trains longer
BEST_RESULT = "best_result.json"  # of a sweep's best trial, beside its checkpoint
METRICS = "metrics.jsonl"
LOG = "train.log"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"
TENSORBOARD = "tensorboard"
METRICS_TABLE, SCORES_TABLE = "metrics.csv", "scores.csv"
TRACKERS = "trackers.json"  # what trackers remember of the run
HISTOGRAM, CURVES, BY_CLASS = "class_counts.png", "learning_curves.png", "accuracy_by_class.png"
IMAGES = "images.txt.gz"  # names of the images that it was trained on and chosen by
CONFUSION = ("confusion.html", "confusion.json")
SWEEP, SWEEP_RUNS = "sweep.json", "trials"  # in a sweep's folder
COPY = ".storage"  # where the run's copy in an object store is, and which run of its name this is


def resume_command(run: Path | str) -> str:
    """The command that resumes a run, of its folder or of the URI of its copy."""
    return f"python -m cibl_ray.train --resume {shlex.quote(str(run))}"


def is_run(folder: Path) -> bool:
    """Whether a run has begun in `folder`: it has a configuration, or a checkpoint, which has one, too."""
    names = (CONFIG, *(f"{CHECKPOINTS}/{name}" for name in (LAST, PREVIOUS, BEST)))
    return any((folder / name).is_file() for name in names)


def never_begun(folder: Path) -> bool:
    """Whether `folder` is as a kill leaves it before the configuration is written."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK, COPY, LOG, f"{CONFIG}.part"}


def no_run(folder: Path) -> str:
    """Why `folder` is no run folder, and what to name in its place, as a message goes on behind its name."""
    if not os.path.lexists(folder):
        return "does not exist; name a run folder"
    if not folder.is_dir():
        run = next((place for place in folder.absolute().parents[:2] if is_run(place)), None)
        return f"is a file; name {'a run folder' if run is None else f'the run folder: {run}'}"
    if (folder / SWEEP).is_file():
        again = f"python -m cibl_ray.tune --resume {shlex.quote(str(folder))}"
        return f"is a sweep; its runs are in {folder / SWEEP_RUNS}, and this resumes it: {again}"
    left = "; no run began in it: remove it, and start a new run" if never_begun(folder) else ""
    return f"is not a run folder: it has no {CONFIG}{left}"


def need_new(folder: Path) -> None:
    """Check that no run folder is there yet, and that one can be made.

    Raises:
        UserError: `folder` exists, or its place cannot be written.
    """
    if not os.path.lexists(folder):
        need_writable(folder, f"run folder {str(folder)!r}", "name another place: --runs FOLDER")
        return
    way = ""
    if is_run(folder):
        way = f"resume it (--resume {folder}, in Python open_run({str(folder)!r}).resume()), or "
    elif never_begun(folder):
        way = "it holds no run: remove it, or "
    raise UserError(f"run folder {str(folder)!r} already exists; {way}choose another name (--name, in Python name=)")


def need_old(folder: Path) -> None:
    """Check that a run can be resumed in its folder.

    Raises:
        UserError: `folder` cannot be written.
    """
    need_writable(folder, f"run folder {str(folder)!r}", "make it writable, or resume a copy of it")


def same_name(name: str, resumed: str) -> None:
    """Check that --name is the folder or URI that --resume names, which would be changed in its place.

    Raises:
        UserError: They differ.
    """
    names = [part for part in name.split("/") if part]
    if names and Path(resumed).absolute().parts[-len(names) :] != tuple(names):
        raise UserError(f"--name {name}: --resume continues in {resumed} itself; leave --name out")


def copy_of(folder: Path) -> str | None:
    """The URI of a run folder's copy, or None."""
    mark = folder / COPY
    return mark.read_text(errors="replace").strip().partition("\n")[0] if mark.is_file() else None


def identity(folder: Path) -> str:
    """What tells a run that has a copy from others of its name; empty where it has no copy, or is of an earlier version."""
    mark = folder / COPY
    return mark.read_text(errors="replace").strip().partition("\n")[2] if mark.is_file() else ""


def lock_folder(folder: Path, doing: str, patience: float) -> AbstractContextManager[None]:
    """Hold the folder's lock while working in it.

    Args:
        folder: A run or sweep folder.
        doing: What the other process does, for the error ("training").
        patience: Seconds to wait for a process that is about to end.

    Returns:
        A context manager; entering it raises UserError where another process works in the folder.
    """
    lock = folder / LOCK
    if os.path.lexists(lock) and not lock.is_file():
        log.warning("%s is not a file; it is kept as %s", lock, set_aside(lock))
    busy = f"another process is {doing} in {str(folder)!r}"
    waiting = f"{busy}: waiting up to {patience:.0f} s for its end" if patience else ""
    return locked(lock, patience, f"{busy}; wait for it, or end it", waiting, log.warning)


def set_aside(path: Path) -> Path:
    """Rename a file or a folder to NAME.old, or NAME.old2 and so on where that is there, and return the new path."""
    number = 1
    while os.path.lexists(other := path.with_name(f"{path.name}.old{number if number > 1 else ''}")):
        number += 1
    return path.rename(other)


def make_room(folder: Path) -> None:
    """Set aside what stands where a run writes and is of another kind: a folder in a file's place, a file in a folder's.

    Each is one line of the log. Otherwise the run would fail as it writes there, as late as its end.
    """
    files = [
        CONFIG,
        RESULT,
        RESULT_BEFORE,
        METRICS,
        METRICS_TABLE,
        SCORES_TABLE,
        TRACKERS,
        LOG,
        HISTOGRAM,
        CURVES,
        BY_CLASS,
        IMAGES,
        *CONFUSION,
    ]
    files += [f"{CHECKPOINTS}/{name}" for name in (LAST, PREVIOUS, BEST)]
    only_folders(folder / name for name in (CHECKPOINTS, TENSORBOARD))
    only_files(folder / name for name in files)


def only_folders(paths: Iterable[Path]) -> None:
    """Set aside those of `paths` that are there and are no folders; each is one line of the log."""
    for path in paths:
        if os.path.lexists(path) and not path.is_dir():
            log.warning("%s is not a folder; it is kept as %s", path, set_aside(path))


def only_files(paths: Iterable[Path]) -> None:
    """Set aside those of `paths` that are there and are no files, and folders in the way of writing them, likewise."""
    for path in paths:
        part = path.with_name(f"{path.name}.part")
        if os.path.lexists(path) and not (path.is_file() or path.is_char_device()):
            log.warning("%s is not a file; it is kept as %s", path, set_aside(path))
        if part.is_dir():
            log.warning("%s is not a file; it is kept as %s", part, set_aside(part))
