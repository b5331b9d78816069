"""The claims' figures, from lines whose answers are known."""

import pytest

from benchmarks.reproduce import report
from benchmarks.reproduce.claims import figures, sentences


def line(value, seed, overall, tail=0.1, table="tail_skew"):
    scores = {"overall": overall, "head": 1 - tail, "middle": 0.5, "tail": tail, "many": 0.5, "medium": 0.5, "few": 0.5}
    return {
        "table": table,
        "budget": "cpu",
        "dataset": "cifar100",
        "imbalance": 100,
        "value": value,
        "seed": seed,
        "last": scores,
        "seconds": 60.0,
        "hardware": "CPU",
        "machine": {"torch": "2"},
        "commit": None,
        "code": ["0123"],
        "command": "",
        "source": "folder",
    }


SKEWS = {"λ=0.0": (0.1, 0.0), "λ=0.05": (0.4, 0.1), "λ=0.5": (0.3, 0.2), "λ=5.0": (0.2, 0.3)}


def test_skew_is_a_rank_correlation_and_the_best_of_means():
    found = figures("tail_skew", [line(value, seed, *scores) for value, scores in SKEWS.items() for seed in range(2)])
    assert found["best_lambda"] == {"cifar100": 0.05}
    assert found["rank_correlation"]["cifar100"]["tail"] == 1.0
    assert found["rank_correlation"]["cifar100"]["head"] == -1.0
    assert found["rank_correlation"]["cifar100"]["overall"] == pytest.approx(0.2, abs=1e-3)
    assert found["rank_correlation"]["cifar100"]["middle"] is None  # the same everywhere
    assert "ratios" not in found


def test_the_rows_of_equal_cost_that_differ_in_lambda_alone_are_a_curve(tmp_path):
    scores = {"CIBL, λ = 0.2": (0.3, 0.3), "balanced softmax": (0.4, 0.1), "CIBL, λ = 0.01": (0.5, 0.2), "BCL": (0.6, 0.9)}
    scores["CIBL, two views"] = (0.7, 0.0)
    lines = [line(value, 0, *of, table="equal_cost") | {"budget": "laptop"} for value, of in scores.items()]
    found = figures("equal_cost", lines)
    assert found["best_lambda"] == {"cifar100": 0.01}
    assert found["rank_correlation"]["cifar100"]["tail"] == 1.0
    assert figures("equal_cost", lines[:2]) == {}  # two values are no curve
    report.write(tmp_path / "t.jsonl", lines, [])
    assert (
        "![CIFAR-100-LT, imbalance factor 100, accuracy over λ](t-cifar100-if100-skew.png)" in (tmp_path / "t.md").read_text()
    )
    assert (tmp_path / "t-cifar100-if100-skew.png").stat().st_size > 10_000
    report.write(tmp_path / "u.jsonl", lines[:2], [])
    assert "skew.png" not in (tmp_path / "u.md").read_text()


def test_epochs_are_compared_between_the_same_seeds():
    """The linear head's second seed has no cosine head's yet: it counts on neither side."""

    def of(value, seed, overall):
        return line(value, seed, overall, table="cosine_epochs")

    lines = [of("linear, 5", 0, 0.3), of("linear, 5", 1, 0.4), of("cosine, 2", 0, 0.2), of("cosine, 5", 0, 0.35)]
    found = figures("cosine_epochs", lines)
    assert found["ratios"] == {"cifar100_cosine_epochs_over_linear": 0.8}  # .3 lies at 4 of 5 epochs
    assert found["cosine_epochs_over_linear_by_seed"] == {"cifar100": {0: 0.8}}
    lines += [of("cosine, 2", 1, 0.3), of("cosine, 5", 1, 0.38)]
    found = figures("cosine_epochs", lines)
    assert found["cosine_epochs_over_linear_by_seed"]["cifar100"] == {0: 0.8, 1: None}  # not reached within the run
    assert sentences(found)[1].endswith("by seed: 0.8, not reached.")


def test_the_table_has_the_figures(tmp_path):
    lines = [line(value, seed, *scores) for value, scores in SKEWS.items() for seed in range(2)]
    report.write(tmp_path / "tail_skew-cpu.jsonl", lines, [])
    text = (tmp_path / "tail_skew-cpu.md").read_text()
    assert (
        "cifar100: Spearman's rank correlation with λ: overall +0.20, head -1.00, middle –, tail +1.00. Best λ overall: 0.05."
        in text
    )


def test_a_table_without_a_claim_has_none():
    assert figures("cifar100_lt", [line("CE", 0, 0.3)]) == {}
    assert sentences({}) == []
