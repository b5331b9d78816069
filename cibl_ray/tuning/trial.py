"""One trial of a sweep, in a process of Ray Tune: a run like any other, whose epochs are reported to Ray Tune."""

from __future__ import annotations

import json
import logging
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.util.queue import Queue

from cibl_ray.cluster.cut_off import end_when_cut_off
from cibl_ray.cluster.environment import is_own_cluster
from cibl_ray.cluster.shared_folder import same_folder
from cibl_ray.config import RunConfig
from cibl_ray.hardware import keep_freed_memory
from cibl_ray.run.log import read_metrics
from cibl_ray.run.progress import Progress
from cibl_ray.training.fit import fit
from cibl_ray.tuning.config import SweepConfig
from cibl_ray.tuning.folder import RUNS
from cibl_ray.tuning.sweep import objectives, trial_config, trial_name, worst_objectives
from cibl_ray.world import World
from pipelines.common.cores import limit_cores
from pipelines.common.errors import UserError
from pipelines.common.files import locked, write_atomically
from pipelines.common.validation import validate

UNWRITTEN = "unwritten"  # the kind of a note: a trial's name, and an error that could not be written into the sweep's folder


def objective_names(sweep: SweepConfig) -> list[str]:
    """The names under which trials report the values of `objectives`."""
    return [f"objective_{number}" for number in range(len(sweep.objective))]


def trial(params: dict[str, Any], given: dict[str, Any]) -> None:
    """Train one trial. Ray Tune calls this function in a process for trials.

    An error is written to a file, from which the driver reads it. It is not raised: Ray Tune must repeat a trial whose process
    was lost, and no other. Where this node cannot write into the folder, the error goes through the relay and is raised:
    another node may do better.

    Args:
        params: The values of the searched fields, by dotted name.
        given: The sweep, its base configuration, its folder and mark, the CPUs of a worker, the driver's relay, and the
            queue of `TrialPlaces` where trials have several workers.
    """
    keep_freed_memory()
    torch.set_num_threads(given["cpus"])
    limit_cores(given["cpus"])
    sweep = validate(SweepConfig, given["sweep"], "the sweep")
    name = trial_name(params)
    run_folder = Path(given["folder"]) / RUNS / name
    failed = run_folder.with_suffix(".error")
    try:
        same_folder(Path(given["folder"]), given["mark"], "--sweeps")  # a node that has joined since the sweep began
        run_folder.parent.mkdir(parents=True, exist_ok=True)
        failed.unlink(missing_ok=True)
    except (UserError, OSError) as error:
        ray.get(given["relay"].post.remote(UNWRITTEN, (name, str(error))))
        raise
    progress: _Reported | None = None
    try:
        # The same parameters may be proposed twice: the second trial waits, and reports what the first one did.
        watched = nullcontext() if is_own_cluster() else end_when_cut_off(given["relay"])
        with watched, locked(run_folder.with_suffix(".lock")):
            write_atomically(run_folder.with_suffix(".json"), json.dumps(params))
            config = trial_config(given["base"], params)
            progress = _Reported(sweep, config.train.epochs)
            for row in read_metrics(run_folder):  # of an earlier proposal, or of the part before an interruption
                progress.epoch(row, "")
            if sweep.workers == 1:
                fit(config, run_folder, run_folder.exists(), World(), progress)
            else:
                _in_workers(sweep, config, run_folder, progress, given["places"])
            progress.finish()
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        failed.write_text(f"{kind}{error}")
        if not isinstance(error, UserError):
            traceback.print_exc()
        # Else the search would take the last epoch that went well for the trial's score, and propose more of its kind.
        values = dict(zip(objective_names(sweep), worst_objectives(sweep), strict=True))
        tune.report({"epoch": progress.reported if progress is not None else 0} | values)


def _in_workers(sweep: SweepConfig, config: RunConfig, run_folder: Path, progress: Progress, places: Queue) -> None:
    """Train in several workers of Ray Train. This process waits for them, and `places` hears where they are."""
    from cibl_ray.cluster.launch import Shape, launch  # slow to import, and most trials need no workers

    gpus = bool(ray.cluster_resources().get("GPU")) and config.train.device != "cpu"
    shape = Shape((sweep.workers, sweep.workers), sweep.cpus, gpus, failures=2)
    config = config.with_train(device="cuda" if gpus else "cpu")
    launch(config, run_folder, run_folder.exists(), shape, progress, trial_places=(places, run_folder.name))
    for row in read_metrics(run_folder):  # any scores that did not arrive
        progress.epoch(row, "")


class _Reported:
    """Reports the scores of each epoch of a trial to Ray Tune.

    The last epoch is reported by `finish`, when the run folder is complete: ASHA may end a trial at any report.
    """

    def __init__(self, sweep: SweepConfig, epochs: int) -> None:
        self._sweep, self._epochs, self.reported = sweep, epochs, 0
        self._last: dict[str, Any] | None = None

    def begin(self, total: int, done: int) -> None: ...

    def advance(self, images: int) -> None: ...

    def line(self, text: str) -> None: ...

    def close(self) -> None: ...

    def log_handler(self) -> logging.Handler:
        return logging.NullHandler()

    def epoch(self, row: dict[str, Any], text: str) -> None:
        if row["epoch"] <= self.reported or ("val" not in row and row["epoch"] < self._epochs):
            return
        if "val" not in row:
            raise UserError("no validation split, and a sweep must not choose on the test set; set data.val_fraction: 0.1")
        self.reported = row["epoch"]
        if row["epoch"] == self._epochs:
            self._last = row
        else:
            self._report(row)

    def finish(self) -> None:
        if self._last is not None:
            self._report(self._last)

    def _report(self, row: dict[str, Any]) -> None:
        values = dict(zip(objective_names(self._sweep), objectives(self._sweep, row["val"]), strict=True))
        tune.report({"epoch": row["epoch"], "scores": row["val"]} | values)
