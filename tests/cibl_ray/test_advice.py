"""What a run says of its length, of busy cores, and of classes that it never answers."""

import json
import shlex
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cibl_ray.config import load_config, save_config
from cibl_ray.hardware import resolve
from cibl_ray.run.progress import Terminal
from cibl_ray.training import advice
from cibl_ray.training.advice import FirstSteps, busy_cores, classes_at_zero, long_run, next_steps
from cibl_ray.tuning.sweep import base_content, load_sweep
from pipelines.common.progress import counted
from tests.conftest import REPOSITORY

FOLDER = ["--data.source.path", "/photos/my birds"]


def test_a_run_of_many_hours_says_so_and_what_is_cheaper():
    config = load_config("folder", FOLDER)
    text = long_run(config, 2.0, 108_000)
    assert text == (
        "at 256 img/s this run takes about 15.0 h on this machine; cheaper: python -m cibl_ray.train photos --data.source.path "
        "'/photos/my birds' (a pretrained network: minutes); --train.epochs 6 (an hour)"
    )
    assert long_run(config, 20.0, 108_000) == ""  # an hour and a half
    large = load_config("imagenet_lt", [])
    assert long_run(large, 0.01, 40_000).endswith("--data.size 64 with --network.backbone resnet32")
    full = load_config("photos", [*FOLDER, "--tune", "full"])
    assert "--train.tune head (features once, then minutes)" in long_run(full, 0.1, 10_000)
    assert "photos --data" not in long_run(full, 0.1, 10_000)
    digits = load_config("quickstart", [])
    assert "photos" not in long_run(digits, 0.1, 10_000)  # no photographs, and no fewer than an epoch an hour
    assert "--train.epochs 1 (an hour)" in long_run(digits, 0.1, 10_000)
    # What is done of a resumed run cannot be made shorter.
    assert long_run(digits, 0.1, 10_000, resumed=True).endswith("the rest of this run takes about 27.8 h on this machine")
    assert long_run(config, 2.0, 108_000, resumed=True).endswith("(a pretrained network: minutes)")


def test_the_first_steps_are_measured_once(monkeypatch):
    config = load_config("folder", [*FOLDER, "--device", "cpu"])
    clock = count()
    monkeypatch.setattr(advice.time, "monotonic", lambda: 2.0 * next(clock))
    monkeypatch.setattr(advice, "_Cores", lambda: SimpleNamespace(others=lambda: 2.0))
    monkeypatch.setattr(advice.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(advice, "usable_cores", lambda: 2)
    first = FirstSteps(config, Path("runs/a"), 40_011)
    said = [first.step() for _ in range(11)]
    assert said[:10] == [[]] * 10
    assert first.done
    assert said[10][0].startswith("at 64 img/s this run takes about 22.2 h on this machine")  # two seconds a step
    assert "2.0 of this machine's 2 cores busy; 2 threads" in said[10][1]


@pytest.mark.parametrize(
    ("threads", "cores", "others", "said"),
    [(2, 2, 0.9, True), (2, 2, 0.3, False), (1, 2, 2.0, False), (2, 16, 9.0, False), (16, 16, 5.0, True), (8, 16, 3.0, False)],
)
def test_threads_that_wait_for_each_other_on_busy_cores(threads, cores, others, said):
    text = busy_cores(threads, cores, others, Path("runs/a"))
    assert text.endswith("OMP_NUM_THREADS=1 python -m cibl_ray.train --resume runs/a") is said


def test_what_other_programs_use_is_measured():
    """This process does not count itself, nor its children, but a stranger."""
    code = "import time; end = time.process_time() + 1.5\nwhile time.process_time() < end: pass"
    cores = advice._Cores()
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        child.poll()
        own = advice._own_seconds()
        while child.poll() is None and advice._own_seconds() < own + 0.5:
            pass
        assert advice._own_seconds() >= own + 0.5
        assert cores.others() >= 0
    stranger = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}])"
    subprocess.run([sys.executable, "-c", stranger], check=True)  # its parent has ended: it is nobody's child here
    before, own = advice._busy_seconds(), advice._own_seconds()
    while (advice._busy_seconds() - before) - (advice._own_seconds() - own) < 0.5:
        pass


def test_classes_at_zero_have_something_to_try(tmp_path):
    classes, counts = [f"c{number}" for number in range(9)], np.arange(90, 0, -10)
    scored = [5] * 9
    some = SimpleNamespace(per_class=[0.9, 0.5, 0.0, None, 0.0, 0.0, 0.0, 0.0, 0.0])
    digits = load_config("quickstart", [])
    text = classes_at_zero(digits, classes, counts, scored, some, True, Path("runs/a b"))
    assert text == (
        "6 of 9 classes are at 0 %: c2 (70 images), c4 (50 images), c5 (40 images), c6 (30 images), c7 (20 images) and 1 more. "
        "To try: python -m cibl_ray.evaluate 'runs/a b' --tail-shift auto; a larger --loss.tail_skew, or --loss.kappa 1; "
        "more epochs: python -m cibl_ray.train --resume 'runs/a b' --train.epochs 80"
    )
    plain = load_config("folder", [*FOLDER, "--loss", "{kind: cross_entropy}"])
    text = classes_at_zero(plain, classes, counts, scored, some, False, Path("r"))
    assert "To try: python -m cibl_ray.train photos --data.source.path" in text
    assert "--loss.kind balanced_softmax" in text
    assert "tail-shift" not in text
    fine = SimpleNamespace(per_class=[0.9] * 8 + [None])
    assert classes_at_zero(plain, classes, counts, scored, fine, False, Path("r")) == ""
    scored[2:8] = [1] * 6  # one image that is not answered rightly is no class that never is
    assert classes_at_zero(plain, classes, counts, scored, some, False, Path("r")).startswith("1 of 9 classes are at 0 %: c8 ")


def test_a_run_of_one_epoch_ends_with_advice(tmp_path):
    """`--epochs 1` trains as it stands, and classes that it never answers are named."""
    flags = ["quickstart", "--epochs", "1", "--runs", tmp_path / "runs", "--prepared", tmp_path / "prepared", "--name", "one"]
    flags += ["--device", "cpu", "--loader.kind", "torch"]
    command = [sys.executable, "-m", "cibl_ray.train", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert "schedule.warmup_epochs = 5 is more than train.epochs = 1: the rate rises over 0.25 epochs" in done.stderr
    result = json.loads((tmp_path / "runs" / "one" / "result.json").read_text())
    zero = result["best"]["scores"]["per_class"].count(0)
    assert zero > 0
    assert f"{zero} of 10 classes are at 0 %: " in done.stdout


def test_without_a_terminal_a_line_a_minute_has_rate_and_time_left(monkeypatch, capsys):
    """Within the first epoch, too. The same for preparing images."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    terminal = Terminal()
    terminal.begin(total=10_000, done=1_000)
    for _ in range(100):  # of 2 seconds each
        clock[0] += 2
        terminal.advance(20)
    terminal.close()
    assert capsys.readouterr().out.splitlines() == [
        "16 % of all images, 10 img/s, about 14 min left",
        "22 % of all images, 10 img/s, about 13 min left",
        "28 % of all images, 10 img/s, about 12 min left",
    ]

    def images():
        for number in range(100):
            clock[0] += 2
            yield number

    assert [*counted(images(), 150, "data: train", done=50)] == [*range(100)]
    assert capsys.readouterr().err.splitlines() == [
        "data: train: 80 of 150 images, 0.5 images/s, about 2 min left",
        "data: train: 110 of 150 images, 0.5 images/s, about 80 s left",
        "data: train: 140 of 150 images, 0.5 images/s, about 20 s left",
    ]


TABLE = ["--data.source", "{kind: table, path: /photos/my birds.csv, label: species}"]
CHOSEN = [*TABLE, "--data.exclude", "/photos/bad.txt", "--data.split_by", "(bird[0-9]+)"]


def test_a_head_is_followed_by_what_may_do_better(tmp_path):
    """The printed commands have the run's own data and backbone, and the recipe of fine-tuning."""
    run = tmp_path / "my run"
    run.mkdir()
    config = load_config("photos", [*CHOSEN, "--network.backbone.name", "resnet18"])
    save_config(resolve(config), run / "config.yaml")
    lines = next_steps(resolve(config), run).removeprefix("To try next: ").splitlines()
    sweep, partial, full = (shlex.split(line.partition("  (")[0].strip()) for line in map(str.strip, lines))
    assert sweep == ["python", "-m", "cibl_ray.tune", "sweeps/photos", "--base", str(run / "config.yaml")]
    trials = base_content(load_sweep(sweep[3], sweep[4:]))
    assert trials["data"] == {**config.data.model_dump(mode="json"), "sampling": "instance"}
    assert trials["network"]["backbone"] == config.network.backbone.model_dump(mode="json")
    assert (trials["train"]["tune"], trials["train"]["epochs"], trials["loss"]["kind"]) == ("head", 12, "cibl")
    for command, tune in ((partial, "partial"), (full, "full")):
        assert command[:3] == ["python", "-m", "cibl_ray.train"]
        deeper = load_config(command[3], command[4:])
        wanted = load_config("photos", [*CHOSEN, "--network.backbone.name", "resnet18", "--tune", tune])
        assert deeper == resolve(wanted)
    assert next_steps(load_config("photos", [*FOLDER, "--tune", "full"]), run) == ""
    assert next_steps(load_config("quickstart", []), run) == ""


def test_photos_are_named_with_the_images_of_the_run():
    """A long run from scratch on a table; what it prints trains on the same images."""
    config = load_config("folder", CHOSEN)
    command = long_run(config, 2.0, 108_000).partition("cheaper: ")[2].partition(" (a pretrained")[0]
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "cibl_ray.train", "photos"]
    again = load_config(words[3], words[4:]).data
    assert (again.source, again.exclude, again.split_by) == (config.data.source, config.data.exclude, config.data.split_by)
    lists = load_config("imagenet_lt", [])
    words = shlex.split(advice._photos(lists))
    assert load_config(words[3], words[4:]).data.source == lists.data.source


@pytest.mark.parametrize("tune", ["partial", "full"])
def test_fine_tuning_has_a_recipe_of_its_own(tune, caplog):
    with caplog.at_level("INFO"):
        config = load_config("photos", ["--tune", tune, "--optimizer.lr", "3e-5", "--epochs", "7"])
    optimizer, train = config.optimizer, config.train
    assert (optimizer.kind, optimizer.lr, optimizer.weight_decay, optimizer.layer_decay) == ("adamw", 3e-5, 0.05, 0.75)
    assert (train.batch_size, train.epochs, train.head_start, train.checkpoint_minutes) == (16, 7, "trained", 5)
    assert config.schedule.warmup_epochs == 0.5
    assert f"train.tune {tune}: the recipe of fine-tuning" in caplog.text
    own = load_config("photos", ["--train.tune", tune, "--optimizer", "{kind: sgd, lr: 0.01}"])
    assert (own.optimizer.kind, own.optimizer.lr, own.optimizer.layer_decay) == ("sgd", 0.01, 1.0)
    # A head keeps its recipe, and so does a configuration that trains more by itself.
    assert load_config("photos", ["--tune", "head"]).train.batch_size == 64
    assert load_config("quickstart", ["--tune", tune]).optimizer.kind == "sgd"
