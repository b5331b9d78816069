"""What every tracker does, what it is given, and what a run folder remembers of it."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cibl_ray.run.folder import TRACKERS
from cibl_ray.run.log import Row
from pipelines.common.files import write_atomically

Status = Literal["finished", "stopped", "failed"]
_WRITING = threading.Lock()  # each tracker has a thread, and all of a folder have one file
PROJECT = "cibl-ray"  # the MLflow experiment and the W&B project, unless the environment names another


class Memory:
    """What trackers remember of a run or a sweep: `trackers.json` in its folder, with one entry for each tracker.

    Args:
        folder: The run or sweep folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / TRACKERS

    def read(self, tracker: str) -> dict[str, Any]:
        """The entry of a tracker; empty where there is none, or the file is damaged."""
        entry = self._all().get(tracker)
        return entry if isinstance(entry, dict) else {}

    def write(self, tracker: str, **values: Any) -> None:
        """Set values of a tracker's entry.

        Raises:
            OSError: The disk is full or cannot be written.
        """
        with _WRITING:
            entries = self._all()
            entries[tracker] = {**self.read(tracker), **values}
            write_atomically(self._path, json.dumps(entries, indent=1))

    def _all(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class Subject:
    """What is tracked.

    Attributes:
        name: Of the run or sweep.
        folder: Its folder.
        runs: The folder that run folders lie in; a tracker without a server keeps its database there.
        params: The configuration by dotted names.
        sweep: The sweep folder, where this is a trial; else None.
        is_sweep: Whether this is a sweep itself.
        tags: Further facts, as text.
    """

    name: str
    folder: Path
    runs: Path
    params: dict[str, Any]
    sweep: Path | None = None
    is_sweep: bool = False
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a run or a sweep ends with.

    Attributes:
        scores: The final table: numbers by column, for each row.
        text: The same as text.
        files: The configuration, the result and the pictures.
    """

    scores: dict[str, dict[str, float]]
    text: str
    files: list[Path]

    def numbers(self) -> dict[str, float]:
        """The table as one number for each name, `row/column`."""
        return {f"{row}/{column}": value for row, values in self.scores.items() for column, value in values.items()}


@dataclass(frozen=True)
class Ended:
    """A trial of a sweep that has ended.

    Attributes:
        name: Of the trial.
        params: The values of the searched fields.
        scores: On the validation split.
        status: How it ended.
    """

    name: str
    params: dict[str, Any]
    scores: dict[str, float]
    status: Status


class Tracker:
    """A tracker that does nothing. Each method may raise any exception, after which the tracker is not used any more.

    Attributes:
        name: As `track` has it.
        packages: What has to be importable.
        sends: Whether it talks to another process or host, and so gets a thread of its own.
    """

    name = ""
    packages: tuple[str, ...] = ()
    sends = False

    def begin(self, epoch: int, rows: list[Row]) -> None:
        """Start, or continue after `epoch` whole epochs, whose rows are `rows`."""

    def row(self, row: Row) -> None:
        """Record an epoch, or what an epoch's row lacked before."""

    def end(self, outcome: Outcome) -> None:
        """Record what the run or sweep ends with."""

    def trial(self, ended: Ended) -> None:
        """Record a trial of the sweep."""

    def bundle(self, folder: Path) -> None:
        """Keep a bundle with the run."""

    def close(self, status: Status) -> None:
        """Let go of everything."""


class Sender(Tracker):
    """A tracker that sends each epoch once to another host or process, however often the run resumes.

    Args:
        subject: The run or sweep.
    """

    sends = True

    def __init__(self, subject: Subject) -> None:
        self._subject, self._memory = subject, Memory(subject.folder)
        self._sent = 0  # the last epoch that was sent

    def row(self, row: Row) -> None:
        """Send an epoch's numbers, unless they were sent before the run resumed."""
        epoch = row["epoch"]
        if epoch < self._sent or (epoch == self._sent and "train" in row):
            return
        self.send(epoch, numbers_of(row))
        self._sent = epoch
        self._memory.write(self.name, epoch=epoch)

    def send(self, epoch: int, numbers: dict[str, float]) -> None:
        """Send the numbers of an epoch, by `group/name`."""
        raise NotImplementedError


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration by dotted names; a list stays one value."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def numbers_of(row: Row) -> dict[str, float]:
    """The numbers of an epoch's row by `group/name`."""
    return {
        f"{group}/{name}": value
        for group, values in row.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if isinstance(value, int | float)
    }
