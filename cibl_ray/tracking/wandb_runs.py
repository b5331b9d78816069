"""Weights & Biases: one run of a project for each run; the trials of a sweep are a group.

`WANDB_API_KEY` logs in, `WANDB_PROJECT` and `WANDB_ENTITY` say where. Without a key, or with `WANDB_MODE=offline`, the run is
kept in the run folder, and `wandb sync` sends it later.
"""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import Any

from cibl_ray.run.log import Row
from cibl_ray.tracking.base import PROJECT, Ended, Memory, Outcome, Sender, Status, Subject

log = logging.getLogger(__name__)

_START = 30  # seconds for the host to answer when a run begins


class WandB(Sender):
    """Sends a run or a sweep to Weights & Biases.

    Args:
        subject: The run or sweep.
    """

    name = "wandb"
    packages = ("wandb",)

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._run: Any = None
        self._id = ""

    def begin(self, epoch: int, rows: list[Row]) -> None:
        """Open the run, or continue the one of the same folder, and send the epochs that it lacks."""
        self._open()
        for row in rows:
            self.row(row)

    def send(self, epoch: int, numbers: dict[str, float]) -> None:
        """Send the numbers of an epoch."""
        self._run.log({"epoch": epoch, **numbers})

    def end(self, outcome: Outcome) -> None:
        """Send the final table, the pictures and the files."""
        import wandb

        self._run.summary.update(outcome.numbers())
        columns = [*dict.fromkeys(name for values in outcome.scores.values() for name in values)]
        lines = [[row, *(values.get(name) for name in columns)] for row, values in outcome.scores.items()]
        pictures = {path.stem: wandb.Image(str(path)) for path in outcome.files if path.suffix == ".png"}
        self._run.log({"scores": wandb.Table(columns=["scores", *columns], data=lines), **pictures})
        kept = wandb.Artifact(f"result-{self._id}", type="result")
        for path in outcome.files:
            kept.add_file(str(path))
        self._run.log_artifact(kept)

    def trial(self, ended: Ended) -> None:
        """Send a trial that no process has sent: one that trained in the command's own process."""
        if Memory(self._subject.folder / "trials" / ended.name).read(self.name):
            return
        run = self._init(_child(self._id, ended.name), ended.name, ended.params, "trial", self._id)
        run.summary.update({f"val/{name}": value for name, value in ended.scores.items()})
        run.finish(exit_code=int(ended.status == "failed"))

    def bundle(self, folder: Path) -> None:
        """Keep a bundle with the run."""
        import wandb

        self._open()
        kept = wandb.Artifact(f"bundle-{self._id}", type="model")
        kept.add_dir(str(folder))
        self._run.log_artifact(kept)

    def close(self, status: Status) -> None:
        """End the run, and wait until everything is sent."""
        if self._run is not None:
            self._run.finish(exit_code=int(status == "failed"))

    def _open(self) -> None:
        known = self._memory.read(self.name)
        group = None if self._subject.sweep is None else Memory(self._subject.sweep).read(self.name).get("run")
        own = _child(group, self._subject.name) if group else secrets.token_hex(4)
        self._id, self._sent = str(known.get("run") or own), int(known.get("epoch", 0))
        kind = "sweep" if self._subject.is_sweep else "train" if self._subject.sweep is None else "trial"
        group = self._id if self._subject.is_sweep else group
        self._run = self._init(self._id, self._subject.name, {**self._subject.params, **self._subject.tags}, kind, group)
        self._memory.write(self.name, run=self._id)

    def _init(self, run: str, name: str, params: dict[str, Any], kind: str, group: Any) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode: Any = os.environ.get("WANDB_MODE")
        if mode is None and not os.environ.get("WANDB_API_KEY"):
            mode = "offline"  # wandb itself would ask for a key on the terminal, or raise
            log.info("wandb: WANDB_API_KEY is not set; the run is kept offline in %s", self._subject.folder / "wandb")
        settings = wandb.Settings(silent=True, console="off", init_timeout=_START)
        opened = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=run, name=name, config=params, group=group, job_type=kind,
            dir=os.environ.get("WANDB_DIR", str(self._subject.folder)), mode=mode, resume="allow", reinit="create_new",
            settings=settings,
        )  # fmt: skip
        opened.define_metric("epoch")
        opened.define_metric("*", step_metric="epoch")
        return opened


def _child(sweep: str, name: str) -> str:
    """The id of a trial: the same however often its process is lost."""
    return f"{sweep}-{name}"
