"""The tables and pictures of `benchmarks.claims`, from the runs that have a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from benchmarks.claims_cells import TITLES, Cell
from benchmarks.measure import machine

THIRDS = ("overall", "head", "middle", "tail")
COLORS = {"overall": "black", "head": "#2a6f97", "middle": "#8a8a8a", "tail": "#c8553d"}
DEFAULT = "0.05"  # λ of the comparisons
Results = dict[Cell, dict[str, Any]]
Accuracies = dict[str, np.ndarray]  # value of λ, method or epochs -> (seeds, THIRDS), percent


def accuracies(results: Results, dataset: str, claim: str) -> Accuracies:
    rows: dict[str, list[list[float]]] = {}
    for cell, result in results.items():
        if (cell.dataset, cell.claim) == (dataset, claim):
            scores = result["last"]["scores"]
            rows.setdefault(cell.value, []).append([100 * scores[third] for third in THIRDS])
    return {value: np.array(of) for value, of in rows.items()}


def summarize(results: Results) -> dict[str, Any]:
    """Figures of each data set: rank correlation of λ with each third's accuracy over all runs, and the ratio of epochs."""
    summary: dict[str, Any] = {"rank_correlation": {}, "best_lambda": {}, "ratios": {}}
    summary["cosine_epochs_over_linear_by_seed"] = {}
    for dataset in sorted({cell.dataset for cell in results}):
        swept = accuracies(results, dataset, "lambda")
        if len(swept) > 2:
            skews = np.concatenate([[float(value)] * len(of) for value, of in swept.items()])
            reached = np.concatenate([*swept.values()])
            summary["rank_correlation"][dataset] = {third: _correlation(skews, reached[:, i]) for i, third in enumerate(THIRDS)}
            summary["best_lambda"][dataset] = max(swept, key=lambda value: swept[value][:, 0].mean())
        seeds = _seeds_of_both(results, dataset)
        ratio = _epochs_ratio(results, dataset, seeds)
        if ratio is not None:
            summary["ratios"][f"{dataset}_cosine_epochs_over_linear"] = ratio
        summary["cosine_epochs_over_linear_by_seed"][dataset] = {
            seed: _epochs_ratio(results, dataset, {seed}) for seed in sorted(seeds)
        }
    return summary


def _correlation(skews: np.ndarray, reached: np.ndarray) -> float | None:
    """Spearman's; None where nothing varies, as with a tail at 0 throughout."""
    return round(float(spearmanr(skews, reached).statistic), 3) if np.ptp(reached) else None


def _seeds_of_both(results: Results, dataset: str) -> set[int]:
    """The seeds that the linear head's run and the cosine head's of every length have: what a stopped measurement has of one
    side alone would be compared with other seeds."""
    seeds: dict[str, set[int]] = {}
    for cell in results:
        if cell.dataset == dataset and (cell.claim == "cosine" or (cell.claim, cell.value) == ("lambda", DEFAULT)):
            seeds.setdefault(f"{cell.claim} {cell.value}", set()).add(cell.seed)
    return set.intersection(*seeds.values()) if seeds else set()


def _epochs(results: Results, dataset: str) -> int:
    """Of a full run."""
    return max(result["last"]["epoch"] for cell, result in results.items() if cell.dataset == dataset)


def _epochs_ratio(results: Results, dataset: str, seeds: set[int]) -> float | None:
    """Epochs of the cosine head's runs, interpolated between their lengths, at the linear head's final accuracy, over its own.

    None where there are no runs, or where the longest does not reach it; the shortest run's share where even that is above it.
    """
    epochs, results = _epochs(results, dataset), {cell: result for cell, result in results.items() if cell.seed in seeds}
    cosine, linear = accuracies(results, dataset, "cosine"), accuracies(results, dataset, "lambda").get(DEFAULT)
    if linear is None or not cosine:
        return None
    lengths = sorted(map(int, cosine))
    reached = np.maximum.accumulate([cosine[str(length)][:, 0].mean() for length in lengths])
    goal = linear[:, 0].mean()
    return round(float(np.interp(goal, reached, lengths)) / epochs, 2) if reached[-1] >= goal else None


def write(docs: Path, budget: str, summary: dict[str, Any], results: Results, of: int) -> None:
    """`docs/BUDGET.md` and a picture of the sweep over λ for each data set."""
    docs.mkdir(parents=True, exist_ok=True)
    lines = [
        f"# Budget `{budget}`: {len(results)} of {of} runs",
        "",
        "Last epoch, test set, %; mean ± deviation (runs).",
    ]
    for dataset in sorted({cell.dataset for cell in results}):
        swept = accuracies(results, dataset, "lambda")
        compared = accuracies(results, dataset, "method")
        first = {"cross-entropy": swept.get("0.0"), f"CIBL, λ = {DEFAULT}": swept.get(DEFAULT)}
        methods = {name: rows for name, rows in first.items() if rows is not None} | compared
        cosine = {f"{length} epochs": rows for length, rows in accuracies(results, dataset, "cosine").items()}
        tables = {
            "λ": swept,
            "method": methods,
            f"cosine head, λ = {DEFAULT}": cosine,
            "reading of the loss, one seed": accuracies(results, dataset, "reading"),
        }
        for title, table in tables.items():
            if not table:
                continue
            lines += ["", f"## {TITLES[dataset]}, {title}", ""]
            lines += [f"| {title} | overall | head third | middle | tail third |", "|---" * 5 + "|"]
            for name, rows in table.items():
                lines.append(f"| {name} | " + " | ".join(_cell(rows[:, i]) for i in range(len(THIRDS))) + " |")
        if len(swept) > 1:
            lines += ["", f"![accuracy against λ]({budget}-{dataset}.png)"]
            _picture(docs / f"{budget}-{dataset}.png", swept, dataset)
    lines += [
        "",
        f"Rank correlation with λ (Spearman): {summary['rank_correlation']}.",
        f"Best λ overall: {summary['best_lambda']}.",
        f"Ratios: {summary['ratios']}; by seed: {summary['cosine_epochs_over_linear_by_seed']}.",
    ]
    lines += ["", f"{machine()['cpu']}, {machine()['cores']} cores, GPU: {machine()['gpu']}."]
    lines += ["", f"Every run's scores, hardware, and digests of its images and its code: [{budget}.jsonl]({budget}.jsonl)."]
    (docs / f"{budget}.md").write_text("\n".join(lines) + "\n")
    every = [json.dumps(_line(*run), ensure_ascii=False) + "\n" for run in results.items()]
    (docs / f"{budget}.jsonl").write_text("".join(every))


def _line(cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run; no path of this machine."""
    kept = ("last", "seconds", "images_per_s", "hardware", "loader", "data", "code")
    named = {"dataset": cell.dataset, "claim": cell.claim, "value": cell.value, "seed": cell.seed}
    return named | {"options": [*cell.options]} | {name: result[name] for name in kept if name in result}


def _cell(values: np.ndarray) -> str:
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread} ({len(values)})"


def _picture(path: Path, swept: Accuracies, dataset: str) -> None:
    """Mean and range of each third's accuracy against λ; λ = 0 stands at the left end."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    values = sorted(swept, key=float)
    place = np.arange(len(values))
    for i, third in enumerate(THIRDS):
        columns = [swept[value][:, i] for value in values]
        axes.plot(place, [column.mean() for column in columns], marker="o", color=COLORS[third], label=third)
        low, high = [column.min() for column in columns], [column.max() for column in columns]
        axes.fill_between(place, low, high, color=COLORS[third], alpha=0.2, lw=0)
    axes.set(xlabel="tail-skew weight λ", ylabel="test accuracy, %", xticks=place, xticklabels=values)
    axes.set_title(f"{TITLES[dataset]}: mean and range over the seeds")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, ncols=4, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
