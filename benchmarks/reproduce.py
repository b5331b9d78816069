"""`python -m benchmarks.reproduce TABLE [--budget gpu|cpu|smoke] [--seeds 3] [--jobs N]`: a table, from runs to docs/results/.

TABLE: cifar10_lt, cifar100_lt (nine methods at imbalance factors 100, 50, 10), tail_skew, cosine_epochs, imagenet_lt, and
recipe: CIBL's recipe with one thing changed at a time, scored on a tenth of each class that is set aside for validation.

gpu: ResNet-32, 200 epochs, the published recipes, three runs at a time. cpu: ResNet-20, 3 epochs, imbalance factor 100, one
short recipe for all methods, a run a core: it says how methods compare after so little training. smoke: one epoch of few
images, in minutes, to see that all of it runs. Images come from torchvision's files in data/, or from an image folder
(train/CLASS/*, test/CLASS/*): --cifar10 FOLDER, --cifar100 FOLDER.

Scores are the last epoch's, on the test set, which chooses nothing. With --val 0.1 a tenth of each class is set aside, and the
best epoch on it is scored too. What has a result is not run again, so a stopped measurement goes on. Every cell is a line of
docs/results/TABLE-BUDGET.jsonl, with its command, commit and machine; Markdown and picture beside it are drawn from those.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks import reproduce_report
from benchmarks.many_runs import Run, RunsFailedError, computed, refuse_another, run_all
from benchmarks.measure import machine, report
from benchmarks.reproduce_cells import BUDGETS, TABLES, Cell, cells
from cibl_ray.config import RunConfig
from cibl_ray.runlog import read_metrics
from cibl_ray.train import CONFIG
from pipelines.cores import usable_cores
from pipelines.errors import UserError, run_command
from pipelines.settings import read_config, validate

REPOSITORY = Path(__file__).resolve().parent.parent


CODE = ("benchmarks", "cibl_ray", "configs", "pipelines")  # what decides a result


def commit() -> str | None:
    """The checked-out commit, marked where its code has been changed; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()

    found = git("rev-parse", "--short=12", "HEAD")
    return found + ("-dirty" if git("status", "--porcelain", "--", *CODE) else "") if found else None


def source(dataset: str, folder: Path | None) -> tuple[str, ...]:
    if folder is None:
        return ()
    if dataset == "imagenet":
        return ("--data.source.root", str(folder))
    return ("--data.source.kind", "folder", "--data.source.path", str(folder))


def recipe(config: RunConfig) -> str:
    """A short name of what a configuration computes, wherever its images lie: a line of another recipe is of no use. Of what
    is not as by default, so that a field which is new changes no name."""
    content = computed(config, defaults=False)
    content.get("train", {}).pop("precision", None)  # 'auto' differs from machine to machine; a line says what it was
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def record(
    cell: Cell, folder: Path, table: str, budget: str, of: str | None, wall_seconds: float | None = None
) -> dict[str, Any]:
    """All that is needed to read a cell and to repeat it; no path of this machine. wall_seconds: of its process as a whole."""
    result = json.loads((folder / "result.json").read_text())
    if table == "recipe":  # recipes are chosen by these scores, so the test set stays out of them
        last = read_metrics(folder)[-1]
        result = {**result, "last": {"epoch": last["epoch"], "scores": last["val"]}}
        result.pop("best", None)
    config = validate(RunConfig, read_config(folder / CONFIG), str(folder))
    # What the run itself read, whatever this command was given; the lists of ImageNet have a root for every user.
    elsewhere = config.data.source.kind in ("folder", "lists")
    where = source(cell.dataset, Path("FOLDER") if elsewhere else None)
    compiled = ("--train.compile", "true") if config.train.compile else ()
    return {
        "table": table,
        "budget": budget,
        "dataset": cell.dataset,
        "imbalance": cell.imbalance,
        "value": cell.value,
        "seed": cell.seed,
        "source": config.data.source.kind,
        "command": shlex.join(["python", "-m", "cibl_ray.train", cell.config, *where, *cell.options, *compiled]),
        "recipe": recipe(config),
        "precision": config.train.precision,
        "compile": config.train.compile,
        "loader": result["loader"],
        "data": result["data"],
        "commit": of,
        "machine": machine(),
        "hardware": result["hardware"],
        "seconds": round(result["seconds"], 1),
        "wall_seconds": None if wall_seconds is None else round(wall_seconds, 1),
        "images_per_s": round(result["images_per_s"], 1),
        **{kind: _scores(result[kind]) for kind in ("last", "best") if kind in result},
    }


def _scores(entry: dict[str, Any]) -> dict[str, Any]:
    names = ("overall", "many", "medium", "few", "head", "middle", "tail", "worst", "calibration_error")
    scores = {name: entry["scores"].get(name) for name in names}
    return {"epoch": entry["epoch"], **{name: None if value is None else round(value, 4) for name, value in scores.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--budget", choices=BUDGETS, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, help="runs at a time; by default three on a GPU, one a core without")
    parser.add_argument("--methods", nargs="+", metavar="ROW", help="train only these rows of the table")
    parser.add_argument("--datasets", nargs="+", choices=("cifar10", "cifar100"), help="train only on these")
    parser.add_argument("--factors", nargs="+", type=int, metavar="IF", help="train only at these imbalance factors")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile, on a GPU as CUDA graphs")
    parser.add_argument(
        "--val", type=float, default=0.0, help="share of each class set aside to choose the best epoch on (0; recipe: 0.1)"
    )
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10 as an image folder; by default torchvision's files in data/")
    parser.add_argument("--cifar100", type=Path, help="CIFAR-100 likewise")
    parser.add_argument("--imagenet", type=Path, help="the lists' root folder; by default data/imagenet")
    parser.add_argument("--prepared", type=Path, default=Path("prepared"), help="folder for .beton files")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--report-only", action="store_true", help="draw tables and pictures from the lines that are there")
    arguments = parser.parse_args()
    table, budget = arguments.table, arguments.budget
    lines = arguments.docs / f"{table}-{budget}{'-val' if arguments.val else ''}{_suffix(arguments)}.jsonl"
    if table == "recipe":
        arguments.val = arguments.val or 0.1
    if table == "imagenet_lt" and budget != "gpu":
        parser.error("imagenet_lt is ResNet-50 at 224 pixels, 90 epochs: it has the budget gpu alone")
    seeds = 1 if budget == "smoke" else arguments.seeds
    known_seeds = [1 + line["seed"] for line in reproduce_report.read(lines)]
    every = cells(table, budget, max([seeds, *known_seeds]), arguments.val)
    wanted = [cell for cell in every if cell.seed < seeds]
    for option, name in (("methods", "value"), ("datasets", "dataset"), ("factors", "imbalance")):
        if (chosen := getattr(arguments, option)) is not None:
            there = {getattr(cell, name) for cell in every}
            if strange := sorted({*chosen} - there):
                parser.error(f"--{option}: no row {strange[0]!r}; there are: {', '.join(map(str, sorted(there)))}")
            wanted = [cell for cell in wanted if getattr(cell, name) in chosen]
    failed = None if arguments.report_only else _train(wanted, arguments, lines)
    # The table is always the whole one: of every line that still says what its cell would train.
    rows = {reproduce_report.row(cell): number for number, cell in reversed([*enumerate(every)])}
    by_key = {(*reproduce_report.row(cell), cell.seed): cell for cell in every}
    known = []
    for line in reproduce_report.read(lines):
        cell = by_key.get(reproduce_report.key(line))
        if cell is not None and line_is_of(line, cell, recipe(Run(cell.name, cell.config, cell.options).configuration(Path()))):
            known.append(line)
    if failed is not None and not known:
        raise UserError(str(failed))
    if not known:
        parser.error(f"{lines} has no results yet")
    results = sorted(known, key=lambda line: (rows[reproduce_report.key(line)[:3]], line["seed"]))
    reproduce_report.write(lines, results, of=len(every))
    if failed is not None:
        raise UserError(f"{failed}; the table has the others")
    report(table=table, budget=budget, runs=len(results), of=len(every), ratios={}, rows=reproduce_report.means(results))


def _suffix(arguments: argparse.Namespace) -> str:
    return "-compiled" if arguments.compile else ""


def line_is_of(line: dict[str, Any], cell: Cell, wanted: str) -> bool:
    """Whether a line is of the recipe that the cell has now, named `wanted`. Older lines have their command alone."""
    if "recipe" in line:
        return bool(line["recipe"] == wanted)
    return bool(line["command"].endswith(shlex.join(["", *cell.options])[2:]))


def _train(every: list[Cell], arguments: argparse.Namespace, lines: Path) -> RunsFailedError | None:
    """Train every cell that has no line; returns what failed."""
    alone = arguments.table == "imagenet_lt"  # three such runs at once do not fit into a GPU's memory
    jobs = arguments.jobs or (1 if alone else BUDGETS[arguments.budget].jobs) or usable_cores()
    compiled = ("--train.compile", "true") if arguments.compile else ()
    # Compiled runs have folders, lines and a table of their own.
    runs = arguments.runs / f"{arguments.budget}{'-val' if arguments.val else ''}{_suffix(arguments)}" / arguments.table
    at = commit()
    by_name = {cell.name: cell for cell in every}
    known = {reproduce_report.key(line): line for line in reproduce_report.read(lines)}

    def done(run: Run, seconds: float | None) -> None:
        line = record(by_name[run.name], runs / run.name, arguments.table, arguments.budget, at, seconds)
        reproduce_report.add(lines, line)

    todo = []
    for cell in every:
        key = cell.dataset, cell.imbalance, cell.value, cell.seed
        place = source(cell.dataset, getattr(arguments, cell.dataset))
        run = Run(cell.name, cell.config, (*place, *cell.options, *compiled, "--prepared", str(arguments.prepared)))
        if key not in known or not line_is_of(known[key], cell, recipe(run.configuration(runs))):
            todo.append(run)
    for run in todo:
        if (runs / run.name / "result.json").exists():  # stopped between the run and its line
            refuse_another(runs / run.name, run.configuration(runs))
            done(run, None)
    try:
        run_all(todo, runs, jobs, done)
    except RunsFailedError as failed:
        return failed
    return None


if __name__ == "__main__":
    run_command(main)
