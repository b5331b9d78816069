"""A sweep in trackers: it is the parent, its trials are the children."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cibl_ray.tracking.base import Ended, Outcome, Status
from cibl_ray.tracking.trackers import Trackers, track_sweep
from cibl_ray.tuning.config import SweepConfig
from cibl_ray.tuning.folder import BEST_CONFIG, OVER_SKEW, SWEEP, TABLE, TRADE_OFF
from cibl_ray.tuning.sweep import Trial, best, trial_config

_STATUS: dict[str, Status] = {"completed": "finished", "stopped": "stopped", "failed": "failed"}


@contextmanager
def sweep_trackers(sweep: SweepConfig, base: dict[str, Any], folder: Path) -> Iterator[Trackers]:
    """Begin the trackers of a sweep, and end them with it.

    Args:
        sweep: The sweep.
        base: The configuration that every trial starts from.
        folder: The sweep folder.

    Yields:
        The trackers. Each knows the sweep by now, or has failed: its trials look for the parent in the folder.
    """
    trackers = track_sweep(trial_config(base, {}), folder, sweep.model_dump(mode="json"))
    trackers.begin(0, [], wait=True)
    status: Status = "failed"
    try:
        yield trackers
        status = "finished"
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        trackers.close(status, sweep.trials)


def track_trial(trackers: Trackers, trial: Trial) -> None:
    """Record a trial that has ended."""
    trackers.trial(Ended(trial.name, trial.params, trial.scores, _STATUS[trial.state]))


def sweep_outcome(sweep: SweepConfig, folder: Path, trials: list[Trial], text: str) -> Outcome:
    """What a sweep ends with: the best trial's scores, the front, the table of trials and the pictures."""
    chosen = best(sweep, trials)
    scores = {"best": chosen.scores} if chosen is not None else {}
    files = [folder / name for name in (SWEEP, TABLE, BEST_CONFIG, TRADE_OFF, OVER_SKEW)]
    return Outcome(scores, text, [path for path in files if path.is_file()])
