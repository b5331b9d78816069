"""Which checkpoint of a run is meant."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from cibl_ray.run.folder import BEST, CHECKPOINTS, LAST, PREVIOUS, is_run
from cibl_ray.run.head import read_head
from cibl_ray.run.log import read_metrics
from pipelines.common.errors import UserError

log = logging.getLogger(__name__)


def checkpoints(run: Path, which: str | None = None) -> list[Path]:
    """Choose the checkpoints to evaluate: of a run folder each of 'last' and 'best' that exists, or `which` of them alone.

    Args:
        run: A run folder, or a checkpoint file, which is itself the answer.
        which: 'last' or 'best'.

    Raises:
        UserError: `run` is neither, has no such checkpoint, or is the file of another one.
    """
    if run.is_file():
        return [_file(run, which)]
    found = _existing(run, (LAST, BEST), which)
    if which is None:
        _say_missing(found)
    return found or [_in_folder_itself(run, (LAST, BEST), which)]


def checkpoint(run: Path, which: str | None = None) -> Path:
    """Choose the checkpoint to use: `which` of 'best' and 'last', else the best, else the last.

    Args:
        run: A run folder, a sweep folder (its best trial's), or a checkpoint file, which is itself the answer.
        which: 'last' or 'best'.

    Raises:
        UserError: `run` is not one of these, has no such checkpoint, or is the file of another one.
    """
    if run.is_file():
        return _file(run, which)
    found = _existing(run, (BEST, LAST), which)
    if which is None:
        _say_missing(found[:1])
    return found[0] if found else _in_folder_itself(run, (BEST, LAST), which)


def _file(checkpoint: Path, which: str | None) -> Path:
    if which is not None and checkpoint.stem != which:
        raise UserError(f"--checkpoint {which} is for a run folder, and {str(checkpoint)!r} is a file; leave one of them out")
    return checkpoint


def _existing(run: Path, names: tuple[str, ...], which: str | None) -> list[Path]:
    paths = [run / CHECKPOINTS / name for name in names if which in (None, Path(name).stem)]
    return [path for path in paths if os.path.lexists(path)]


def _say_missing(found: list[Path]) -> None:
    """Warn where a checkpoint is gone that the run once had, so that the other one is not taken for it."""
    if [path.name for path in found] == [LAST]:
        best = (read_head(found[0]) or {}).get("best")
        if isinstance(best, dict):
            log.warning(
                "%s is missing (epoch %s was the best): the last epoch is used", found[0].with_name(BEST), best.get("epoch")
            )


def _in_folder_itself(run: Path, names: tuple[str, ...], which: str | None) -> Path:
    """A checkpoint that lies in the folder itself, as in a sweep's."""
    for name in names:
        if which in (None, Path(name).stem) and (run / name).is_file():
            return run / name
    if not is_run(run):
        if not os.path.lexists(run):
            raise UserError(f"{str(run)!r} does not exist; name a run folder or a checkpoint file")
        raise UserError(f"{str(run)!r} is neither a run folder nor a checkpoint file")
    wanted, folder = which or "last", run / CHECKPOINTS
    for name in (LAST, BEST, PREVIOUS):
        if (head := read_head(folder / name)) is not None:
            raise UserError(f"{str(folder)!r} has no {wanted} checkpoint; take {folder / name}, of epoch {head['epoch']}")
    if read_metrics(run):
        raise UserError(
            f"{str(folder)!r} has no checkpoint left; resuming it (--resume {run}, in Python Run.resume) "
            "trains again from epoch 1"
        )
    raise UserError(f"{str(folder)!r} has no {wanted} checkpoint; the run has not finished its first epoch")
