"""A run's own configuration: of its file, or of its last checkpoint where the file is damaged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from cibl_ray.config import RunConfig
from cibl_ray.run.folder import BEST, CHECKPOINTS, CONFIG
from cibl_ray.run.head import newest_head, read_head
from pipelines.common.config_file import read_config
from pipelines.common.errors import UserError
from pipelines.common.validation import validate

log = logging.getLogger(__name__)


def own_config(folder: Path) -> dict[str, Any]:
    """Read the configuration that a run was trained with.

    Where `config.yaml` is missing, cut short or no configuration, the last checkpoint's is taken, with a warning.

    Args:
        folder: The run folder.

    Returns:
        The content, not yet validated.

    Raises:
        UserError: The file is damaged, and there is no checkpoint.
    """
    content, problem = _of_file(folder / CONFIG)
    saved = _of_checkpoint(folder)
    if problem is None and saved is not None:
        problem = _lacking(content, saved)
    if problem is None:
        return content
    if saved is None:
        raise UserError(
            f"{folder / CONFIG} {problem}, and there is no checkpoint to take it from; remove the folder, and train again"
        )
    log.warning("%s %s; the configuration of the last checkpoint is used", folder / CONFIG, problem)
    return saved


def config_problem(folder: Path) -> str | None:
    """What is wrong with a run's `config.yaml`, where a checkpoint has another one to use; else None."""
    content, problem = _of_file(folder / CONFIG)
    saved = _of_checkpoint(folder)
    return None if saved is None else problem or _lacking(content, saved)


def _of_file(path: Path) -> tuple[dict[str, Any], str | None]:
    if not path.is_file():
        return {}, "is not a file" if path.is_dir() else "is missing"
    try:
        content = read_config(path)
        if not content:
            return {}, "is empty"
        return content, None if path.read_bytes().endswith(b"\n") else "is cut short"
    except (UserError, OSError):
        return {}, "is damaged: it is not YAML with settings"


def _of_checkpoint(folder: Path) -> dict[str, Any] | None:
    head = newest_head(folder / CHECKPOINTS) or read_head(folder / CHECKPOINTS / BEST) or {}
    config = head.get("config")
    return config if isinstance(config, dict) else None


def _lacking(content: dict[str, Any], saved: dict[str, Any]) -> str | None:
    """A setting of the checkpoint that the file lacks: the file was cut at the end of a line, or is another one.

    A file of an earlier version lacks what was added since, and one of a later version what was renamed.
    """
    missing = _missing(content, saved)
    if missing is None:
        return None
    later = validate(RunConfig, saved, "the last checkpoint").model_dump(mode="json")
    return None if _missing(content, later) is None else f"lacks {missing!r}"


def _missing(content: Any, saved: Any, place: str = "") -> str | None:
    if content is None and isinstance(saved, list):  # the file was cut behind its name
        return place.removesuffix(".")
    if not isinstance(saved, dict):
        return None
    if not isinstance(content, dict):
        return place.removesuffix(".")
    if content.get("kind") != saved.get("kind"):  # another kind has other settings
        return None if "kind" in content else f"{place}kind"
    for name, value in saved.items():
        if name not in content:
            return f"{place}{name}"
        if (missing := _missing(content[name], value, f"{place}{name}.")) is not None:
            return missing
    return None
