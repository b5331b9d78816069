"""What a run writes while it goes: JSON lines and TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cibl_ray.run.folder import METRICS
from pipelines.common.files import write_atomically


class RunLog:
    """One JSON object an epoch in `metrics.jsonl`, the same numbers as TensorBoard events.

    On resume after `epoch` whole epochs, what a killed process had written beyond it is dropped.
    """

    def __init__(self, folder: Path, epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / METRICS
        rows = [row for row in read_metrics(folder) if row["epoch"] <= epoch]
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append one epoch's numbers: {"epoch": ..., group: {name: value}}."""
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for group, values in row.items():
            for name, value in (values if isinstance(values, dict) else {}).items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{group}/{name}", value, row["epoch"])
        self._events.flush()

    def last_without(self, group: str, epoch: int) -> dict[str, Any] | None:
        """The last row, where it is of `epoch` and has no numbers of `group`: the run was stopped before it had them."""
        rows = read_metrics(self._path.parent)
        return rows[-1] if rows and rows[-1]["epoch"] == epoch and group not in rows[-1] else None

    def replace_last(self, row: dict[str, Any]) -> None:
        """Write a row in the place of the last one."""
        rows = read_metrics(self._path.parent)[:-1]
        write_atomically(self._path, "".join(json.dumps(each) + "\n" for each in rows))
        self.write(row)

    def close(self) -> None:
        """Close the files."""
        self._events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """A run's epochs. A last line that a kill cut short is left out."""
    path = folder / METRICS
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
