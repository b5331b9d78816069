"""The configuration of a run that is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cibl_ray.config import RunConfig, build_config, load_config
from cibl_ray.run.folder import CONFIG, is_run, no_run
from cibl_ray.run.own_config import own_config
from pipelines.common.errors import UserError

# What decides which images there are.
_IMAGES = tuple(
    f"data.{field}"
    for field in (
        "profile",
        "val_fraction",
        "test_fraction",
        "split_by",
        "exclude",
        "subset_seed",
        "on_bad_image",
        "max_pixels",
        "window",
    )
)
# What may change without a word: length, places, speed. Tensors of another network the checkpoint refuses.
_FREE = (
    "runs",
    "track",
    "loader",
    "network.backbone.weights",
    "data.source",
    "data.prepared",
    "data.published",
    "data.cache_gb",
    *_IMAGES,
    *(
        f"train.{field}"
        for field in ("start", "epochs", "checkpoint_", "eval", "device", "precision", "exchange_precision", "compile")
    ),
)


def resumed(folder: Path, overrides: list[str], name: str | None) -> tuple[RunConfig, Path]:
    """Build the configuration to resume a run with.

    Args:
        folder: The run folder.
        overrides: `--field value` of the command line.
        name: The configuration's name, where the command names one, as the command that began the run: it must agree.

    Returns:
        The run's configuration with `overrides`, and the folder's absolute path.

    Raises:
        UserError: No run began in the folder, its configuration is lost, it is another one than `name`, or `overrides` ask for
            other images.
    """
    if not is_run(folder) and not (folder / CONFIG).exists():
        raise UserError(f"{str(folder)!r} {no_run(folder)}")
    content = own_config(folder)
    begun = build_config(content, [], str(folder / CONFIG))
    if name is not None:
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
    config = build_config(content, overrides, str(folder / CONFIG))
    need_same_images(begun, config, folder)
    return config, folder.absolute()


def need_same_images(begun: RunConfig, config: RunConfig, folder: Path) -> None:
    """Refuse settings that would give a resumed run other images, before these are prepared.

    Args:
        begun: The run's configuration.
        config: What it is to be resumed with.
        folder: The run folder.

    Raises:
        UserError: A field that decides which images there are differs.
    """
    for name, before, now in _differences(begun, config):
        if name == "seed" or any(name == field or name.startswith(f"{field}.") for field in _IMAGES):
            raise UserError(
                f"{str(folder)!r}: {name} is {now}, and the run began with {before}; its images cannot change: "
                f"leave {name} out, or start a new run"
            )


def changes(begun: RunConfig, config: RunConfig) -> str:
    """Say which settings differ that decide what is learned: "loss.tail_skew 1.0 (it was 0.05)"; empty: none does.

    Args:
        begun: The configuration of the checkpoint that a run is resumed from.
        config: That of the resumed run.
    """
    found = _differences(begun, config)
    return ", ".join(f"{name} {now} (it was {before})" for name, before, now in found if not name.startswith(_FREE))


def _differences(begun: RunConfig, config: RunConfig) -> list[tuple[str, Any, Any]]:
    """Fields that differ, by dotted name, with both values. 'auto' is what was then decided, so it differs from nothing."""
    found = []

    def walk(name: str, before: Any, now: Any) -> None:
        if isinstance(before, dict) and isinstance(now, dict):
            for key in dict.fromkeys((*before, *now)):
                walk(f"{name}.{key}" if name else key, before.get(key), now.get(key))
        elif before != now and "auto" not in (before, now):
            found.append((name, before, now))

    walk("", begun.model_dump(mode="json"), config.model_dump(mode="json"))
    return found
