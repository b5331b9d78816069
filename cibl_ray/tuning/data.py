"""The data that all trials of a sweep share."""

from __future__ import annotations

from typing import Any

from cibl_ray.tuning.sweep import trial_config
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.shots import shot_groups, thirds


def prepare_data(base: dict[str, Any]) -> tuple[set[str], bool]:
    """Prepare the data of a sweep.

    Returns:
        The groups and thirds of classes that have validation images, and whether there is a validation split.
    """
    config = trial_config(base, {})
    prepared = ensure_prepared(config.data, config.seed)
    if "val" not in prepared.splits:
        return set(), False
    groups = zip(prepared.splits["val"].counts, shot_groups(prepared.train_counts), thirds(prepared.train_counts), strict=True)
    return {name for count, *names in groups if count for name in names}, True
