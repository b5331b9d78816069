"""What a run ends with: the content of result.json, the pictures, and the report that is printed."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from cibl_ray.evaluation.confusion import save_confusion
from cibl_ray.evaluation.metrics import Scores, heading, table
from cibl_ray.evaluation.pictures import save_accuracy_by_class, save_learning_curves
from cibl_ray.evaluation.tail_shift import TailShift
from cibl_ray.hardware import describe
from cibl_ray.run.folder import BY_CLASS, CONFIG, CONFUSION, CURVES, HISTOGRAM, RESULT
from cibl_ray.run.progress import Progress
from cibl_ray.tracking.base import Outcome
from cibl_ray.training.advice import classes_at_zero, next_steps, uses
from cibl_ray.training.folds import CrossValidated
from cibl_ray.training.trainer import Trainer
from pipelines.loaders.reading import eval_rule

_PHOTOGRAPHS = 64  # pixels a side; people cannot recognise smaller images


@dataclass(frozen=True)
class Finished:
    """A run that is trained and scored, on rank 0.

    Attributes:
        trainer: Of the run.
        found: What `Trainer.fit` returned: the split, and 'last' and 'best' with epoch, scores and tail shift.
        folds: How many heads were cross-validated; 0: none.
        crossed: What cross-validation found; None: there was none.
        rows: The rows of the log, one an epoch.
    """

    trainer: Trainer
    found: dict[str, Any]
    folds: int
    crossed: CrossValidated | None
    rows: list[dict[str, Any]]

    @property
    def split(self) -> str:
        """The split that was scored: 'test', or 'val' where there is no test split."""
        return str(self.found["split"])

    @property
    def kinds(self) -> list[str]:
        """'last', and 'best' where validation chose an epoch."""
        return [name for name in ("last", "best") if name in self.found]

    @property
    def scores(self) -> dict[str, Scores]:
        """The scores of each kind, by a title that names the epoch."""
        return {f"{name} (epoch {self.found[name]['epoch']})": self.found[name]["scores"] for name in self.kinds}

    @property
    def shifts(self) -> dict[str, TailShift]:
        """The tail shift of each kind, where images were held out to choose one."""
        shifts = {name: self.found[name]["tail_shift"] for name in self.kinds if "tail_shift" in self.found[name]}
        return shifts if self.crossed is None else shifts | {"last": self.crossed.shift}

    @property
    def shows_confusion(self) -> bool:
        """Whether the images are large enough to show the ones that the network confuses."""
        return self.trainer.config.data.size >= _PHOTOGRAPHS and self.trainer.evaluator.outputs is not None


def result_content(finished: Finished) -> dict[str, Any]:
    """The content of result.json."""
    trainer, found, rows = finished.trainer, finished.found, finished.rows
    content = dict(found)
    if finished.crossed is not None:
        content["folds"] = finished.crossed.dump()
    shifts = finished.shifts
    for name in finished.kinds:
        content[name] = {**found[name], "scores": asdict(found[name]["scores"])}
        if name in shifts:
            content[name]["tail_shift"] = shifts[name].dump()
    return content | {
        "seconds": sum(row["seconds"].get("epoch", 0.0) for row in rows),
        "time": {name: seconds + trainer.spent.get(name, 0.0) for name, seconds in _time(rows).items()},
        "classes": trainer.prepared.classes,  # of the scores' `per_class`, in order
        # No rows: a log that was lost.
        "images_per_s": statistics.median([row["rate"].get("images_per_s", 0.0) for row in rows] or [0.0]),
        "passes": asdict(trainer.passes),  # of an unbroken run as configured now
        "parameters": sum(parameter.numel() for parameter in trainer.network.classifying_parameters()),
        "workers": trainer.world.size,
        "loader": trainer.train_loaders[0].name,
        "data": trainer.prepared.digests,
        "code": sorted({row.get("code", "unknown") for row in rows}),
        "hardware": describe(trainer.config.train.device),
    }


def save_pictures(finished: Finished) -> None:
    """Draw the learning curves, the accuracy of each class and, of large images, which classes are confused."""
    trainer, scores = finished.trainer, finished.scores
    folder, prepared, outputs = trainer.folder, trainer.prepared, trainer.evaluator.outputs
    if finished.rows:
        save_learning_curves(folder / CURVES, finished.rows)
    panels = _panels(finished.found, scores)
    save_accuracy_by_class(folder / BY_CLASS, prepared.classes, prepared.train_counts, panels)
    if finished.shows_confusion and outputs is not None:
        save_confusion(folder, prepared, finished.split, *outputs, eval_rule(trainer.config.data))


def outcome(finished: Finished) -> Outcome:
    """What trackers get: the final scores, and the files that are in the run folder."""
    scores, folder = finished.scores, finished.trainer.folder
    final = {f"{finished.split}/{name}": score.numbers() for name, score in zip(finished.kinds, scores.values(), strict=True)}
    files = [folder / name for name in (CONFIG, RESULT, HISTOGRAM, CURVES, BY_CLASS, *CONFUSION)]
    return Outcome(final, table(scores), [path for path in files if path.is_file()])


def print_report(finished: Finished, seconds: dict[str, float], progress: Progress) -> None:
    """Print the scores, what may be done about them, and where the files are.

    Args:
        finished: The run.
        seconds: How the time was spent: `time` of `result_content`.
        progress: Prints the lines.
    """
    trainer, scores, crossed = finished.trainer, finished.scores, finished.crossed
    config, folder, prepared = trainer.config, trainer.folder, trainer.prepared
    progress.line(f"\n{heading(f'the {finished.split} split')}\n")
    progress.line(table(scores))
    if crossed is not None:
        progress.line(f"\n{heading(f'the training images, by {finished.folds} heads that were not trained on them')}\n")
        progress.line(table({"mean ± spread": crossed.pooled}, {"mean ± spread": crossed.of_each}))
    shifts = finished.shifts
    chosen = shifts.get("best", shifts.get("last"))
    shifted = chosen is not None and chosen.shift != 0
    if chosen is not None and shifted:
        chooser = "Validation chooses" if crossed is None else "The held-out training images choose"
        progress.line(f"\n{chooser} {chosen.line()}; the scores with it: evaluate RUN --tail-shift auto")
    judged = [*scores.values()][-1]
    scored = prepared.splits[finished.split].counts
    if zero := classes_at_zero(config, prepared.classes, prepared.train_counts, scored, judged, shifted, folder):
        progress.line(f"\n{zero}")
    if "best" not in finished.found and crossed is None and config.train.epochs:
        progress.line("\nNo validation split, so no best epoch: data.val_fraction carves one out.")
    progress.line(f"\nTime: {_shares(seconds)}")
    progress.line(f"Run folder: {folder}\nPictures:   {CURVES}, {BY_CLASS}, {HISTOGRAM}\n{uses(folder)}")
    if finished.shows_confusion:
        progress.line(f"Confusion:  {CONFUSION[0]}: pairs of classes, worst classes, images that the network disagrees with")
        if following := next_steps(config, folder):
            progress.line(f"\n{following}")


def _panels(found: dict[str, Any], scores: dict[str, Scores]) -> dict[str, Scores]:
    """One panel where the last epoch is the best."""
    if len(scores) == 2 and found["last"]["epoch"] == found["best"]["epoch"]:
        return {f"last and best (epoch {found['last']['epoch']})": next(iter(scores.values()))}
    return scores


def _time(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How rank 0 spent its seconds, over all epochs, up to the last epoch's row."""
    time = {
        name: sum(row["seconds"].get(name, 0.0) for row in rows)
        for name in ("data_wait", "communication", "evaluation", "checkpoint")
    }
    return {"step": sum(row["seconds"].get("epoch", 0.0) for row in rows) - time["data_wait"] - time["communication"]} | time


def _shares(seconds: dict[str, float]) -> str:
    total = sum(seconds.values()) or 1.0
    return ", ".join(f"{name.replace('_', ' ')} {100 * value / total:.0f} %" for name, value in seconds.items())
