"""Trackers that write files into the run folder: TensorBoard events and CSV tables."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from cibl_ray.run.folder import METRICS_TABLE, SCORES_TABLE, TENSORBOARD
from cibl_ray.run.log import Row
from cibl_ray.tracking.base import Outcome, Status, Subject, Tracker, numbers_of
from pipelines.common.files import write_atomically


class TensorBoard(Tracker):
    """Events below `tensorboard/`: numbers of each epoch, the parameters and the final table as text, the pictures.

    Args:
        subject: The run.
    """

    name = "tensorboard"
    packages = ("tensorboard",)

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._events: Any = None
        self._epoch = 0

    def begin(self, epoch: int, rows: list[Row]) -> None:
        """Open a file of events. Events of epochs that are trained again are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self._epoch = epoch
        self._events = SummaryWriter(str(self._subject.folder / TENSORBOARD), purge_step=epoch + 1)
        table = "\n".join(f"| {name} | {json.dumps(value)} |" for name, value in self._subject.params.items())
        self._events.add_text("parameters", f"| field | value |\n|---|---|\n{table}", epoch)

    def row(self, row: Row) -> None:
        """Write an epoch's numbers."""
        self._epoch = row["epoch"]
        for name, value in numbers_of(row).items():
            self._events.add_scalar(name, value, self._epoch)
        self._events.flush()

    def end(self, outcome: Outcome) -> None:
        """Write the final table and the pictures, as they are: nothing is encoded again."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._events.add_text("scores", "\n".join(f"    {line}" for line in outcome.text.splitlines()), self._epoch)
        for path in outcome.files:
            if path.suffix == ".png":
                with Image.open(path) as picture:
                    width, height = picture.size
                image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=path.read_bytes())
                summary = Summary(value=[Summary.Value(tag=path.stem, image=image)])
                self._events.file_writer.add_summary(summary, self._epoch)

    def close(self, status: Status) -> None:
        """Close the file."""
        if self._events is not None:
            self._events.close()


class CSV(Tracker):
    """`metrics.csv`, one line for each epoch, and `scores.csv`, the final table.

    Args:
        subject: The run.
    """

    name = "csv"

    def __init__(self, subject: Subject) -> None:
        self._folder = subject.folder
        self._rows: list[dict[str, float]] = []

    def begin(self, epoch: int, rows: list[Row]) -> None:
        """Write the epochs that the run has."""
        self._rows = [_line(row) for row in rows]
        self._write()

    def row(self, row: Row) -> None:
        """Add an epoch, or what its row lacked before."""
        line = _line(row)
        if self._rows and self._rows[-1]["epoch"] == line["epoch"]:
            line = self._rows.pop() | line
        self._rows.append(line)
        self._write()

    def end(self, outcome: Outcome) -> None:
        """Write the final table."""
        lines = [{"scores": name, **values} for name, values in outcome.scores.items()]
        write_atomically(self._folder / SCORES_TABLE, _table(lines))

    def _write(self) -> None:
        write_atomically(self._folder / METRICS_TABLE, _table(self._rows))


def _line(row: Row) -> dict[str, float]:
    return {"epoch": row["epoch"], **numbers_of(row)}


def _table(lines: list[Any]) -> str:
    """Lines as CSV. A number that a line lacks is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*dict.fromkeys(name for line in lines for name in line)])
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
