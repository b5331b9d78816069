"""Every file of a run folder, damaged in every way: the run resumes right, or one line says what is wrong. Nothing is lost."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cibl_ray
from cibl_ray.run.checkpoint import load_checkpoint, save_checkpoint
from cibl_ray.run.progress import Silent
from cibl_ray.run.shift import chosen_shift
from cibl_ray.run.which import checkpoint
from cibl_ray.training.fit import fit
from cibl_ray.world import World
from pipelines.common.errors import Interrupted

LAST, PREVIOUS, BEST = (f"checkpoints/{name}.safetensors" for name in ("last", "previous", "best"))
PICTURES = "accuracy_by_class.png class_counts.png learning_curves.png"
BINARY = bytes(range(256)) * 4
Damage = Callable[[Path], None]


class StopAfter(Silent):
    """Ctrl-C when an epoch is done and saved."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def epoch(self, row, text):
        if row["epoch"] == self._epoch:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    settings = {
        "runs": folder / "runs",
        "data.prepared": str(folder / "prepared"),
        "data.profile": {"kind": "exp", "imbalance": 2, "largest": 8},
        "data.views": [{"cut": {"kind": "crop", "padding": 2}}],
        "data.val_fraction": 0.2,
        "loss": {"kind": "cross_entropy"},
        "schedule.warmup_epochs": 0,
        "train.epochs": 3,
        "train.batch_size": 16,
        "train.precision": "fp32",
        "train.device": "cpu",
        "loader.kind": "torch",
    }
    return cibl_ray.load_config("quickstart", settings)


@pytest.fixture(scope="module")
def whole(config) -> cibl_ray.Run:
    """A run of three epochs that nothing happened to."""
    return cibl_ray.fit(config, name="whole", progress=False)


@pytest.fixture(scope="module")
def stopped(config) -> Path:
    """The same run, stopped after its second epoch; it has been finished once, after the first, so it has every file."""
    folder = config.runs / "stopped"
    first = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 2})})
    with pytest.raises(Interrupted):
        fit(config, folder, False, World(), StopAfter(2))
    shutil.copytree(cibl_ray.fit(first, name="short", progress=False).folder, folder.parent / "finished")
    for path in (folder.parent / "finished").iterdir():
        if not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)
    return folder


def missing(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut(path: Path) -> None:
    """Without its last bytes."""
    path.write_bytes(path.read_bytes()[:-9])


def cut_at_a_line(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def binary(path: Path) -> None:
    path.write_bytes(BINARY)


def in_place_of_a_file(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "mine.txt").write_text("mine")


def in_place_of_a_folder(path: Path) -> None:
    """In the place of a folder."""
    shutil.rmtree(path)
    path.write_text("mine")


def loop(path: Path) -> None:
    """A link to itself: it cannot be read, nor written."""
    missing(path)
    path.symlink_to(path.name)


def foreign(path: Path) -> None:
    path.write_text('{"epoch": "one", "train": []}\n[1, 2]\n')


def torn(path: Path) -> None:
    """A line in the middle is cut, as after a crash of the machine between two writes."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0][:30] + b"\n" + b"".join(lines[1:]))


def flipped(path: Path) -> None:
    """One bit of a tensor is another."""
    content = bytearray(path.read_bytes())
    content[-1000] ^= 16
    path.write_bytes(bytes(content))


def another_run(path: Path) -> None:
    """A whole checkpoint of another architecture."""
    checkpoint = load_checkpoint(path)
    weights = {name: tensor for name, tensor in checkpoint.weights.items() if not name.startswith("head.")}
    object.__setattr__(checkpoint, "weights", weights)
    save_checkpoint(path, checkpoint)


def foreign_tensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, path)


ANY_FILE = (missing, empty, half, cut, binary, in_place_of_a_file, loop, foreign)
# The file, how it is damaged, and what the log says, or how the resume is refused.
CASES: list[tuple[str, Damage, str]] = [
    *(("config.yaml", damage, "the configuration of the last checkpoint is used") for damage in (*ANY_FILE, cut_at_a_line)),
    *(
        ("metrics.jsonl", damage, "2 epochs are written again from the last checkpoint")
        for damage in (*ANY_FILE, cut_at_a_line, torn)
    ),
    *((LAST, damage, "resuming from the one before, after epoch 1") for damage in (*ANY_FILE, flipped, foreign_tensors)),
    (LAST, another_run, "error: the checkpoint is of another architecture"),
    *((BEST, damage, "") for damage in (*ANY_FILE, flipped, foreign_tensors, another_run)),
    *((f"result.json {PREVIOUS} train.log {PICTURES}", damage, "") for damage in ANY_FILE),
    ("tensorboard", missing, ""),
    ("tensorboard", in_place_of_a_folder, "tensorboard is not a folder"),
    ("tensorboard", loop, "tensorboard is not a folder"),
    (".lock", missing, ""),
    (".lock", binary, ""),
    (".lock", in_place_of_a_file, ".lock is not a file"),
    ("checkpoints", missing, "training begins at epoch 1"),
    ("checkpoints", in_place_of_a_folder, "training begins at epoch 1"),
    ("checkpoints", loop, "error: .* is a link to 'checkpoints', which is not there"),
]


@pytest.mark.parametrize(
    ("names", "damage", "says"), CASES, ids=[f"{names.split()[0]}-{damage.__name__}" for names, damage, _ in CASES]
)
def test_a_damaged_run_resumes(whole, stopped, tmp_path, caplog, monkeypatch, names, damage, says):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    for name in names.split():
        damage(folder / name)
    mine = {name: content(folder / name) for name in names.split()}
    use(cibl_ray.open_run(folder), whole, evaluate=names.startswith("checkpoints"))
    caplog.clear()
    if says.startswith("error: "):
        with pytest.raises(cibl_ray.UserError, match=says.removeprefix("error: ")) as refused:
            cibl_ray.open_run(folder).resume(progress=False)
        assert "\n" not in str(refused.value)
        assert {name: content(folder / name) for name in mine} == mine
        return
    if PICTURES not in names:  # they take longest
        for module in ("cibl_ray.evaluation.pictures.save", "pipelines.prepare.pictures.save"):
            monkeypatch.setattr(module, lambda figure, path: path.write_text("a picture"))
    with caplog.at_level(logging.INFO):
        resumed = cibl_ray.open_run(folder).resume(progress=False)
    assert says in caplog.text
    last, expected = (load_checkpoint(run.folder / LAST) for run in (resumed, whole))
    for part in ("weights", "optimizer"):
        ours, theirs = getattr(last, part), getattr(expected, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert numbers(resumed.history) == numbers(whole.history)
    assert numbers(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())) == numbers(whole.history)
    assert resumed.result["last"] == whole.result["last"]
    assert resumed.result.get("best", whole.result["best"]) == whole.result["best"]
    assert "best" in resumed.result or names == BEST
    assert resumed.config == whole.config
    for name in ("config.yaml", "metrics.jsonl", "result.json", "train.log", *PICTURES.split(), LAST, PREVIOUS):
        assert (folder / name).is_file()
        assert not (folder / name).is_symlink()
    for name, held in mine.items():
        if held is not None and (name in KEPT or isinstance(held, dict | Path) or damage is in_place_of_a_folder):
            assert held in [content(path) for path in (folder / name).parent.iterdir()]
            assert f"is kept as {(folder / name).with_name(Path(name).name)}.old" in caplog.text


def test_a_checkpoint_of_an_earlier_version_has_no_rows(whole, stopped, tmp_path, caplog):
    """Then the lines of the log that can be read are kept, and the file beside."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    for name in (LAST, PREVIOUS):
        save_checkpoint(folder / name, replace(load_checkpoint(folder / name), rows=None))
    torn(folder / "metrics.jsonl")
    before = (folder / "metrics.jsonl").read_bytes()
    resumed = cibl_ray.open_run(folder).resume(progress=False)
    assert numbers(resumed.history) == numbers(whole.history)[1:]
    assert resumed.result["last"] == whole.result["last"]
    assert (folder / "metrics.jsonl.old").read_bytes() == before
    assert "1 epoch is written again from the lines of it that can be read; it is kept as" in caplog.text


def test_a_best_checkpoint_that_is_gone_is_not_replaced_by_the_last_in_silence(whole, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    (folder / BEST).unlink()
    assert checkpoint(folder) == folder / LAST
    assert f"best.safetensors is missing (epoch {whole.result['best']['epoch']} was the best)" in caplog.text
    with pytest.raises(cibl_ray.UserError, match=r"has no best checkpoint; take .*last.safetensors, of epoch 3"):
        checkpoint(folder, "best")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(cibl_ray.UserError, match="has no checkpoint left; resuming it .--resume .* trains again from epoch 1"):
        checkpoint(folder)


def test_a_result_that_cannot_be_read_has_no_tail_shift(whole, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    assert chosen_shift(folder / BEST) == whole.result["best"]["tail_shift"]["shift"]
    assert not caplog.text
    for damage in (binary, foreign, in_place_of_a_file):
        damage(folder / "result.json")
        caplog.clear()
        assert chosen_shift(folder / BEST) == 0
        assert "the tail shift is 0:" in caplog.text
        with pytest.raises(cibl_ray.UserError, match="resume the run to write it again"):
            _ = cibl_ray.open_run(folder).scores


KEPT = {"config.yaml", "metrics.jsonl", LAST}  # their damaged files are looked at by people


def content(path: Path) -> object:
    """What a file, a link or a folder holds; None where nothing is there."""
    if path.is_symlink():
        return path.readlink()
    if path.is_dir():
        return {each.name: content(each) for each in path.iterdir()}
    return path.read_bytes() if path.exists() else None


def numbers(rows) -> list[tuple]:
    """What is the same in every repetition of a run."""
    return [(row["epoch"], row["train"], row["val"]) for row in rows]


def use(run: cibl_ray.Run, whole: cibl_ray.Run, evaluate: bool) -> None:
    """Open, evaluate and read a damaged run: the right value, or one line."""
    values: list[tuple[Callable[[], object], list]] = [
        (lambda: run.config, [whole.config]),
        (lambda: numbers(run.history), [numbers(whole.history)[:2], []]),
        (lambda: run.scores, SCORES),
    ]
    if evaluate:
        values += [(run.evaluate, SCORES), (lambda: run.evaluate(checkpoint="last"), SCORES)]
    for value, right in values:
        outcome = answer(value)
        assert outcome in right or (isinstance(outcome, str) and "\n" not in outcome)


def answer(value: Callable[[], object]) -> object:
    """What `value` returns, or the message of its refusal."""
    try:
        return value()
    except cibl_ray.UserError as error:
        return str(error)


SCORES: list[dict[str, float]] = []  # of the run's checkpoints, before anything is damaged


@pytest.fixture(scope="module", autouse=True)
def scores(stopped) -> None:
    run = cibl_ray.open_run(stopped)
    SCORES[:] = [run.evaluate(checkpoint="last"), run.evaluate(checkpoint="best")]
    SCORES.append(run.scores)
