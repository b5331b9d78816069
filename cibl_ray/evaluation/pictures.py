"""A run's pictures: learning curves, and accuracy against the number of training images of each class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox

from cibl_ray.evaluation.metrics import Scores
from pipelines.common.fonts import save
from pipelines.prepare.pictures import COLORS
from pipelines.prepare.shots import GROUPS, shot_groups

_NAMED, _WORST = 20, 12  # classes that are all named; of more, so many
# Places of a name beside its point, in points of a font: right and left, then further up and down.
_BESIDE = [(right, up) for up in (0, 7, -7, 13, -13) for right in (6, -6)]


def save_learning_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw loss terms, accuracy and learning rate over the epochs.

    If a run continued with another loss, some terms exist for a part of the epochs only. They are drawn for that part. A line
    joins the epochs that were evaluated.

    Args:
        path: The picture.
        rows: The run's history, one dict for each epoch.
    """
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    for name in ("loss", "cross_entropy", "contrastive"):
        if (values := _values(rows, "train", name)) is not None:
            loss.plot(*values, label=name.replace("_", "-"))
    if (values := _values(rows, "val", "loss")) is not None:
        loss.plot(*values, label="validation cross-entropy", color="black", lw=1)
    loss.set(title="loss", xlabel="epoch")
    accuracy.plot(epochs, [100 * row["train"]["accuracy"] for row in rows], label="training", color="#8a8a8a")
    for name, color in (("balanced", "black"), *((group, COLORS[group]) for group in GROUPS)):
        if (values := _values(rows, "val", name)) is not None:
            accuracy.plot(values[0], 100 * values[1], label=f"validation, {name}", color=color)
    accuracy.set(title="accuracy, %", xlabel="epoch", ylim=(0, 100))
    rate.plot(epochs, [row["rate"]["lr"] for row in rows], color="#2a6f97")
    rate.set(title="learning rate", xlabel="epoch")
    for axes in (loss, accuracy):
        axes.legend(frameon=False, fontsize=8)
    for axes in (loss, accuracy, rate):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _values(rows: list[dict[str, Any]], group: str, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The epochs that have a number, and their numbers; None where no epoch has it."""
    found = [(row["epoch"], row[group][name]) for row in rows if row.get(group, {}).get(name) is not None]
    return (np.array([epoch for epoch, _ in found]), np.array([value for _, value in found])) if found else None


def save_accuracy_by_class(path: Path, classes: list[str], train_counts: np.ndarray, runs: dict[str, Scores]) -> None:
    """Draw each class's accuracy against its training images, one panel a checkpoint, coloured by shot group.

    Classes are named, of more than 20 the worst ones.

    Args:
        path: The picture.
        classes: Class names.
        train_counts: Training images of each class, int64 (C,).
        runs: Scores by the title of their panel.
    """
    figure = Figure(figsize=(max(7.0, 5.5 * len(runs)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.atleast_1d(figure.subplots(1, len(runs), sharey=True))
    groups = shot_groups(train_counts)
    for axes, (name, scores) in zip(panels, runs.items(), strict=True):
        for group in GROUPS:
            members = [i for i, own in enumerate(groups) if own == group and scores.per_class[i] is not None]
            if members:
                heights = [100 * (scores.per_class[i] or 0.0) for i in members]
                axes.scatter(train_counts[members], heights, color=COLORS[group], label=f"{group} ({len(members)})", zorder=3)
                _level(axes, getattr(scores, group), train_counts[members], COLORS[group])
        axes.set(ylim=(-6, 108), xlabel="training images of the class", title=f"{name}: {100 * scores.overall:.1f} %")
        _count_axis(axes, train_counts)
        axes.grid(axis="y", color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.canvas.draw()  # places the axes, by which names find room
    for axes, scores in zip(panels, runs.values(), strict=True):
        _name_classes(axes, classes, train_counts, scores)
    save(figure, path)


def _count_axis(axes: Axes, counts: np.ndarray) -> None:
    """A logarithmic axis of numbers of images, with whole numbers as ticks."""
    low, high = 0.7 * max(1, int(counts.min())), 1.6 * int(counts.max())
    steps = (1, 2, 5) if high < 1000 * low else (1,)
    ticks = [step * 10**power for power in range(10) for step in steps if low <= step * 10**power <= high]
    if len(ticks) < 2:
        ticks = sorted({int(counts.min()), int(counts.max())})
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _name_classes(axes: Axes, classes: list[str], counts: np.ndarray, scores: Scores) -> None:
    """Write names beside their points, where they cover no other one; classes at one point share a label."""
    points: dict[tuple[int, float], list[str]] = {}
    known = [(label, accuracy) for label, accuracy in enumerate(scores.per_class) if accuracy is not None]
    worst = sorted(known, key=lambda each: (each[1], -counts[each[0]]))
    for label, accuracy in worst if len(known) <= _NAMED else worst[:_WORST]:
        points.setdefault((int(counts[label]), 100 * accuracy), []).append(classes[label])
    figure = axes.get_figure()
    renderer = figure.canvas.get_renderer()  # type: ignore[union-attr]  # of FigureCanvasAgg
    marks = [axes.transData.transform((counts[label], 100 * accuracy)) for label, accuracy in known]
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in marks]
    for place, names in points.items():
        text = ", ".join(_short(name) for name in names[:2]) + (f" +{len(names) - 2}" if len(names) > 2 else "")
        for right, up in _BESIDE:
            written = axes.annotate(
                text, place, xytext=(right, up), textcoords="offset points", ha="left" if right > 0 else "right", va="center",
                fontsize=7, color="#555555", parse_math=False, zorder=2.5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )  # fmt: skip
            box = written.get_window_extent(renderer)
            if axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            written.remove()


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def _level(axes: Axes, mean: float | None, counts: np.ndarray, color: str) -> None:
    """A group's mean accuracy as a line over its range."""
    if mean is not None:
        axes.hlines(100 * mean, counts.min() * 0.9, counts.max() * 1.1, color=color, lw=1, ls="--")
