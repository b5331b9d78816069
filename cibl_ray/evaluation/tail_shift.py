"""The tail shift: logits − shift · log π, chosen on validation images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from cibl_ray.evaluation.metrics import Scores, score

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
        return (
            f"tail shift {self.shift:g}: {self.metric} {100 * self.before:.1f} -> {100 * self.after:.1f} % "
            f"on {self.images:,} validation images"
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
    """Choose the shift of `SHIFTS` that is best on validation images. Of equally good shifts, the one nearest to 0 wins.

    Args:
        logits: Of the validation images, float32 (N, C).
        labels: int64 (N,).
        train_counts: Training images of each class, (C,).
        metric: One of `METRICS`.

    Returns:
        The shift, with the score before and after it.
    """
    values = {shift: _value(score(shifted(logits, train_counts, shift), labels, train_counts), metric) for shift in SHIFTS}
    top = max(values.values())
    best = min((shift for shift, value in values.items() if value == top), key=lambda shift: (abs(shift), shift))
    return TailShift(best, metric, values[0.0], values[best], len(labels))


def _value(scores: Scores, metric: str) -> float:
    value = getattr(scores, metric)
    return -1.0 if value is None else float(value)
