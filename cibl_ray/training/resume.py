"""The configuration of a run that is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cibl_ray.config import RunConfig, build_config, load_config
from cibl_ray.run.folder import CONFIG, is_run, no_run
from cibl_ray.run.own_config import own_config
from pipelines.common.errors import UserError


def resumed(folder: Path, overrides: list[str], name: str | None) -> tuple[RunConfig, Path]:
    """Build the configuration to resume a run with.

    Args:
        folder: The run folder.
        overrides: `--field value` of the command line.
        name: The configuration's name, where the command names one, as the command that began the run: it must agree.

    Returns:
        The run's configuration with `overrides`, and the folder's absolute path.

    Raises:
        UserError: No run began in the folder, its configuration is lost, or it is another one than `name`.
    """
    if not is_run(folder) and not (folder / CONFIG).exists():
        raise UserError(f"--resume {folder} {no_run(folder)}")
    content = own_config(folder)
    if name is not None:
        begun = build_config(content, [], str(folder / CONFIG))
        # Device, precision and loader are chosen when a run begins, and kept in its file.
        execution: Any = {"runs": True, "track": True, "loader": True, "train": {"device", "precision"}, "data": {"prepared"}}
        wanted, there = (one.model_dump(mode="json", exclude=execution) for one in (load_config(name, overrides), begun))
        for field in ("compile", "tau"):  # so are these, where they were left open
            if wanted["train"][field] == "auto":
                del wanted["train"][field], there["train"][field]
        changed = sorted(part for part in wanted if wanted[part] != there[part])
        if changed:
            raise UserError(
                f"--resume {folder}: that run is of another configuration than {name} ({', '.join(changed)} differ); "
                f"leave {name} out to resume with the run's own, or start a new one without --resume"
            )
    return build_config(content, overrides, str(folder / CONFIG)), folder.absolute()
