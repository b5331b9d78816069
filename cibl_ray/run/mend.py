"""A run folder whose files were damaged, before its run resumes: the checkpoint decides, and nothing of the user is lost."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from cibl_ray.run.folder import BEST, CHECKPOINTS, CONFIG, RESULT, set_aside
from cibl_ray.run.head import read_head
from cibl_ray.run.own_config import config_problem

log = logging.getLogger(__name__)


def mend(folder: Path, found: bool, damaged: list[Path]) -> None:
    """Set aside the files that the resumed run would write over, though they say something else.

    The log is mended as it is opened, by `RunLog`.

    Args:
        folder: The run folder. The caller holds its lock, and has called `make_room`.
        found: Whether there is a checkpoint to resume from.
        damaged: Checkpoints that cannot be read, where an earlier one is used.
    """
    for path in damaged:
        if os.path.lexists(path):  # not where `make_room` has done it
            log.warning("the damaged %s is kept as %s", path, set_aside(path))
    if config_problem(folder) is not None and os.path.lexists(folder / CONFIG):
        log.warning("the damaged %s is kept as %s", folder / CONFIG, set_aside(folder / CONFIG))
    best = folder / CHECKPOINTS / BEST
    if found and best.is_file() and read_head(best) is None:
        log.warning("the damaged %s is kept as %s", best, set_aside(best))
    if not found:
        for path in (best, folder / RESULT):
            if path.is_file():
                log.warning(
                    "no checkpoint to resume from is left: training begins at epoch 1; %s is kept as %s", path, set_aside(path)
                )
