"""`import cibl_ray` as a library: what it gives, and what it leaves alone."""

import json
import logging
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml
from nbclient import NotebookClient
from PIL import Image

import cibl_ray
from cibl_ray import hardware
from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.training.resume import resumed
from cibl_ray.tuning.folder import read_sweep
from tests.conftest import REPOSITORY
from tests.exported import small_run

FAST_DATA = {
    "source": {"kind": "digits"},
    "profile": {"kind": "exp", "imbalance": 10, "largest": 30},
    "val_fraction": 0.1,
    "store": {"square": 16},
    "size": 16,
    "views": [{"cut": {"kind": "crop", "padding": 2}}],
}
TINY = {
    "data.profile": FAST_DATA["profile"],
    "data.views": FAST_DATA["views"],
    "loss": {"kind": "cross_entropy"},
    "schedule.warmup_epochs": 0,
    "train.epochs": 2,
    "train.precision": "fp32",
    "train.device": "cpu",
    "loader.kind": "torch",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    return cibl_ray.load_config("quickstart", {**TINY, "runs": folder / "runs", "data.prepared": str(folder / "prepared")})


@pytest.fixture(scope="module")
def run(config) -> cibl_ray.Run:
    return cibl_ray.fit(config, name="first", progress=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """FOLDER/CLASS/*.png of digits."""
    import sklearn.datasets

    folder = tmp_path_factory.mktemp("images")
    digits = sklearn.datasets.load_digits()
    for index in range(20):
        path = folder / str(digits.target[index]) / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((digits.images[index] * 255 / 16).astype(np.uint8)).save(path)
    return folder


def test_the_import_is_light():
    code = "import sys, cibl_ray; dir(cibl_ray); print([x for x in ('torch', 'ray', 'ffcv', 'numpy') if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        cibl_ray.fitt  # noqa: B018


def test_settings_by_dotted_name():
    config = cibl_ray.load_config("cifar100_lt", {"loss.tail_skew": 0.2, "data.size": 32})
    assert config.loss.tail_skew == 0.2
    assert config.runs.is_absolute()
    with pytest.raises(cibl_ray.UserError, match=r"unknown key 'loss.tail_skw'; did you mean 'loss.tail_skew'\?"):
        cibl_ray.load_config("cifar100_lt", {"loss.tail_skw": 0.2})
    with pytest.raises(cibl_ray.UserError, match="no configuration 'cifar_100_lt'; did you mean cifar100_lt?"):
        cibl_ray.load_config("cifar_100_lt")


def test_a_run_has_scores_history_and_a_network(run):
    result = json.loads((run.folder / "result.json").read_text())
    assert run.scores["overall"] == result["best"]["scores"]["overall"]
    assert all(isinstance(value, float) for value in run.scores.values())
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert run.history[0]["train"]["loss"] > 0
    assert all("val" in row for row in run.history)
    network = run.network()
    assert isinstance(network, torch.nn.Module)
    assert not network.training
    assert network(torch.zeros(2, 3, 16, 16)).logits.shape == (2, 10)
    assert network(torch.zeros(2, 3, 16, 16)).embeddings is None  # cross-entropy needs no projection
    assert run.classes == [str(digit) for digit in range(10)]
    assert run.config.train.epochs == 2


def test_evaluate_repeats_the_scores(run, images):
    assert run.evaluate() == run.scores
    assert run.evaluate(checkpoint="last", split="val")["balanced"] == run.history[-1]["val"]["balanced"]
    assert 0 <= run.evaluate(images)["overall"] <= 1
    with pytest.raises(cibl_ray.UserError, match="leave it out where a folder is given"):
        run.evaluate(images, split="val")


def test_predict_agrees_with_the_evaluation(run, images):
    files = sorted(images.glob("*/*.png"))
    predictions = run.predict(map(str, files), tail_shift=0)
    right = [prediction.label == prediction.image.parent.name for prediction in predictions]
    assert np.mean(right) == pytest.approx(run.evaluate(images)["overall"])
    assert {one.label for one in run.predict(files, tail_shift=100)} == {"9"}  # the rarest class
    assert run.evaluate(images, tail_shift=100)["tail"] == pytest.approx(1 / 3)
    assert run.evaluate(images)["tail"] != pytest.approx(1 / 3)
    chosen = run.predict(files)
    assert np.mean([one.label == one.image.parent.name for one in chosen]) == pytest.approx(
        run.evaluate(images, tail_shift=None)["overall"]
    )
    with pytest.raises(cibl_ray.UserError, match="tail_shift = nan: a number from"):
        run.evaluate(tail_shift=float("nan"))
    assert [prediction.image for prediction in predictions] == files
    for prediction in predictions:
        assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert prediction.probability == max(prediction.probabilities.values()) == prediction.probabilities[prediction.label]
    assert run.predict([]) == []
    with pytest.raises(cibl_ray.UserError, match=r"gone.png' does not exist"):
        run.predict([images / "gone.png"])
    with pytest.raises(cibl_ray.UserError, match="is not an image that can be read"):
        run.predict([__file__])


def test_predict_takes_folders_and_images(run, images, tmp_path):
    files = sorted(images.glob("*/*.png"))
    of_files = run.predict(files)
    assert run.predict(images) == of_files
    (alone,) = run.predict(str(files[0]))
    assert (alone.image, alone.label) == (files[0], of_files[0].label)
    opened = Image.open(files[3])
    mixed = run.predict([files[5], images / "1", opened])
    assert [one.image for one in mixed] == [files[5], *sorted((images / "1").glob("*.png")), opened]
    assert mixed[-1].probabilities == pytest.approx(of_files[3].probabilities, abs=1e-6)
    assert run.predict(opened) == run.predict([opened])
    for wrong in ([3], 3):
        with pytest.raises(cibl_ray.UserError, match="predict takes image files, folders and Pillow's images, and got 3"):
            run.predict(wrong)
    twice = run.predict([Image.open(files[3])] * 2)
    assert twice[0] == twice[1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(cibl_ray.UserError, match="no images in"):
        run.predict(tmp_path / "empty")
    with pytest.raises(cibl_ray.UserError, match=r"Image.*is not an image that can be read: floating-point grey"):
        run.predict(Image.new("F", (20, 20)))


def test_predict_shifts_as_the_command_does(run, images, tmp_path, monkeypatch):
    """By what the validation images chose, unless told otherwise; and with the run's own limit of pixels."""
    file = sorted(images.glob("*/*.png"))[0]
    monkeypatch.setattr("cibl_ray.api.chosen_shift", lambda path: 0.7)
    (chosen,), (given,), (plain,) = run.predict([file]), run.predict([file], tail_shift=0.7), run.predict([file], tail_shift=0)
    assert chosen == given
    assert chosen.probabilities != plain.probabilities
    counts = load_checkpoint(run.folder / "checkpoints" / "best.safetensors").train_counts
    expected = np.array(list(plain.probabilities.values())) * (counts / counts.sum()) ** -0.7
    assert list(chosen.probabilities.values()) == pytest.approx(expected / expected.sum(), abs=1e-5)
    large = tmp_path / "large.png"
    Image.new("RGB", (8000, 8000)).save(large)
    with pytest.raises(cibl_ray.UserError, match=r"large.png' is too large: 8000x8000 pixels, 60,000,000 at most"):
        run.predict([large])


def test_export_makes_a_bundle(run, tmp_path, monkeypatch):
    monkeypatch.setattr("cibl_ray.api.chosen_shift", lambda path: 0.7)
    bundle = run.export(out=tmp_path / "bundle", provider="cpu")
    made = json.loads((bundle / "manifest.json").read_text())
    assert made["default_tail_shift"] == 0.7  # as the command does
    with pytest.raises(cibl_ray.UserError, match=r"exists; remove it, .* in Python overwrite=True replaces it"):
        run.export(out=bundle)
    with pytest.raises(cibl_ray.UserError, match=r"exists; remove it, or choose another folder \(--out, in Python out=\)$"):
        run.export(out=tmp_path)
    for wrong, message in (
        ({"precisions": ["int4"]}, "no precision 'int4'; there are: fp32, fp16, int8"),
        ({"names": "x"}, "no option 'names'; there are: calibration, embedding"),
        ({"max_drop": 200}, "max_drop = 200: a number from 0 to 100"),
        ({"target": "mips"}, "target = 'mips': one of None, 'x86'"),
    ):
        with pytest.raises(cibl_ray.UserError, match=message):
            run.export(out=bundle, overwrite=True, **wrong)
    # An export that fails leaves the bundle that was there; one that succeeds replaces it.
    with monkeypatch.context() as failing:
        failing.setattr("cibl_ray.exporting.make_bundle.TOLERANCE", -1)
        with pytest.raises(cibl_ray.UserError):
            run.export(out=bundle, overwrite=True, provider="cpu")
    assert json.loads((bundle / "manifest.json").read_text()) == made
    run.export(out=bundle, overwrite=True, tail_shift=0, provider="cpu")
    assert json.loads((bundle / "manifest.json").read_text())["default_tail_shift"] == 0
    assert [*tmp_path.iterdir()] == [bundle]


@pytest.mark.parametrize("method", ["evaluate", "predict", "export"])
@pytest.mark.parametrize("shift", ["auto", "0.5", True, [1], float("nan"), 101])
def test_a_tail_shift_is_a_number_or_none(run, images, method, shift):
    arguments = {"evaluate": [], "predict": [[next(images.glob("*/*.png"))]], "export": []}[method]
    with pytest.raises(cibl_ray.UserError, match=r"tail_shift = .*: a number from -100 to 100; in Python None takes the shift"):
        getattr(run, method)(*arguments, tail_shift=shift)
    assert not (run.folder / "bundle").exists()


def test_errors_make_sense_without_a_command_line(run, config, tmp_path):
    again = r"run folder '.*first' already exists; resume it .*open_run\('.*first'\).resume\(\)\), or .* in Python name="
    with pytest.raises(cibl_ray.UserError, match=again):
        cibl_ray.fit(config, name="first")
    for name in ("quickstart", Path("quickstart")):
        with pytest.raises(cibl_ray.UserError, match=r"fit takes a configuration, .*; give it load_config\('quickstart'\)$"):
            cibl_ray.fit(name)
    with pytest.raises(cibl_ray.UserError, match=r"fit takes a configuration, and got \{\}; give it what load_config returns"):
        cibl_ray.fit({})
    with pytest.raises(cibl_ray.UserError, match="open_run takes a folder, and got None"):
        cibl_ray.open_run(None)
    with pytest.raises(cibl_ray.UserError, match=r"settings is \['train.epochs'\]; give values by dotted name"):
        cibl_ray.load_config("quickstart", ["train.epochs"])
    with pytest.raises(cibl_ray.UserError, match=r"settings is \['train.epochs'\]; give values by dotted name"):
        run.resume(["train.epochs"])
    with pytest.raises(cibl_ray.UserError, match=r"is not a run folder: it has no config.yaml"):
        cibl_ray.open_run(tmp_path)


def test_what_is_no_run_is_told_apart(tmp_path):
    """By `open_run` and by --resume, of a run and of a sweep: what was named, and what to name in its place."""
    run, sweep, file = tmp_path / "run", tmp_path / "sweep", tmp_path / "answers.csv"
    (run / "checkpoints").mkdir(parents=True)
    sweep.mkdir()
    for path in (run / "config.yaml", run / "checkpoints" / "last.safetensors", sweep / "sweep.json", file):
        path.write_text("")
    for path, reason in (
        (tmp_path / "gone", "does not exist; name a run folder"),
        (file, "is a file; name a run folder"),
        (run / "config.yaml", f"is a file; name the run folder: {run}"),
        (run / "checkpoints" / "last.safetensors", f"is a file; name the run folder: {run}"),
        (sweep, f"is a sweep; its runs are in {sweep}/trials, and this resumes it: python -m cibl_ray.tune --resume {sweep}"),
        (tmp_path, "is not a run folder: it has no config.yaml"),
    ):
        with pytest.raises(cibl_ray.UserError) as told:
            cibl_ray.open_run(path)
        assert str(told.value) == f"{str(path)!r} {reason}"
        with pytest.raises(cibl_ray.UserError) as told:
            resumed(path, [], None)
        assert str(told.value) == f"{str(path)!r} {reason}"
    for path, reason in (
        (tmp_path / "gone", "does not exist; name a sweep folder"),
        (file, "is a file; name a sweep folder"),
        (sweep / "sweep.json", f"is a file; name the sweep folder: {sweep}"),
        (run, f"is a run; this resumes it: python -m cibl_ray.train --resume {run}"),
        (tmp_path, "is not a sweep folder: it has no sweep.json"),
    ):
        with pytest.raises(cibl_ray.UserError) as told:
            read_sweep(path)
        assert str(told.value) == f"--resume {path} {reason}"


def test_the_process_is_left_alone(config, monkeypatch, run):
    """No signal handler, no change to the logging of others, no setting of malloc, no exit; random numbers stay."""
    caught: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: caught.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in (None, "cibl_ray", "pipelines")]
    for logger in loggers:
        logger.addHandler(handler)
    handlers = [[*logger.handlers] for logger in loggers]
    levels = [logger.level for logger in loggers]

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"called with {arguments}")

    torch.manual_seed(7)
    state, threads, benchmark = torch.get_rng_state(), torch.get_num_threads(), torch.backends.cudnn.benchmark
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "exit", refuse)
            patch.setattr(hardware, "keep_freed_memory", refuse)
            patch.setattr(signal, "signal", refuse)
            again = cibl_ray.fit(config, name="again", progress=False)
        assert [[*logger.handlers] for logger in loggers] == handlers
        assert [logger.level for logger in loggers] == levels
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert any("from epoch 1 of 2" in message for message in caught)  # the program's own handlers hear the run
    assert "from epoch 1 of 2" in (again.folder / "train.log").read_text()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.backends.cudnn.benchmark == benchmark
    assert again.scores == run.scores  # the second run in one process is the first one again


def test_a_run_in_a_thread_and_resumed(config, run, capfd):
    found: list[cibl_ray.Run] = []
    one = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 1})})
    thread = threading.Thread(target=lambda: found.append(cibl_ray.fit(one, name="thread")))
    thread.start()
    thread.join()
    assert len(found[0].history) == 1
    assert "epoch 1/1" in capfd.readouterr().out
    assert found[0].resume({"train.epochs": 2}, progress=False).scores.keys() == run.scores.keys()
    assert len(found[0].history) == 2
    words = (found[0].folder / "train.log").read_text()
    assert "compared with neither" not in words
    # Another rate is taken, and told; other images are not.
    found[0].resume({"train.epochs": 3, "optimizer.lr": 0.01}, progress=False)
    told = (found[0].folder / "train.log").read_text().removeprefix(words)
    assert "from epoch 3 on the run has optimizer.lr 0.01 (it was 0.1): it can be compared with neither" in told
    for settings, message in (
        ({"data.val_fraction": 0.2}, "data.val_fraction is 0.2, and the run began with 0.1; its images cannot change"),
        ({"train.epochs": 1}, "train.epochs is 1, and 3 epochs are done"),
    ):
        with pytest.raises(cibl_ray.UserError, match=message):
            found[0].resume(settings, progress=False)
    assert len(found[0].history) == 3
    assert found[0].config.train.epochs == 3


def shown_by(cell) -> str:
    """What a cell shows, without its numbers and what it logs."""
    widget = "application/vnd.jupyter.widget-view+json"  # of progress bars
    outputs = [each for each in cell.outputs if each.get("name") != "stderr" and widget not in each.get("data", {})]
    text = "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
    return re.sub(r"\d+(\.\d+)?", "#", " ".join(text.split()))


def test_the_notebook_runs_and_shows_what_it_shows(tmp_path):
    """docs/tutorials/python.ipynb, in a Jupyter kernel: the same outputs, but for their numbers."""
    notebook = nbformat.read(REPOSITORY / "docs" / "tutorials" / "python.ipynb", 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [shown_by(cell) for cell in cells]
    assert sum(map(bool, shown)) >= 8
    # A file in the working folder goes before the shipped configuration of that name: this one trains faster.
    content = yaml.safe_load((REPOSITORY / "configs" / "quickstart.yaml").read_text())
    content["loader"] = {"kind": "torch"}
    content["data"] |= {"size": 8, "store": {"square": 8}}
    (tmp_path / "quickstart").write_text(yaml.safe_dump(content))
    setup = nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})")
    run = nbformat.v4.new_notebook(cells=[setup, *cells])
    NotebookClient(run, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [shown_by(cell) for cell in run.cells[1:]] == shown
    made = tmp_path / "runs" / "digits-python"
    assert (made / "bundle" / "manifest.json").is_file()
    # What the text says beside the outputs.
    text = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    counts = load_checkpoint(made / "checkpoints" / "last.safetensors").train_counts
    assert f"{counts[0]} images of the zero, {counts[9]} of the nine" in text
    best = re.search(r"^best \(epoch \d+\) +(\d+)", (REPOSITORY / "docs" / "tutorials" / "digits.md").read_text(), re.MULTILINE)
    assert content["train"]["epochs"] == 40
    assert f"the forty of `quickstart` reach {best[1]} % overall" in text


def test_the_tutorials_share_no_run_folder():
    """All can be run in one folder, and a notebook says what to do before it is run again."""
    names = []
    for path in sorted((REPOSITORY / "docs" / "tutorials").iterdir()):
        if path.suffix == ".ipynb":
            cells = nbformat.read(path, 4).cells
            found = re.findall(r'\bname="(.+?)"', "\n".join(cell.source for cell in cells if cell.cell_type == "code"))
            text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
            assert all("before you run this page again, remove" in text and f"`runs/{name}`" in text for name in found)
            names += found
        elif path.suffix == ".md":
            names += re.findall(r"--name ([\w-]+)", path.read_text())
    assert len(names) > 5
    assert len({*names}) == len(names)


def test_a_resume_that_trains_nothing_keeps_the_configuration(tmp_path):
    """config.yaml and train.log say what the run was trained by."""
    run = cibl_ray.open_run(small_run(tmp_path, "--epochs", "1", "--warmup_epochs", "0"))
    before = (run.folder / "config.yaml").read_bytes()
    run.resume({"optimizer.lr": 3.0}, progress=False)
    assert (run.folder / "config.yaml").read_bytes() == before
    told = (run.folder / "train.log").read_text()
    assert "all 1 epochs are done" in told
    assert "it can be compared with neither" not in told
    run.resume({"optimizer.lr": 0.01, "train.epochs": 2}, progress=False)
    assert (run.config.optimizer.lr, run.config.train.epochs) == (0.01, 2)
