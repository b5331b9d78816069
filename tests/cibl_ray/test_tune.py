"""Sweeps: more trials than slots, failures, interruption, several workers a trial; and how trials are compared."""

import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import optuna
import psutil
import pytest
import yaml
from PIL import Image

from cibl_ray import tune
from cibl_ray.cluster.environment import configure_ray_env
from cibl_ray.config import RunConfig, load_config
from cibl_ray.config_warnings import config_warnings
from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.run.log import read_metrics
from cibl_ray.tuning import report as sweep_report
from cibl_ray.tuning import run as tuning_run
from cibl_ray.tuning.config import METRICS, SweepConfig
from cibl_ray.tuning.data import prepare_data
from cibl_ray.tuning.folder import read_trials
from cibl_ray.tuning.in_process import fits_in_process
from cibl_ray.tuning.journal import STUDY, check_choices, open_journal
from cibl_ray.tuning.sweep import (
    Trial,
    axes,
    base_content,
    best,
    check_metrics,
    front,
    load_sweep,
    most_epochs,
    objectives,
    trial_config,
    trial_name,
)
from pipelines.common.errors import UserError
from pipelines.common.validation import validate
from tests.conftest import REPOSITORY, processes_below

pytestmark = pytest.mark.timeout(280)

BASE = {
    "base": "quickstart",
    "set": {"train.epochs": 4, "schedule.warmup_epochs": 0, "train.batch_size": 62, "loader.kind": "torch"},
    "search": {"loss.tail_skew": {"kind": "log_uniform", "low": 0.005, "high": 5}},
    "trials": 5,
    "asha": {"grace": 2, "reduction": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tune")


def start(folder, name, content, *more):
    file = folder / f"{name}.yaml"
    content = {**content, "set": {**content["set"], "data.prepared": str(folder / "prepared")}}
    file.write_text(yaml.safe_dump(content))
    return command(folder, file, "--sweeps", folder, "--name", name, *more)


def command(folder, *arguments):
    log = folder / f"{time.time_ns()}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cibl_ray.tune", *map(str, arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
        )
    return process, log


def ended(process, log, status=0):
    try:
        assert process.wait(timeout=400) == status, log.read_text()
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return log.read_text()


def test_a_sweep_with_more_trials_than_slots_and_one_that_fails(folder):
    search = {**BASE["search"], "optimizer.lr": {"kind": "choice", "values": [0.1, 1000000]}}
    text = ended(*start(folder, "whole", {**BASE, "search": search, "trials": 6}))
    assert "Traceback" not in text
    trials = read_trials(folder / "whole")
    assert len(trials) == 6
    failed = [trial for trial in trials if trial.state == "failed"]
    assert failed
    assert all(trial.params["optimizer.lr"] == 1000000 for trial in failed)
    assert "the loss is not finite" in failed[0].error
    journal = open_journal(folder / "whole")
    told = [
        one for one in journal.get_all_trials(journal.get_study_id_from_name(STUDY)) if one.params["optimizer.lr"] == 1000000
    ]
    assert {one.value for one in told} == {-1e9}
    others = [trial for trial in trials if trial.state != "failed"]
    assert {trial.epochs for trial in others} <= {2, 4}
    for trial in others:  # grace 2, reduction 2: ASHA compares after the last epoch too
        assert (folder / "whole" / "trials" / trial.name / "result.json").exists() == (trial.epochs == 4)
    assert all(trial.state == ("completed" if trial.epochs == 4 else "stopped") for trial in others)
    assert "The front, validation, in %" in text
    assert not (folder / "whole" / ".ray").exists()
    with (folder / "whole" / "trials.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert {row["trial"] for row in rows} == {trial.name for trial in trials}
    chosen = best(load_sweep(str(folder / "whole.yaml"), []), trials)
    config = load_config(str(folder / "whole" / "best.yaml"), [])
    assert config.loss.tail_skew == chosen.params["loss.tail_skew"]
    assert load_checkpoint(folder / "whole" / "best.safetensors").epoch == chosen.epochs
    assert all((folder / "whole" / name).stat().st_size > 5000 for name in ("trade_off.png", "tail_skew.png"))
    evaluate = [sys.executable, "-m", "cibl_ray.evaluate", str(folder / "whole" / "best.safetensors")]
    done = subprocess.run(evaluate, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


def epochs_done(folder):
    return sum(len(path.read_text().splitlines()) for path in (folder / "trials").glob("*/metrics.jsonl"))


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(folder):
    """After Ctrl-C, and again after its driver was killed."""
    content = {**BASE, "set": {**BASE["set"], "train.epochs": 8}, "trials": 3, "asha": None}
    process, log = start(folder, "stopped", content)
    # Before any has ended, so that only the journal knows what was proposed.
    while epochs_done(folder / "stopped") < 1:
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    # As a full disk leaves it; the search then proposes others.
    (folder / "stopped" / "trials" / "0.json").write_text("")
    process.send_signal(signal.SIGINT)
    text = ended(process, log, 130)
    assert f"--resume {folder / 'stopped'}" in text
    assert not psutil.wait_procs(children, timeout=60)[1]
    before = read_trials(folder / "stopped")
    assert len(before) < 3
    reached = epochs_done(folder / "stopped")
    process, log = command(folder, "--resume", folder / "stopped")
    while epochs_done(folder / "stopped") <= reached:
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if child.name().startswith("ray::") and not child.name().endswith("Agent")]
    process.kill()
    process.wait()
    assert workers
    assert not psutil.wait_procs(workers, timeout=60)[1]  # Ray's own agents take a minute more
    rows = {path: path.read_text().splitlines() for path in (folder / "stopped" / "trials").glob("*/metrics.jsonl")}
    text = ended(*command(folder, "--resume", folder / "stopped"))
    (folder / "stopped" / "trials" / "0.json").unlink()
    after = read_trials(folder / "stopped")
    assert len({trial.name for trial in after}) == 3
    assert after[: len(before)] == before
    assert {trial.state for trial in after} == {"completed"}
    # A trial that had begun is resumed from its last checkpoint, not restarted: rows up to it stay as they were.
    for path, before_the_kill in rows.items():
        assert path.read_text().splitlines()[: len(before_the_kill) - 1] == before_the_kill[:-1]
    # Every folder has its result.
    begun = [*(folder / "stopped" / "trials").glob("*.json")]
    assert {path.stem for path in begun} == {trial.name for trial in after}


@pytest.fixture
def neighbour():
    """Another cluster on this machine."""
    configure_ray_env(own=True)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_trial_of_two_workers_that_is_lost_frees_its_place(folder, neighbour):
    """There is room for one trial at a time: it is tried again, and the next one starts, where the first one's CPUs were."""
    objective = [{"metric": "many"}, {"metric": "few"}]
    content = {**BASE, "trials": 2, "workers": 2, "objective": objective, "asha": None, "algorithm": "nsga2"}
    process, log = start(folder, "places", content)
    lost: list[psutil.Process] = []
    while not lost:
        assert process.poll() is None, log.read_text()
        if [*(folder / "places" / "trials").glob("*/metrics.jsonl")]:
            lost = [child for child, command in processes_below(process.pid) if "ImplicitFunc" in command]
        time.sleep(0.05)
    lost[0].kill()
    ended(process, log)
    trials = read_trials(folder / "places")
    assert [trial.state for trial in trials] == ["completed"] * 2
    for trial in trials:
        result = json.loads((folder / "places" / "trials" / trial.name / "result.json").read_text())
        assert result["workers"] == 2


@pytest.mark.slow  # a minute and a half
def test_a_sweep_joins_a_cluster_and_names_it(folder):
    configure_ray_env(own=True)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        content = {**BASE, "set": {**BASE["set"], "train.epochs": 8}, "trials": 2, "asha": None}
        process, log = start(folder, "joined", content, "--address", cluster.address)
        while not [*(folder / "joined" / "trials").glob("*/metrics.jsonl")]:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        assert len([*(folder / ".ray").glob("joined.*.mark")]) == 1
        process.send_signal(signal.SIGINT)
        text = ended(process, log, 130)
        assert f"--resume {folder / 'joined'} --address {cluster.address}" in text
        ended(*command(folder, "--resume", folder / "joined", "--address", cluster.address))
        assert [trial.state for trial in read_trials(folder / "joined")] == ["completed"] * 2
    finally:
        cluster.shutdown()
    assert not [*(folder / ".ray").glob("joined.*.mark")]


def test_trials_on_features_run_in_this_process_and_continue(folder, monkeypatch, caplog):
    content = {
        "base": "quickstart",
        "set": {
            "train.tune": "head",
            "train.epochs": 1,
            "schedule.warmup_epochs": 0,
            "data.prepared": str(folder / "prepared"),
        },
        "search": {
            "loss.tail_skew": {"kind": "log_uniform", "low": 0.005, "high": 5},
            "network.head": {"kind": "choice", "values": [{"kind": "linear"}, {"kind": "cosine", "scale": {"start": 8}}]},
        },
        "trials": 3,
        "asha": None,
    }
    sweep = validate(SweepConfig, content, "test")
    of_four = validate(SweepConfig, {**content, "trials": 4, "concurrent": 2}, "test")
    monkeypatch.setattr(tuning_run, "cluster", None)  # Ray is not started
    place = folder / "on features"
    first, _ = tuning_run.run(sweep, place, None)
    assert "do nothing" not in caplog.text
    again, table = tuning_run.run(of_four, place, None)
    assert "concurrent, cpus and asha do nothing" in caplog.text
    assert again[:3] == first
    assert len({trial.name for trial in again}) == 4
    assert {trial.params["network.head"]["kind"] for trial in again} <= {"linear", "cosine"}
    chosen = best(of_four, again)
    saved = load_checkpoint(place / "best.safetensors")
    assert saved.config.loss.tail_skew == chosen.params["loss.tail_skew"]
    rows = read_metrics(place / "trials" / chosen.name)  # trained once more: the same scores
    assert rows[-1]["val"]["balanced"] == chosen.scores["balanced"]
    assert f"{chosen.name}" in table
    assert (place / "trade_off.png").exists()
    assert not fits_in_process(sweep, {"train": {"tune": "full"}}, None)
    assert not fits_in_process(sweep, {"train": {"tune": "head"}}, "auto")


@pytest.mark.filterwarnings("ignore:Choices for a categorical")  # Optuna keeps mappings all the same
@pytest.mark.parametrize("values", [["instance", "square_root"], [{"kind": "linear"}, {"kind": "cosine"}]])
def test_a_search_of_choices_continues_as_it_began(tmp_path, monkeypatch, values):
    """In this process or with Ray: the journal has the choices by number, or by value."""
    key = "data.sampling" if isinstance(values[0], str) else "network.head"
    given = {"train.tune": "head", "data.prepared": str(tmp_path / "prepared")}
    of = sweep(set=given, search={key: {"kind": "choice", "values": values}}, asha=None)
    monkeypatch.setattr(tuning_run, "prepare_data", lambda base: ({"many", "few"}, True))
    for name, choices in (("own", range(2)), ("ray", values)):
        (tmp_path / name).mkdir()
        check_choices(tmp_path / name, of, in_process=True)  # a new one
        study = optuna.create_study(storage=open_journal(tmp_path / name), study_name=STUDY)
        study.ask().suggest_categorical(key, choices)
    check_choices(tmp_path / "own", of, in_process=True)
    check_choices(tmp_path / "ray", of, in_process=False)
    with pytest.raises(UserError, match="ray: this sweep began with Ray, .*; add --address$"):
        tuning_run.run(of, tmp_path / "ray", None)
    with pytest.raises(UserError, match="own: this sweep began in the command's process, .*; leave --address out$"):
        tuning_run.run(of, tmp_path / "own", "auto")


def test_front():
    points = np.array([[3.0, 1], [1, 3], [2, 2], [2, 1], [0, 0], [2, 2]])
    assert front(points).tolist() == [True, True, True, False, False, True]


def sweep(**content):
    return validate(SweepConfig, {**BASE, **content}, "test")


def trial(name, state="completed", **scores):
    return Trial(name, {}, state, 4, {"overall": 0.5, **scores})


def test_best_by_an_objective_and_a_bound():
    trials = [trial("a", few=0.5, many=0.4), trial("b", few=0.3, many=0.7), trial("c", few=0.2, many=0.9)]
    few = [{"metric": "few"}]
    assert best(sweep(objective=few), trials).name == "a"
    assert best(sweep(objective=few, bound={"metric": "many", "at_least": 0.6}), trials).name == "b"
    assert best(sweep(objective=few, bound={"metric": "many", "at_least": 0.95}), trials).name == "c"  # the nearest to it
    assert best(sweep(objective=[{"metric": "few", "mode": "min"}]), trials).name == "c"
    assert best(sweep(objective=few), [trial("d", "stopped", few=0.9), *trials]).name == "a"
    assert best(sweep(), [Trial("e", {}, "failed", 0, {}, "error")]) is None
    assert objectives(sweep(objective=[{"metric": "few"}, {"metric": "many"}], asha=None), trials[0].scores) == [0.5, 0.4]


@pytest.mark.parametrize("metric", ["loss", "calibration_error"])
def test_what_is_to_be_small_is_minimised(metric):
    trials = [trial("a", **{metric: 0.5, "few": 0.5}), trial("b", **{metric: 0.1, "few": 0.2})]
    of = sweep(objective=[{"metric": metric}])
    assert of.objective[0].mode == "min"
    assert best(of, trials).name == "b"
    bound = sweep(objective=[{"metric": "few"}], bound={"metric": metric, "at_most": 0.3})
    assert best(bound, trials).name == "b"
    assert objectives(bound, trials[0].scores) == [pytest.approx(-1.2)]
    assert validate(SweepConfig, of.model_dump(mode="json"), "sweep.json") == of


def test_a_score_that_is_not_finite_never_wins():
    trials = [trial("a", few=math.nan, loss=math.nan), trial("b", few=0.1, loss=9e3), trial("c", few=0.2, loss=math.inf)]
    for content, winner in (
        ({"objective": [{"metric": "few"}]}, "c"),
        ({"objective": [{"metric": "loss"}]}, "b"),
        ({"objective": [{"metric": "few"}], "bound": {"metric": "loss", "at_most": 1}}, "b"),
    ):
        of = sweep(**content)
        for order in (trials, trials[::-1]):
            assert best(of, order).name == winner
        assert abs(objectives(of, trials[0].scores)[0]) == 1e9
    few = sweep(objective=[{"metric": "few"}])
    assert best(few, [trials[0]]) is None
    assert best(few, [trials[0], trial("d", "stopped", few=0.1)]).name == "d"
    assert front(np.array([[math.nan, 1.0], [0.5, 0.5], [0.5, math.nan]])).tolist() == [False, True, False]


def test_axes_of_the_trade_off():
    assert axes(sweep(), [trial("a", many=1, few=1, head=1, tail=1)]) == ("many", "few")
    assert axes(sweep(), [trial("a", many=1, head=1, tail=1)]) == ("head", "tail")
    assert axes(sweep(), [trial("a", many=1, balanced=1, worst=0)]) == ("balanced", "worst")  # two classes have no thirds
    assert axes(sweep(objective=[{"metric": "worst"}, {"metric": "overall"}], asha=None), []) == ("worst", "overall")


def test_a_trial_has_its_parameters():
    config = trial_config(base_content(sweep()), {"loss.tail_skew": 0.7})
    assert isinstance(config, RunConfig)
    assert (config.loss.tail_skew, config.train.epochs) == (0.7, 4)
    assert trial_name({"a": 1, "b": 2}) == trial_name({"b": 2, "a": 1}) != trial_name({"a": 1, "b": 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"search": {"loss.tail_skw": {"kind": "uniform", "low": 0, "high": 1}}}, "'loss.tail_skw' is no field"),
        ({"search": {"loss.tail_skew": {"kind": "log_uniform", "low": 0, "high": 1}}}, "begins above 0"),
        ({"search": {"loss.tail_skew": {"kind": "uniform", "low": 2, "high": 1}}}, "must be less than"),
        ({"search": {"train.epochs": {"kind": "integer", "low": 1.5, "high": 3}}}, "whole ends"),
        ({"objective": [{"metric": "few"}, {"metric": "many"}]}, "set asha: null"),
        ({"objective": [{"metric": "fw"}]}, "metric"),
        ({"trials": 0}, "trials"),
        ({"set": {"loss.tail_skew": 3}}, "'loss.tail_skew' is in `set` and in `search`; take it out of one"),
        ({"objective": [{"metric": "loss", "mode": "max"}]}, "mode 'max' looks for the largest loss, .*leave mode out"),
        ({"bound": {"metric": "loss", "at_least": 0.5}}, "a bound of loss is `at_most: VALUE` alone"),
        ({"bound": {"metric": "few", "at_most": 0.5}}, "a bound of few is `at_least: VALUE` alone"),
        ({"bound": {"metric": "few"}}, "a bound of few is `at_least: VALUE` alone"),
    ],
)
def test_mistakes_in_a_sweep(content, message):
    with pytest.raises(UserError, match=message):
        sweep(**content)


@pytest.mark.parametrize(
    ("key", "space", "message"),
    [
        ("train.batch_size", {"kind": "uniform", "low": 32, "high": 64}, r"value 48.5: .* integer.*; .* with kind: integer"),
        ("train.batch_size", {"kind": "log_uniform", "low": 32, "high": 64}, r"value 48.5: .*; .* with kind: integer"),
        ("train.batch_size", {"kind": "integer", "low": 1, "high": 64}, "train.batch_size = 1: .*greater"),
        ("optimizer.momentum", {"kind": "uniform", "low": 0.5, "high": 1.5}, r"value 1.5: .* less than 1; lower high"),
        ("loss.tail_skew", {"kind": "choice", "values": [0.1, "x"]}, r"value 'x': .*; leave it out of values"),
        ("schedule.warmup_epochs", {"kind": "integer", "low": -1, "high": 9}, r"schedule.warmup_epochs = -1: .*greater"),
    ],
)
def test_a_search_of_impossible_values(key, space, message):
    rest = {name: value for name, value in BASE["set"].items() if name != key}
    with pytest.raises(UserError, match=message) as caught:
        base_content(sweep(search={key: space}, set=rest))
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sweep_that_tunes_a_pretrained_backbone_has_the_recipe_for_it():
    search = {"optimizer.layer_decay": {"kind": "choice", "values": [0.7, 0.8]}}
    base = base_content(sweep(base="photos", search=search, set={"train.tune": "full", "train.epochs": 2}))
    alone = load_config("photos", ["--tune", "full", "--train.epochs", "2"])
    assert base["optimizer"] == {**alone.optimizer.model_dump(mode="json"), "layer_decay": 0.7}
    assert base["train"] == alone.train.model_dump(mode="json")
    with pytest.raises(UserError, match="train.tune decides the recipe"):
        base_content(sweep(base="photos", search={"train.tune": {"kind": "choice", "values": ["head", "full"]}}, set={}))


def test_a_search_whose_keys_depend_on_each_other():
    """Nine epochs of warm-up are possible in the longest trials."""
    search = {
        "train.epochs": {"kind": "integer", "low": 3, "high": 20},
        "schedule.warmup_epochs": {"kind": "integer", "low": 1, "high": 9},
        "train.batch_size": {"kind": "integer", "low": 32, "high": 64},
        "optimizer.lr": {"kind": "log_uniform", "low": 0.01, "high": 1},
    }
    assert base_content(sweep(search=search, set={}))["train"]["batch_size"] == 32


def test_trials_that_could_not_be_compared_are_refused():
    with pytest.raises(UserError, match="must not choose on the test set"):
        check_metrics(sweep(), {"many"}, has_validation=False)
    with pytest.raises(UserError, match="group 'few'; use head, tail"):
        check_metrics(sweep(objective=[{"metric": "few"}]), {"many", "medium", "head", "tail"}, has_validation=True)
    check_metrics(sweep(objective=[{"metric": "few"}]), {"many", "few"}, has_validation=True)


def test_a_third_that_no_class_is_in_is_refused_before_a_trial_begins(tmp_path):
    """As with two classes, or where the smallest have one image each, which stays in training."""
    for name, images in (("common", 4), ("rare", 1)):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for number in range(images):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / "train" / name / f"{number}.png")
    source = {"kind": "folder", "path": str(tmp_path / "images")}
    data = {"source": source, "val_fraction": 0.2, "prepared": str(tmp_path), "profile": {"kind": "none"}}
    of = sweep(objective=[{"metric": "tail"}], set={"data": data})
    groups, there = prepare_data(base_content(of))
    assert there
    assert groups == {"few", "middle"}
    with pytest.raises(UserError, match="group 'tail'; use balanced or worst"):
        check_metrics(of, groups, has_validation=True)


def test_a_base_in_this_folder_has_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("data: {source: {kind: digits}, prepared: here}")
    monkeypatch.chdir(tmp_path)
    content = base_content(sweep(base="mine.yaml", set={}))
    assert content["data"]["prepared"] == str(tmp_path / "here")
    monkeypatch.chdir("/")
    assert trial_config(content, {"loss.tail_skew": 0.3}).data.prepared == tmp_path / "here"


def test_a_sweep_goes_on_with_the_base_that_it_began_with(tmp_path, monkeypatch):
    """The base's file has changed since, and so has the current folder."""
    base, folder = tmp_path / "mine.yaml", tmp_path / "kept"
    base.write_text("{data: {source: {kind: digits}, val_fraction: 0.1, store: {square: 16}, size: 16, prepared: here}}")
    ended = Trial("a", {"loss.tail_skew": 0.3}, "completed", 4, dict.fromkeys(METRICS, 0.5))
    (folder / "trials" / "a" / "checkpoints").mkdir(parents=True)
    (folder / "trials" / "a" / "checkpoints" / "last.safetensors").write_bytes(b"x")
    (folder / "trials.jsonl").write_text(json.dumps(asdict(ended)) + "\n")
    monkeypatch.chdir(tmp_path)
    configure_ray_env(own=True)
    from cibl_ray.tuning.run import run  # Ray, after `configure_ray_env`

    run(sweep(base="mine.yaml", set={}, trials=1), folder, None)
    begun = (folder / "best.yaml").read_text()
    assert f"prepared: {tmp_path / 'here'}" in begun
    base.write_text(base.read_text().replace("{data", "{optimizer: {lr: 0.5}, data"))
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "argv", ["tune", "--resume", str(folder)])
    tune.main()
    assert (folder / "best.yaml").read_text() == begun
    # Begun by an earlier version, it has the file alone, and the file's content from now on.
    content = json.loads((folder / "sweep.json").read_text())
    del content["base_content"]
    (folder / "sweep.json").write_text(
        json.dumps({**content, "base": str(base), "set": {"data.prepared": str(tmp_path / "here")}})
    )
    tune.main()
    assert json.loads((folder / "sweep.json").read_text())["base_content"]["optimizer"]["lr"] == 0.5


@pytest.mark.parametrize("more", [[], ["--set.train.epochs", "3"]])
def test_a_sweep_file_with_an_empty_set(tmp_path, more):
    file = tmp_path / "mine.yaml"
    file.write_text("base: quickstart\nset:\n#  train.batch_size: 64\n")
    assert load_sweep(str(file), more).set == ({"train.epochs": 3} if more else {})
    for other in ("[]", "[train.epochs]", "3"):
        file.write_text(f"base: quickstart\nset: {other}\n")
        with pytest.raises(UserError, match="mine.yaml: set = .*: expected a mapping"):
            load_sweep(str(file), more)


def test_paths_in_a_sweep_file_are_relative_to_it(tmp_path, monkeypatch):
    """Those of the command line are relative to the working folder."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    (home / "base.yaml").write_text("data: {source: {kind: table, path: base.csv, label: y}}")
    content = {
        "base": "base.yaml",
        "set": {"data.source.path": "set.csv", "data.source.label": "z", "data.exclude": "/elsewhere/x.txt"},
        "search": {"data.source.classes": {"kind": "choice", "values": ["a.txt", None]}},
    }
    (home / "s.yaml").write_text(yaml.safe_dump(content))
    own = load_sweep(str(home / "s.yaml"), [])
    assert own.set == {
        "data.source.path": str(home / "set.csv"), "data.source.label": "z", "data.exclude": "/elsewhere/x.txt",
    }  # fmt: skip
    assert own.search["data.source.classes"].values == (str(home / "a.txt"), None)
    choice = "{data.source.classes: {kind: choice, values: [b.txt]}}"
    given = load_sweep(str(home / "s.yaml"), ["--set.data.source.path", "given.csv", "--search", choice])
    assert given.set["data.source.path"] == str(work / "given.csv")
    assert given.search["data.source.classes"].values == (str(work / "b.txt"),)
    shipped = load_sweep("sweeps/photos", ["--set.data.source.path", "photos"])
    assert shipped.set["data.source.path"] == str(work / "photos")
    # A part as a whole; and the name of a data set, which is a path in the other kinds.
    whole = {**content, "set": {"data.source": {"kind": "table", "path": "set.csv", "label": "z"}}}
    (home / "s.yaml").write_text(yaml.safe_dump(whole))
    assert load_sweep(str(home / "s.yaml"), []).set["data.source"]["path"] == str(home / "set.csv")
    (home / "base.yaml").write_text("data: {source: {kind: huggingface, path: user/first}}")
    (home / "s.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "set": {"data.source.path": "user/second"}}))
    assert load_sweep(str(home / "s.yaml"), []).set == {"data.source.path": "user/second"}


def test_the_longest_trial_counts():
    content = base_content(sweep())
    assert most_epochs(sweep(), content) == 4
    assert most_epochs(sweep(search={"train.epochs": {"kind": "integer", "low": 2, "high": 9}}, set={}), content) == 9
    assert most_epochs(sweep(search={"train.epochs": {"kind": "choice", "values": [7, 3]}}, set={}), content) == 7


def test_a_choice_of_numbers_that_yaml_reads_as_words(tmp_path):
    of = sweep(search=yaml.safe_load("{loss.tail_skew: {kind: choice, values: [1e-3, 0.1]}}"))
    assert of.search["loss.tail_skew"].values == (0.001, 0.1)
    scores = {"overall": 0.5, "balanced": 0.5, "many": 0.5, "few": 0.5}
    trials = [Trial(str(skew), {"loss.tail_skew": skew}, "completed", 4, scores) for skew in of.search["loss.tail_skew"].values]
    for each in trials:
        (tmp_path / "trials" / each.name / "checkpoints").mkdir(parents=True)
        (tmp_path / "trials" / each.name / "checkpoints" / "last.safetensors").write_bytes(b"x")
    sweep_report.write(tmp_path, of, base_content(of), trials)
    assert (tmp_path / "tail_skew.png").exists()
    kinds = {"network.head.kind": {"kind": "choice", "values": ["linear", "cosine"]}}
    assert sweep(search=kinds).search["network.head.kind"].values == ("linear", "cosine")


def test_report_of_two_objectives_one_of_them_to_be_small(tmp_path, monkeypatch):
    objective = [{"metric": "few"}, {"metric": "calibration_error", "mode": "min"}]
    of = sweep(objective=objective, asha=None)
    trials = [
        Trial("a", {"loss.tail_skew": 0.1}, "completed", 4, {"overall": 0.5, "few": 0.5, "calibration_error": 0.05}),
        Trial("b", {"loss.tail_skew": 0.2}, "completed", 4, {"overall": 0.5, "few": 0.4, "calibration_error": 0.5}),
        Trial("c", {"loss.tail_skew": 0.3}, "completed", 4, {"overall": 0.5, "few": 0.3, "calibration_error": 0.01}),
    ]
    for each in trials:
        (tmp_path / "trials" / each.name / "checkpoints").mkdir(parents=True)
        (tmp_path / "trials" / each.name / "checkpoints" / "last.safetensors").write_bytes(b"x")
    (tmp_path / "trials" / "a" / "result.json").write_text("of the best")
    monkeypatch.setattr("cibl_ray.tuning.report.load_checkpoint", lambda path: None)
    table = sweep_report.write(tmp_path, of, base_content(of), trials)
    assert (tmp_path / "best_result.json").read_text() == "of the best"  # with the tail shift that its validation images chose
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["a", "c"]
    with pytest.raises(UserError, match="no trial has a finite validation score, the first: boom"):
        sweep_report.write(tmp_path, of, base_content(of), [Trial("d", {}, "failed", 0, {}, "boom")])


@pytest.mark.parametrize(
    ("flag", "key"),
    [("--data.source.path", "data.source.path"), ("--source.path", "data.source.path"), ("--epochs=3", "train.epochs")],
)
def test_a_field_of_the_trials_names_its_option(flag, key):
    with pytest.raises(UserError, match=rf"^{flag.partition('=')[0]}: unknown field of a sweep; did you mean --set.{key}\?$"):
        load_sweep("sweeps/photos", [flag] if "=" in flag else [flag, "FOLDER"])


def test_commands_mistakes(tmp_path):
    for arguments, message in (
        ([], "name a sweep first"),
        (["nowhere"], "no configuration 'nowhere'"),
        (["--resume", tmp_path], "is not a sweep folder"),
        (["--resume", tmp_path, "--sweeps", tmp_path], f"--resume continues in {tmp_path} itself; leave --sweeps out"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cibl_ray.tune", *map(str, arguments)],
            capture_output=True, text=True, cwd=REPOSITORY, env=os.environ,
        )  # fmt: skip
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["tail_skew", "tail_skew_quick"])
def test_the_shipped_sweeps_are_valid(name):
    shipped = load_sweep(f"sweeps/{name}", [])
    config = trial_config(base_content(shipped), {"loss.tail_skew": 1.0, "network.head.scale.start": 8.0})
    assert config.network.head.scale.start == 8.0


def test_the_shipped_sweep_of_photographs_runs_in_this_process():
    shipped = load_sweep("sweeps/photos", ["--set.data.source.path", "my photos", "--trials", "7", "--set.epochs=3"])
    base = base_content(shipped)
    assert base["data"]["source"]["path"].endswith("/my photos")
    assert (base["train"]["epochs"], base["network"]["neck"]["hidden"], shipped.trials) == (3, 512, 7)
    with pytest.raises(UserError, match="--epoks: unknown field"):
        load_sweep("sweeps/photos", ["--set.epoks", "3"])
    assert fits_in_process(shipped, base, None)
    config = trial_config(base, {"network.head": shipped.search["network.head"].values[1], "data.sampling": "square_root"})
    assert (config.network.head.kind, config.loss.kind, config.data.sampling) == ("cosine", "cibl", "square_root")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_sweeps_never_raise_the_tail_twice(path):
    """By sampling and by the loss, whatever a trial draws."""
    shipped = load_sweep(f"sweeps/{path.stem}", ["--set.data.source.path", "photos"] if path.stem == "photos" else [])
    base = base_content(shipped)
    ends = [axis.values if axis.kind == "choice" else (axis.low, axis.high) for axis in shipped.search.values()]
    for values in itertools.product(*ends):
        told = config_warnings(trial_config(base, dict(zip(shipped.search, values, strict=True))))
        assert not [line for line in told if "raised twice" in line]
