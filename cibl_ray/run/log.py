"""What a run writes as it trains: one JSON object for each epoch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cibl_ray.run.folder import CHECKPOINTS, METRICS, set_aside
from cibl_ray.run.head import newest_head
from pipelines.common.files import write_atomically
from pipelines.common.words import plural

log = logging.getLogger(__name__)

Row = dict[str, Any]
_GROUPS = ("train", "rate", "seconds")  # of numbers, which every row has


class RunLog:
    """One JSON object an epoch in `metrics.jsonl`.

    Args:
        folder: The run folder.
        epoch: Whole epochs that the run resumes after; 0 for a new run. Rows beyond it are dropped: they are trained again.
        saved: The rows that the checkpoint has; None where it is an older one, or there is none.
        listener: Called with each epoch's numbers, and with those that an epoch's row lacked before.

    Attributes:
        rows: The log so far. A checkpoint keeps them, and the file is mended by them.
    """

    def __init__(
        self, folder: Path, epoch: int, saved: list[Row] | None = None, listener: Callable[[Row], None] = lambda row: None
    ) -> None:
        self._path = folder / METRICS
        self.rows = _mend(self._path, epoch, saved)
        write_atomically(self._path, _text(self.rows))
        self._listener = listener

    def write(self, row: Row) -> None:
        """Append one epoch's numbers: {"epoch": ..., group: {name: value}}."""
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._listener(row)

    def last_without(self, group: str, epoch: int) -> Row | None:
        """The last row, where it is of `epoch` and has no numbers of `group`: the run was stopped before it had them."""
        last = self.rows[-1] if self.rows else None
        return last if last is not None and last["epoch"] == epoch and group not in last else None

    def replace_last(self, row: Row) -> None:
        """Write a row in the place of the last one, which lacks some of its groups."""
        before = self.rows.pop()
        self.rows.append(row)
        write_atomically(self._path, _text(self.rows))
        self._listener({"epoch": row["epoch"]} | {name: group for name, group in row.items() if name not in before})


def read_metrics(folder: Path) -> list[Row]:
    """Read a run's epochs: those that its last checkpoint has, and those that the log has beyond.

    A line that a kill cut short or that is no row is left out. Nothing is written.
    """
    rows = _read(folder / METRICS).rows
    head = newest_head(folder / CHECKPOINTS) or {}
    saved = [row for row in head.get("rows") or [] if is_row(row)]
    return saved + [row for row in rows if row["epoch"] > saved[-1]["epoch"]] if saved else rows


def is_row(row: object) -> bool:
    """Whether `row` has what each row of the log has: the epoch, and its groups of numbers."""
    return (
        isinstance(row, dict)
        and isinstance(row.get("epoch"), int)
        and all(
            isinstance(row.get(group), dict) and all(isinstance(value, int | float) for value in row[group].values())
            for group in _GROUPS
        )
    )


@dataclass(frozen=True)
class _Read:
    """A log as its file has it: the rows, the lines that are not rows, and whether the file ends within a line."""

    rows: list[Row]
    strange: int
    torn: bool


def _read(path: Path) -> _Read:
    if not path.is_file():
        return _Read([], 0, False)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return _Read([], 1, False)
    rows: list[Row] = []
    strange = 0
    for line in lines[:-1]:
        row = _row(line)
        if row is None or (rows and row["epoch"] <= rows[-1]["epoch"]):
            strange += 1
        else:
            rows.append(row)
    return _Read(rows, strange, torn=lines[-1] != b"")


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if is_row(row) else None


def _mend(path: Path, epoch: int, saved: list[Row] | None) -> list[Row]:
    """The rows to resume with: the checkpoint's decide. A file that says something else is kept beside, and a line says so."""
    there = _read(path)
    kept = [row for row in there.rows if row["epoch"] <= epoch]
    beyond = len(there.rows) - len(kept)
    rows = kept if saved is None else [row for row in saved if row["epoch"] <= epoch]
    if not path.is_file():
        if epoch:
            log.warning("%s is missing: %s", path, _written(rows, saved))
        return rows
    whole = there.strange == 0 and _text(kept) == _text(rows) and (saved is not None or not epoch or _last(kept) == epoch)
    if whole and not (beyond and epoch == 0):
        if beyond:
            again = "it is" if beyond == 1 else "they are"
            log.info("the log has %s beyond the last checkpoint; %s trained again", plural(beyond, "epoch"), again)
        return rows
    if whole:
        log.warning(
            "no checkpoint is left: training begins at epoch 1; the log of %s is kept as %s",
            plural(beyond, "epoch"),
            set_aside(path),
        )
    else:
        log.warning("%s is damaged: %s; it is kept as %s", path, _written(rows, saved), set_aside(path))
    return rows


def _written(rows: list[Row], saved: list[Row] | None) -> str:
    source = "the lines of it that can be read" if saved is None else "the last checkpoint"
    return f"{plural(len(rows), 'epoch', 'are')} written again from {source}"


def _last(rows: list[Row]) -> int:
    return int(rows[-1]["epoch"]) if rows else 0


def _text(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
