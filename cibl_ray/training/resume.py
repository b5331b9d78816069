"""The configuration of a run that goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from cibl_ray.config import RunConfig, build_config, load_config
from cibl_ray.run.folder import CHECKPOINTS, CONFIG, never_begun
from pipelines.common.errors import UserError
from pipelines.common.settings import read_config

log = logging.getLogger("cibl_ray")


def resumed(folder: Path, overrides: list[str], name: str | None) -> tuple[RunConfig, Path]:
    """The run's configuration with `overrides`; where `name` is given too, as in the command that began it, it must agree."""
    if not (folder / CONFIG).is_file():
        left = "; no run began in it: remove it, and start the run anew" if never_begun(folder) else ""
        raise UserError(f"--resume {folder}: not a run folder, it has no {CONFIG}{left}")
    content = read_config(folder / CONFIG) or _of_checkpoint(folder)
    if name is not None:
        begun = build_config(content, [], str(folder / CONFIG))
        # How it is executed is decided as a run begins, and stands in the run's own file.
        execution: Any = {"runs": True, "loader": True, "train": {"device", "precision"}, "data": {"prepared"}}
        wanted, there = (one.model_dump(mode="json", exclude=execution) for one in (load_config(name, overrides), begun))
        changed = sorted(part for part in wanted if wanted[part] != there[part])
        if changed:
            raise UserError(
                f"--resume {folder}: that run is of another configuration than {name} ({', '.join(changed)} differ); "
                f"leave {name} out to go on with the run's own, or start a new one without --resume"
            )
    return build_config(content, overrides, str(folder / CONFIG)), folder.absolute()


def _of_checkpoint(folder: Path) -> dict[str, Any]:
    """The configuration of a run whose file is empty, as a power cut may leave it."""
    from cibl_ray.run.checkpoint import newest  # torch, which the command does without until then

    checkpoint = newest(folder / CHECKPOINTS)
    if checkpoint is None:
        raise UserError(f"--resume {folder}: its {CONFIG} is empty and it has no checkpoint; remove it, and start the run anew")
    log.warning("%s is empty; going on with the configuration of the last checkpoint", folder / CONFIG)
    return checkpoint.config.model_dump(mode="json")
