"""Trackers: MLflow against a real server with a database file, wandb offline, TensorBoard and CSV by reading them back."""

import csv
import importlib.util
import json
import logging
import os
import pickle
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from unittest.mock import patch

import pytest
import yaml

import cibl_ray
from cibl_ray import train, tune
from cibl_ray.cluster.environment import configure_ray_env
from cibl_ray.run.log import RunLog
from cibl_ray.tracking import trackers as tracking
from cibl_ray.tracking.base import Memory, Tracker
from cibl_ray.tracking.trackers import Trackers, track_run
from cibl_ray.training import fit as training
from cibl_ray.tuning.config import SweepConfig
from cibl_ray.tuning.sweep import Trial, trial_config
from cibl_ray.tuning.track import sweep_outcome, sweep_trackers, track_trial
from pipelines.common.validation import validate
from tests.cibl_ray.test_api import TINY
from tests.commands import in_process
from tests.conftest import REPOSITORY
from tests.test_docs_blocks import blocks

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]  # what mlflow and wandb say of others
KINDS = ("tensorboard", "mlflow", "wandb", "csv")


def need(*packages):
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed: the extra track")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of MLflow's own with a database file, on loopback; the environment names it."""
    need("mlflow", "graphene", "huey", "flask_cors", "sqlalchemy")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += [
        "--artifacts-destination",
        str(folder / "artifacts"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
            except OSError:
                time.sleep(0.3)
            else:
                break
        with patch.dict(os.environ, {"MLFLOW_TRACKING_URI": address, "WANDB_MODE": "offline"}):
            os.environ.pop("MLFLOW_EXPERIMENT_NAME", None)
            yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def small(folder, **settings):
    return cibl_ray.load_config(
        "quickstart", {**TINY, "runs": folder / "runs", "data.prepared": str(folder / "prepared"), **settings}
    )


@pytest.fixture(scope="module")
def tracked(server, tmp_path_factory):
    """A run of three epochs in all trackers, resumed after two, and exported."""
    need("wandb", "onnxruntime")
    folder = tmp_path_factory.mktemp("tracked")
    cibl_ray.fit(small(folder, track=KINDS), "first", progress=False)
    run = cibl_ray.open_run(folder / "runs" / "first").resume({"train.epochs": 3}, progress=False)
    run.export()
    return run


def of_mlflow(server, folder):
    """(client, the run that the folder knows)."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=server)
    return client, client.get_run(Memory(folder).read("mlflow")["run"])


def expected(run):
    """Each number of metrics.jsonl: {name: {epoch: value}}."""
    values = {}
    for row in run.history:
        for group in ("train", "val", "rate", "seconds"):
            for name, value in row[group].items():
                values.setdefault(f"{group}/{name}", {})[row["epoch"]] = value
    return values


def test_mlflow_has_every_number_once(tracked, server):
    client, run = of_mlflow(server, tracked.folder)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    for name, values in expected(tracked).items():
        history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        assert sorted(history) == [*values.items()], name
    assert run.data.metrics["test/last/balanced"] == tracked.result["last"]["scores"]["balanced"]


def test_mlflow_has_parameters_and_files(tracked, server):
    client, run = of_mlflow(server, tracked.folder)
    assert run.data.params["loss.kind"] == "cross_entropy"
    assert run.data.params["train.epochs"] == "2"
    assert run.data.tags["train.epochs"] == "3"  # MLflow changes no parameter
    assert run.data.tags["folder"] == str(tracked.folder)
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "result.json", "scores.txt", "learning_curves.png", "class_counts.png", "bundle"} <= files
    assert "bundle/model.onnx" in {file.path for file in client.list_artifacts(run.info.run_id, "bundle")}


def test_wandb_keeps_the_run_offline(tracked):
    (begun, resumed, exported) = sorted((tracked.folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    name = Memory(tracked.folder).read("wandb")["run"]
    assert all(folder.name.endswith(f"-{name}") for folder in (begun, resumed, exported))
    first, second = ((folder / f"run-{name}.wandb").read_bytes() for folder in (begun, resumed))
    losses = [json.dumps(value).encode() for value in expected(tracked)["train/loss"].values()]
    assert [loss in first for loss in losses] == [True, True, False]
    assert [loss in second for loss in losses] == [False, False, True]
    (table,) = (resumed / "files" / "media" / "table").glob("scores*.json")
    content = json.loads(table.read_text())
    column = content["columns"].index("balanced")
    assert {line[0]: line[column] for line in content["data"]} == {
        f"test/{kind}": tracked.result[kind]["scores"]["balanced"] for kind in ("last", "best")
    }
    assert [*(resumed / "files" / "media" / "images").glob("learning_curves*.png")]
    assert b"bundle-" in (exported / f"run-{name}.wandb").read_bytes()


def test_tensorboard_and_csv_have_the_same(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked.folder / "tensorboard"))
    events.Reload()
    with (tracked.folder / "metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for name, values in expected(tracked).items():
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(values, rel=1e-6), name
        assert [float(row[name]) for row in rows] == [*values.values()]
    assert {"learning_curves", "accuracy_by_class", "class_counts"} <= {*events.Tags()["images"]}
    assert {"parameters/text_summary", "scores/text_summary"} <= {*events.Tags()["tensors"]}
    picture = events.Images("learning_curves")[-1]
    assert picture.encoded_image_string == (tracked.folder / "learning_curves.png").read_bytes()
    with (tracked.folder / "scores.csv").open() as file:
        scores = {row["scores"]: float(row["balanced"]) for row in csv.DictReader(file)}
    assert scores["test/last"] == tracked.result["last"]["scores"]["balanced"]


def test_no_credential_is_in_the_run_folder(tracked):
    """Servers and keys come from the environment alone."""
    assert yaml.safe_load((tracked.folder / "config.yaml").read_text())["track"] == [*KINDS]
    for name in ("config.yaml", "trackers.json", "result.json"):
        assert os.environ["MLFLOW_TRACKING_URI"] not in (tracked.folder / name).read_text()


def test_a_sweep_is_a_parent_and_its_trials_children(server, tmp_path):
    """One trial is a run of its own, one trained in the sweep's process, one never began."""
    from mlflow import MlflowClient

    config = small(tmp_path, track=["mlflow", "csv"])
    content = {"base": "quickstart", "set": {"data.prepared": str(tmp_path / "prepared")}, "trials": 3}
    sweep = validate(SweepConfig, content, "test")
    base, folder = config.model_dump(mode="json"), tmp_path / "sweep"
    folder.mkdir()
    scores = {"balanced": 0.5, "overall": 0.25}
    with sweep_trackers(sweep, base, folder) as trackers:
        run = folder / "trials" / "a"
        run.parent.mkdir()
        fitted = trial_config(base, {"train.epochs": 1})
        training.fit(fitted, run, False, cibl_ray.api.World(), cibl_ray.api.Silent())
        track_trial(trackers, Trial("a", {}, "stopped", 1, scores))
        track_trial(trackers, Trial("b", {"loss.tail_skew": 0.5}, "completed", 2, scores))
        track_trial(trackers, Trial("c", {"loss.tail_skew": 9.0}, "failed", 0, {}, "no"))
        (folder / "trials.csv").write_text("trial\n")
        trackers.end(sweep_outcome(sweep, folder, [Trial("b", {}, "completed", 2, scores)], "the front"))
    client = MlflowClient(tracking_uri=server)
    parent = client.get_run(Memory(folder).read("mlflow")["run"])
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["best/balanced"] == 0.5
    assert json.loads(parent.data.params["search.loss.tail_skew.low"]) == 0.005
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"scores.txt", "trials.csv"}
    wanted = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = {child.info.run_name: child for child in client.search_runs([parent.info.experiment_id], wanted)}
    assert {name: child.info.status for name, child in children.items()} == {"a": "KILLED", "b": "FINISHED", "c": "FAILED"}
    assert children["b"].data.metrics["val/overall"] == 0.25
    assert children["b"].data.params == {"loss.tail_skew": "0.5"}
    assert children["a"].data.metrics["train/loss"] > 0


def examples():
    """The commands of the page on trackers: (environment, words after `python -m`)."""
    found = [shlex.split(commands) for commands, _ in blocks("docs/how-to/trackers.md")]
    return [
        ({one[0].split("=")[0]: one[0].split("=")[1]} if "=" in one[0] else {}, one[one.index("-m") + 1 :]) for one in found
    ]


def test_the_examples_of_the_page_are_valid():
    commands = {"cibl_ray.train": train.main, "cibl_ray.tune": tune.main}
    told = [in_process(commands[module], *words, "--print-config") for _, (module, *words) in examples()]
    assert [done.returncode for done in told] == [0] * 5, told
    assert [yaml.safe_load(done.stdout).get("track") for done in told[:4]] == [
        ["tensorboard"], ["tensorboard", "mlflow"], ["wandb"], ["csv"],
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_the_examples_of_the_page_run(number, server, tmp_path):
    environment, (module, *words) = examples()[number]
    if "MLFLOW_TRACKING_URI" in environment:
        environment = {"MLFLOW_TRACKING_URI": server}
    command = [sys.executable, "-m", module, *words, "--epochs", "1", "--warmup_epochs", "0", "--loader.kind", "torch"]
    more = {"PYTHONPATH": str(REPOSITORY), **environment}
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **more}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "track: " not in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert [(run / name).exists() for name in ("tensorboard", "wandb", "metrics.csv")] == [number < 2, number == 2, number == 3]
    assert bool(Memory(run).read("mlflow")) == (number == 1)


@pytest.mark.slow
def test_the_command_tracks_a_sweep(server, tmp_path):
    from mlflow import MlflowClient

    sweep = {
        "base": "quickstart", "trials": 2, "asha": None,
        "set": {"train.epochs": 1, "schedule.warmup_epochs": 0, "loader.kind": "torch", "data.prepared": str(tmp_path / "p")},
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    command = [sys.executable, "-m", "cibl_ray.tune", str(tmp_path / "sweep.yaml"), "--sweeps", str(tmp_path), "--name", "s"]
    done = subprocess.run([*command, "--set.track", "[mlflow]"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    client = MlflowClient(tracking_uri=server)
    parent = client.get_run(Memory(tmp_path / "s").read("mlflow")["run"])
    wanted = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], wanted)
    assert {child.info.run_name for child in children} == {
        path.name for path in (tmp_path / "s" / "trials").iterdir() if path.is_dir()
    }
    assert {child.info.status for child in children} == {"FINISHED"}
    assert "trade_off.png" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_a_server_that_is_not_there_does_not_end_a_run(tmp_path, caplog):
    need("mlflow", "sqlalchemy")
    gone = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    with patch.dict(os.environ, gone), caplog.at_level(logging.WARNING, "cibl_ray"):
        run = cibl_ray.fit(small(tmp_path, track=["mlflow", "csv"], **{"train.epochs": 1}), "gone", progress=False)
    assert run.result["last"]["epoch"] == 1
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("track: ")]
    assert len(said) == 1
    assert said[0].startswith("track: mlflow failed, and is not used any more in this run: MlflowException: API request to")
    assert (run.folder / "metrics.csv").exists()


class Slow(Tracker):
    name, sends = "slow", True

    def __init__(self, ends):
        self.ends = ends

    def row(self, row):
        self.ends.wait()


class Fails(Tracker):
    def __init__(self, name, sends):
        self.name, self.sends, self.calls = name, sends, 0

    def row(self, row):
        self.calls += 1
        raise OSError("the host\nis gone")


def test_each_tracker_that_fails_is_one_warning(caplog):
    both = [Fails("here", False), Fails("far", True)]
    trackers = Trackers([*both])
    for epoch in (1, 2, 3):
        trackers.row({"epoch": epoch})
    trackers.close("finished")
    assert [one.calls for one in both] == [1, 1]
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"track: {name} failed, and is not used any more in this run: OSError: the host is gone" for name in ("far", "here")
    ]


def test_nothing_waits_for_a_slow_tracker(caplog, monkeypatch):
    monkeypatch.setattr(tracking, "_PATIENCE", 0.05)
    ends = threading.Event()
    trackers = Trackers([Slow(ends)])
    trackers.row({"epoch": 1})
    trackers.close("finished")
    assert [record.getMessage() for record in caplog.records] == [
        "tracker slow is still busy after 0.05 s; what it has not sent is lost"
    ]
    ends.set()


def test_all_trackers_together_have_a_minute(monkeypatch):
    """A server that is slow takes the time of the others, too."""
    now, given = [0.0], []

    def wait(channel, seconds):  # each is busy for 45 s
        given.append(seconds)
        now[0] += min(seconds, 45.0)
        return seconds >= 45

    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])
    for name in ("wait", "finish"):
        monkeypatch.setattr(tracking._Thread, name, wait)
    trackers = Trackers([Fails("one", True), Fails("two", True), Fails("three", True)])
    trackers.begin(0, [], wait=True)
    assert given == [60, 15, 0]
    trackers.close("finished", trials=2)
    assert given[3:] == [80, 35, 0]


def test_a_copy_has_no_trackers():
    """Ray Tune pickles what it calls in the driver."""
    fails = Fails("here", False)
    pickle.loads(pickle.dumps(Trackers([fails, Slow(threading.Event())]))).row({"epoch": 1})
    assert fails.calls == 0


def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path, caplog, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("wandb", "tensorboard") else there(name))
    track_run(small(tmp_path, track=["wandb", "tensorboard", "csv"]), tmp_path, {})
    assert [record.getMessage() for record in caplog.records] == [
        "track: wandb is left out: wandb is not installed; pip install 'cibl-ray[track]'",
        "track: tensorboard is left out: tensorboard is not installed; pip install 'cibl-ray[train]'",
    ]


def test_a_row_that_is_replaced_tells_what_it_lacked(tmp_path):
    heard = []
    row = {"epoch": 1, "train": {"loss": 1.0}, "rate": {}, "seconds": {}}
    log = RunLog(tmp_path, 0, listener=heard.append)
    log.write(row)
    log.replace_last({**row, "val": {"balanced": 0.5}})
    assert heard == [row, {"epoch": 1, "val": {"balanced": 0.5}}]
    assert log.rows == [{**row, "val": {"balanced": 0.5}}]


def test_one_tracker_may_stand_alone(tmp_path):
    assert small(tmp_path, track="csv").track == ("csv",)


def test_a_damaged_memory_is_an_empty_one(tmp_path):
    (tmp_path / "trackers.json").write_text('{"mlflow": ')
    assert Memory(tmp_path).read("mlflow") == {}
    Memory(tmp_path).write("mlflow", run="a")
    assert Memory(tmp_path).read("mlflow") == {"run": "a"}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{here}/mlflow.db"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("mlruns", "{here}/mlruns"),
        ("/data/mlruns", "/data/mlruns"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("databricks", "databricks"),
        ("databricks://profile", "databricks://profile"),
    ],
)
def test_a_trackers_place_is_the_same_in_rays_processes(given, wanted, tmp_path, monkeypatch):
    """They work in folders of their own, to which a relative place would be relative."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    monkeypatch.setenv("WANDB_DIR", "wandb")
    with patch.dict(os.environ):
        configure_ray_env(own=True)
        assert os.environ["MLFLOW_TRACKING_URI"] == wanted.format(here=tmp_path)
        assert os.environ["WANDB_DIR"] == str(tmp_path / "wandb")
