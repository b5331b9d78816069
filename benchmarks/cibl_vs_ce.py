"""`python -m benchmarks.cibl_vs_ce --images FOLDER`: CIBL beside plain cross-entropy, everything else equal, several seeds.

FOLDER holds CIFAR-10 as train/CLASS/* and test/CLASS/*; by default torchvision's copy in data/ is used. Cells that have a
result are not run again, so a stopped measurement continues. Writes the table and the picture to docs/results/cibl_vs_ce/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.common.errors import UserError, run_command

METHODS = {
    "cross-entropy": ["--loss.kind", "cross_entropy"],
    "CIBL, λ = 0.05": ["--loss.kind", "cibl", "--loss.tail_skew", "0.05"],
}
BUDGETS = {
    "cpu": ["--network.backbone", "resnet20", "--train.epochs", "20", "--schedule.warmup_epochs", "2"],
    "gpu": [],
    "quick": ["--network.backbone", "resnet20", "--train.epochs", "1", "--schedule.warmup_epochs", "0",
              "--data.profile.largest", "500"],
}  # fmt: skip
COLUMNS = ("overall", "many", "medium", "few", "head", "middle", "tail", "worst", "calibration_error")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cibl_vs_ce", description=__doc__)
    parser.add_argument("--images", type=Path, help="CIFAR-10 as an image folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", choices=[*BUDGETS], default="cpu", help="cpu: ResNet-20, 20 epochs; gpu: ResNet-32, 200")
    parser.add_argument("--quick", action="store_true", help="one epoch, one seed: shows that it runs, measures nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs/cibl_vs_ce"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results/cibl_vs_ce"))
    arguments = parser.parse_args()
    budget = "quick" if arguments.quick else arguments.budget
    seeds = 1 if arguments.quick else arguments.seeds
    source = ["--data.source.kind", "folder", "--data.source.path", str(arguments.images)] if arguments.images else []
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for seed in range(seeds):
        for number, (name, options) in enumerate(METHODS.items()):
            run = arguments.runs / f"{budget}-{number}-seed{seed}"
            cells[name].append(_cell(run, [*source, *BUDGETS[budget], *options, "--seed", str(seed)]))
    if not arguments.quick:
        _render(arguments.docs, cells, budget, seeds)
    print(json.dumps({name: _statistics(results) for name, results in cells.items()}))


def _cell(run: Path, options: list[str]) -> dict[str, Any]:
    """One run's scores; trained now where it has no result yet."""
    if not (run / "result.json").exists():
        start = ["--resume", str(run)] if run.exists() else ["cifar10_lt", "--runs", str(run.parent), "--name", run.name]
        print(f"{run}: training", file=sys.stderr)
        if subprocess.run([sys.executable, "-m", "cibl_ray.train", *start, *options], stdout=sys.stderr).returncode:
            raise UserError(f"the run {str(run)!r} has no result; the lines above say why; the same command continues")
    return json.loads((run / "result.json").read_text())


def _statistics(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of the last epoch's scores, in percent; null where a group is empty."""
    table: dict[str, Any] = {
        "seeds": len(results),
        "images_per_s": round(float(np.median([r["images_per_s"] for r in results]))),
    }
    for column in COLUMNS:
        values = [result["last"]["scores"][column] for result in results]
        if values[0] is None:
            table[column] = None
        else:
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            table[column] = [round(100 * float(np.mean(values)), 2), round(100 * float(spread), 2)]
    return table


def _render(docs: Path, cells: dict[str, list[dict[str, Any]]], budget: str, seeds: int) -> None:
    docs.mkdir(parents=True, exist_ok=True)
    titles = (
        "overall",
        "many",
        "medium",
        "few",
        "3 largest",
        "4 middle",
        "3 smallest",
        "worst class",
        "calibration error",
    )
    lines = ["| last epoch, test set, % | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, results in cells.items():
        statistics = _statistics(results)
        row = ["–" if statistics[c] is None else f"{statistics[c][0]:.1f} ± {statistics[c][1]:.1f}" for c in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    hardware = next(iter(cells.values()))[0]["hardware"]
    lines += ["", f"Mean ± standard deviation over {seeds} seeds; budget `{budget}`; {hardware}."]
    (docs / f"{budget}.md").write_text("\n".join(lines) + "\n")
    (docs / f"{budget}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in _lines(cells, budget, seeds)))
    _picture(docs / f"{budget}.png", cells)


def _lines(cells: dict[str, list[dict[str, Any]]], budget: str, seeds: int) -> list[dict[str, Any]]:
    """What `make tables` draws the tables of the docs from: the mean and the deviation of each score, as shares."""
    found = []
    for name, results in cells.items():
        statistics = _statistics(results)
        scores = {c: None if statistics[c] is None else [round(value / 100, 4) for value in statistics[c]] for c in COLUMNS}
        last = results[0]
        found.append(
            {"value": name, "budget": budget, "seeds": seeds, "epoch": last["last"]["epoch"], "scores": scores}
            | {"hardware": last["hardware"], "command": f"python -m benchmarks.cibl_vs_ce --images FOLDER --budget {budget}"}
        )
    return found


def _picture(path: Path, cells: dict[str, list[dict[str, Any]]]) -> None:
    """Accuracy of each class, in order of training images, one line a method with its range over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for (name, results), color in zip(cells.items(), ("#8a8a8a", "#c8553d"), strict=True):
        values = 100 * np.array([result["last"]["scores"]["per_class"] for result in results])
        place = np.arange(values.shape[1])
        axes.plot(place, values.mean(0), marker="o", color=color, label=name)
        axes.fill_between(place, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
    axes.set(xlabel="class, from most to fewest training images", ylabel="test accuracy, %", ylim=(0, 100), xticks=place)
    axes.set_title("Accuracy by class: mean and range over the seeds")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_command(main)
