"""A line of a table: what is needed to read a run's scores, to repeat it, and to see whether it is what its cell says today."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.many_runs import computed
from benchmarks.measure import machine
from benchmarks.reproduce.cells import ON_VALIDATION, Cell
from benchmarks.reproduce.cost import cost
from cibl_ray.config import RunConfig
from cibl_ray.run.fingerprint import code_digest
from cibl_ray.run.folder import CONFIG
from cibl_ray.run.log import read_metrics
from pipelines.common.config_file import read_config
from pipelines.common.errors import UserError
from pipelines.common.validation import validate

Line = dict[str, Any]

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = ("benchmarks", "cibl_ray", "configs", "pipelines")  # what decides a result


def commit() -> str | None:
    """The checked-out commit, marked where its code has been changed; None outside a repository, or without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()

    try:
        found = git("rev-parse", "--short=12", "HEAD")
        return found + ("-dirty" if git("status", "--porcelain", "--", *CODE) else "") if found else None
    except OSError:
        return None


def source(kind: str, folder: Path | None) -> tuple[str, ...]:
    """The options that read a data set from a folder, as image folder or (kind 'lists') as the root of split lists; none: from
    where its configuration says."""
    if folder is None:
        return ()
    if kind == "lists":
        return ("--data.source.root", str(folder))
    return ("--data.source.kind", "folder", "--data.source.path", str(folder))


def source_of(line: Line) -> str:
    """The kind of source that a line's images came from; an older line says it in its command alone."""
    if "source" in line:
        return str(line["source"])
    return "folder" if "--data.source.kind folder" in line["command"] else str(line["dataset"])


def of_cell(cell: Cell, table: str, budget: str, config: RunConfig) -> Line:
    """What the line of a cell says before it has scores. config: what a run computes, on whatever machine."""
    return {
        "table": table,
        "budget": budget,
        "dataset": cell.dataset,
        "imbalance": cell.imbalance,
        "value": cell.value,
        "seed": cell.seed,
        "source": config.data.source.kind,
        "config": anywhere(config),
    }


def failed(cell: Cell, table: str, budget: str, config: RunConfig, reason: str) -> Line:
    """The line of a run that failed: it has a reason in the place of scores."""
    return of_cell(cell, table, budget, config) | {"failed": reason}


def record(
    cell: Cell, folder: Path, table: str, budget: str, jobs: int | None = None, wall_seconds: float | None = None
) -> Line:
    """The line of a finished run; no path of this machine. jobs: runs at a time; wall_seconds: of its process as a whole.

    commit: the one that is checked out, if it is its code that trained every epoch; else None.
    """
    result, rows = json.loads((folder / "result.json").read_text()), read_metrics(folder)
    if table in ON_VALIDATION:  # recipes are chosen by these scores, so the test set stays out of them
        result = {**result, "last": {"epoch": rows[-1]["epoch"], "scores": rows[-1]["val"]}}
        result.pop("best", None)
    config = validate(RunConfig, read_config(folder / CONFIG), str(folder))
    # What the run itself read, whatever this command was given; the lists of ImageNet have a root for every user.
    kind = config.data.source.kind
    where = source(kind, Path("FOLDER") if kind in ("folder", "lists") else None)
    compiled = ("--train.compile", "true") if config.train.compile else ()
    return of_cell(cell, table, budget, config) | {
        "command": shlex.join(["python", "-m", "cibl_ray.train", cell.config, *where, *cell.options, *compiled]),
        "precision": config.train.precision,
        "compile": config.train.compile,
        "loader": result["loader"],
        "data": result["data"],
        "code": result["code"],
        "commit": commit() if result["code"] == [code_digest()] else None,
        "machine": machine(),
        "hardware": result["hardware"],
        "jobs": jobs,
        "seconds": round(result["seconds"], 1),
        "wall_seconds": None if wall_seconds is None else round(wall_seconds, 1),
        "images_per_s": round(result["images_per_s"], 1),
        **cost(result, config),
        **{kind: _scores(result[kind]) for kind in ("last", "best") if kind in result},
    }


def anywhere(config: RunConfig) -> dict[str, Any]:
    """What decides a run's result, on any machine: 'auto' precision differs between them, and a line says what it was."""
    return computed(config)


def is_of(line: Line, config: RunConfig) -> bool:
    """Whether a line's run computed what its cell's configuration says today.

    Every value in the line must be today's, so a changed default is a difference; a field that has come since counts as having
    its default, which is to change nothing.
    """
    if "config" not in line:
        return False
    content = {**line["config"], "data": {**line["config"]["data"], "source": config.data.source.model_dump()}}
    try:
        there = validate(RunConfig, content, "")
    except UserError:  # a value or a field that is no more
        return False
    return anywhere(there) == anywhere(config)


def _scores(entry: dict[str, Any]) -> dict[str, Any]:
    names = ("overall", "many", "medium", "few", "head", "middle", "tail", "worst", "calibration_error")
    scores = {name: entry["scores"].get(name) for name in names}
    return {"epoch": entry["epoch"], **{name: None if value is None else round(value, 4) for name, value in scores.items()}}
