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
from pathlib import Path

from benchmarks import claims_report
from benchmarks.claims_cells import BUDGETS, TITLES, Budget, Cell, cells
from benchmarks.many_runs import Run, RunsFailedError, refuse_another, run_all
from benchmarks.measure import report
from pipelines.common.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", choices=["cpu", "gpu"], default="cpu", help="cpu: ResNet-20, 5 epochs; gpu: ResNet-32, 200")
    parser.add_argument("--quick", action="store_true", help="one epoch of few images: shows that it runs, measures nothing")
    for dataset, title in TITLES.items():
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
    every = cells(budget, [*TITLES])
    if arguments.quick:
        every = [
            cell
            for cell in every
            if (cell.dataset, cell.value) in (("cifar10", "0.0"), ("cifar10", "0.05"), ("cifar100", "BCL"))
        ]
    runs, summary, failed = arguments.runs / name, {}, None
    sources = {
        dataset: ("--data.source.kind", "folder", "--data.source.path", str(folder))
        for dataset in TITLES
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
