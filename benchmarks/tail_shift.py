"""`python -m benchmarks.tail_shift --runs FOLDER`: how much of the tail skew can be had after training?

FOLDER holds the runs of `python -m benchmarks.reproduce tail_skew --budget cpu`: runs/reproduce/cpu/tail_skew. Of
CIFAR-10-LT and five values of λ, each run's last checkpoint is evaluated on the test set under tail shifts from 0 to 2 (logits
- tail_shift · log prior), as an exported model answers, and set beside what the other values of λ reach by training. Writes
docs/pictures/tail_shift.png and prints the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.measure import report
from benchmarks.reproduce.cells import cells
from cibl_ray.evaluation.metrics import Scores, score
from cibl_ray.evaluation.predict import predict
from cibl_ray.hardware import resolve
from cibl_ray.run.checkpoint import load_checkpoint
from pipelines.augment.recipe import Normalize
from pipelines.common.errors import run_command
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import eval_plan
from pipelines.prepare.build import ensure_prepared

LAMBDAS = (0.0, 0.01, 0.05, 0.5, 5.0)
SHIFTS = tuple(step / 4 for step in range(9))
SEEDS = 3
PICTURE = Path("docs/pictures/tail_shift.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tail_shift", description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="runs/reproduce/cpu/tail_skew")
    parser.add_argument("--quick", action="store_true", help="one seed")
    arguments = parser.parse_args()
    seeds = 1 if arguments.quick else SEEDS
    rows: dict[float, dict[float, list[Scores]]] = {}
    for cell in cells("tail_skew", "cpu", seeds, 0.0):
        value = float(cell.value.removeprefix("λ="))
        if cell.dataset == "cifar10" and value in LAMBDAS:
            for shift, scores in shifted(arguments.runs / cell.name).items():
                rows.setdefault(value, {}).setdefault(shift, []).append(scores)
    table = {
        value: {
            shift: {name: _mean(scores, name) for name in ("overall", "head", "middle", "tail")} for shift, scores in by.items()
        }
        for value, by in rows.items()
    }
    print("lambda  tail_shift  overall   head  middle   tail")
    for value, by in table.items():
        for shift, row in by.items():
            print(f"{value:>6}  {shift:>10}  " + "  ".join(f"{100 * cell:6.1f}" for cell in row.values()))
    _picture(table)
    report(
        accuracy={str(value): {str(shift): row for shift, row in by.items()} for value, by in table.items()},
        seeds=seeds,
        ratios={
            "tail_of_shifted_over_trained": round(
                max(r["tail"] for r in table[0.0].values()) / max(by[0.0]["tail"] for by in table.values()), 2
            )
        },
    )


def shifted(run: Path) -> dict[float, Scores]:
    """Scores of a run's last checkpoint on the test set under each shift."""
    checkpoint = load_checkpoint(run / "checkpoints" / "last.safetensors")
    config = resolve(checkpoint.config)
    prepared = ensure_prepared(config.data, config.seed)
    loader = make_loader(prepared, "test", eval_plan(config.data, 500), config.loader)
    device = torch.device(config.train.device)
    logits, labels = predict(checkpoint.network().to(device), loader, Normalize(config.data).to(device), device)
    counts = checkpoint.train_counts
    log_prior = torch.from_numpy(np.log(counts / counts.sum()).astype(np.float32))
    return {shift: score(logits - shift * log_prior, labels, counts) for shift in SHIFTS}


def _mean(scores: list[Scores], name: str) -> float:
    return float(np.mean([getattr(row, name) for row in scores]))


def _picture(table: dict[float, dict[float, dict[str, float]]]) -> None:
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for value, color in ((0.0, "#2a6f97"), (0.05, "#e9a03b"), (0.5, "#7a5195")):
        by = table[value]
        points = np.array([[100 * by[shift]["head"], 100 * by[shift]["tail"]] for shift in SHIFTS])
        axes.plot(*points.T, color=color, marker=".", label=f"λ = {value:g}, tail_shift 0 to 2 after training")
        for shift in (0.5, 1.0, 2.0):
            axes.annotate(
                f"{shift:g}", points[SHIFTS.index(shift)], textcoords="offset points", xytext=(4, 4), fontsize=7, color=color
            )
    trained = np.array([[100 * by[0.0]["head"], 100 * by[0.0]["tail"]] for by in table.values()])
    axes.plot(
        *trained.T, color="black", marker="o", linestyle="--", label="λ by training: " + ", ".join(f"{v:g}" for v in table)
    )
    axes.set(xlabel="accuracy of the largest third of the classes, %", ylabel="of the smallest third, %")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    run_command(main)
