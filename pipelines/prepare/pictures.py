"""Class histograms, as text for a terminal and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.common.fonts import save

MANY, FEW = 100, 20  # many: more than 100 training images; few: fewer than 20 (Liu et al. 2019)
GROUPS = ("many", "medium", "few")
THIRDS = ("head", "middle", "tail")
COLORS = {"many": "#2a6f97", "medium": "#e9a03b", "few": "#c8553d"}


def shot_groups(train_counts: np.ndarray) -> list[str]:
    """The group of each class by its training images: 'many' (> 100), 'medium' (20 to 100), 'few' (< 20)."""
    return ["many" if count > MANY else "few" if count < FEW else "medium" for count in train_counts]


def thirds(train_counts: np.ndarray) -> list[str]:
    """'head', 'middle' or 'tail' of each class by its training images, (C,).

    The middle gets the remainder of C / 3: of 10 classes 3, 4 and 3; of two classes both.
    """
    classes = len(train_counts)
    names = ["middle"] * classes
    order = np.argsort(-train_counts, kind="stable").tolist()
    for place in range(classes // 3):
        names[order[place]], names[order[classes - 1 - place]] = "head", "tail"
    return names


def histogram_text(classes: list[str], counts: np.ndarray, rows: int = 20, width: int = 50) -> str:
    """Training images of each class, sorted, as bars of text.

    Args:
        classes: C names.
        counts: Training images of each class, (C,).
        rows: With more classes than this, only so many are shown, at equal distances.
        width: Characters of the longest bar.
    """
    order = np.argsort(-counts, kind="stable")
    shown = order if len(order) <= rows else order[np.linspace(0, len(order) - 1, rows).round().astype(int)]
    names = [classes[i][:24] for i in shown]
    pad = max(map(len, names))
    lines = [
        f"{name:<{pad}} {counts[i]:>7,} {'█' * max(1, round(width * counts[i] / counts.max()))}"
        for name, i in zip(names, shown, strict=True)
    ]
    if len(shown) < len(order):
        lines.append(f"({len(shown)} of {len(order)} classes shown)")
    return "\n".join(lines)


def save_histogram(path: Path, classes: list[str], counts: np.ndarray) -> None:
    """Draw the training images of each class, sorted, coloured by shot group, on a logarithmic axis.

    Args:
        path: The picture.
        classes: C names.
        counts: Training images of each class, (C,).
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    order = np.argsort(-counts, kind="stable")
    groups = shot_groups(counts)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(order)), counts[order], color=[COLORS[groups[i]] for i in order], width=1 if len(order) > 50 else 0.8)
    axes.set(
        yscale="log",
        ylim=(0.8, None),
        ylabel="training images",
        title=f"{counts.sum():,} training images in {len(classes)} classes",
    )
    if len(order) <= 30:
        names = [classes[i] if len(classes[i]) <= 24 else f"{classes[i][:23]}…" for i in order]  # long ones squeeze the axes
        axes.set_xticks(range(len(order)), names, rotation=60 if len(order) > 12 else 20, ha="right", parse_math=False)
    else:
        axes.set_xlabel("classes, from most to fewest images")
    present = [(group, groups.count(group)) for group in GROUPS if group in groups]
    handles = [Patch(color=COLORS[group], label=f"{group} ({number})") for group, number in present]
    axes.legend(handles=handles, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
