"""MLflow: one run of an experiment for each run; a sweep is the parent of its trials.

The server is that of `MLFLOW_TRACKING_URI`, the experiment `MLFLOW_EXPERIMENT_NAME`. Without a server, a database file beside
the run folders holds the runs: `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db` shows them.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from cibl_ray.run.log import Row
from cibl_ray.tracking.base import PROJECT, Ended, Memory, Outcome, Sender, Status, Subject

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_PARENT, _NAME = "mlflow.parentRunId", "mlflow.runName"
_LONGEST = 6000  # characters of a parameter
_BATCH = 100  # parameters in a request


class MLflow(Sender):
    """Sends a run or a sweep to MLflow.

    Args:
        subject: The run or sweep.
    """

    name = "mlflow"
    packages = ("mlflow", "sqlalchemy", "alembic")

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._client: Any = None
        self._run = ""

    def begin(self, epoch: int, rows: list[Row]) -> None:
        """Open the run, or the one of the same folder, and send the epochs that it lacks."""
        self._open()
        self._client.update_run(self._run, status="RUNNING")
        self._params(self._subject.params)
        for key, value in self._subject.tags.items():
            self._client.set_tag(self._run, key, value)
        self._memory.write(self.name, run=self._run)
        for row in rows:
            self.row(row)

    def send(self, epoch: int, numbers: dict[str, float]) -> None:
        """Send the numbers of an epoch."""
        self._metrics(self._run, numbers, epoch)

    def end(self, outcome: Outcome) -> None:
        """Send the final table and the files."""
        self._metrics(self._run, outcome.numbers(), self._sent)
        self._client.log_text(self._run, outcome.text, "scores.txt")
        for path in outcome.files:
            self._client.log_artifact(self._run, str(path))

    def trial(self, ended: Ended) -> None:
        """Say how a trial ended. One that no process has sent is sent now."""
        child = Memory(self._subject.folder / "trials" / ended.name).read(self.name).get("run")
        if not isinstance(child, str):
            child = self._child(ended.name)
            self._client.log_batch(child, params=_as_params(ended.params))
            self._metrics(child, {f"val/{name}": value for name, value in ended.scores.items()}, 0)
        self._client.set_terminated(child, _STATUS[ended.status])

    def bundle(self, folder: Path) -> None:
        """Keep a bundle with the run."""
        self._open()
        self._client.log_artifacts(self._run, str(folder), "bundle")

    def close(self, status: Status) -> None:
        """End the run."""
        if self._run:
            self._client.set_terminated(self._run, _STATUS[status])

    def _open(self) -> None:
        # Read at each request. A server that is gone is given up after a minute, not after ten.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        runs = self._subject.runs.absolute()
        if uri is None:
            runs.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{runs / 'mlflow.db'}")
        experiment = _experiment(self._client, None if uri else (runs / "mlflow-artifacts").as_uri())
        known = self._memory.read(self.name)
        self._run = self._known(experiment, known.get("run"))
        self._sent = int(known.get("epoch", 0)) if self._run else 0
        if not self._run:
            self._run = self._new(experiment, self._subject.name, self._parent())

    def _known(self, experiment: str, run: Any) -> str:
        """The run that this folder had before, where the server has it; else ''."""
        from mlflow.exceptions import MlflowException

        if not isinstance(run, str):
            return self._of_name(experiment, self._subject.name, self._parent())
        try:
            return str(self._client.get_run(run).info.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        return ""

    def _parent(self) -> str | None:
        """The run of the sweep that this run is a trial of."""
        if self._subject.sweep is None:
            return None
        run = Memory(self._subject.sweep).read(self.name).get("run")
        return run if isinstance(run, str) else None

    def _of_name(self, experiment: str, name: str, parent: str | None) -> str:
        """A child of the sweep that has the name: a trial that was sent before. Else ''."""
        if parent is None:
            return ""
        wanted = f"tags.`{_PARENT}` = '{parent}' and attributes.run_name = '{name}'"
        found = self._client.search_runs([experiment], filter_string=wanted, max_results=1)
        return str(found[0].info.run_id) if found else ""

    def _child(self, name: str) -> str:
        experiment = str(self._client.get_run(self._run).info.experiment_id)
        return self._of_name(experiment, name, self._run) or self._new(experiment, name, self._run)

    def _new(self, experiment: str, name: str, parent: str | None) -> str:
        tags = {_NAME: name} | ({_PARENT: parent} if parent is not None else {})
        return str(self._client.create_run(experiment, tags=tags, run_name=name).info.run_id)

    def _params(self, params: dict[str, Any]) -> None:
        """Send parameters. MLflow never changes one: what a resumed run changed is a tag of the same name."""
        there = self._client.get_run(self._run).data.params
        new = _as_params({key: value for key, value in params.items() if key not in there})
        for start in range(0, len(new), _BATCH):
            self._client.log_batch(self._run, params=new[start : start + _BATCH])
        for key, value in params.items():
            if key in there and there[key] != _text(value):
                self._client.set_tag(self._run, key, _text(value))

    def _metrics(self, run: str, numbers: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(run, metrics=[Metric(key, float(value), now, step) for key, value in numbers.items()])


def _experiment(client: Any, artifacts: str | None) -> str:
    """The experiment, made where it is missing."""
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:  # another run made it just now
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _as_params(params: dict[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, _text(value)) for key, value in params.items()]


def _text(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:_LONGEST]
