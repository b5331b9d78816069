"""Outputs that cannot be written are told in one line, with the option and a fix, before any work begins."""

import os
from pathlib import Path

import pytest

from cibl_ray import evaluate, export, predict, train, tune
from cibl_ray.config import load_config, save_config
from cibl_ray.exporting import make_bundle
from pipelines import preview
from pipelines.common.errors import UserError, run_command
from pipelines.common.files import need_writable, write_atomically, write_output
from pipelines.doctor import __main__ as doctor
from pipelines.prepare import __main__ as prepare
from tests.commands import in_process

COMMANDS = {
    "train --runs": (train, "quickstart", "--runs", "{place}"),
    "train --data.prepared": (train, "quickstart", "--data.prepared", "{place}"),
    "prepare --data.prepared": (prepare, "quickstart", "--data.prepared", "{place}"),
    "preview --data.prepared": (preview, "quickstart", "--data.prepared", "{place}"),
    "tune --sweeps": (tune, "sweeps/tail_skew", "--sweeps", "{place}"),
    "doctor --out": (doctor, "quickstart", "--out", "{place}"),
    "preview --out": (preview, "quickstart", "--out", "{place}/views.png"),
    "evaluate --json": (evaluate, "gone", "--json", "{place}/scores.json"),
    "predict --out": (predict, "gone", "gone.png", "--out", "{place}/answers.csv"),
    "export --out": (export, "gone", "--out", "{place}/bundle"),
}


@pytest.fixture
def locked_folder(tmp_path, monkeypatch) -> Path:
    """A folder that may not be written, for root too."""
    folder, access = tmp_path / "locked", os.access
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))
    return folder


def told(name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(export, "checkpoint", lambda *_: Path("gone"))
    monkeypatch.setattr(export, "asked_shift", lambda *_: 0.0)
    command, *words = COMMANDS[name]
    filled = [word.format(place=place) for word in words]
    if command is train and "--runs" in filled:
        filled += ["--data.prepared", tmp_path / "prepared"]
    done = in_process(command.main, *filled, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert not (tmp_path / "prepared").exists()  # the work had not begun
    return line


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_may_not_be_written(name, locked_folder, tmp_path, monkeypatch):
    line = told(name, locked_folder, tmp_path, monkeypatch)
    assert f"{str(locked_folder)!r} cannot be written; name " in line
    assert name.split("--")[1] in line
    assert [*locked_folder.iterdir()] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_in_the_place_of_a_folder(name, tmp_path, monkeypatch):
    file = tmp_path / "answers.csv"
    file.write_text("kept")
    line = told(name, file, tmp_path, monkeypatch)
    assert str(file) in line
    assert "is not a folder; name" in line or "does not exist" in line or "in a folder that exists" in line
    assert name.split("--")[1] in line
    assert file.read_text() == "kept"


@pytest.mark.parametrize("name", ["evaluate --json", "predict --out", "preview --out"])
def test_a_file_that_is_there_is_kept(name, tmp_path, monkeypatch):
    _, *words = COMMANDS[name]
    file = Path(words[-1].format(place=tmp_path))
    file.write_text("kept")
    line = told(name, tmp_path, tmp_path, monkeypatch)
    assert line == f"error: {str(file)!r} exists; remove it, or name another file ({name.split(maxsplit=1)[1]})"
    assert file.read_text() == "kept"


def test_a_run_that_may_not_be_written_is_not_resumed(locked_folder, tmp_path):
    save_config(load_config("quickstart", []), locked_folder / "config.yaml")
    done = in_process(train.main, "--resume", locked_folder, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == (
        f"error: run folder {str(locked_folder)!r}: {str(locked_folder)!r} cannot be written; make it writable, or resume a "
        "copy of it"
    )


def test_a_name_that_no_file_can_have(tmp_path):
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(UserError, match="--out: .*; name another"):
            need_writable(tmp_path / name / "b", "--out", "name another")
    need_writable(tmp_path / "new" / "folder", "--out", "name another")
    assert [*tmp_path.iterdir()] == []


def test_an_error_of_the_disk_names_the_file_that_the_user_knows(tmp_path, capsys):
    """Wherever it is raised, in one line with a fix: not the name of an exception, nor of a half-written file."""
    (tmp_path / "a file").write_text("")
    for act, reason in (
        (lambda: write_atomically(tmp_path / "a file" / "b", "text"), "Not a directory; name another place"),
        (lambda: (tmp_path / "gone" / "b.part").open("w"), "No such file or directory; check the name"),
    ):
        with pytest.raises(SystemExit) as ended:
            run_command(act)
        line = capsys.readouterr().err
        assert ended.value.code == 2
        assert line.startswith("error: '/")
        assert line.endswith(f"/b' cannot be used: {reason}\n")


def test_a_full_disk_names_the_file(tmp_path, capsys):
    (tmp_path / "file.part").symlink_to("/dev/full")
    with pytest.raises(SystemExit):
        run_command(lambda: write_atomically(tmp_path / "file", "text"))
    assert capsys.readouterr().err == (
        f"error: {str(tmp_path / 'file')!r} cannot be used: No space left on device; free some of the disk, or name another "
        "place\n"
    )


def test_a_device_is_written_to_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_output(pipe, b"answers", "--out")
    assert os.read(reader, 100) == b"answers"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_bundle_needs_its_place_first(locked_folder):
    with pytest.raises(UserError, match=r"cannot be written; name another folder \(--out\)"):
        make_bundle.make_bundle(Path("gone"), locked_folder / "bundle", make_bundle.Options())
