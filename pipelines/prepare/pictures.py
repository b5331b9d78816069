"""Class histograms, as text for a terminal and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.common.fonts import save
from pipelines.prepare.shots import GROUPS, shot_groups

COLORS = {"many": "#2a6f97", "medium": "#e9a03b", "few": "#c8553d"}


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
