"""The run folder: the names of its files, whether one is a run, which checkpoint, and its lock."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.common.files import locked

CONFIG = "config.yaml"
RESULT = "result.json"
METRICS = "metrics.jsonl"
LOG = "train.log"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"
COPY = ".storage"  # where the run's copy in an object store is


def is_run(folder: Path) -> bool:
    """Whether a run has begun in `folder`."""
    return (folder / CONFIG).is_file()


def never_begun(folder: Path) -> bool:
    """Whether `folder` is as a kill leaves it before the configuration is written."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK, COPY, LOG, f"{CONFIG}.part"}


def need_new(folder: Path) -> None:
    """Check that no run folder is there yet.

    Raises:
        UserError: `folder` exists.
    """
    if not folder.exists():
        return
    way = ""
    if is_run(folder):
        way = f"resume it (--resume {folder}), or "
    elif never_begun(folder):
        way = "it holds no run: remove it, or "
    raise UserError(f"run folder {str(folder)!r} already exists; {way}choose another name (--name)")


def same_name(name: str, resumed: str) -> None:
    """Check that --name is the folder or URI that --resume names, which would be changed in its place.

    Raises:
        UserError: They differ.
    """
    names = [part for part in name.split("/") if part]
    if names and Path(resumed).absolute().parts[-len(names) :] != tuple(names):
        raise UserError(f"--name {name}: --resume goes on in {resumed} itself; leave --name out")


def copy_of(folder: Path) -> str | None:
    """The URI of a run folder's copy, or None."""
    mark = folder / COPY
    return mark.read_text() if mark.is_file() else None


def lock_folder(folder: Path, doing: str, patience: float) -> AbstractContextManager[None]:
    """Hold the folder's lock while working in it.

    Args:
        folder: A run or sweep folder.
        doing: What the other process does, for the error ("training").
        patience: Seconds to wait for a process that is about to end.

    Returns:
        A context manager; entering it raises UserError where another process works in the folder.
    """
    return locked(folder / LOCK, patience, f"another process is {doing} in {str(folder)!r}; wait for it, or end it")


def checkpoints(run: Path, which: str | None = None) -> list[Path]:
    """The checkpoints to evaluate: of a run folder each of 'last' and 'best' that exists, or `which` of them alone.

    Args:
        run: A run folder, or a checkpoint file, which is itself the answer.
        which: 'last' or 'best'.

    Raises:
        UserError: `run` is neither, or has no such checkpoint.
    """
    if run.is_file():
        return [run]
    wanted = [name for name in (LAST, BEST) if which in (None, Path(name).stem)]
    found = [path for name in wanted if (path := run / CHECKPOINTS / name).exists()]
    return found or [_beside(run, wanted, which)]


def checkpoint(run: Path, which: str | None = None) -> Path:
    """The checkpoint to export: `which` of 'best' and 'last', else the best, else the last.

    Args:
        run: A run folder, a sweep folder (its best trial's), or a checkpoint file, which is itself the answer.
        which: 'last' or 'best'.

    Raises:
        UserError: `run` is none of these, or has no such checkpoint.
    """
    if run.is_file():
        return run
    wanted = [name for name in (BEST, LAST) if which in (None, Path(name).stem)]
    found = [path for name in wanted if (path := run / CHECKPOINTS / name).exists()]
    return found[0] if found else _beside(run, wanted, which)


def _beside(run: Path, wanted: list[str], which: str | None) -> Path:
    """A checkpoint that lies in the folder itself, as in a sweep's."""
    for name in wanted:
        if (run / name).exists():
            return run / name
    if not is_run(run):
        raise UserError(f"{str(run)!r} is neither a run folder nor a checkpoint file")
    raise UserError(f"{str(run / CHECKPOINTS)!r} has no {which or 'last'} checkpoint; the run has not finished its first epoch")
