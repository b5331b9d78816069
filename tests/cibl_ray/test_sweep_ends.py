"""How trials and sweeps end that do not end well: what is recorded, what the search hears, what is left."""

import json
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from cibl_ray.cluster.environment import configure_ray_env
from cibl_ray.tracking.trackers import Trackers
from cibl_ray.tuning import report as sweep_report
from cibl_ray.tuning.config import METRICS, SweepConfig
from cibl_ray.tuning.folder import read_trials
from cibl_ray.tuning.sweep import Trial, base_content, best, trial_name
from pipelines.common.errors import Interrupted, UserError
from pipelines.common.validation import validate

configure_ray_env(own=True)

from cibl_ray.tuning import run as tuning_run  # noqa: E402  Ray, after its environment
from cibl_ray.tuning import search as tuning_search  # noqa: E402
from cibl_ray.tuning import trial as tuning_trial  # noqa: E402

CONTENT = {
    "base": "quickstart",
    "search": {"loss.tail_skew": {"kind": "log_uniform", "low": 0.005, "high": 5}},
    "objective": [{"metric": "few"}],
    "trials": 2,
}
PARAMS = {"loss.tail_skew": 0.3}


@pytest.fixture
def sweep(tmp_path):
    content = {**CONTENT, "set": {"train.epochs": 2, "data.prepared": str(tmp_path / "prepared")}}
    return validate(SweepConfig, content, "test")


class Relay:
    """Takes notes as the actor does, in this process."""

    def __init__(self):
        self.notes = []
        self.post = SimpleNamespace(remote=lambda kind, content: self.notes.append((kind, content)))
        self.take = SimpleNamespace(remote=lambda: self.notes)


@pytest.fixture
def relay(monkeypatch):
    for module in (tuning_search, tuning_trial):
        monkeypatch.setattr(module.ray, "get", lambda value, timeout=None: value)
    return Relay()


def test_a_failed_trial_is_never_the_best(sweep, tmp_path):
    """Its scores are those of an epoch before it failed; earlier versions recorded them."""
    scores = dict.fromkeys(METRICS, 0.5)
    failed = Trial("a", PARAMS, "failed", 1, {**scores, "few": 0.9}, "the loss is not finite")
    stopped = Trial("b", {"loss.tail_skew": 0.1}, "stopped", 1, scores)
    assert best(sweep, [failed, stopped]).name == "b"
    assert best(sweep, [failed]) is None
    text = sweep_report.write(tmp_path, sweep, base_content(sweep), [failed, stopped])
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["b"]


def test_a_trial_that_fails_ranks_last_in_the_search(sweep, tmp_path, monkeypatch, relay):
    reports = []
    monkeypatch.setattr(tuning_trial.tune, "report", reports.append)
    monkeypatch.setattr(tuning_trial, "is_own_cluster", lambda: True)

    def fit(config, folder, resume, world, progress):
        progress.epoch({"epoch": 1, "val": {**dict.fromkeys(METRICS, 0.5), "few": 0.7}}, "")
        raise UserError("the loss is not finite")

    monkeypatch.setattr(tuning_trial, "fit", fit)
    given = {
        "sweep": sweep.model_dump(mode="json"), "base": base_content(sweep), "folder": str(tmp_path), "mark": None, "cpus": 1,
        "relay": relay,
    }  # fmt: skip
    tuning_trial.trial(PARAMS, given)
    assert [(one["epoch"], one["objective_0"]) for one in reports] == [(1, 0.7), (1, -1e9)]
    recorder = tuning_search._Recorder(tmp_path, sweep, base_content(sweep), relay, None, Trackers([]))
    recorder.on_trial_complete(0, [], SimpleNamespace(config=PARAMS, last_result={**reports[0]}))
    (ended,) = read_trials(tmp_path)
    assert (ended.state, ended.scores, ended.error) == ("failed", {}, "the loss is not finite")


def test_a_node_that_does_not_see_the_folder_says_so(sweep, tmp_path, relay):
    given = {
        "sweep": sweep.model_dump(mode="json"),
        "folder": "/elsewhere/sweep",
        "mark": "/elsewhere/mark",
        "cpus": 1,
        "relay": relay,
    }
    with pytest.raises(UserError, match="does not see '/elsewhere' as the driver does; give --sweeps a folder"):
        tuning_trial.trial(PARAMS, given)
    recorder = tuning_search._Recorder(tmp_path, sweep, base_content(sweep), relay, None, Trackers([]))
    recorder.on_trial_error(0, [], SimpleNamespace(config=PARAMS, last_result=None))
    other = {"loss.tail_skew": 0.1}
    recorder.on_trial_error(0, [], SimpleNamespace(config=other, last_result=None))
    first, second = read_trials(tmp_path)
    assert (first.name, second.name) == (trial_name(PARAMS), trial_name(other))
    assert "does not see '/elsewhere' as the driver does" in first.error
    assert second.error == "its process was lost three times"


def test_a_mistake_leaves_no_folder_that_blocks_the_mended_command(sweep, tmp_path, monkeypatch):
    def no_room(*arguments):
        raise UserError("no room for a trial")

    monkeypatch.setattr(tuning_run, "cluster", lambda address: nullcontext())
    monkeypatch.setattr(tuning_run, "search", no_room)
    folder = tmp_path / "sweep"
    with pytest.raises(UserError, match="no room"):
        tuning_run.run(sweep, folder, None)
    assert not folder.exists()
    (folder / "trials").mkdir(parents=True)  # of trials that have begun
    with pytest.raises(UserError, match="no room"):
        tuning_run.run(sweep, folder, None)
    assert json.loads((folder / "sweep.json").read_text())["trials"] == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_sweep_in_this_process_says_how_it_goes_on(sweep, tmp_path, monkeypatch, number, status):
    """After SIGTERM a scheduler should start it again."""
    monkeypatch.setattr(tuning_run, "search_in_process", lambda *arguments: signal.raise_signal(number))
    of = sweep.model_copy(update={"set": {**sweep.set, "train.tune": "head"}})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped; resume with: python -m cibl_ray.tune --resume .*/sweep$") as caught:
        tuning_run.run(of, tmp_path / "sweep", None)
    assert caught.value.status == status
    assert signal.getsignal(signal.SIGTERM) == before
