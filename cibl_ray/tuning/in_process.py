"""The search of a sweep in this process: for trials that train a head on computed features, and take a second or two."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import optuna

from cibl_ray.config import RunConfig
from cibl_ray.hardware import resolve
from cibl_ray.run.progress import Silent
from cibl_ray.tracking.trackers import Trackers
from cibl_ray.training.fit import fit
from cibl_ray.training.trainer import Trainer
from cibl_ray.tuning.config import AshaConfig, Choice, Range, SweepConfig
from cibl_ray.tuning.folder import RUNS, read_trials, record_trial
from cibl_ray.tuning.journal import STUDY, open_journal
from cibl_ray.tuning.sweep import Trial, best, objectives, trial_config, trial_name
from cibl_ray.tuning.track import track_trial
from cibl_ray.world import World
from pipelines.common.errors import UserError
from pipelines.prepare.build import ensure_prepared, prepared_folder
from pipelines.prepare.prepared import Prepared

log = logging.getLogger(__name__)


def fits_in_process(sweep: SweepConfig, base: dict[str, Any], address: str | None) -> bool:
    """Whether every trial trains a head on features, in one worker of this machine."""
    always_head = base["train"]["tune"] == "head" and "train.tune" not in sweep.search
    return always_head and sweep.workers == 1 and address is None


def search_in_process(sweep: SweepConfig, base: dict[str, Any], folder: Path, left: int, trackers: Trackers) -> None:
    """Run trials one after the other until `left` more have ended. ASHA does not stop any: they are short.

    Args:
        sweep: The sweep.
        base: The configuration that every trial starts from.
        folder: The sweep folder.
        left: The number of trials to run.
        trackers: The sweep's.
    """
    if sweep.concurrent is not None or sweep.cpus > 1 or sweep.asha not in (None, AshaConfig()):
        log.warning("trials train a head on features, one after another in this process: concurrent, cpus and asha do nothing")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    before = len(read_trials(folder))
    samplers: dict[str, Any] = {
        "tpe": optuna.samplers.TPESampler,
        "random": optuna.samplers.RandomSampler,
        "nsga2": optuna.samplers.NSGAIISampler,
    }
    study = optuna.create_study(
        storage=open_journal(folder),
        study_name=STUDY,
        load_if_exists=True,
        sampler=samplers[sweep.algorithm](seed=sweep.seed + before),  # a resumed search does not repeat its proposals
        directions=["maximize" if objective.mode == "max" else "minimize" for objective in sweep.objective],
    )
    prepared: dict[Path, Prepared] = {}
    known = {trial.name: trial for trial in read_trials(folder)}
    for _ in range(left):
        proposal = study.ask()
        params = {key: _propose(proposal, key, space) for key, space in sweep.search.items()}
        ended = known.get(trial_name(params)) or _train(base, params, prepared)
        known[ended.name] = ended
        if ended.scores:
            study.tell(proposal, objectives(sweep, ended.scores))
        else:
            study.tell(proposal, state=optuna.trial.TrialState.FAIL)
        record_trial(folder, sweep, ended)
        track_trial(trackers, ended)


def keep_best(sweep: SweepConfig, base: dict[str, Any], folder: Path) -> None:
    """Train the best trial once more, as a run in the folder's `trials`: a hundred networks are not kept."""
    chosen = best(sweep, read_trials(folder))
    if chosen is not None:
        run = folder / RUNS / chosen.name
        run.parent.mkdir(exist_ok=True)
        fit(trial_config(base, chosen.params), run, run.exists(), World(), Silent())


def _propose(proposal: optuna.Trial, key: str, space: Range | Choice) -> Any:
    if isinstance(space, Choice):  # by number: Optuna keeps no mappings
        return space.values[proposal.suggest_categorical(key, range(len(space.values)))]
    if space.kind == "integer":
        return proposal.suggest_int(key, int(space.low), int(space.high))
    return proposal.suggest_float(key, space.low, space.high, log=space.kind == "log_uniform")


def _train(base: dict[str, Any], params: dict[str, Any], prepared: dict[Path, Prepared]) -> Trial:
    """Train one trial to its last epoch, and score it on validation."""
    name = trial_name(params)
    try:
        config = resolve(trial_config(base, params))
        scores = _scores(config, prepared)
    except UserError as error:
        return Trial(name, params, "failed", 0, {}, str(error))
    return Trial(name, params, "completed", config.train.epochs, scores)


def _scores(config: RunConfig, prepared: dict[Path, Prepared]) -> dict[str, float]:
    place = prepared_folder(config.data, config.seed)
    if place not in prepared:
        prepared[place] = ensure_prepared(config.data, config.seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(config, prepared[place], Path(scratch))
        for _ in range(config.train.epochs):
            trainer.train_epoch()
        scores = trainer.evaluate("val")
    assert scores is not None
    return scores.numbers()
