"""The report of a sweep: a table, the best configuration and checkpoint, two pictures."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cibl_ray.config import save_config
from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.run.folder import BEST, BEST_RESULT, CHECKPOINTS, LAST, RESULT, set_aside
from cibl_ray.tuning.config import METRICS, SweepConfig
from cibl_ray.tuning.folder import BEST_CONFIG, OVER_SKEW, RUNS, TABLE, TRADE_OFF
from cibl_ray.tuning.sweep import Trial, axes, best, front, objectives, scored, trial_config
from pipelines.common.errors import UserError
from pipelines.common.files import write_atomically
from pipelines.common.fonts import save

log = logging.getLogger(__name__)


def write(folder: Path, sweep: SweepConfig, base: dict[str, Any], trials: list[Trial]) -> str:
    """Write trials.csv, best.yaml, best.safetensors and the pictures.

    Without the best trial's checkpoint there is no best.safetensors, and a warning says how to train it again.

    Args:
        folder: The sweep folder.
        sweep: The sweep.
        base: The configuration that every trial starts from.
        trials: All trials that have ended.

    Returns:
        The Pareto front as a table of text.

    Raises:
        UserError: No trial has a score. trials.csv is written all the same.
    """
    _table(folder / TABLE, sweep, trials)
    compared = scored(trials)
    chosen = best(sweep, trials)
    if chosen is None:
        first = next((f", the first: {trial.error}" for trial in trials if trial.error), "")
        raise UserError(f"no trial has a finite validation score{first}; all of them are in {folder / 'trials.csv'}")
    save_config(trial_config(base, chosen.params), folder / BEST_CONFIG)
    _keep_checkpoint(folder, chosen)
    first, second = axes(sweep, compared)
    points = np.array([[_percent(trial.scores, first), _percent(trial.scores, second)] for trial in compared])
    modes: dict[str, str] = {objective.metric: objective.mode for objective in sweep.objective}
    on_front = front(points * [-1 if modes.get(metric) == "min" else 1 for metric in (first, second)])
    _trade_off(folder / TRADE_OFF, points, on_front, (first, second), compared.index(chosen))
    _over_skew(folder / OVER_SKEW, compared, (first, second))
    lines = [f"{'trial':<12}{first:>8}{second:>8}{'overall':>9}  epochs  parameters"]
    shown = {tuple(points[compared.index(chosen)])}
    for i in np.argsort(-points[:, 0], kind="stable"):
        trial = compared[i]
        if on_front[i] and (trial is chosen or tuple(points[i]) not in shown):  # of equal trials one
            shown.add(tuple(points[i]))
            values = ", ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in trial.params.items())
            mark = "  <- best" if trial is chosen else ""
            overall = _percent(trial.scores, "overall")
            lines.append(
                f"{trial.name:<12}{points[i, 0]:>8.1f}{points[i, 1]:>8.1f}{overall:>9.1f}{trial.epochs:>8}  {values}{mark}"
            )
    return "\n".join(lines)


def _keep_checkpoint(folder: Path, trial: Trial) -> None:
    """Copy the checkpoint of the best trial to best.safetensors."""
    source, kept = folder / RUNS / trial.name / CHECKPOINTS / LAST, folder / BEST
    try:
        load_checkpoint(source)
    except UserError as error:
        again = f"train it again: python -m cibl_ray.train {folder / BEST_CONFIG} --name NAME"
        log.warning("%s is not written: %s; %s", kept, error, again)
    else:
        write_atomically(kept, source.read_bytes())
        result = folder / RUNS / trial.name / RESULT
        if result.is_file():  # not of a trial that was stopped early
            write_atomically(folder / BEST_RESULT, result.read_bytes())
        else:
            (folder / BEST_RESULT).unlink(missing_ok=True)
        return
    if os.path.lexists(kept):  # another trial's, perhaps
        log.warning("the earlier %s is kept as %s", kept, set_aside(kept))


def _percent(scores: dict[str, float], metric: str) -> float:
    return scores.get(metric, math.nan) * (1 if metric == "loss" else 100)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(path: Path, sweep: SweepConfig, trials: list[Trial]) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["trial", "state", "epochs", *sweep.search, "objective", *METRICS, "error"])
    for trial in trials:
        params = [trial.params.get(key) for key in sweep.search]
        objective = objectives(sweep, trial.scores)[0] if trial.scores else None
        scores = [trial.scores.get(metric) for metric in METRICS]
        writer.writerow([trial.name, trial.state, trial.epochs, *params, objective, *scores, trial.error])
    write_atomically(path, file.getvalue())


def _trade_off(path: Path, points: np.ndarray, on_front: np.ndarray, names: tuple[str, str], chosen: int) -> None:
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    plot = figure.add_subplot()
    plot.scatter(*points[~on_front].T, color="#8a8a8a", label="trial")
    order = points[on_front][np.argsort(points[on_front][:, 0])]
    plot.plot(*order.T, marker="o", color="#c8553d", label="Pareto front")
    plot.scatter(
        points[chosen, 0], points[chosen, 1], s=140, facecolors="none", edgecolors="black", label="best by the objective"
    )
    plot.set(xlabel=f"{names[0]}, validation{_unit(names[0])}", ylabel=f"{names[1]}, validation{_unit(names[1])}")
    plot.legend(frameon=False)
    plot.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _unit(metric: str) -> str:
    return "" if metric == "loss" else ", %"


def _over_skew(path: Path, trials: list[Trial], names: tuple[str, str]) -> None:
    """Accuracy against λ, where λ was searched."""
    key = "loss.tail_skew"
    searched = [trial for trial in trials if key in trial.params]
    if not searched:
        return
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    plot = figure.add_subplot()
    skews = [trial.params[key] for trial in searched]
    for name, color in ((names[0], "#2a6f97"), ("overall", "black"), (names[1], "#c8553d")):
        values = [_percent(trial.scores, name) for trial in searched]
        faces = ["none" if trial.state == "stopped" else color for trial in searched]
        plot.scatter(skews, values, edgecolors=color, facecolors=faces)
        plot.scatter([], [], color=color, label=name)
    if any(trial.state == "stopped" for trial in searched):
        plot.scatter([], [], edgecolors="black", facecolors="none", label="stopped early")
    if min(skews) > 0:
        plot.set_xscale("log")
    else:  # λ = 0 is cross-entropy: it is drawn left of the others
        plot.set_xscale("symlog", linthresh=min((skew for skew in skews if skew > 0), default=1.0))
    plot.set(xlabel="tail-skew weight λ", ylabel="validation, %")
    plot.set_ylim(bottom=0)
    plot.legend(frameon=False)
    plot.spines[["top", "right"]].set_visible(False)
    save(figure, path)
