"""A run's pictures: learning curves, and accuracy against the number of training images of each class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cibl_ray.evaluation.metrics import Scores
from pipelines.common.fonts import save
from pipelines.prepare.pictures import COLORS, GROUPS, shot_groups


def save_learning_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw loss terms, accuracy and learning rate over the epochs.

    If a run continued with another loss, some terms exist for a part of the epochs only. They are drawn for that part.

    Args:
        path: The picture.
        rows: The run's history, one dict for each epoch.
    """
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    for name in ("loss", "cross_entropy", "contrastive"):
        if (values := _values(rows, "train", name)) is not None:
            loss.plot(epochs, values, label=name.replace("_", "-"))
    if (values := _values(rows, "val", "loss")) is not None:
        loss.plot(epochs, values, label="validation cross-entropy", color="black", lw=1)
    loss.set(title="loss", xlabel="epoch")
    accuracy.plot(epochs, [100 * row["train"]["accuracy"] for row in rows], label="training", color="#8a8a8a")
    for name, color in (("balanced", "black"), *((group, COLORS[group]) for group in GROUPS)):
        if (values := _values(rows, "val", name)) is not None:
            accuracy.plot(epochs, 100 * values, label=f"validation, {name}", color=color)
    accuracy.set(title="accuracy, %", xlabel="epoch", ylim=(0, 100))
    rate.plot(epochs, [row["rate"]["lr"] for row in rows], color="#2a6f97")
    rate.set(title="learning rate", xlabel="epoch")
    for axes in (loss, accuracy):
        axes.legend(frameon=False, fontsize=8)
    for axes in (loss, accuracy, rate):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _values(rows: list[dict[str, Any]], group: str, name: str) -> np.ndarray | None:
    """A number of each row, NaN where it lacks it; None where all do."""
    values = [row.get(group, {}).get(name, np.nan) for row in rows]
    return None if np.isnan(values).all() else np.array(values)


def save_accuracy_by_class(path: Path, classes: list[str], train_counts: np.ndarray, runs: dict[str, Scores]) -> None:
    """Draw each class's accuracy against its training images: one panel for each checkpoint, coloured by shot group.

    Args:
        path: The picture.
        classes: C names.
        train_counts: Training images of each class, (C,).
        runs: Scores by the name of the checkpoint.
    """
    figure = Figure(figsize=(5.5 * len(runs), 3.8), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(runs), sharey=True))
    groups = shot_groups(train_counts)
    for axes, (name, scores) in zip(panels, runs.items(), strict=True):
        for group in GROUPS:
            members = [i for i, own in enumerate(groups) if own == group and scores.per_class[i] is not None]
            if members:
                heights = [100 * (scores.per_class[i] or 0.0) for i in members]
                axes.scatter(train_counts[members], heights, color=COLORS[group], label=f"{group} ({len(members)})", zorder=3)
                _level(axes, getattr(scores, group), train_counts[members], COLORS[group])
        if len(classes) <= 20:
            for i, label in enumerate(classes):
                if scores.per_class[i] is not None:
                    place = (train_counts[i], 100 * (scores.per_class[i] or 0.0))
                    style = {"fontsize": 7, "color": "#555555", "parse_math": False}
                    axes.annotate(label, place, xytext=(4, 4), textcoords="offset points", **style)
        axes.set(
            xscale="log",
            ylim=(-3, 105),
            xlabel="training images of the class",
            title=f"{name}: {100 * scores.overall:.1f} %",
        )
        axes.grid(axis="y", color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy, %")
    panels[0].legend(frameon=False, fontsize=8, loc="best")
    save(figure, path)


def _level(axes: Axes, mean: float | None, counts: np.ndarray, color: str) -> None:
    """A group's mean accuracy as a line over its range."""
    if mean is not None:
        axes.hlines(100 * mean, counts.min() * 0.9, counts.max() * 1.1, color=color, lw=1, ls="--")
