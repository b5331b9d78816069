"""The search of a sweep: Optuna proposes trials, Ray Tune runs them, ASHA stops those that are behind."""

from __future__ import annotations

import json
import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from cibl_ray.cluster.options import places
from cibl_ray.cluster.progress import start_relay
from cibl_ray.cluster.ray_workarounds import TrialPlaces
from cibl_ray.tracking.trackers import Trackers
from cibl_ray.tuning.config import Choice, SweepConfig
from cibl_ray.tuning.folder import OF_RAY, RUNS, read_trials, record_trial
from cibl_ray.tuning.journal import STUDY, open_journal
from cibl_ray.tuning.sweep import Trial, most_epochs, trial_name
from cibl_ray.tuning.track import track_trial
from cibl_ray.tuning.trial import UNWRITTEN, objective_names, trial
from pipelines.common.errors import UserError

_ANSWER = 10.0  # seconds for the relay to say why a trial could not begin


def search(
    sweep: SweepConfig, base: dict[str, Any], folder: Path, left: int, mark: str | None, trackers: Trackers | None = None
) -> None:
    """Run trials in the cluster that this process is connected to, until `left` more have ended.

    Args:
        sweep: The sweep.
        base: The configuration that every trial starts from.
        folder: The sweep folder.
        left: The number of trials to run.
        mark: The folder's mark (`mark_beside`), by which nodes check that they see the same folder.
        trackers: The sweep's; None: it has none.

    Raises:
        UserError: The cluster has no room for a trial.
    """
    gpus = base["train"]["device"] != "cpu" and bool(ray.cluster_resources().get("GPU"))
    room = places([node["Resources"] for node in ray.nodes() if node["Alive"]], sweep.cpus, gpus) // sweep.workers
    if room == 0:
        raise UserError(f"no room for a trial of {sweep.workers} workers with {sweep.cpus} CPUs each; lower workers or cpus")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # _Recorder prints what happens
    names = objective_names(sweep)
    modes: list[str] = [objective.mode for objective in sweep.objective]
    storage = open_journal(folder)
    proposed = _proposed(storage)
    ended = {one.name for one in read_trials(folder)}
    waiting = [one.system_attrs.get("fixed_params") for one in proposed if one.state.name == "WAITING"]
    begun = [params for path in sorted((folder / RUNS).glob("*.json")) if (params := _read(path)) is not None]
    unfinished = [params for params in begun if trial_name(params) not in ended and params not in waiting]
    seed = sweep.seed + max(len(proposed), len(ended))  # an interrupted search does not repeat its proposals
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
        study_name=STUDY,
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
    trial_places = TrialPlaces() if sweep.workers > 1 else None
    given = {
        "sweep": sweep.model_dump(mode="json"), "base": base, "folder": str(folder), "cpus": sweep.cpus, "mark": mark,
        "places": trial_places.queue if trial_places is not None else None, "relay": start_relay(),
    }  # fmt: skip
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(trial, given=given),
            # With several workers the trial's own process only waits. Ray Tune needs a resource for it: a byte.
            {"CPU": sweep.cpus, "GPU": int(gpus)} if sweep.workers == 1 else {"memory": 1},
        ),
        param_space={key: _space(space) for key, space in sweep.search.items()},
        tune_config=tune.TuneConfig(
            num_samples=left,
            search_alg=search,
            scheduler=scheduler,
            max_concurrent_trials=min(sweep.concurrent or room, room),
            # A reused process has everything imported and compiled. With several threads it is not reused: the thread pool of
            # the last trial slows OpenMP down.
            reuse_actors=sweep.workers == 1 and sweep.cpus == 1 and not gpus,
        ),
        run_config=tune.RunConfig(
            name=f"{folder.name}-{time.time_ns()}",
            storage_path=str(folder / OF_RAY),
            failure_config=tune.FailureConfig(max_failures=2),
            verbose=0,
            callbacks=[_Recorder(folder, sweep, base, given["relay"], trial_places, trackers or Trackers([]))],
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(folder / OF_RAY, ignore_errors=True)  # what Ray Tune keeps for itself: the sweep's own files are all


def _read(path: Path) -> dict[str, Any] | None:
    """A trial's parameters; None where a full disk cut them short, or it is another file: the search proposes others."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and trial_name(content) == path.stem else None


def _proposed(storage: Any) -> list[Any]:
    """All trials that the search proposed before, from its journal."""
    try:
        return [*storage.get_all_trials(storage.get_study_id_from_name(STUDY))]
    except KeyError:
        return []


def _space(space: Any) -> Any:
    """A range or choice of a sweep file as Ray Tune's."""
    if isinstance(space, Choice):
        return tune.choice([*space.values])
    match space.kind:
        case "uniform":
            return tune.uniform(space.low, space.high)
        case "log_uniform":
            return tune.loguniform(space.low, space.high)
    return tune.randint(int(space.low), int(space.high) + 1)


class _Recorder(tune.Callback):
    """Ray Tune calls this in the driver: each trial that ends becomes a line of trials.jsonl and one on the terminal."""

    def __init__(
        self,
        folder: Path,
        sweep: SweepConfig,
        base: dict[str, Any],
        relay: Any,
        places: TrialPlaces | None,
        trackers: Trackers,
    ) -> None:
        self._folder, self._sweep, self._base, self._places, self._trackers = folder, sweep, base, places, trackers
        self._relay = relay
        self._unwritten: dict[str, str] = {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        reached = (trial.last_result or {}).get("epoch", 0)
        wanted = trial.config.get("train.epochs", self._base["train"]["epochs"])
        self._end(trial, "completed" if reached >= wanted else "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        with suppress(RayError):
            notes = ray.get(self._relay.take.remote(), timeout=_ANSWER)
            self._unwritten |= dict(content for kind, content in notes if kind == UNWRITTEN)
        self._end(trial, "failed", self._unwritten.get(trial_name(trial.config), "its process was lost three times"))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ray Tune restarts a trial whose process was lost."""
        if self._places is not None:
            self._places.free(trial_name(trial.config))

    def _end(self, trial: Any, state: str, error: str | None = None) -> None:
        if self._places is not None:
            self._places.free(trial_name(trial.config))
        result, name = trial.last_result or {}, trial_name(trial.config)
        failed = self._folder / RUNS / f"{name}.error"
        if failed.exists():
            state, error = "failed", " ".join(failed.read_text().split())
        scores = {} if state == "failed" else result.get("scores", {})
        ended = Trial(name, trial.config, state, result.get("epoch", 0), scores, error)
        record_trial(self._folder, self._sweep, ended)
        track_trial(self._trackers, ended)
