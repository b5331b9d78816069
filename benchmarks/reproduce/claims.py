"""What a table says of the papers' claims: λ moves accuracy to the tail, and the cosine head needs fewer epochs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.reproduce.lines import Line

THIRDS = ("overall", "head", "middle", "tail")


def figures(table: str, lines: list[Line]) -> dict[str, Any]:
    """The figures of a table's claim.

    Args:
        table: The table's name.
        lines: Its lines that have scores.

    Returns:
        For `tail_skew`, and `equal_cost` with three values of λ or more, by data set: Spearman's rank correlation of λ with
        the accuracy of each third of the classes, over all runs (None where nothing varies), and the λ that is best overall.
        For `cosine_epochs`, by data set: the epochs that the cosine head needs for the linear head's accuracy, over the linear
        head's epochs; of all seeds, and of each. For other tables nothing.
    """
    found: dict[str, Any] = {}
    for dataset in sorted({line["dataset"] for line in lines}):
        of = [line for line in lines if line["dataset"] == dataset]
        if table == "equal_cost":
            of = [line for line in of if skew(line["value"]) is not None]
        if table == "tail_skew" or (table == "equal_cost" and len({line["value"] for line in of}) > 2):
            found.setdefault("rank_correlation", {})[dataset] = _correlations(of)
            found.setdefault("best_lambda", {})[dataset] = _best_lambda(of)
        elif table == "cosine_epochs":
            seeds = _seeds_of_every_row(of)
            ratio = _epochs_ratio(of, seeds)
            if ratio is not None:
                found.setdefault("ratios", {})[f"{dataset}_cosine_epochs_over_linear"] = ratio
            by_seed = {seed: _epochs_ratio(of, {seed}) for seed in sorted(seeds)}
            found.setdefault("cosine_epochs_over_linear_by_seed", {})[dataset] = by_seed
    return found


def sentences(found: dict[str, Any]) -> list[str]:
    """The figures as lines of Markdown, a paragraph each."""
    text = []
    for dataset, by_third in found.get("rank_correlation", {}).items():
        parts = ", ".join(f"{third} {'–' if value is None else format(value, '+.2f')}" for third, value in by_third.items())
        text += [
            "",
            f"{dataset}: Spearman's rank correlation with λ: {parts}. Best λ overall: {found['best_lambda'][dataset]}.",
        ]
    for dataset, by_seed in found.get("cosine_epochs_over_linear_by_seed", {}).items():
        ratio = found.get("ratios", {}).get(f"{dataset}_cosine_epochs_over_linear")
        listed = ", ".join("not reached" if value is None else str(value) for value in by_seed.values())
        text += [
            "",
            f"{dataset}: epochs until the cosine head has the linear head's accuracy, over the linear head's: "
            f"{'not reached' if ratio is None else ratio}; by seed: {listed or '–'}.",
        ]
    return text


def skew(value: str) -> float | None:
    """The λ of a row of `tail_skew` or `equal_cost`; None: it has none.

    Balanced softmax is CIBL with λ = 0 and the log-prior.
    """
    if value == "balanced softmax":
        return 0.0
    match = re.fullmatch(r"(?:CIBL, )?λ ?= ?([0-9.]+)", value)
    return float(match[1]) if match else None


def by_skew(rows: dict[str, list[Line]]) -> dict[str, list[Line]]:
    """The rows that differ in λ alone, as `tail_skew` names them, the smallest λ first."""
    found = {known: of for value, of in rows.items() if (known := skew(value)) is not None}
    return {f"λ={known:g}": found[known] for known in sorted(found)}


def _skew(line: Line) -> float:
    known = skew(line["value"])
    assert known is not None
    return known


def _correlations(lines: list[Line]) -> dict[str, float | None]:
    skews = [_skew(line) for line in lines]
    reached = {third: [line["last"][third] for line in lines] for third in THIRDS}
    return {
        third: round(float(spearmanr(skews, of).statistic), 3) if len({*skews}) > 2 and np.ptp(of) else None
        for third, of in reached.items()
    }


def _best_lambda(lines: list[Line]) -> float:
    return max({_skew(line) for line in lines}, key=lambda known: _overall(line for line in lines if _skew(line) == known))


def _overall(lines: Iterable[Line]) -> float:
    return float(np.mean([line["last"]["overall"] for line in lines]))


def _seeds_of_every_row(lines: list[Line]) -> set[int]:
    """The seeds that every row has: of a stopped measurement, one side alone would be compared with other seeds."""
    rows: dict[str, set[int]] = {}
    for line in lines:
        rows.setdefault(line["value"], set()).add(line["seed"])
    return set.intersection(*rows.values())


def _epochs_ratio(lines: list[Line], seeds: set[int]) -> float | None:
    """Epochs of the cosine head's runs, interpolated between their lengths, at the linear head's accuracy, over its own.

    None where there are no runs, or where the longest does not reach it; the shortest run's share where even that is above it.
    """
    reached: dict[str, dict[int, list[Line]]] = {"linear": {}, "cosine": {}}
    for line in lines:
        if line["seed"] in seeds:
            head, epochs = line["value"].split(", ")
            reached[head].setdefault(int(epochs), []).append(line)
    if not reached["linear"] or not reached["cosine"]:
        return None
    length, linear = next(iter(reached["linear"].items()))
    lengths = sorted(reached["cosine"])
    accuracies = np.maximum.accumulate([_overall(reached["cosine"][epochs]) for epochs in lengths])
    goal = _overall(linear)
    return round(float(np.interp(goal, accuracies, lengths)) / length, 2) if accuracies[-1] >= goal else None
