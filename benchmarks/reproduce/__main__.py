"""`python -m benchmarks.reproduce TABLE [--budget BUDGET] [--seeds N] [--jobs N] [--hours H]`: from runs to tables.

TABLE is one of:

cifar10_lt, cifar100_lt  Eleven rows (cpu: nine) at imbalance factors 100, 50 and 10.
tail_skew       Does λ move accuracy from the head to the tail? Accuracy of each third of the classes against λ.
cosine_epochs   Does the cosine head need fewer epochs? Whole runs of a quarter to all of the linear head's epochs.
readings        What the paper's text leaves open: a log-prior in the logits, a queue, cross-entropy weights normalised to a
                mean of 1, means within each class first. With which does λ move accuracy to the tail?
recipe          CIBL's recipe with one thing changed at a time, scored on a tenth of each class, set aside for validation.
search          CIFAR-100-LT, a short recipe (one view, 35 epochs) with one thing changed at a time, scored likewise.
equal_cost      Each method on one short recipe, a million passes through ResNet-32 for all.
length          CIFAR-100-LT, the same recipe with half a million to 5 million passes: from which length on does a second view
                pay, and how long does the cosine head need for the linear one's accuracy?
imagenet_lt     ResNet-50, 90 epochs.

gpu: ResNet-32, 200 epochs, the published recipes, three runs at a time. laptop: the same, one after another on all cores, one
seed. Ctrl-C loses five minutes at most, the same command continues, and --hours H begins no run that would not end. cpu:
ResNet-20, 3 epochs, imbalance factor 100, one short recipe for all methods, a run a core: it says how methods compare after so
little training. smoke: one epoch of few images, in minutes, to see that all of it runs. Images come from torchvision's files in
data/, or from an image folder (train/CLASS/*, test/CLASS/*): --cifar10 FOLDER, --cifar100 FOLDER.

Scores are the last epoch's, on the test set, which chooses nothing. With --val 0.1 a tenth of each class is set aside, and the
best epoch on it is scored too. What has a result is not run again, so a stopped measurement continues. Every cell is a line of
TABLE-BUDGET.jsonl, with its command, configuration, code and machine, or with why it failed; Markdown and picture
beside it are drawn from those.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from benchmarks.many_runs import Run, RunsFailedError, refuse_another, run_all
from benchmarks.measure import machine, report
from benchmarks.reproduce import report as tables
from benchmarks.reproduce.cells import BUDGETS, ON_VALIDATION, TABLES, Cell, cells
from benchmarks.reproduce.claims import figures
from benchmarks.reproduce.lines import Line, failed, is_of, record, source, source_of
from benchmarks.reproduce.pace import planned, seconds_a_pass
from pipelines.common.cores import usable_cores
from pipelines.common.errors import UserError, run_command
from pipelines.common.words import plural


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--budget", choices=BUDGETS, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, help="by default 3; laptop and smoke: 1")
    parser.add_argument("--hours", type=float, help="begin no run that would end later; the same command does the rest")
    parser.add_argument("--jobs", type=int, help="runs at a time; by default three on a GPU, one a core without")
    parser.add_argument("--methods", nargs="+", metavar="ROW", help="train only these rows of the table")
    parser.add_argument("--datasets", nargs="+", choices=("cifar10", "cifar100"), help="train only on these")
    parser.add_argument("--factors", nargs="+", type=int, metavar="IF", help="train only at these imbalance factors")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile, on a GPU as CUDA graphs")
    parser.add_argument(
        "--val",
        type=float,
        default=0.0,
        help="share of each class set aside, for the best epoch (0; recipe, search: 0.1)",
    )
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10 as an image folder; by default torchvision's files in data/")
    parser.add_argument("--cifar100", type=Path, help="CIFAR-100 likewise")
    parser.add_argument(
        "--imagenet", type=Path, help="the lists' root folder, by default data/imagenet; with the budget smoke any image folder"
    )
    parser.add_argument("--prepared", type=Path, default=Path("prepared"), help="folder for .beton files")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"))
    parser.add_argument(
        "--docs",
        type=Path,
        help="folder of the table; by default docs/results (cpu, smoke: docs/lab-notes/short-runs)",
    )
    parser.add_argument("--report-only", action="store_true", help="draw tables and pictures from the lines that are there")
    arguments = parser.parse_args()
    table, budget = arguments.table, arguments.budget
    docs = arguments.docs or Path("docs/lab-notes/short-runs" if budget in ("cpu", "smoke") else "docs/results")
    lines = docs / f"{table}-{budget}{'-val' if arguments.val else ''}{_suffix(arguments)}.jsonl"
    if table in ON_VALIDATION:
        arguments.val = arguments.val or 0.1
    if table in ("search", "equal_cost", "length") and budget == "cpu":
        parser.error(f"{table} trains ResNet-32 for 18 epochs or more a row: it has the budgets laptop, gpu and smoke")
    if table == "imagenet_lt" and budget == "cpu":
        parser.error("imagenet_lt is ResNet-50 at 224 pixels, 90 epochs: it has the budgets gpu and smoke")
    seeds = 1 if budget == "smoke" else arguments.seeds or (1 if budget == "laptop" else 3)
    known_seeds = [1 + line["seed"] for line in tables.read(lines)]
    if arguments.report_only and known_seeds and not arguments.seeds:
        seeds = max(known_seeds)
    every = cells(table, budget, max([seeds, *known_seeds]), arguments.val)
    wanted = [cell for cell in every if cell.seed < seeds]
    for option, name in (("methods", "value"), ("datasets", "dataset"), ("factors", "imbalance")):
        if (chosen := getattr(arguments, option)) is not None:
            there = {getattr(cell, name) for cell in every}
            if strange := sorted({*chosen} - there):
                parser.error(f"--{option}: no row {strange[0]!r}; there are: {', '.join(map(str, sorted(there)))}")
            wanted = [cell for cell in wanted if getattr(cell, name) in chosen]
    if not wanted:
        parser.error("no row has all of --methods, --datasets and --factors; leave one of them out")
    stopped = None if arguments.report_only else _train(wanted, arguments, lines)
    # The table is always the whole one: of every line that still says what its cell would train.
    rows = {tables.row(cell): number for number, cell in reversed([*enumerate(every)])}
    by_key = {(*tables.row(cell), cell.seed): cell for cell in every}
    known = []
    for line in tables.read(lines):
        cell = by_key.get(tables.key(line))
        if cell is not None and is_of(line, Run(cell.name, cell.config, cell.options).configuration(Path())):
            known.append(line)
    known.sort(key=lambda line: (rows[tables.key(line)[:3]], line["seed"]))
    results = [line for line in known if "failed" not in line]
    if stopped is not None and not results:
        raise UserError(str(stopped))
    if not results:
        parser.error(f"{lines} has no results yet")
    tables.write(lines, known, every)
    if stopped is not None:
        raise UserError(f"{stopped}; the table has the others")
    found = {"ratios": {}} | figures(table, results)
    report(table=table, budget=budget, runs=len(results), of=len(every), rows=tables.means(results), **found)


def _suffix(arguments: argparse.Namespace) -> str:
    return "-compiled" if arguments.compile else ""


def _train(every: list[Cell], arguments: argparse.Namespace, lines: Path) -> RunsFailedError | None:
    """Train every cell that has no line; returns what failed.

    Raises UserError where a line's images came from another kind of source: they are not the same pixels.
    """
    table, budget = arguments.table, arguments.budget
    alone = table == "imagenet_lt"  # three such runs at once do not fit into a GPU's memory
    jobs = arguments.jobs or (1 if alone else BUDGETS[budget].jobs) or usable_cores()
    compiled = ("--train.compile", "true") if arguments.compile else ()
    # Compiled runs have folders, lines and a table of their own.
    runs = arguments.runs / f"{budget}{'-val' if arguments.val else ''}{_suffix(arguments)}" / table
    by_name = {cell.name: cell for cell in every}
    known = {tables.key(line): line for line in tables.read(lines)}

    def done(run: Run, seconds: float | None) -> None:
        line = record(by_name[run.name], runs / run.name, table, budget, jobs, seconds)
        tables.add(lines, line)
        print(f"{run.name}: {100 * line['last']['overall']:.1f} %, {line['seconds']:.0f} s", flush=True)

    todo = []
    for cell in every:
        kind = "lists" if table == "imagenet_lt" and budget != "smoke" else "folder"
        place = source(kind, getattr(arguments, cell.dataset))
        run = Run(cell.name, cell.config, (*place, *cell.options, *compiled, "--prepared", str(arguments.prepared)))
        config, line = run.configuration(runs), known.get((*tables.row(cell), cell.seed))
        if line is None or "failed" in line or not is_of(line, config):
            todo.append(run)
        elif source_of(line) != config.data.source.kind:
            raise UserError(
                f"{lines} has {cell.name} of images from {source_of(line)!r}, this command reads {config.data.source.kind!r}: "
                "choose another --docs, and another --runs"
            )
    for run in todo:
        if (runs / run.name / "result.json").exists():  # stopped between the run and its line
            refuse_another(runs / run.name, run.configuration(runs))
            done(run, None)
    try:
        if arguments.hours is None:
            run_all(todo, runs, jobs, done)
        else:
            pace = _pace([*known.values()], todo, runs, jobs)
            late = run_all(todo, runs, jobs, done, 3600 * arguments.hours, planned, pace)
            if late:
                when = f"would end after {arguments.hours:g} hours (--hours)"
                print(f"{plural(len(late), 'run', 'were')} not begun, since each {when}: {', '.join(late)}", flush=True)
    except RunsFailedError as error:
        for run in todo:
            if run.name in error.reasons:
                reason = error.reasons[run.name].replace(str(runs), "RUNS")
                tables.add(lines, failed(by_name[run.name], table, budget, run.configuration(runs), reason))
        return error
    return None


def _pace(known: list[Line], todo: list[Run], runs: Path, jobs: int) -> float:
    """Seconds that a pass takes here: the median of this machine's lines, or as a few steps measure it."""
    taken = [
        line["wall_seconds"] / (line["passes"] + line["forward_passes"] / 3)
        for line in known
        if line.get("passes") and line.get("wall_seconds") and line["machine"] == machine() and line["jobs"] == jobs
    ]
    if taken:
        return statistics.median(taken)
    unfinished = [run for run in todo if not (runs / run.name / "result.json").exists()]
    if not unfinished:
        return 0.0
    config = unfinished[0].configuration(runs)
    # Runs share the cores. A GPU waits for the host most of the time with networks as small as these.
    return seconds_a_pass(config) * (jobs if config.train.device == "cpu" else 1)


if __name__ == "__main__":
    run_command(main)
