"""Accuracy by class frequency. The accuracy of a group without classes is None, never 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import stdev

import numpy as np
import torch

from pipelines.prepare.shots import GROUPS, THIRDS, shot_groups, thirds

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Scores:
    """Scores of a network on a split. All accuracies are shares from 0 to 1; None where a group has no class.

    Attributes:
        overall: Accuracy over all samples.
        balanced: Mean of the class accuracies.
        many: Mean over the classes with more than 100 training images.
        medium: Mean over the classes with 20 to 100 training images.
        few: Mean over the classes with fewer than 20 training images.
        head: Mean over the third of the classes with the most training images.
        middle: Mean over the middle third.
        tail: Mean over the third with the fewest.
        worst: The lowest class accuracy.
        harmonic: Harmonic mean of the class accuracies; 0 if one of them is 0.
        calibration_error: Expected calibration error, in 15 bins.
        loss: Mean cross-entropy.
        samples: How many images were scored.
        per_class: Accuracy of each class; None where the split has no sample of the class.
    """

    overall: float
    balanced: float
    many: float | None
    medium: float | None
    few: float | None
    head: float | None
    middle: float | None
    tail: float | None
    worst: float
    harmonic: float
    calibration_error: float
    loss: float
    samples: int
    per_class: list[float | None]

    def numbers(self) -> dict[str, float]:
        """The scalar scores that exist, by name."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, float)}


def score(logits: torch.Tensor, labels: torch.Tensor, train_counts: np.ndarray) -> Scores:
    """Score logits against labels.

    Args:
        logits: float32 (N, C), N >= 1.
        labels: int64 (N,).
        train_counts: Training images of each class, int64 (C,). They decide the groups.

    Returns:
        All scores.
    """
    classes = logits.shape[1]
    right = logits.argmax(1) == labels
    samples = np.bincount(labels.numpy(), minlength=classes)
    present = samples > 0
    accuracy = np.divide(np.bincount(labels[right].numpy(), minlength=classes), samples, out=np.zeros(classes), where=present)

    def mean(group: str) -> float | None:
        members = members_of(group, train_counts) & present
        return float(accuracy[members].mean()) if members.any() else None

    return Scores(
        overall=float(right.double().mean()),
        balanced=float(accuracy[present].mean()),
        **{group: mean(group) for group in (*GROUPS, *THIRDS)},
        worst=float(accuracy[present].min()),
        harmonic=float(1 / (1 / accuracy[present]).mean()) if accuracy[present].all() else 0.0,
        calibration_error=calibration_error(logits.softmax(1).amax(1), right),
        loss=float(torch.nn.functional.cross_entropy(logits, labels)),
        samples=len(labels),
        per_class=[float(value) if there else None for value, there in zip(accuracy, present, strict=True)],
    )


def members_of(group: str, train_counts: np.ndarray) -> np.ndarray:
    """Which classes a score is a mean over.

    Args:
        group: A shot group, a third, or 'balanced': all.
        train_counts: Training images of each class, int64 (C,).

    Returns:
        bool (C,).
    """
    if group == "balanced":
        return np.ones(len(train_counts), dtype=bool)
    names = shot_groups(train_counts) if group in GROUPS else thirds(train_counts)
    members: np.ndarray = np.array(names) == group
    return members


def calibration_error(confidence: torch.Tensor, right: torch.Tensor) -> float:
    """Expected calibration error (Guo et al., On Calibration of Modern Neural Networks, equation 3).

    Args:
        confidence: Probability of the predicted class, (N,).
        right: Whether the prediction is right, (N,).

    Returns:
        The gap between confidence and the share of right answers in bins of equal width, averaged over the samples.
    """
    bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS).numpy()
    gaps = np.bincount(bins, (confidence.double() - right.double()).numpy())
    return float(np.abs(gaps).sum() / len(bins))


COLUMNS = ("overall", "many", "medium", "few", "worst", "harmonic", "calibration_error")


def heading(where: str) -> str:
    """The line above a `table` of scores on `where`."""
    return f"Accuracy on {where}, %, by training images of the class (many > 100, few < 20):"


def table(rows: dict[str, Scores], spreads: dict[str, Sequence[Scores]] | None = None) -> str:
    """Scores as a table of text, in percent, one row for each name; '-' where a group is empty.

    Args:
        rows: The scores.
        spreads: For some rows, scores whose standard deviation stands behind each number.
    """
    titles = ("", *COLUMNS[:-1], "calib. err.")
    lines: list[tuple[str, ...]] = [titles]
    for name, scores in rows.items():
        lines.append((name, *(_cell(scores, (spreads or {}).get(name, ()), column) for column in COLUMNS)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cell(scores: Scores, others: Sequence[Scores], column: str) -> str:
    value = getattr(scores, column)
    if value is None:
        return "-"
    known = [each for each in (getattr(other, column) for other in others) if each is not None]
    return f"{100 * value:.1f}" + (f" ± {100 * stdev(known):.1f}" if len(known) > 1 else "")
