"""Every file of a sweep folder, damaged in every way: the sweep resumes, or one line says what is wrong. Nothing is lost."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest

from cibl_ray import tune
from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.tuning import report
from cibl_ray.tuning import run as tuning_run
from cibl_ray.tuning.config import SweepConfig
from cibl_ray.tuning.folder import read_trials
from cibl_ray.tuning.search import _read
from cibl_ray.tuning.sweep import Trial, best, trial_name
from pipelines.common.errors import UserError
from pipelines.common.validation import validate
from tests.cibl_ray.test_damage import (
    binary,
    content,
    cut,
    cut_at_a_line,
    empty,
    foreign,
    half,
    in_place_of_a_file,
    in_place_of_a_folder,
    loop,
    missing,
    torn,
)

OUTPUT = "trials.csv best.yaml best.safetensors trade_off.png tail_skew.png"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> SweepConfig:
    settings = {
        "train.tune": "head",
        "train.epochs": 1,
        "schedule.warmup_epochs": 0,
        "train.device": "cpu",
        "data.prepared": str(tmp_path_factory.mktemp("prepared")),
        "data.profile": {"kind": "exp", "imbalance": 2, "largest": 8},
        "data.val_fraction": 0.2,
    }
    return validate(SweepConfig, {"base": "quickstart", "set": settings, "trials": 3, "asha": None}, "test")


@pytest.fixture(scope="module")
def whole(sweep, tmp_path_factory) -> Path:
    """A sweep of three trials that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    tuning_run.run(sweep, folder, None)
    return folder


@pytest.fixture(scope="module")
def stopped(sweep, whole, tmp_path_factory) -> Path:
    """The same sweep, stopped after two trials; it has every file."""
    folder = tmp_path_factory.mktemp("stopped") / "sweep"
    tuning_run.run(sweep.model_copy(update={"trials": 2}), folder, None)
    written = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**written, "trials": 3}, indent=1))
    assert read_trials(folder) == read_trials(whole)[:2]
    return folder


# The file, how it is damaged, how many trials are left of the two, and what the log says, or how the resume is refused.
CASES = [
    ("sweep.json", missing, 0, "error: is not a sweep folder: it has no sweep.json"),
    ("sweep.json", in_place_of_a_file, 0, "error: is not a sweep folder: it has no sweep.json"),
    ("sweep.json", foreign, 0, "error: sweep.json is damaged"),
    *(
        ("sweep.json", damage, 0, "error: sweep.json is damaged, not valid JSON")
        for damage in (empty, half, cut, cut_at_a_line, binary)
    ),
    ("trials.jsonl", missing, 0, "trials.jsonl is missing"),
    ("trials.jsonl", empty, 0, ""),
    ("trials.jsonl", cut, 1, ""),
    ("trials.jsonl", cut_at_a_line, 1, ""),
    ("trials.jsonl", torn, 1, "trials.jsonl is damaged: 1 trial of it can be read"),
    ("trials.jsonl", binary, 0, "trials.jsonl is damaged: 0 trials of it can be read"),
    ("trials.jsonl", foreign, 0, "trials.jsonl is damaged: 0 trials of it can be read"),
    ("trials.jsonl", in_place_of_a_file, 0, "trials.jsonl is not a file"),
    ("search.journal", missing, 2, "search.journal knows no trial"),
    ("search.journal", empty, 2, "search.journal knows no trial"),
    *(("search.journal", damage, 2, "") for damage in (half, cut, cut_at_a_line)),
    *(("search.journal", damage, 2, "search.journal is damaged") for damage in (torn, binary, foreign)),
    ("search.journal", in_place_of_a_file, 2, "search.journal is not a file"),
    *((OUTPUT, damage, 2, "") for damage in (missing, binary, in_place_of_a_file, loop)),
    ("trials", missing, 2, ""),
    ("trials", in_place_of_a_folder, 2, "trials is not a folder"),
    (".lock", in_place_of_a_file, 2, ".lock is not a file"),
    (".lock", missing, 2, ""),
]


@pytest.mark.parametrize(
    ("names", "damage", "left", "says"), CASES, ids=[f"{names.split()[0]}-{damage.__name__}" for names, damage, *_ in CASES]
)
def test_a_damaged_sweep_resumes(sweep, whole, stopped, tmp_path, caplog, monkeypatch, names, damage, left, says):
    folder = tmp_path / "sweep"
    shutil.copytree(stopped, folder, symlinks=True)
    before = read_trials(folder)
    for name in names.split():
        damage(folder / name)
    mine = {name: content(folder / name) for name in names.split()}
    monkeypatch.setattr(sys, "argv", ["tune", "--resume", str(folder)])
    monkeypatch.setattr(report, "save", lambda figure, path: path.write_text("a picture"))
    if says.startswith("error: "):
        with pytest.raises(UserError) as refused:
            tune.main()
        assert says.removeprefix("error: ") in str(refused.value).replace(f"{folder}/", "")
        assert "\n" not in str(refused.value)
        assert {name: content(folder / name) for name in mine} == mine
        return
    tune.main()
    assert says in caplog.text
    trials = read_trials(folder)
    assert len(trials) == 3
    kept = [trial for trial in trials if trial in before]
    assert len(kept) >= left
    assert {trial.state for trial in trials} == {"completed"}
    if left == 2:
        assert trials[:2] == before
        assert len({trial.name for trial in trials}) == 3  # no proposal is repeated
    chosen = best(sweep, trials)
    assert load_checkpoint(folder / "best.safetensors").config.loss.tail_skew == chosen.params["loss.tail_skew"]
    for name in ("sweep.json", "trials.jsonl", "search.journal", *OUTPUT.split()):
        assert (folder / name).is_file()
        assert not (folder / name).is_symlink()
    for name, held in mine.items():
        if "is damaged" in says or isinstance(held, dict | Path) or damage is in_place_of_a_folder:
            assert held in [content(path) for path in folder.iterdir()]
            assert f"is kept as {folder / name}.old" in caplog.text
    if names == "search.journal" and damage in (half, cut, cut_at_a_line):  # what is left of it is used, and it is whole again
        assert "is damaged" not in caplog.text
        assert all(map(json.loads, (folder / name).read_text().splitlines()))


def test_a_search_whose_driver_was_killed_as_it_wrote(stopped, tmp_path, monkeypatch):
    """Optuna's lock is left. In a folder that was moved since, the link leads nowhere, and Optuna waits for ever."""
    folder = tmp_path / "sweep"
    shutil.copytree(stopped, folder)
    (folder / "search.journal.lock").symlink_to(tmp_path / "moved" / "search.journal")
    monkeypatch.setattr(sys, "argv", ["tune", "--resume", str(folder)])
    monkeypatch.setattr(report, "save", lambda figure, path: None)
    tune.main()
    assert len(read_trials(folder)) == 3
    assert not (folder / "search.journal.lock").is_symlink()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"search": None}, "is damaged: it lacks 'search'; restore it from a copy, or start the sweep again"),
        ({"base_content": [1]}, "is damaged: 'base_content' is not a mapping"),
        ({"base_content": {"train": {"epochs": 4}}}, "sweep.json, base_content: 'data.source' is missing"),
        ({"trials": "many"}, "sweep.json: trials = 'many'"),
    ],
)
def test_a_sweep_file_that_is_json_and_damaged(stopped, tmp_path, monkeypatch, changed, message):
    """Fields have defaults: a file without them would be another sweep."""
    written = {**json.loads((stopped / "sweep.json").read_text()), **changed}
    text = json.dumps({key: value for key, value in written.items() if value is not None})
    (tmp_path / "sweep.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["tune", "--resume", str(tmp_path)])
    with pytest.raises(UserError, match=message) as refused:
        tune.main()
    assert "\n" not in str(refused.value)
    assert (tmp_path / "sweep.json").read_text() == text


def test_a_kill_before_the_first_file(tmp_path, monkeypatch):
    """The two ways to go on do not send from one to the other."""
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".lock").write_text("")
    monkeypatch.setattr(sys, "argv", ["tune", "sweeps/tail_skew", "--sweeps", str(tmp_path), "--name", "begun"])
    with pytest.raises(UserError, match="already exists; it holds no sweep: choose another --name"):
        tune.main()


@pytest.mark.parametrize("damage", [missing, half, binary, in_place_of_a_file])
def test_a_best_trial_without_its_checkpoint(whole, sweep, tmp_path, caplog, monkeypatch, damage):
    """As in a sweep with Ray, which does not train the best trial once more."""
    folder = tmp_path / "sweep"
    shutil.copytree(whole, folder)
    trials = read_trials(folder)
    damage(folder / "trials" / best(sweep, trials).name / "checkpoints" / "last.safetensors")
    earlier = content(folder / "best.safetensors")
    monkeypatch.setattr(report, "save", lambda figure, path: None)
    base = json.loads((folder / "sweep.json").read_text())["base_content"]
    with caplog.at_level(logging.WARNING):
        assert "<- best" in report.write(folder, sweep, base, trials)
    assert f"python -m cibl_ray.train {folder / 'best.yaml'} --name NAME" in caplog.text
    assert not (folder / "best.safetensors").exists()
    assert content(folder / "best.safetensors.old") == earlier


def test_what_other_programs_left_among_the_trials(stopped, tmp_path, caplog, monkeypatch):
    folder = tmp_path / "sweep"
    shutil.copytree(stopped, folder)
    for name in ("0.json", "0.lock", "0.error"):
        (folder / "trials" / name).mkdir()
    (folder / "trials" / "0123456789").write_text("mine")
    (folder / ".ray").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["tune", "--resume", str(folder)])
    monkeypatch.setattr(report, "save", lambda figure, path: None)
    tune.main()
    for name in ("0.json.old", "0.lock.old", "0.error.old"):
        assert (folder / "trials" / name).is_dir()
    assert (folder / "trials" / "0123456789.old").read_text() == "mine"
    assert (folder / ".ray.old").read_text() == "mine"
    assert caplog.text.count("is kept as") == 5


def test_parameters_of_another_trial_are_not_proposed(tmp_path):
    params = {"loss.tail_skew": 0.25}
    right = tmp_path / f"{trial_name(params)}.json"
    right.write_text(json.dumps(params))
    assert _read(right) == params
    for damage in (foreign, binary, empty):
        damage(right)
        assert _read(right) is None
    right.write_text(json.dumps({"loss.kappa": 1}))
    assert _read(right) is None


def test_a_line_that_is_no_trial(tmp_path):
    lines = [
        {"name": "a", "params": {}, "state": "completed", "epochs": 4, "scores": {"overall": 0.5}},
        {"name": "b", "params": {}, "state": "completed", "epochs": 4, "scores": {"overall": "high"}},
        {"name": "c", "params": {}, "state": "running", "epochs": 4, "scores": {}},
        {"name": "d", "params": [], "state": "failed", "epochs": 4, "scores": {}},
        {"name": "e", "params": {}, "state": "failed", "epochs": 0, "scores": {}, "error": "boom"},
    ]
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_trials(tmp_path) == [
        Trial("a", {}, "completed", 4, {"overall": 0.5}),
        Trial("e", {}, "failed", 0, {}, "boom"),
    ]
