"""`python -m cibl_ray.tune SWEEP [--field value ...]`: search for the trade-off between head and tail with Ray Tune.

SWEEP is a sweep file or the name of a shipped one (sweeps/tail_skew). Optuna proposes, ASHA stops what is behind, every trial
is a run folder of its own under SWEEP_FOLDER/trials. The search's memory is a journal of JSON lines; nothing is unpickled on
resuming. Left behind: trials.csv, best.yaml (ready to train), best.safetensors (ready to evaluate), pictures.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cibl_ray.cluster.environment import settle
from cibl_ray.run.folder import lock_folder, same_name
from pipelines.common.errors import CommandParser, Interrupted, UserError, run_command
from pipelines.common.files import locked, write_atomically
from pipelines.common.settings import split_command_line

if TYPE_CHECKING:
    from cibl_ray.config import RunConfig
    from cibl_ray.run.progress import Progress
    from cibl_ray.tuning.sweep import SweepConfig, Trial

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
    if arguments.resume is not None and arguments.name is not None:
        same_name(arguments.name, str(arguments.resume))
    from cibl_ray.tuning.sweep import load_sweep, read_sweep

    base = None
    if arguments.resume is not None:
        folder = arguments.resume.absolute()
        if not (folder / SWEEP).is_file():
            raise UserError(f"--resume {folder}: not a sweep folder, it has no {SWEEP}")
        if overrides:
            raise UserError(f"{overrides[0]}: a sweep goes on as it began; start a new one to change it")
        sweep, base = read_sweep(folder / SWEEP)
    else:
        assert name is not None
        sweep = load_sweep(name, overrides)
        folder = (arguments.sweeps / (arguments.name or f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}")).absolute()
        if folder.exists():
            raise UserError(
                f"sweep folder {str(folder)!r} already exists; go on with --resume {folder}, or choose another --name"
            )
    settle(own=arguments.address is None)
    run(sweep, folder, arguments.address, base)


def run(sweep: SweepConfig, folder: Path, address: str | None, base: dict[str, Any] | None = None) -> None:
    """Do what is left of a sweep in `folder`, and write its result. base: as it began with; None: of the sweep's file."""
    import ray

    from cibl_ray.cluster.launch import cluster, polite_end
    from cibl_ray.cluster.shared_folder import mark_beside
    from cibl_ray.tuning import report as sweep_report
    from cibl_ray.tuning.sweep import base_content, check_metrics, read_trials, sweep_text

    base = base or base_content(sweep)  # a mistake is found before anything is started or written
    if address is None:
        check_metrics(sweep, *_prepared(base))  # once: all trials share it
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, "sweeping", patience=0):
        write_atomically(folder / SWEEP, sweep_text(sweep, base))
        ended = read_trials(folder)
        write_atomically(
            folder / TRIALS, "".join(json.dumps(asdict(trial)) + "\n" for trial in ended)
        )  # without a line cut short
        left = sweep.trials - len(ended)
        if left > 0:
            # Whether the controller of a trial's workers still lives is asked of a service in Ray's dashboard; else the cores
            # are the trials'.
            with cluster(address, dashboard=sweep.workers > 1), polite_end(), mark_beside(folder, None) as mark:
                if address is not None:
                    _check_nodes(folder, mark)
                    check_metrics(sweep, *_told(ray.remote(_prepared).remote(base)))
                _search(sweep, base, folder, left, mark)
        trials = read_trials(folder)
        if len(trials) < sweep.trials:  # Ray Tune itself ends in order on Ctrl-C
            at = f" --address {address}" if address is not None else ""
            raise Interrupted(f"stopped; go on with: python -m cibl_ray.tune --resume {shlex.quote(str(folder))}{at}")
        table = sweep_report.write(folder, sweep, base, trials)
    states = {state: sum(trial.state == state for trial in trials) for state in ("completed", "stopped", "failed")}
    print(f"\n{len(trials)} trials: " + ", ".join(f"{count} {state}" for state, count in states.items()))
    print(f"\nThe front, validation, in %:\n\n{table}\n")
    pictures = [name for name in ("trade_off.png", "tail_skew.png") if (folder / name).exists()]
    print(f"Sweep folder: {folder}\n              trials.csv, best.yaml, best.safetensors, {', '.join(pictures)}")


def _prepared(base: dict[str, Any]) -> tuple[set[str], bool]:
    """Prepare the data of a sweep: the groups of classes that validation has images of, and whether there is such a split."""
    from cibl_ray.tuning.sweep import trial_config
    from pipelines.prepare.build import ensure_prepared
    from pipelines.prepare.pictures import shot_groups, thirds

    config = trial_config(base, {})
    prepared = ensure_prepared(config.data, config.seed)
    if "val" not in prepared.splits:
        return set(), False
    groups = zip(prepared.splits["val"].counts, shot_groups(prepared.train_counts), thirds(prepared.train_counts), strict=True)
    return {name for count, *names in groups if count for name in names}, True


def _check_nodes(folder: Path, mark: str | None) -> None:
    """Raise UserError where a node of the cluster does not see the sweep's folder, in which trials leave their results."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cibl_ray.cluster.shared_folder import same_folder

    check: Any = ray.remote(same_folder)
    nodes = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]]
    _told([check.options(num_cpus=0, scheduling_strategy=node).remote(folder, mark, "--sweeps") for node in nodes])


def _told(tasks: Any) -> Any:
    """What Ray's tasks return; a user's mistake that one of them finds is raised as such."""
    import ray

    try:
        return ray.get(tasks)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None


def _read(path: Path) -> dict[str, Any] | None:
    """A trial's parameters; None where a full disk cut them short: the search proposes others in their stead."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _search(sweep: SweepConfig, base: dict[str, Any], folder: Path, left: int, mark: str | None) -> None:
    import optuna
    import ray
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from cibl_ray.cluster.launch import places
    from cibl_ray.tuning.sweep import most_epochs, read_trials, trial_name

    gpus = base["train"]["device"] != "cpu" and bool(ray.cluster_resources().get("GPU"))
    room = places([node["Resources"] for node in ray.nodes() if node["Alive"]], sweep.cpus, gpus) // sweep.workers
    if room == 0:
        raise UserError(f"no room for a trial of {sweep.workers} workers with {sweep.cpus} CPUs each; lower workers or cpus")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the recorder tells what happens
    names = [f"objective_{number}" for number in range(len(sweep.objective))]
    modes: list[str] = [objective.mode for objective in sweep.objective]
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    proposed = _proposed(storage)
    ended = {trial.name for trial in read_trials(folder)}
    waiting = [trial.system_attrs.get("fixed_params") for trial in proposed if trial.state.name == "WAITING"]
    begun = [params for path in sorted((folder / "trials").glob("*.json")) if (params := _read(path)) is not None]
    unfinished = [params for params in begun if trial_name(params) not in ended and params not in waiting]
    seed = sweep.seed + len(proposed)  # what was proposed before an interruption is not proposed again
    sampler: Any = {
        "tpe": optuna.samplers.TPESampler,
        "random": optuna.samplers.RandomSampler,
        "nsga2": optuna.samplers.NSGAIISampler,
    }[sweep.algorithm](seed=seed)
    search = OptunaSearch(
        metric=names if len(names) > 1 else names[0],
        mode=modes if len(modes) > 1 else modes[0],
        points_to_evaluate=unfinished[:left] or None,
        sampler=sampler,
        study_name="sweep",
        storage=storage,
    )
    epochs = most_epochs(sweep, base)
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
    given = {"sweep": sweep.model_dump(mode="json"), "base": base, "folder": str(folder), "cpus": sweep.cpus, "mark": mark}
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_trial, given=given),
            # The process that waits for a trial's workers needs no CPU; Ray Tune wants it to need something: a byte of memory.
            {"CPU": sweep.cpus, "GPU": int(gpus)} if sweep.workers == 1 else {"memory": 1},
        ),
        param_space={key: _space(space) for key, space in sweep.search.items()},
        tune_config=tune.TuneConfig(
            num_samples=left,
            search_alg=search,
            scheduler=scheduler,
            max_concurrent_trials=min(sweep.concurrent or room, room),
            # The next trial finds everything imported and compiled. Not with several threads each: the pool of threads that a
            # former trial leaves makes OpenMP's waiting slower.
            reuse_actors=sweep.workers == 1 and sweep.cpus == 1 and not gpus,
        ),
        run_config=tune.RunConfig(
            name=f"{folder.name}-{time.time_ns()}",
            storage_path=str(folder / ".ray"),
            failure_config=tune.FailureConfig(max_failures=2),
            verbose=0,
            callbacks=[_recorder(folder, sweep, base)],
        ),
    )
    tuner.fit()


def _proposed(storage: Any) -> list[Any]:
    """The search's earlier proposals, from the journal."""
    try:
        return [*storage.get_all_trials(storage.get_study_id_from_name("sweep"))]
    except KeyError:
        return []


def _space(space: Any) -> Any:
    from ray import tune

    from cibl_ray.tuning.sweep import Choice

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

    from cibl_ray.cluster.shared_folder import same_folder
    from cibl_ray.run.log import read_metrics
    from cibl_ray.training.fit import fit
    from cibl_ray.tuning.sweep import SweepConfig, trial_config, trial_name
    from cibl_ray.world import World
    from pipelines.common.cores import limit_cores
    from pipelines.common.settings import validate

    torch.set_num_threads(given["cpus"])
    limit_cores(given["cpus"])
    sweep = validate(SweepConfig, given["sweep"], "the sweep")
    name = trial_name(params)
    same_folder(Path(given["folder"]), given["mark"], "--sweeps")  # a node that has joined since the sweep began
    run_folder = Path(given["folder"]) / "trials" / name
    run_folder.parent.mkdir(parents=True, exist_ok=True)
    failed = run_folder.with_suffix(".error")
    failed.unlink(missing_ok=True)
    try:
        # The same parameters may be proposed twice: the second waits, and tells what the first has done.
        with locked(run_folder.with_suffix(".lock")):
            write_atomically(run_folder.with_suffix(".json"), json.dumps(params))
            config = trial_config(given["base"], params)
            progress = _Reported(sweep, config.train.epochs)
            for row in read_metrics(run_folder):  # of an earlier proposal, or of the part before an interruption
                progress.epoch(row, "")
            if sweep.workers == 1:
                fit(config, run_folder, run_folder.exists(), World(), progress)
            else:
                _in_workers(sweep, config, run_folder, progress)
            progress.finish()
    except Exception as error:
        # Told to the driver by way of a file, not raised: Ray Tune then tries again what a lost process left, and that alone.
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        failed.write_text(f"{kind}{error}")
        if not isinstance(error, UserError):
            traceback.print_exc()


def _in_workers(sweep: SweepConfig, config: RunConfig, run_folder: Path, progress: Progress) -> None:
    """The same in several workers, for which the trial's own process only waits."""
    import ray

    from cibl_ray.cluster.launch import Shape, launch
    from cibl_ray.run.log import read_metrics

    gpus = bool(ray.cluster_resources().get("GPU")) and config.train.device != "cpu"
    train = config.train.model_copy(update={"device": "cuda" if gpus else "cpu"})
    shape = Shape((sweep.workers, sweep.workers), sweep.cpus, gpus, failures=2)
    launch(config.model_copy(update={"train": train}), run_folder, run_folder.exists(), shape, progress)
    for row in read_metrics(run_folder):  # scores that did not arrive on the way here
        progress.epoch(row, "")


class _Reported:
    """`Progress` of a trial of `epochs`: every epoch's scores for Ray Tune.

    The last one's when all is written (`finish`): ASHA may end a trial at any report, and this one is complete.
    """

    def __init__(self, sweep: SweepConfig, epochs: int) -> None:
        self._sweep, self._epochs, self._told = sweep, epochs, 0
        self._last: dict[str, Any] | None = None

    def begin(self, total: int, done: int) -> None: ...

    def advance(self, images: int) -> None: ...

    def line(self, text: str) -> None: ...

    def close(self) -> None: ...

    def log_handler(self) -> logging.Handler:
        return logging.NullHandler()

    def epoch(self, row: dict[str, Any], text: str) -> None:
        if row["epoch"] <= self._told:
            return
        if "val" not in row:
            raise UserError("no validation split, and a sweep must not choose on the test set; set data.val_fraction: 0.1")
        self._told = row["epoch"]
        if row["epoch"] == self._epochs:
            self._last = row
        else:
            self._report(row)

    def finish(self) -> None:
        if self._last is not None:
            self._report(self._last)

    def _report(self, row: dict[str, Any]) -> None:
        from ray import tune

        from cibl_ray.tuning.sweep import objectives

        values = {f"objective_{number}": value for number, value in enumerate(objectives(self._sweep, row["val"]))}
        tune.report({"epoch": row["epoch"], "scores": row["val"]} | values)


def _recorder(folder: Path, sweep: SweepConfig, base: dict[str, Any]) -> Any:
    """Runs in the driver: each trial that ends is a line in trials.jsonl and one on the terminal."""
    from ray import tune

    from cibl_ray.tuning.sweep import Trial, objectives, read_trials, trial_name

    class Recorder(tune.Callback):
        done = len(read_trials(folder))

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            reached = (trial.last_result or {}).get("epoch", 0)
            wanted = trial.config.get("train.epochs", base["train"]["epochs"])
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
                f"trial {self.done}/{sweep.trials} {ended.name} {state} after {ended.epochs} epochs{objective}{_tail(ended)}",
                flush=True,
            )

    return Recorder()


def _tail(trial: Trial) -> str:
    return f": {trial.error}" if trial.error else "  " + json.dumps(trial.params)


if __name__ == "__main__":
    run_command(main)
