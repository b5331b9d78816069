"""One sweep, from its start or where it was interrupted to its report."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cibl_ray.cluster.failures import no_code
from cibl_ray.cluster.session import cluster, polite_end
from cibl_ray.cluster.shared_folder import mark_beside, same_folder
from cibl_ray.run.folder import lock_folder
from cibl_ray.run.stop import AGAIN
from cibl_ray.tuning import report
from cibl_ray.tuning.config import SweepConfig
from cibl_ray.tuning.data import prepare_data
from cibl_ray.tuning.folder import RUNS, SWEEP, mend, read_trials, sweep_text
from cibl_ray.tuning.in_process import fits_in_process, keep_best, search_in_process
from cibl_ray.tuning.journal import check_choices
from cibl_ray.tuning.search import search
from cibl_ray.tuning.sweep import Trial, base_content, check_metrics
from cibl_ray.tuning.track import sweep_outcome, sweep_trackers
from pipelines.common.errors import Interrupted, UserError
from pipelines.common.files import need_writable, write_atomically


def run(sweep: SweepConfig, folder: Path, address: str | None, base: dict[str, Any] | None = None) -> tuple[list[Trial], str]:
    """Run the trials that a sweep has left, and write its report into its folder.

    Args:
        sweep: The sweep.
        folder: The sweep folder, new or of an interrupted sweep.
        address: The address of a Ray cluster, or 'auto'. None starts a cluster on this machine.
        base: The configuration that the sweep's first trials started from. None reads it from `sweep.base`.

    Returns:
        All trials, and the Pareto front as a table of text.

    Raises:
        UserError: The sweep cannot run, or no trial has a score.
        Interrupted: Ctrl-C ended the search before all trials were done.
    """
    base = base or base_content(sweep)  # finds mistakes before anything is started or written
    need_writable(folder, f"sweep folder {str(folder)!r}", "make it writable, or resume a copy of it")
    if address is None:
        check_metrics(sweep, *prepare_data(base))  # once: all trials share it
    try:
        folder.mkdir(parents=True)
        new = True
    except FileExistsError:
        new = False
    try:
        return _run(sweep, folder, address, base)
    except UserError:
        if new and not os.path.lexists(folder / RUNS) and not read_trials(folder):
            shutil.rmtree(folder, ignore_errors=True)  # no trial began: the mended command may have its name
        raise


def _run(sweep: SweepConfig, folder: Path, address: str | None, base: dict[str, Any]) -> tuple[list[Trial], str]:
    """As `run`, once the folder is there."""
    with lock_folder(folder, "sweeping", patience=0), polite_end() as heard:
        in_process = fits_in_process(sweep, base, address)
        if len(read_trials(folder)) < sweep.trials:
            check_choices(folder, sweep, in_process)
        mend(folder)
        write_atomically(folder / SWEEP, sweep_text(sweep, base))
        with sweep_trackers(sweep, base, folder) as trackers:
            left = sweep.trials - len(read_trials(folder))
            if in_process:
                try:
                    search_in_process(sweep, base, folder, left, trackers)
                    keep_best(sweep, base, folder)
                except KeyboardInterrupt:
                    raise _interrupted(folder, address, heard) from None
            elif left > 0:
                with cluster(address), mark_beside(folder, None) as mark:
                    if address is not None:
                        _check_nodes(folder, mark)
                        check_metrics(sweep, *_results(ray.remote(prepare_data).remote(base)))
                    search(sweep, base, folder, left, mark, trackers)
            trials = read_trials(folder)
            if len(trials) < sweep.trials:  # Ray Tune returns normally after Ctrl-C
                raise _interrupted(folder, address, heard)
            text = report.write(folder, sweep, base, trials)
            trackers.end(sweep_outcome(sweep, folder, trials, text))
            return trials, text


def _interrupted(folder: Path, address: str | None, heard: set[int]) -> Interrupted:
    """heard: the signals beside Ctrl-C; after SIGTERM a scheduler should start the sweep again, as it does a run."""
    at = f" --address {address}" if address is not None else ""
    text = f"stopped; resume with: python -m cibl_ray.tune --resume {shlex.quote(str(folder))}{at}"
    return Interrupted(text, AGAIN if signal.SIGTERM in heard else 130)


def _check_nodes(folder: Path, mark: str | None) -> None:
    """Check that every node of the cluster sees the sweep's folder, where trials write their results.

    Raises:
        UserError: A node does not see it.
    """
    check: Any = ray.remote(same_folder)
    nodes = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]]
    _results([check.options(num_cpus=0, scheduling_strategy=node).remote(folder, mark, "--sweeps") for node in nodes])


def _results(tasks: Any) -> Any:
    """The results of Ray tasks. A UserError that a task raises is raised here as itself."""
    try:
        return ray.get(tasks)
    except ray.exceptions.RuntimeEnvSetupError as error:
        raise no_code(error) from None
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
