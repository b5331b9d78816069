"""The learning rate over a run: a pure function of the epoch, so resuming needs no state."""

from __future__ import annotations

import math
from typing import assert_never

from cibl_ray.config import CosineSchedule, StepSchedule, warmup_of


def lr_factor(schedule: StepSchedule | CosineSchedule, epoch: float, epochs: int) -> float:
    """The factor of the base learning rate.

    Args:
        schedule: The schedule.
        epoch: Epochs done, fractional: 3.5 is the middle of the fourth.
        epochs: Epochs of the run.

    Returns:
        0 to 1.
    """
    warmup = warmup_of(schedule, epochs)
    if epoch < warmup:
        if schedule.warmup_by == "epoch":
            return min((math.floor(epoch) + 1) / warmup, 1.0)
        return min(max(epoch, 1e-3) / warmup, 1.0)
    match schedule:
        case StepSchedule():
            passed = sum(epoch >= milestone * epochs for milestone in schedule.milestones)
            return float(schedule.gamma**passed)
        case CosineSchedule():
            done = (epoch - warmup) / max(epochs - warmup, 1e-9)
            return schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    assert_never(schedule)
