"""`python -m benchmarks.reproduce.front LINES... --out FILE.png [--dataset cifar100] [--factor 100]`: accuracy against PFLOP.

Draws every line of JSON that has a cost and is scored on the test set: the tables `recipe` and `search` are not. The published
points are drawn beside them: what methods reach, over what a run of theirs costs.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.reproduce import report as tables
from benchmarks.reproduce.cells import ON_VALIDATION
from benchmarks.reproduce.cost import pflop
from benchmarks.reproduce.lines import Line
from cibl_ray.training.passes import Passes
from pipelines.common.errors import UserError, run_command

_MULTIPLY_ADDS = 69_000_000  # of ResNet-32 with 16 base channels, an image of 32 pixels
_IMAGES = {("cifar10", 100): 12_406, ("cifar100", 100): 10_847}
# Method, epochs, views forward and backward, views forward alone, accuracy in % by data set at imbalance factor 100; ResNet-32.
# †: the best epoch on the test set. ProCo's are the last epochs of its own logs. Balanced softmax's are 13,000 steps of 512.
PUBLISHED: tuple[tuple[str, int | dict[str, int], int, int, dict[str, float]], ...] = (
    ("CE", 200, 1, 0, {"cifar10": 70.4, "cifar100": 38.3}),
    ("LDAM-DRW †", 200, 1, 0, {"cifar10": 77.0, "cifar100": 42.0}),
    ("MiSLAS †", 210, 1, 0, {"cifar10": 82.5, "cifar100": 47.0}),
    ("Hybrid-PSC", 200, 3, 0, {"cifar10": 78.82, "cifar100": 44.97}),
    ("Hybrid-SC", 200, 3, 0, {"cifar10": 81.40, "cifar100": 46.72}),
    ("balanced softmax", {"cifar10": 537, "cifar100": 614}, 1, 0, {"cifar10": 83.1, "cifar100": 50.3}),
    ("VS, SAM, AutoAugment", 400, 2, 0, {"cifar10": 86.29, "cifar100": 52.09}),
    ("DDC", 400, 2, 0, {"cifar10": 86.42, "cifar100": 53.05}),
    ("PaCo †", 400, 1, 1, {"cifar100": 52.0}),
    ("BCL †", 200, 3, 0, {"cifar100": 53.9}),
    ("ProCo", 400, 3, 0, {"cifar100": 54.15}),
    ("ProCo", 200, 3, 0, {"cifar10": 85.63, "cifar100": 52.76}),
)


def published(dataset: str, factor: int) -> list[tuple[str, float, float]]:
    """Method, PFLOP and accuracy in % of the published points."""
    if (dataset, factor) not in _IMAGES:
        return []
    images = _IMAGES[dataset, factor]
    return [
        (name, pflop(Passes(many * images * trained, many * images * forward), _MULTIPLY_ADDS), scores[dataset])
        for name, epochs, trained, forward, scores in PUBLISHED
        if dataset in scores
        for many in [epochs if isinstance(epochs, int) else epochs[dataset]]
    ]


def ours(lines: list[Line], dataset: str, factor: int) -> dict[str, list[tuple[float, float]]]:
    """PFLOP and accuracy in % of every run that has both, by row; rows that differ in length alone are one."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        scored = "failed" not in line and line.get("pflop") and line["table"] not in ON_VALIDATION
        if scored and (line["dataset"], line["imbalance"]) == (dataset, factor):
            row = re.sub(r", [\d.]+ M passes$", "", line["value"])  # of the table `length`; the axis tells it
            found.setdefault(row, []).append((line["pflop"], 100 * line["last"]["overall"]))
    return found


def _apart(heights: list[float], gap: float) -> list[float]:
    """Heights in rising order, each moved up until it is `gap` above the one before."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + gap) if found else height)
    return found


def draw(lines: list[Line], dataset: str, factor: int, path: Path) -> int:
    """Draw the picture. Returns how many of our runs are in it.

    Raises:
        UserError: None of the lines has a cost.
    """
    points = ours(lines, dataset, factor)
    if not points:
        raise UserError(f"no line of {dataset} at imbalance factor {factor} has a cost (pflop)")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, x, y in published(dataset, factor):
        axes.plot(x, y, "D", mfc="none", color="#8a8a8a", ms=6)
        axes.annotate(name, (x, y), xytext=(5, -9), textcoords="offset points", fontsize=7, color="#8a8a8a")
    names = sorted(points, key=lambda name: max(y for _, y in points[name]))
    heights = _apart([max(y for _, y in points[name]) for name in names], 0.75)
    for name, height in zip(names, heights, strict=True):
        color = "#c8553d" if name.startswith("CIBL") else "#2a6f97"
        x, y = np.array(sorted(points[name])).T
        axes.plot(x, y, "o-", color=color, ms=5, lw=0.8)
        axes.annotate(
            name, (x[y.argmax()], y.max()), (x[y.argmax()] * 0.93, height), fontsize=7, color=color, ha="right", va="center",
            arrowprops={"arrowstyle": "-", "relpos": (1, 0.5), "color": color, "lw": 0.4},
        )  # fmt: skip
    axes.set_xscale("log")
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10) if axes.get_xlim()[0] / 1.6 <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    left, right = axes.get_xlim()
    axes.set_xlim(left / 3, 1.15 * right)  # room for names
    axes.set(xlabel="PFLOP of a run", ylabel="test accuracy, %")
    axes.set_title(
        f"{tables.TITLES[dataset]}, imbalance factor {factor}: runs here (dots; CIBL red) and published (diamonds)", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return sum(map(len, points.values()))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce.front", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lines", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    parser.add_argument("--dataset", choices=("cifar10", "cifar100"), default="cifar100")
    parser.add_argument("--factor", type=int, default=100, help="the imbalance factor")
    arguments = parser.parse_args()
    lines = [line for path in arguments.lines for line in tables.read(path)]
    count = draw(lines, arguments.dataset, arguments.factor, arguments.out)
    print(f"{arguments.out}: {count} runs")


if __name__ == "__main__":
    run_command(main)
