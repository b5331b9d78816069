"""The tail shift: logits − shift · log π, chosen on validation images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from cibl_ray.evaluation.metrics import Scores, members_of, score

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
    """
    scored = {value: score(logits_with(value), labels, train_counts) for value in values}
    found = {value: _value(scores, metric) for value, scores in scored.items()}
    top = max(found.values())
    best = min((value for value, reached in found.items() if reached == top), key=lambda value: (abs(value), value))
    changed = (logits_with(0.0).argmax(1) == labels) != (logits_with(best).argmax(1) == labels)
    error = np.linalg.norm(_shares(scored[best], metric, labels, train_counts)[changed.numpy()])
    if top - found[0.0] <= 2 * error:
        best = 0.0
    return best, found[0.0], found[best]


def _value(scores: Scores, metric: str) -> float:
    value = getattr(scores, metric)
    return -1.0 if value is None else float(value)


def _shares(scores: Scores, metric: str, labels: torch.Tensor, train_counts: np.ndarray) -> np.ndarray:
    """By how much one more right answer raises a metric, for each image (N,): to first order for the harmonic mean."""
    accuracy = np.array([np.nan if value is None else value for value in scores.per_class])
    samples = np.bincount(labels.numpy(), minlength=len(accuracy))
    present = samples > 0
    if metric == "overall":
        of_class = samples / len(labels)
    elif metric == "worst":
        of_class = (np.arange(len(accuracy)) == np.nanargmin(accuracy)).astype(float)
    elif metric == "harmonic":
        of_class = (scores.harmonic / np.maximum(accuracy, 1e-9)) ** 2 / present.sum()
    else:
        members = present & members_of(metric, train_counts)
        of_class = members / max(1, members.sum())
    shares: np.ndarray = (of_class / np.maximum(samples, 1))[labels.numpy()]
    return shares
