"""Files that are whole or not there, and locks."""

import errno
import fcntl
import multiprocessing
import time

import pytest

from pipelines.common.errors import UserError
from pipelines.common.files import locked, write_atomically


@pytest.mark.parametrize(
    ("content", "expected"),
    [("λ\n", "λ\n".encode()), (b"\x00\r\n", b"\x00\r\n"), (lambda file: file.write(b"ab"), b"ab")],
)
def test_what_is_written(tmp_path, content, expected):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    write_atomically(path, content)
    assert path.read_bytes() == expected
    assert [*tmp_path.iterdir()] == [path]


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    (tmp_path / "file.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "after")
    assert path.read_bytes() == b"before"
    assert [*tmp_path.iterdir()] == [path]


def test_what_a_killed_process_left_is_written_over(tmp_path):
    (tmp_path / "file.part").write_bytes(b"half of somethi")
    write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _hold(path, ready, seconds):
    with locked(path):
        ready.set()
        time.sleep(seconds)


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / ".lock"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(path, ready, 1.5))
    holder.start()
    try:
        assert ready.wait(60)
        with pytest.raises(UserError, match="already here"), locked(path, 0, "already here"):
            pass
        with locked(path, patience=60):  # waits for the other's end
            pass
    finally:
        holder.join()
    assert holder.exitcode == 0


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_worked_on_with_a_warning(tmp_path, monkeypatch, caplog, code):
    def refuse(file, operation):
        raise OSError(code, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for patience in (None, 0):
        caplog.clear()
        with locked(tmp_path / ".lock", patience):
            pass
        assert "has no locks" in caplog.text


def test_another_failure_of_the_lock_is_an_error(tmp_path, monkeypatch):
    def fail(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path / ".lock"):
        pass
