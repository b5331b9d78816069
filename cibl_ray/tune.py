"""`python -m cibl_ray.tune SWEEP [--field value ...]`: search for the trade-off between head and tail with Ray Tune.

SWEEP is a sweep file or the name of a shipped one (sweeps/tail_skew). Optuna proposes, ASHA stops what is behind, every trial
is a run folder of its own under SWEEP_FOLDER/trials. The search's memory is a journal of JSON lines; nothing is unpickled on
resuming. Left behind: trials.csv, best.yaml (ready to train), best.safetensors (ready to evaluate), pictures.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cibl_ray.ray_start import settle
from pipelines.errors import Interrupted, UserError, run_command
from pipelines.settings import CommandParser, split_command_line

if TYPE_CHECKING:
    from cibl_ray.config import RunConfig
    from cibl_ray.progress import Progress
    from cibl_ray.sweep import SweepConfig, Trial

SWEEP, TRIALS, JOURNAL = "sweep.json", "trials.jsonl", "search.journal"


def main() -> None:
    parser = CommandParser(
        prog="python -m cibl_ray.tune",
        usage="%(prog)s SWEEP [--name NAME] [--field value ...]\n       %(prog)s --resume FOLDER",
        description=__doc__,
    )
    parser.add_argument("--name", help="of the sweep folder; by default the sweep's name and the time")
    parser.add_argument("--sweeps", type=Path, default=Path("runs"), help="folder for sweep folders (default: runs)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the sweep in this folder")
    parser.add_argument("--address", help="of a Ray cluster, or 'auto'; by default one is started on this machine")
    name, arguments, overrides = split_command_line(parser)
    if (name is None) == (arguments.resume is None):
        raise UserError("name a sweep first (sweeps/tail_skew, say) to start one, or --resume FOLDER to go on with one")
    from cibl_ray.sweep import SweepConfig, load_sweep
    from pipelines.settings import read_config, validate

    if arguments.resume is not None:
        folder = arguments.resume.absolute()
        if not (folder / SWEEP).is_file():
            raise UserError(f"--resume {folder}: not a sweep folder, it has no {SWEEP}")
        if overrides:
            raise UserError(f"{overrides[0]}: a sweep goes on as it began; start a new one to change it")
        sweep = validate(SweepConfig, read_config(folder / SWEEP), str(folder / SWEEP))
    else:
        assert name is not None
        sweep = load_sweep(name, overrides)
        folder = (arguments.sweeps / (arguments.name or f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}")).absolute()
        if folder.exists():
            raise UserError(
                f"sweep folder {str(folder)!r} already exists; go on with --resume {folder}, or choose another --name"
            )
    settle(own=arguments.address is None)
    run(sweep, folder, arguments.address)


def run(sweep: SweepConfig, folder: Path, address: str | None) -> None:
    """Do what is left of a sweep in `folder`, and write its result."""
    from cibl_ray import sweep_report
    from cibl_ray.cluster import cluster
    from cibl_ray.sweep import read_trials, trial_config
    from pipelines.prepare import ensure_prepared

    config = trial_config(sweep, _any_params(sweep))  # a mistake is found before anything is started or written
    if address is None:
        ensure_prepared(config.data, config.seed)  # once: all trials share it
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SWEEP).write_text(json.dumps(sweep.model_dump(mode="json"), indent=1))
    left = sweep.trials - len(read_trials(folder))
    if left > 0:
        # ASHA asks Ray's state service, which lives in the dashboard, to stop a trial.
        with cluster(address, dashboard=True):
            _search(sweep, folder, left)
        if len(read_trials(folder)) < sweep.trials:  # Ray Tune itself ends in order on Ctrl-C
            raise Interrupted(f"stopped; go on with: python -m cibl_ray.tune --resume {folder}")
    trials = read_trials(folder)
    table = sweep_report.write(folder, sweep, trials)
    states = {state: sum(trial.state == state for trial in trials) for state in ("completed", "stopped", "failed")}
    print(f"\n{len(trials)} trials: " + ", ".join(f"{count} {state}" for state, count in states.items()))
    print(f"\nThe front, validation accuracy in %:\n\n{table}\n")
    print(f"Sweep folder: {folder}\n              trials.csv, best.yaml, best.safetensors, trade_off.png, tail_skew.png")


def _any_params(sweep: SweepConfig) -> dict[str, Any]:
    from cibl_ray.sweep import Choice

    return {
        key: space.values[0] if isinstance(space, Choice) else int(space.low) if space.kind == "integer" else space.low
        for key, space in sweep.search.items()
    }


def _search(sweep: SweepConfig, folder: Path, left: int) -> None:
    import optuna
    import ray
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from cibl_ray.sweep import read_trials, trial_config, trial_name

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the recorder tells what happens
    names = [f"objective_{number}" for number in range(len(sweep.objective))]
    modes: list[str] = [objective.mode for objective in sweep.objective]
    ended = {trial.name for trial in read_trials(folder)}
    begun = [json.loads(path.read_text()) for path in sorted((folder / "trials").glob("*.json"))]
    unfinished = [params for params in begun if trial_name(params) not in ended]
    sampler: Any = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=sweep.seed + len(ended)),
        "random": lambda: optuna.samplers.RandomSampler(seed=sweep.seed + len(ended)),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=sweep.seed + len(ended)),
    }[sweep.algorithm]()
    search = OptunaSearch(
        metric=names if len(names) > 1 else names[0],
        mode=modes if len(modes) > 1 else modes[0],
        points_to_evaluate=unfinished[:left] or None,
        sampler=sampler,
        study_name="sweep",
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
    )
    epochs = trial_config(sweep, _any_params(sweep)).train.epochs
    scheduler = None
    if sweep.asha is not None and sweep.asha.grace < epochs:
        scheduler = ASHAScheduler(
            time_attr="epoch",
            metric=names[0],
            mode=modes[0],
            max_t=epochs + 1,  # a trial ends by itself
            grace_period=sweep.asha.grace,
            reduction_factor=sweep.asha.reduction,
        )
    gpu = {"GPU": 1} if ray.cluster_resources().get("GPU") else {}
    given = {"sweep": sweep.model_dump(mode="json"), "folder": str(folder), "cpus": sweep.cpus}
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_trial, given=given),
            # The process that waits for a trial's workers needs no CPU; Ray Tune wants it to need something: a byte of memory.
            {"CPU": sweep.cpus, **gpu} if sweep.workers == 1 else {"memory": 1},
        ),
        param_space={key: _space(space) for key, space in sweep.search.items()},
        tune_config=tune.TuneConfig(
            num_samples=left,
            search_alg=search,
            scheduler=scheduler,
            max_concurrent_trials=sweep.concurrent or _room(sweep, gpu),
        ),
        run_config=tune.RunConfig(
            name=f"{folder.name}-{time.time_ns()}",
            storage_path=str(folder / ".ray"),
            failure_config=tune.FailureConfig(max_failures=2),
            verbose=0,
            callbacks=[_recorder(folder, sweep, left + len(ended))],
        ),
    )
    tuner.fit()


def _room(sweep: SweepConfig, gpu: dict[str, int]) -> int:
    """Trials that the cluster has room for at a time."""
    import ray

    resources = ray.cluster_resources()
    places = min(resources.get("CPU", 1) // sweep.cpus, resources["GPU"] if gpu else float("inf"))
    return max(1, int(places // sweep.workers))


def _space(space: Any) -> Any:
    from ray import tune

    from cibl_ray.sweep import Choice

    if isinstance(space, Choice):
        return tune.choice([*space.values])
    match space.kind:
        case "uniform":
            return tune.uniform(space.low, space.high)
        case "log_uniform":
            return tune.loguniform(space.low, space.high)
    return tune.randint(int(space.low), int(space.high) + 1)


def _trial(params: dict[str, Any], given: dict[str, Any]) -> None:
    """One trial, in a process of its own: a run like any other, whose epochs Ray Tune hears of."""
    import torch

    from cibl_ray.runlog import read_metrics
    from cibl_ray.sweep import SweepConfig, trial_config, trial_name
    from cibl_ray.train import train
    from cibl_ray.world import World
    from pipelines.cores import limit_cores
    from pipelines.settings import validate

    torch.set_num_threads(given["cpus"])
    limit_cores(given["cpus"])
    sweep = validate(SweepConfig, given["sweep"], "the sweep")
    config = trial_config(sweep, params)
    name = trial_name(params)
    run_folder = Path(given["folder"]) / "trials" / name
    run_folder.parent.mkdir(parents=True, exist_ok=True)
    run_folder.with_suffix(".json").write_text(json.dumps(params))
    progress = _Reported(sweep)
    try:
        for row in read_metrics(run_folder):  # of the part that was done before an interruption
            progress.epoch(row, "")
        if sweep.workers == 1:
            train(config, run_folder, run_folder.exists(), World(), progress)
        else:
            _in_workers(sweep, config, run_folder, progress)
    except Exception as error:
        # Told to the driver by way of a file, not raised: Ray Tune then tries again what a lost process left, and that alone.
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        run_folder.with_suffix(".error").write_text(f"{kind}{error}")
        if not isinstance(error, UserError):
            traceback.print_exc()


def _in_workers(sweep: SweepConfig, config: RunConfig, run_folder: Path, progress: Progress) -> None:
    """The same in several workers, for which the trial's own process only waits."""
    import ray

    from cibl_ray.cluster import Shape, launch

    gpus = bool(ray.cluster_resources().get("GPU")) and config.train.device != "cpu"
    train = config.train.model_copy(update={"device": "cuda" if gpus else "cpu"})
    shape = Shape((sweep.workers, sweep.workers), sweep.cpus, gpus, failures=2)
    launch(config.model_copy(update={"train": train}), run_folder, run_folder.exists(), shape, progress)


class _Reported:
    """`Progress` of a trial: every epoch's scores for Ray Tune."""

    def __init__(self, sweep: SweepConfig) -> None:
        self._sweep, self._told = sweep, 0

    def begin(self, total: int, done: int) -> None: ...

    def advance(self, images: int) -> None: ...

    def line(self, text: str) -> None: ...

    def close(self) -> None: ...

    def log_handler(self) -> logging.Handler:
        return logging.NullHandler()

    def epoch(self, row: dict[str, Any], text: str) -> None:
        from ray import tune

        from cibl_ray.sweep import objectives

        if row["epoch"] <= self._told:
            return
        self._told = row["epoch"]
        values = {f"objective_{number}": value for number, value in enumerate(objectives(self._sweep, row["val"]))}
        tune.report({"epoch": row["epoch"], "scores": row["val"]} | values)


def _recorder(folder: Path, sweep: SweepConfig, total: int) -> Any:
    """Runs in the driver: each trial that ends is a line in trials.jsonl and one on the terminal."""
    from ray import tune

    from cibl_ray.sweep import Trial, objectives, read_trials, trial_config, trial_name

    epochs = trial_config(sweep, _any_params(sweep)).train.epochs

    class Recorder(tune.Callback):
        done = len(read_trials(folder))

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            reached, wanted = (trial.last_result or {}).get("epoch", 0), trial.config.get("train.epochs", epochs)
            self._end(trial, "completed" if reached >= wanted else "stopped")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._end(trial, "failed", "its process was lost again and again")

        def _end(self, trial: Any, state: str, error: str | None = None) -> None:
            result, name = trial.last_result or {}, trial_name(trial.config)
            told = folder / "trials" / f"{name}.error"
            if told.exists():
                state, error = "failed", " ".join(told.read_text().split())
            ended = Trial(name, trial.config, state, result.get("epoch", 0), result.get("scores", {}), error)
            with (folder / TRIALS).open("a") as file:
                file.write(json.dumps(asdict(ended)) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.done += 1
            objective = f", objective {objectives(sweep, ended.scores)[0]:.4f}" if ended.scores else ""
            print(
                f"trial {self.done}/{total} {ended.name} {state} after {ended.epochs} epochs{objective}{_tail(ended)}",
                flush=True,
            )

    return Recorder()


def _tail(trial: Trial) -> str:
    return f": {trial.error}" if trial.error else "  " + json.dumps(trial.params)


if __name__ == "__main__":
    run_command(main)
