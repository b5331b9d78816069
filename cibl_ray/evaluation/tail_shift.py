"""The tail shift: logits − shift · log π, chosen on validation images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cibl_ray.evaluation.metrics import Scores, members_of, score
from cibl_ray.run.shift import recorded_shift
from pipelines.common.errors import UserError

SHIFTS = tuple(round(step / 20 - 1, 2) for step in range(61))  # -1 to 2
METRICS = ("overall", "balanced", "many", "medium", "few", "head", "middle", "tail", "worst", "harmonic")
FEW = 3  # validation images a class, below which the choice is mostly luck


@dataclass(frozen=True)
class TailShift:
    """A shift that was chosen, and what it does on the images that chose it.

    Attributes:
        shift: This times log π is subtracted from the logits.
        metric: The score that chose it.
        before: That score without a shift, 0 to 1.
        after: With it.
        images: How many images chose it.
    """

    shift: float
    metric: str
    before: float
    after: float
    images: int

    def line(self) -> str:
        """The shift and both scores, in words."""
        if self.shift == 0:
            return (
                f"tail shift 0: {self.metric} {100 * self.before:.1f} %; "
                f"no shift is better beyond chance on {self.images:,} held-out images"
            )
        return (
            f"tail shift {self.shift:g}: {self.metric} {100 * self.before:.1f} -> {100 * self.after:.1f} % "
            f"on {self.images:,} held-out images"
        )

    def dump(self) -> dict[str, Any]:
        """The fields as JSON, for result.json."""
        return asdict(self)

    @classmethod
    def load(cls, content: dict[str, Any]) -> TailShift | None:
        """What `dump` wrote; None: it is something else."""
        return cls(**content) if content.keys() == {field.name for field in fields(cls)} else None


def recorded_choice(checkpoint: Path) -> TailShift | None:
    """Read the shift that a run chose for a checkpoint, which `predict` and `export` use.

    Args:
        checkpoint: A file in a run folder, or a sweep's best one.

    Returns:
        The choice; None: the run chose none, or has no result.
    """
    with suppress(LookupError):
        content = recorded_shift(checkpoint)
        return None if content is None else TailShift.load(content)
    return None


def shifted(logits: torch.Tensor, train_counts: np.ndarray, shift: float) -> torch.Tensor:
    """Shift logits towards the rare classes: logits − shift · log π.

    Args:
        logits: (N, C).
        train_counts: Training images of each class, (C,); π is each class's share of them.
        shift: 0 changes nothing; 1 is the balanced prior.

    Returns:
        Shifted logits, (N, C).
    """
    counts = torch.from_numpy(train_counts).double()
    return logits - shift * (counts / counts.sum()).log().to(logits.dtype)


def choose_shift(logits: torch.Tensor, labels: torch.Tensor, train_counts: np.ndarray, metric: str = "balanced") -> TailShift:
    """Choose the shift of `SHIFTS` that is best on validation images, where it is better than none beyond chance.

    Of equally good shifts, the one nearest to 0 wins. A gain of less than twice its standard error is taken for chance: then
    the shift is 0. The error is that of paired samples, by the images whose answer is right with one of the two alone.

    Args:
        logits: Of the validation images, float32 (N, C).
        labels: int64 (N,).
        train_counts: Training images of each class, (C,).
        metric: One of `METRICS`.

    Returns:
        The shift, with the score before and after it.
    """
    best, before, after = choose(lambda shift: shifted(logits, train_counts, shift), SHIFTS, labels, train_counts, metric)
    return TailShift(best, metric, before, after, len(labels))


def choose(
    logits_with: Callable[[float], torch.Tensor],
    values: Sequence[float],
    labels: torch.Tensor,
    train_counts: np.ndarray,
    metric: str,
) -> tuple[float, float, float]:
    """Choose the value of a setting that is best on validation images, where it is better than 0 beyond chance.

    Args:
        logits_with: The logits (N, C) that a value gives. 0 changes nothing.
        values: To choose from, 0 among them.
        labels: int64 (N,).
        train_counts: Training images of each class, (C,).
        metric: One of `METRICS`.

    Returns:
        The value, the score with 0, and the score with the value.

    Raises:
        UserError: The metric is of a group of classes that has no images.
    """
    scored = {value: score(logits_with(value), labels, train_counts) for value in values}
    found = {value: getattr(scores, metric) for value, scores in scored.items()}
    if found[0.0] is None:
        there = ", ".join(name for name in METRICS if getattr(scored[0.0], name) is not None)
        raise UserError(f"no image that chooses is of a class of {metric!r}; there are scores of: {there}")
    top = max(found.values())
    best = min((value for value, reached in found.items() if reached == top), key=lambda value: (abs(value), value))
    changed = ((logits_with(0.0).argmax(1) == labels) != (logits_with(best).argmax(1) == labels)).numpy()
    # Which class is the worst, and how the harmonic mean moves, differs before and after: the larger error counts.
    errors = [np.linalg.norm(_shares(scored[value], metric, labels, train_counts)[changed]) for value in (0.0, best)]
    if top - found[0.0] <= 2 * max(errors):
        best = 0.0
    return best, found[0.0], found[best]


def _harmonic_moves(accuracy: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """How far one right answer more or fewer moves the harmonic mean, by its class, (C,). At 0 it has no slope to go by."""

    def mean(of_classes: np.ndarray) -> float:
        there = of_classes[samples > 0]
        return float(1 / (1 / there).mean()) if there.all() else 0.0

    moves, now = np.zeros(len(accuracy)), mean(accuracy)
    for label in np.flatnonzero(samples):
        for step in (1, -1):
            moved = accuracy.copy()
            moved[label] = np.clip(moved[label] + step / samples[label], 0, 1).round(12)
            moves[label] = max(moves[label], abs(mean(moved) - now))
    return moves


def _shares(scores: Scores, metric: str, labels: torch.Tensor, train_counts: np.ndarray) -> np.ndarray:
    """By how much one right answer more, or fewer, moves a metric, for each image, (N,)."""
    accuracy = np.array([np.nan if value is None else value for value in scores.per_class])
    samples = np.bincount(labels.numpy(), minlength=len(accuracy))
    present = samples > 0
    if metric == "overall":
        of_class = samples / len(labels)
    elif metric == "worst":
        of_class = (np.arange(len(accuracy)) == np.nanargmin(accuracy)).astype(float)
    elif metric == "harmonic":
        of_class = _harmonic_moves(accuracy, samples) * samples
    else:
        members = present & members_of(metric, train_counts)
        of_class = members / max(1, members.sum())
    shares: np.ndarray = (of_class / np.maximum(samples, 1))[labels.numpy()]
    return shares
