"""`python -m benchmarks.claims --budget cpu --cifar10 FOLDER --cifar100 FOLDER`: the papers' claims, measured on real images.

CIFAR-10-LT and CIFAR-100-LT, imbalance factor 100; the folders hold train/CLASS/* and test/CLASS/*; by default torchvision's
copies in data/ are used. Four questions:

1. Tail skew: accuracy of the head, middle and tail third of the classes against λ. Is it monotonic?
2. Cosine head: how many epochs, in whole runs of that length, until it has the linear head's final accuracy?
3. Methods: CIBL beside cross-entropy, balanced softmax, Hybrid-SC, Hybrid-PSC, BCL and PaCo at equal epochs.
4. Readings of the loss, where the paper's text leaves them open: a log-prior in its logits, a queue, cross-entropy weights
   normalised to a mean of 1, means within each class first. With which does λ move accuracy to the tail?

Everything else is equal: images, views, schedule, initial weights (with --budget gpu all have the field's common recipe, the
Hybrids their own; `benchmarks.reproduce` gives each method its authors').
Scores are the last epoch's, on the test set. Runs that have a result are not run again, so a stopped measurement goes on. The
CPU budget begins no run that would end after two hours (--hours); what is left then, the same command does. Writes tables and
pictures to docs/claims/.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import claims_report
from benchmarks.many_runs import Run, RunsFailedError, refuse_another, run_all
from benchmarks.measure import report
from benchmarks.reproduce_cells import HYBRID
from pipelines.common.errors import UserError, run_command

LAMBDAS = (0.0, 0.01, 0.05, 0.5, 5.0)
READINGS = {
    "log-prior": "kappa: 1",
    "queue": "queue: 1024",
    "normalised": "normalize: batch",
    "normalised by class": "normalize: class",
}
READ_AT = (0.05, 0.5, 5.0)  # λ of the readings: CIFAR-100-LT, where λ moves least to the tail, and the first seed only


@dataclass(frozen=True)
class Budget:
    """epochs: of a full run. cosine: epochs of each of the cosine head's runs. averaging: momentum of PaCo's network. full: by
    the field's recipe and length. hours: after which no run begins that would end later; None: all of them."""

    epochs: int
    cosine: tuple[int, ...]
    averaging: float
    seeds: int
    options: tuple[str, ...]
    full: bool = False
    hours: float | None = None


CPU = ("--backbone", "resnet20", "--schedule", "{kind: cosine, warmup_epochs: 1}", "--loader.kind", "torch")
BUDGETS = {
    # PaCo's average over .999 would, in a run so short, be the initial network.
    "cpu": Budget(5, (2, 3, 5), 0.99, 3, CPU, hours=2),
    "gpu": Budget(200, (50, 100, 150, 200), 0.999, 3, (), full=True),
    "quick": Budget(1, (1,), 0.99, 1, (*CPU, "--warmup_epochs", "0", "--data.profile.largest", "100")),
}


def methods(budget: Budget, dataset: str) -> dict[str, tuple[str, ...]]:
    """Options of each method compared, beside cross-entropy and CIBL, which the sweep over λ has."""
    temperature = 1.0 if dataset == "cifar10" else 0.1  # of the prototypes, as Wang et al. 2021 set it
    hybrid = HYBRID if budget.full else ()
    return {
        "balanced softmax": ("--loss", "{kind: balanced_softmax}"),
        "Hybrid-SC": (*hybrid, "--loss", "{kind: hybrid_sc}"),
        "Hybrid-PSC": (*hybrid, "--loss", f"{{kind: hybrid_psc, temperature: {temperature}}}"),
        "BCL": ("--loss", "{kind: bcl}"),
        "PaCo": ("--loss", f"{{kind: paco, momentum: {budget.averaging}}}"),
    }


@dataclass(frozen=True)
class Cell:
    """One run: a dataset, what is asked (lambda, method, cosine or reading), the value, the seed, and its options."""

    dataset: str
    claim: str
    value: str
    seed: int
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        value = self.value.replace(", λ = ", "-").replace(" ", "_")
        return f"{self.dataset}-{self.claim}-{value}-{self.seed}"


def cells(budget: Budget, datasets: list[str]) -> list[Cell]:
    """Every run of a budget, first seeds first, so that a stopped measurement has something to say of each question."""
    listed = []
    for seed in range(budget.seeds):
        for dataset in datasets:
            length = ("--epochs", str(budget.epochs))
            for tail_skew in LAMBDAS:
                loss = f"{{kind: cibl, tail_skew: {tail_skew}}}"
                listed.append(Cell(dataset, "lambda", str(tail_skew), seed, ("--loss", loss, *length)))
            for method, options in methods(budget, dataset).items():
                listed.append(Cell(dataset, "method", method, seed, (*options, *length)))
            for epochs in budget.cosine:
                options = ("--head", "{kind: cosine}", "--loss", "{kind: cibl, tail_skew: 0.05}", "--epochs", str(epochs))
                listed.append(Cell(dataset, "cosine", str(epochs), seed, options))
        if seed == 0:
            listed += _readings(budget)
    return listed


def _readings(budget: Budget) -> list[Cell]:
    listed = []
    for reading, option in READINGS.items():
        for tail_skew in READ_AT:
            loss = f"{{kind: cibl, tail_skew: {tail_skew}, {option}}}"
            options = ("--loss", loss, "--epochs", str(budget.epochs))
            listed.append(Cell("cifar100", "reading", f"{reading}, λ = {tail_skew}", 0, options))
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", choices=["cpu", "gpu"], default="cpu", help="cpu: ResNet-20, 5 epochs; gpu: ResNet-32, 200")
    parser.add_argument("--quick", action="store_true", help="one epoch of few images: shows that it runs, measures nothing")
    for dataset, title in claims_report.TITLES.items():
        parser.add_argument(f"--{dataset}", type=Path, help=f"{title.removesuffix('-LT')} as an image folder")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"))
    parser.add_argument("--docs", type=Path, default=Path("docs/claims"))
    parser.add_argument("--jobs", type=int, help="runs at a time; by default one a core (cpu), one (gpu)")
    parser.add_argument("--hours", type=float, help="begin no run that would end later; by default 2 with --budget cpu")
    parser.add_argument("--report-only", action="store_true", help="write the tables from the runs that are there")
    arguments = parser.parse_args()
    name = "quick" if arguments.quick else arguments.budget
    budget = BUDGETS[name]
    jobs = arguments.jobs or (1 if arguments.budget == "gpu" else len(os.sched_getaffinity(0)))
    every = cells(budget, [*claims_report.TITLES])
    if arguments.quick:
        every = [
            cell
            for cell in every
            if (cell.dataset, cell.value) in (("cifar10", "0.0"), ("cifar10", "0.05"), ("cifar100", "BCL"))
        ]
    runs, summary, failed = arguments.runs / name, {}, None
    sources = {
        dataset: ("--data.source.kind", "folder", "--data.source.path", str(folder))
        for dataset in claims_report.TITLES
        if (folder := getattr(arguments, dataset)) is not None
    }
    if arguments.report_only:
        for run in _runs(every, sources, budget):
            refuse_another(runs / run.name, run.configuration(runs))
    else:
        hours = arguments.hours or budget.hours
        started = time.monotonic()
        try:
            run_all(_runs(every, sources, budget), runs, jobs, seconds=None if hours is None else 3600 * hours)
        except RunsFailedError as error:
            failed = error
        summary["minutes"] = round((time.monotonic() - started) / 60, 1)
    results = {cell: json.loads(path.read_text()) for cell in every if (path := runs / cell.name / "result.json").exists()}
    summary |= claims_report.summarize(results)
    if not arguments.quick:
        claims_report.write(arguments.docs, name, summary, results, len(every))
    if failed is not None:
        raise UserError(f"{failed}; the tables have the others")
    report(runs=len(results), of=len(every), **summary)


def _runs(every: list[Cell], sources: Mapping[str, tuple[str, ...]], budget: Budget) -> list[Run]:
    common = (*budget.options, "--head", "{kind: linear}") if budget.full else budget.options
    return [
        Run(
            cell.name,
            f"recipes/{cell.dataset}_lt_if100_200" if budget.full else f"{cell.dataset}_lt",
            (*sources.get(cell.dataset, ()), *cell.options[-2:], *common, *cell.options[:-2], "--seed", str(cell.seed)),
        )
        for cell in every
    ]


if __name__ == "__main__":
    run_command(main)
