"""The real commands on a tiny budget: train, resume after a kill, evaluate."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from cibl_ray import evaluate, train
from cibl_ray.config import load_config, save_config
from cibl_ray.hardware import resolve
from cibl_ray.run.checkpoint import load_checkpoint, save_checkpoint
from cibl_ray.run.folder import need_new
from cibl_ray.run.log import read_metrics
from cibl_ray.run.progress import Silent
from cibl_ray.run.shift import chosen_shift
from cibl_ray.training.fit import _as_decided, _rise, _same_data, fit
from cibl_ray.training.resume import changes, resumed
from cibl_ray.training.trainer import Trainer
from cibl_ray.world import World, require_own_gpu
from pipelines.common.errors import UserError
from pipelines.prepare.build import ensure_prepared
from tests.commands import in_process
from tests.conftest import REPOSITORY, digits_config, needs_ffcv

TINY = ["--epochs", "4", "--warmup_epochs", "1", "--batch_size", "64"]


def command(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"cibl_ray.{module}", *map(str, arguments)]


def run(module: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    options = {"cwd": REPOSITORY, **options}
    return subprocess.run(command(module, *arguments), capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("train")
    return ["--runs", str(folder / "runs"), "--prepared", str(folder / "prepared")]


@pytest.fixture(scope="module")
def finished(folders) -> tuple[Path, str]:
    """A run's folder and what it printed."""
    done = run("train", "quickstart", "--name", "whole", *TINY, *folders)
    assert done.returncode == 0, done.stderr
    return Path(folders[1]) / "whole", done.stdout + done.stderr


def test_run_folder(finished):
    folder, output = finished
    assert f"Use it:     python -m cibl_ray.predict {folder} IMAGES\n" in output
    assert f"Serve it:   python -m cibl_ray.export {folder}; python -m serve --simple {folder}/bundle\n" in output
    assert {path.name for path in folder.iterdir()} == {
        "accuracy_by_class.png", "checkpoints", "class_counts.png", "config.yaml", "learning_curves.png", "metrics.jsonl",
        "images.txt.gz", "result.json", "tensorboard", "train.log", ".lock",
    }  # fmt: skip
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "last.safetensors", "previous.safetensors", "best.safetensors",
    }  # fmt: skip
    assert all((folder / name).stat().st_size > 10_000 for name in ("accuracy_by_class.png", "learning_curves.png"))
    rows = read_metrics(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert set(rows[0]["train"]) == {"accuracy", "loss", "cross_entropy", "contrastive", "cross_entropy_weight"}
    assert rows[0]["rate"]["images_per_s"] > 0
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["train"]["precision"] in ("bf16", "fp32")  # resolved
    assert config["train"]["device"] in ("cpu", "cuda")
    assert "overall many medium few worst harmonic" in " ".join(output.split())
    assert "loader, " in output
    assert "loader, " in (folder / "train.log").read_text()


def test_tensorboard_events_hold_the_same_numbers(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "tensorboard"))
    events.Reload()
    rows = read_metrics(finished[0])
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([row["train"]["loss"] for row in rows])
    assert [event.step for event in events.Scalars("val/balanced")] == [1, 2, 3, 4]


def test_result_holds_the_last_and_the_best_on_validation(finished):
    result = json.loads((finished[0] / "result.json").read_text())
    rows = read_metrics(finished[0])
    best = max(range(4), key=lambda i: (rows[i]["val"]["balanced"], -i))
    assert result["split"] == "test"
    assert result["last"]["epoch"] == 4
    assert result["best"]["epoch"] == best + 1
    assert result["last"]["scores"]["samples"] == 445
    assert load_checkpoint(finished[0] / "checkpoints" / "best.safetensors").epoch == best + 1


def test_it_learns(finished):
    result = json.loads((finished[0] / "result.json").read_text())
    rows = read_metrics(finished[0])
    assert rows[-1]["train"]["loss"] < rows[0]["train"]["loss"]
    assert result["last"]["scores"]["overall"] > 0.2


def test_evaluate_repeats_the_result(finished, tmp_path):
    done = run("evaluate", finished[0], "--json", tmp_path / "scores.json", cwd=tmp_path, env=with_project())
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    result = json.loads((finished[0] / "result.json").read_text())
    assert scores["classes"] == result["classes"] == [str(digit) for digit in range(10)]
    assert done.stdout.startswith("Accuracy on the test split, %, by training images of the class ")
    assert scores["last (epoch 4)"] == result["last"]["scores"]
    assert scores[f"best (epoch {result['best']['epoch']})"] == result["best"]["scores"]


def with_project() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def test_evaluate_on_a_folder(finished, image_folder, tmp_path):
    for name, label in (("nought", "0"), ("one", "1"), ("two", "2")):
        (image_folder / "test" / name).rename(image_folder / "test" / label)
    done = run("evaluate", finished[0], "--checkpoint", "last", "--data", image_folder / "test", "--json", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "s.json").read_text())["last (epoch 4)"]
    assert done.stdout.startswith(f"Accuracy on {str(image_folder / 'test')!r}, %, ")
    assert scores["samples"] == 9
    assert scores["per_class"][3:] == [None] * 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' does not exist; name a run folder or a checkpoint file"),
        ([REPOSITORY], "neither a run folder nor a checkpoint file"),
        ([REPOSITORY / "README.md"], "cut short or damaged"),
    ],
)
def test_evaluate_mistakes(arguments, message):
    one_line_error(in_process(evaluate.main, *arguments), message)


def one_line_error(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr


def test_train_mistakes(finished, folders):
    for arguments, message in (
        (["quickstrat"], "no configuration 'quickstrat'"),
        (["quickstart", "--epoch", "3"], "did you mean --train.epochs?"),
        (["quickstart", "--name", "whole", *folders], "already exists; resume it (--resume"),
        (["--resume", "nowhere"], "'nowhere' does not exist; name a run folder"),
        (["--resume", finished[0], "--name", "other"], f"--resume continues in {finished[0]} itself; leave --name out"),
        (
            ["quickstart", *TINY, *folders, "--tail_skew", "3", "--resume", finished[0]],
            "of another configuration than quickstart (loss",
        ),
        (["--resume", ""], "--resume '' is empty; is a shell variable unset?"),
        (["quickstart", "--name", " "], "--name ' ' is empty; is a shell variable unset?"),
        (["--resume", finished[0], "--backbone", "resnet32"], "another architecture"),
        (["--resume", finished[0], "--epochs", "3"], "train.epochs is 3, and 4 epochs are done; give as many or more"),
        (
            ["--resume", finished[0], "--seed", "3"],
            "seed is 3, and the run began with 0; its images cannot change: leave seed out",
        ),
        (
            ["--resume", finished[0], "--data.profile.imbalance", "7"],
            "data.profile.imbalance is 7.0, and the run began with",
        ),
        (["--resume", finished[0], "--data.profile", "{kind: none}"], "data.profile.kind is none, and the run began with exp"),
        (["quickstart", "--lr", "1e9", "--name", "diverged", *TINY, *folders], "the loss is not finite in epoch"),
    ):
        one_line_error(in_process(train.main, *arguments), message)
    # What was refused left nothing behind and changed nothing.
    assert load_checkpoint(finished[0] / "checkpoints" / "last.safetensors").epoch == 4
    assert yaml.safe_load((finished[0] / "config.yaml").read_text())["network"]["backbone"] == "resnet20"
    one_line_error(
        in_process(train.main, "quickstart", "--name", "big", "--batch_size", "5000", *folders), "fewer than one batch"
    )
    assert not (Path(folders[1]) / "big").exists()


def test_resuming_a_finished_run_repeats_its_result(finished, folders):
    before = json.loads((finished[0] / "result.json").read_text())
    assert before["time"]["evaluation"] > sum(
        row["seconds"]["evaluation"] for row in read_metrics(finished[0])
    )  # the test set's
    assert before["time"]["checkpoint"] > 0
    # The command that began it, with --resume, is as good as --resume alone.
    assert run("train", "quickstart", "--name", "whole", *TINY, *folders, "--resume", finished[0]).returncode == 0
    after = json.loads((finished[0] / "result.json").read_text())
    assert {**after, "time": None} == {**before, "time": None}


def test_a_finished_run_whose_log_is_gone(finished, tmp_path):
    folder = tmp_path / "whole"
    shutil.copytree(finished[0], folder)
    (folder / "metrics.jsonl").unlink()
    done = run("train", "--resume", folder)
    assert done.returncode == 0, done.stderr
    assert "metrics.jsonl is missing: 4 epochs are written again from the last checkpoint" in done.stdout + done.stderr
    whole, after = (json.loads((each / "result.json").read_text()) for each in (finished[0], folder))
    assert {**after, "time": None} == {**whole, "time": None}
    assert (folder / "metrics.jsonl").read_text() == (finished[0] / "metrics.jsonl").read_text()


def test_an_empty_configuration_is_taken_from_the_checkpoint(finished, tmp_path, caplog):
    folder = tmp_path / "whole"
    shutil.copytree(finished[0], folder)
    begun, _ = resumed(folder, [], None)
    (folder / "config.yaml").write_text("")
    config, _ = resumed(folder, [], None)
    assert config == begun
    assert "is empty; the configuration of the last checkpoint is used" in caplog.text
    assert resumed(folder, ["--epochs", "6"], None)[0].train.epochs == 6
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match="is empty, and there is no checkpoint to take it from; remove the folder"):
        resumed(folder, [], None)


def test_what_was_left_to_auto_is_no_other_configuration(tmp_path):
    second_stage = ["--train.tune", "classifier", "--train.start", str(tmp_path), "--train.head_start", "tau_normalized"]
    for number, (flags, decided) in enumerate(
        [
            (["--train.compile", "auto"], {"compile": False}),
            ([*second_stage, "--network.head.kind", "linear"], {"tau": 0.75}),
        ]
    ):
        begun, folder = load_config("quickstart", flags), tmp_path / str(number)
        folder.mkdir()
        save_config(begun.model_copy(update={"train": begun.train.model_copy(update=decided)}), folder / "config.yaml")
        config, _ = resumed(folder, flags, "quickstart")
        assert config.train.epochs == begun.train.epochs
        with pytest.raises(UserError, match=r"\(train differ\)"):
            resumed(folder, [*flags, "--train.batch_size", "99"], "quickstart")
        with pytest.raises(UserError, match=r"\(train differ\)"):
            resumed(folder, [*flags, "--train.batch_norm", "keep"], "quickstart")


def test_a_rate_that_rises_because_the_run_is_longer_is_said():
    before, longer, plain = (
        load_config("quickstart", ["--schedule", schedule, "--lr", "0.1", "--train.epochs", epochs])
        for schedule, epochs in (
            ("{kind: cosine, warmup_epochs: 0}", "10"),
            ("{kind: cosine, warmup_epochs: 0}", "20"),
            ("{kind: steps, warmup_epochs: 0, milestones: [0.9]}", "20"),
        )
    )
    assert _rise(before, longer, 10) == (
        "train.epochs is 20 (it was 10): the learning rate rises from 0.0024 in epoch 10 to 0.05 in epoch 11, where the longer "
        "schedule has it"
    )
    assert _rise(before, longer, 0) == _rise(longer, before, 5) == _rise(plain, plain, 5) == ""


def test_what_changes_a_network_without_changing_its_tensors_is_said():
    begun = load_config("quickstart", ["--network.head.kind", "cosine", "--network.neck", "{hidden: 16}"])
    flags = [
        "--network.head.kind",
        "cosine",
        "--network.neck",
        "{hidden: 16, dropout: 0.5}",
        "--network.head.scale.start",
        "24",
    ]
    said = changes(begun, load_config("quickstart", [*flags, "--train.epochs", "90", "--loader.workers", "1"]))
    assert said == "network.neck.dropout 0.5 (it was 0.0), network.head.scale.start 24.0 (it was 16.0)"
    assert changes(begun, begun) == ""


def test_a_configuration_is_written_whole_or_not_at_all(tmp_path):
    config, path = load_config("quickstart", []), tmp_path / "config.yaml"
    save_config(config, path)
    before = path.read_text()
    path.with_name("config.yaml.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        save_config(config, path)
    assert path.read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["config.yaml"]


def test_a_folder_in_which_no_run_began(tmp_path):
    """As a kill leaves it between the folder and its configuration."""
    (tmp_path / ".lock").touch()
    with pytest.raises(UserError, match="already exists; it holds no run: remove it, or choose another name"):
        need_new(tmp_path)
    with pytest.raises(UserError, match="it has no config.yaml; no run began in it: remove it, and start a new run"):
        resumed(tmp_path, [], None)
    (tmp_path / "photo.jpg").touch()  # somebody's own
    with pytest.raises(UserError, match="already exists; choose another name"):
        need_new(tmp_path)
    need_new(tmp_path / "new")


def test_a_process_that_leaves_a_copy_behind_says_so(finished, tmp_path):
    folder = tmp_path / "whole"
    shutil.copytree(finished[0], folder)
    (folder / ".storage").write_text("s3://bucket/whole")
    done = run("train", "--resume", folder)
    assert done.returncode == 0, done.stderr
    assert (
        f"its copy s3://bucket/whole is not brought up to date; --resume {folder} --cluster does" in done.stdout + done.stderr
    )


def test_a_damaged_best_checkpoint_costs_its_scores_alone(finished, tmp_path):
    folder = tmp_path / "whole"
    shutil.copytree(finished[0], folder)
    path = folder / "checkpoints" / "best.safetensors"
    if load_checkpoint(path).epoch == 4:  # the last: nothing is read again
        last = load_checkpoint(folder / "checkpoints" / "last.safetensors")
        save_checkpoint(folder / "checkpoints" / "last.safetensors", replace(last, best={"epoch": 3, "balanced": 2.0}))
    path.write_bytes(path.read_bytes()[:-100])
    done = run("train", "--resume", folder)
    assert done.returncode == 0, done.stderr
    assert f"the damaged {path} is kept as {path}.old" in done.stderr + done.stdout
    result = json.loads((folder / "result.json").read_text())
    assert "best" not in result
    assert result["last"] == json.loads((finished[0] / "result.json").read_text())["last"]


@pytest.mark.parametrize("kind", [pytest.param("ffcv", marks=needs_ffcv), pytest.param("torch", marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_weights(finished, folders, kind):
    """SIGKILL in mid-run, --resume: every weight and momentum equals those of a run that was left alone, bit for bit."""
    flags = ["quickstart", *TINY, *folders, "--loader.kind", kind]
    root = Path(folders[1])
    whole, killed = finished[0] if kind == "ffcv" else root / "alone", root / f"killed-{kind}"
    if kind != "ffcv":
        assert run("train", *flags, "--name", whole.name).returncode == 0
    assert kind in json.loads((whole / "result.json").read_text())["loader"].lower()
    process = subprocess.Popen(command("train", *flags, "--name", killed.name), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    while len(read_metrics(killed)) < 1 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "result.json").exists()
    resumed = run("train", "--resume", killed)
    assert resumed.returncode == 0, resumed.stderr
    first, second = (load_checkpoint(folder / "checkpoints" / "last.safetensors") for folder in (whole, killed))
    for part in ("weights", "optimizer"):
        ours, theirs = getattr(first, part), getattr(second, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = [[(row["epoch"], row["train"], row["val"]) for row in read_metrics(folder)] for folder in (whole, killed)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_stopped_run_saves_first(folders, number, status):
    """Within an epoch too. The status says whether a scheduler should start the run again."""
    folder = Path(folders[1]) / f"stopped-{number}"
    flags = ["quickstart", "--epochs", "500", "--checkpoint_every", "500", *folders, "--name", folder.name]
    process = subprocess.Popen(command("train", *flags), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    while len(read_metrics(folder)) < 3 and process.poll() is None:
        time.sleep(0.01)
    if number == signal.SIGINT:
        one_line_error(in_process(train.main, "--resume", folder), "another process is training in")
    assert not (folder / "checkpoints" / "last.safetensors").exists()
    process.send_signal(number)
    process.send_signal(number)  # as a scheduler may, to the job's shell and to its processes
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"resume with: python -m cibl_ray.train --resume {folder}" in errors
    assert "Traceback" not in errors
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.safetensors")
    assert checkpoint.epoch == read_metrics(folder)[-1]["epoch"] >= 3


def test_a_run_stopped_before_it_trains_ends_at_once(folders):
    flags = ["quickstart", *folders, "--name", "early", "--prepared", str(Path(folders[1]) / "early_prepared")]
    process = subprocess.Popen(command("train", *flags), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("data: ")  # it prepares the images
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert not (Path(folders[1]) / "early").exists()


def test_resume_with_other_data_is_refused(finished, tmp_path, digits):
    config = resolve(load_config("quickstart", ["--runs", str(tmp_path)]))
    checkpoint = load_checkpoint(finished[0] / "checkpoints" / "last.safetensors")
    trainer = Trainer(config, digits, tmp_path)
    trainer.restore(checkpoint)  # the same digits
    checkpoint.data["train"] = "changed"
    with pytest.raises(UserError, match="the data have changed"):
        trainer.restore(checkpoint)


def test_a_copy_of_the_images_is_the_same_data(image_folder, tmp_path):
    """Of other files' times, as on another node; also to a checkpoint of an earlier version, while its folder stands."""
    options = ["--data.source.kind", "folder", "--data.source.path", str(image_folder), "--data.profile", "{kind: none}"]
    options += ["--val_fraction", "0", "--batch_size", "8", "--runs", str(tmp_path), "--prepared", str(tmp_path / "prepared")]
    config = resolve(load_config("quickstart", options))

    def trainer():
        return Trainer(config, ensure_prepared(config.data, config.seed), tmp_path)

    begun = trainer()
    begun.save()
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "last.safetensors")
    earlier = replace(checkpoint, data={name: split.source_digest for name, split in begun.prepared.splits.items()})
    begun.restore(checkpoint)
    begun.restore(earlier)
    os.utime(image_folder / "train" / "one" / "0.png", (1, 1))
    touched = trainer()
    assert touched.prepared.splits["train"].source_digest != begun.prepared.splits["train"].source_digest
    touched.restore(checkpoint)
    shutil.copy(image_folder / "train" / "one" / "1.png", image_folder / "train" / "one" / "0.png")
    with pytest.raises(UserError, match="the data have changed"):
        trainer().restore(checkpoint)


def test_workers_with_other_images_are_named(digits):
    own = digits.digests
    _same_data(World(), digits)
    world = SimpleNamespace(all_gather=lambda mine: [mine, own | {"train": "other"}, mine, own | {"test": "other"}])
    with pytest.raises(UserError, match=r"^ranks 1, 3: the images in '.*' are not rank 0's; give every node the same source"):
        _same_data(world, digits)


def test_cross_entropy_and_cosine_head_run_the_same_way(folders):
    flags = [*TINY[2:], "--epochs", "1", *folders, "--name", "ce", "--loss.kind", "cross_entropy", "--head.kind", "cosine"]
    done = run("train", "quickstart", *flags, "--clip_norm", "1", "--schedule.kind", "steps", "--schedule.warmup_epochs", "0")
    assert done.returncode == 0, done.stderr
    checkpoint = load_checkpoint(Path(folders[1]) / "ce" / "checkpoints" / "last.safetensors")
    assert not any(name.startswith("projection") for name in checkpoint.weights)
    assert checkpoint.config.network.head.kind == "cosine"


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device is visible"):
        resolve(load_config("quickstart", ["--device", "cuda"]))


@pytest.mark.parametrize(
    "module", ["cibl_ray", "cibl_ray.config", "cibl_ray.train", "cibl_ray.evaluate", "cibl_ray.tuning.sweep", "cibl_ray.tune"]
)
def test_importing_pulls_in_neither_ray_nor_ffcv_nor_torch(module):
    code = f"import sys, {module}; print([m for m in ('ray', 'ffcv', 'torch', 'numba') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(folders):
    done = run("train", "quickstart", "--name", "gpu", "--device", "cuda", *TINY, *folders)
    assert done.returncode == 0, done.stderr
    assert json.loads((Path(folders[1]) / "gpu" / "result.json").read_text())["last"]["scores"]["overall"] > 0.2


def test_evaluate_flags_and_folders_of_splits(finished, image_folder):
    one_line_error(run("evaluate", finished[0], "--json"), "expected one argument")
    one_line_error(run("evaluate", finished[0], "--data", image_folder), f"name one of them, as '{image_folder / 'test'}'")


def test_an_own_folder_keeps_every_image(image_folder, folders):
    flags = ["--data.source.path", image_folder, "--name", "own", "--batch_size", "8", *folders]
    done = run("train", "folder", *flags, "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "schedule.warmup_epochs = 5 is more than train.epochs = 1: the rate rises over 0.25 epochs" in done.stderr
    assert "keeps" not in done.stderr
    assert "16 images" in done.stderr  # 19, of which 3 are for validation
    prepare = [sys.executable, "-m", "pipelines.prepare", "folder", "--data.source.path", str(image_folder), "--count"]
    cut = subprocess.run(
        [*prepare, "--data.profile", "{kind: exp, imbalance: 2}"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert "data: profile 'exp' keeps 8 of 16 training images; --data.profile '{kind: none}' keeps all" in cut.stderr


def test_a_validation_loss_that_is_not_finite_ends_the_run(digits, tmp_path):
    """As running statistics make it that are no numbers, which training does not look at."""
    config = resolve(load_config("quickstart", [*TINY, "--loader.kind", "torch"]))
    trainer = Trainer(config, digits, tmp_path)
    trainer.after_save = lambda: next(trainer.network.buffers()).fill_(torch.nan)
    with pytest.raises(UserError, match="the loss is not finite on the val split after epoch 2"):
        trainer.fit()
    assert load_checkpoint(tmp_path / "checkpoints" / "last.safetensors").epoch == 1
    assert [row["epoch"] for row in read_metrics(tmp_path)] == [1]


def test_a_checkpoint_within_an_epoch_goes_on_to_the_bit(digits, tmp_path):
    flags = ["--loader.kind", "torch", "--epochs", "1", "--warmup_epochs", "0", "--checkpoint_minutes", "1e-9"]
    config = resolve(load_config("quickstart", flags))
    whole = Trainer(config, digits, tmp_path)
    expected = whole.train_epoch()
    within = load_checkpoint(tmp_path / "checkpoints" / "previous.safetensors")
    assert (within.epoch, within.step) == (0, whole.train_loaders[0].batches - 2)
    resumed = Trainer(config, digits, tmp_path / "resumed")
    resumed.restore(within)
    row = resumed.train_epoch()
    assert (row["epoch"], resumed.step) == (1, 0)
    assert row["train"] == expected["train"]  # means over the whole epoch
    assert row["seconds"]["epoch"] > within.so_far["seconds"]["epoch"] > 0
    assert row["rate"]["lr"] == expected["rate"]["lr"]
    theirs = resumed.network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in whole.network.state_dict().items())


def test_class_means_of_a_longer_run_are_still_those_of_the_epoch(digits, tmp_path):
    """ProCo's means begin a new epoch with another share of the run; the same epoch of a longer run is none."""
    flags = ["--loader.kind", "torch", "--warmup_epochs", "0", "--checkpoint_minutes", "1e-9", "--loss", "{kind: proco}"]
    config = resolve(load_config("quickstart", [*flags, "--epochs", "2"]))
    whole = Trainer(config, digits, tmp_path)
    whole.epoch = 1
    whole.train_epoch()
    within = load_checkpoint(tmp_path / "checkpoints" / "previous.safetensors")
    assert (within.epoch, within.step) == (1, whole.train_loaders[0].batches - 2)
    longer = Trainer(resolve(load_config("quickstart", [*flags, "--epochs", "8"])), digits, tmp_path / "longer")
    longer.restore(within)
    longer.train_epoch()
    assert torch.equal(longer.objective.class_means.counts, whole.objective.class_means.counts)


def test_a_checkpoint_within_an_epoch_and_other_batches(digits, tmp_path, caplog):
    """Its place in the epoch means nothing then: the epoch starts again, and the log says so."""
    flags = ["--loader.kind", "torch", "--epochs", "2", "--warmup_epochs", "0", "--checkpoint_minutes", "1e-9"]
    first = Trainer(resolve(load_config("quickstart", flags)), digits, tmp_path)
    first.train_epoch()
    other = Trainer(resolve(load_config("quickstart", [*flags, "--batch_size", "199"])), digits, tmp_path)
    other.restore(load_checkpoint(tmp_path / "checkpoints" / "last.safetensors"))
    assert (other.epoch, other.step) == (0, 0)
    assert "its epoch starts again" in caplog.text


def test_fewer_epochs_than_begun_do_not_take_the_best_for_the_last(digits, tmp_path):
    """The last checkpoint stands within the next epoch then: its weights are not those that were best before it."""
    config = resolve(load_config("quickstart", ["--loader.kind", "torch", "--epochs", "2", "--warmup_epochs", "0"]))
    trainer = Trainer(config, digits, tmp_path)
    trainer.train_epoch()
    trainer._validate({})
    best = trainer.evaluate("test")
    batch, feed = next(iter(trainer.train_loaders[0].epoch(1))), trainer.feeds[0]
    trainer.optimize([feed.ready([batch], 1, 0)[0]])
    trainer.step = 1
    trainer.config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 1})})
    result = trainer.fit()
    assert (result["best"]["epoch"], result["best"]["scores"]) == (1, best)
    assert result["last"]["scores"].loss != best.loss


def test_evaluate_every_scores_each_second_epoch_and_the_last(digits, tmp_path):
    flags = ["--loader.kind", "torch", "--epochs", "5", "--warmup_epochs", "0", "--evaluate_every", "2"]
    config = resolve(load_config("quickstart", flags)).model_copy(update={"data": digits_config(digits.folder.parent)})
    result = fit(config, tmp_path / "run", False, World(), Silent())
    scores = {row["epoch"]: row["val"]["balanced"] for row in read_metrics(tmp_path / "run") if "val" in row}
    assert list(scores) == [2, 4, 5]
    assert result["best"]["epoch"] == max(scores, key=lambda epoch: (scores[epoch], -epoch))
    assert (tmp_path / "run" / "learning_curves.png").stat().st_size > 0


@pytest.mark.parametrize("lost", [False, True], ids=["a checkpoint", "no checkpoint yet"])
def test_a_run_that_begins_again_keeps_what_it_decided(digits, tmp_path, monkeypatch, lost):
    """A replaced worker or a repeated trial is given the configuration that still says 'auto'."""
    config = load_config(
        "quickstart", ["--loader.kind", "torch", "--epochs", "1", "--warmup_epochs", "0", "--precision", "auto"]
    )
    config = config.model_copy(update={"data": digits_config(digits.folder.parent)})
    other = {"fp32": "bf16", "bf16": "fp32"}[resolve(config).train.precision]

    def decide(config, *_):
        return config.model_copy(update={"train": config.train.model_copy(update={"precision": other})})

    folder = tmp_path / "run"
    monkeypatch.setattr("cibl_ray.training.fit.decide", decide)
    fit(config, folder, False, World(), Silent())
    monkeypatch.undo()
    if lost:
        shutil.rmtree(folder / "checkpoints")
    longer = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 2})})
    fit(longer, folder, True, World(), Silent())
    train = load_checkpoint(folder / "checkpoints" / "last.safetensors").config.train
    assert (train.precision, train.epochs) == (other, 2)
    assert load_config(str(folder / "config.yaml"), []).train.precision == other


def test_what_an_earlier_version_left_undecided_is_by_rule():
    asked = load_config("quickstart", ["--train.compile", "auto", "--precision", "auto"])
    by_rule = resolve(asked)
    earlier = asked.train.model_copy(update={"precision": "fp32"})
    found = _as_decided(by_rule, asked.train, earlier).train
    assert (found.precision, found.compile) == ("fp32", False)


def test_a_run_that_trains_longer_has_no_result_until_its_end(digits, tmp_path, monkeypatch, caplog):
    config = load_config("quickstart", ["--loader.kind", "torch", "--epochs", "1", "--warmup_epochs", "0"])
    config = config.model_copy(update={"data": digits_config(digits.folder.parent)})
    folder = tmp_path / "run"
    fit(config, folder, False, World(), Silent())
    before = (folder / "result.json").read_text()
    longer = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 2})})

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "fit", stopped)
        fit(longer, folder, True, World(), Silent())
    assert chosen_shift(folder / "checkpoints" / "last.safetensors") == 0
    assert "the run is not finished" in caplog.text
    assert (folder / "result.before.json").read_text() == before
    assert fit(longer, folder, True, World(), Silent())["last"]["epoch"] == 2
    assert not (folder / "result.before.json").exists()


def test_every_worker_is_told_of_a_folder_that_is_there(tmp_path):
    """Not rank 0 alone: the others would fail with the traceback of a lost connection."""

    class Second(World):
        rank, size = 1, 2

        def __init__(self) -> None: ...

        def broadcast_from_rank0(self, make):
            return make()

    with pytest.raises(UserError, match="already exists; it holds no run"):
        fit(load_config("quickstart", []), tmp_path, False, Second(), Silent())


def test_options_of_a_cluster_need_one():
    one_line_error(
        run("train", "quickstart", "--workers", "4"), "--workers belongs to --cluster: add that; the loader's threads"
    )
    one_line_error(run("train", "quickstart", "--max-failures", "0"), "--max-failures belongs to --cluster")
    copy = ["--resume", "file:///nowhere/runs/a/", "--cluster"]
    one_line_error(run("train", *copy, "--storage", "file:///other"), "--resume names the copy itself, which goes on")
    one_line_error(run("train", *copy, "--print-config"), "its configuration is file:///nowhere/runs/a/config.yaml")


def test_too_small_an_image_leaves_no_folder(folders):
    flags = ["--data.store", "{square: 8}", "--name", "small", *folders]
    one_line_error(run("train", "quickstart", *flags), "is smaller than the crop")
    assert not (Path(folders[1]) / "small").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError("Unable to allocate 3.00 GiB"),
    ],
)
def test_no_memory_is_told_with_what_to_lower(error, digits, tmp_path, monkeypatch):
    trainer = Trainer(resolve(load_config("quickstart", ["--loader.kind", "torch"])), digits, tmp_path)

    def full(*arguments):
        raise error

    for place in (trainer.network.__class__, "forward"), (trainer.feeds[0], "ready"):  # in a step, and before it
        with monkeypatch.context() as patch:
            patch.setattr(*place, full)
            with pytest.raises(
                UserError,
                match="^out of memory in a step of 64 images; lower train.batch_size, raise train.accumulate, or use more",
            ):
                trainer.fit()
    monkeypatch.setattr(trainer.network, "classify", full)
    with pytest.raises(UserError, match="^out of memory in evaluation, .* images at once; lower train.eval_batch_size"):
        trainer.evaluate("test")


def test_more_processes_of_torchrun_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    require_own_gpu("cuda")  # Ray's workers may share a GPU
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    require_own_gpu("cpu")
    with pytest.raises(UserError, match="started 2 processes for 1 GPUs; --nproc-per-node 1, or --device cpu"):
        require_own_gpu("cuda")


def test_an_error_that_is_not_of_memory_stays_what_it_is(digits, tmp_path, monkeypatch):
    trainer = Trainer(resolve(load_config("quickstart", ["--loader.kind", "torch"])), digits, tmp_path)
    monkeypatch.setattr(trainer.network, "forward", lambda pixels: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        trainer.fit()


def test_a_place_in_an_epoch_that_other_workers_had_means_nothing(tmp_path, caplog):
    """Where every worker reads files of its own, their number decides the batches."""
    flags = ["--prepared", str(tmp_path), "--loader.kind", "torch"]
    for part, workers, step, expected in [("all", 3, 2, 2), ("shards", 1, 2, 2), ("shards", 3, 2, 0), ("all", 1, 99, 0)]:
        config = resolve(load_config("quickstart", [*flags, "--loader.part", part]))
        trainer = Trainer(config, ensure_prepared(config.data, 0), tmp_path / "run")
        assert trainer.config.loader.cache == "os"  # decided: what is saved with the run does not ask again
        checkpoint = replace(trainer._checkpoint(trainer.network.state_dict()), workers=workers, step=step)
        caplog.clear()
        trainer.restore(checkpoint)
        assert trainer.step == expected
        assert ("its epoch starts again" in caplog.text) == (expected == 0)


def test_another_optimizer_does_not_go_on(tmp_path):
    flags = ["--prepared", str(tmp_path), "--loader.kind", "torch"]
    sgd, adamw = (
        resolve(load_config("quickstart", [*flags, "--optimizer", f"{{kind: {kind}, lr: 0.01}}"])) for kind in ("sgd", "adamw")
    )
    prepared = ensure_prepared(sgd.data, 0)
    begun = Trainer(sgd, prepared, tmp_path / "run")
    checkpoint = begun._checkpoint(begun.network.state_dict())
    with pytest.raises(UserError, match="trained by optimizer.kind 'sgd', whose state 'adamw' cannot continue"):
        Trainer(adamw, prepared, tmp_path / "run").restore(checkpoint)


def test_what_a_configuration_hardly_means_is_logged(folders):
    flags = ["--epochs", "1", "--warmup_epochs", "0", *folders, "--name", "ldam", "--head.kind", "cosine"]
    done = run("train", "quickstart", *flags, "--loss.kind", "ldam")
    assert done.returncode == 0, done.stderr
    told = "LDAM without its re-weighting; set it to 0 at most"
    assert told in done.stderr
    assert told in (Path(folders[1]) / "ldam" / "train.log").read_text()
