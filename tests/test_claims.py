"""The claims' figures, from runs whose answers are known."""

import json

import pytest

from benchmarks.claims_cells import Cell
from benchmarks.claims_report import summarize, write


def run(claim, value, seed, overall, tail=0.1, epochs=5):
    scores = {"overall": overall, "head": 1 - tail, "middle": 0.5, "tail": tail}
    result = {"last": {"epoch": epochs, "scores": scores}, "seconds": 9.0, "code": ["0123456789ab"]}
    return Cell("cifar100", claim, value, seed, ("--epochs", str(epochs))), result


def test_skew_is_a_rank_correlation_and_the_best_of_means():
    skews = {"0.0": (0.1, 0.0), "0.05": (0.4, 0.1), "0.5": (0.3, 0.2), "5.0": (0.2, 0.3)}
    summary = summarize(dict(run("lambda", value, seed, *scores) for value, scores in skews.items() for seed in range(2)))
    assert summary["best_lambda"] == {"cifar100": "0.05"}
    assert summary["rank_correlation"]["cifar100"]["tail"] == 1.0
    assert summary["rank_correlation"]["cifar100"]["head"] == -1.0
    assert summary["rank_correlation"]["cifar100"]["overall"] == pytest.approx(0.2, abs=1e-3)
    assert summary["rank_correlation"]["cifar100"]["middle"] is None  # the same everywhere
    assert summary["ratios"] == {}  # no cosine head's runs


def test_epochs_are_compared_between_the_same_seeds():
    """The linear head's second seed has no cosine head's yet: it counts on neither side."""
    runs = dict([run("lambda", "0.05", 0, 0.3), run("lambda", "0.05", 1, 0.4)])
    runs |= dict([run("cosine", "2", 0, 0.2, epochs=2), run("cosine", "5", 0, 0.35)])
    summary = summarize(runs)
    assert summary["ratios"] == {"cifar100_cosine_epochs_over_linear": 0.8}  # .3 lies at 4 of 5 epochs
    assert summary["cosine_epochs_over_linear_by_seed"] == {"cifar100": {0: 0.8}}
    runs |= dict([run("cosine", "2", 1, 0.3, epochs=2), run("cosine", "5", 1, 0.38)])
    by_seed = summarize(runs)["cosine_epochs_over_linear_by_seed"]["cifar100"]
    assert by_seed == {0: 0.8, 1: None}  # not reached within the run


def test_tables_and_lines_are_written(tmp_path):
    runs = dict(run("lambda", value, seed, 0.3 + 0.1 * seed) for value in ("0.0", "0.05") for seed in range(2))
    write(tmp_path, "cpu", summarize(runs), runs, of=9)
    text = (tmp_path / "cpu.md").read_text()
    assert "4 of 9 runs" in text
    assert "| 0.05 | 35.0 ± 7.1 (2) | 90.0 ± 0.0 (2) |" in text
    lines = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [(line["value"], line["seed"]) for line in lines] == [("0.0", 0), ("0.0", 1), ("0.05", 0), ("0.05", 1)]
    assert lines[0]["code"] == ["0123456789ab"]
    assert (tmp_path / "cpu-cifar100.png").stat().st_size > 5000
