"""Writing files so that a kill or a full disk leaves no half of one, and locks between processes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pipelines.common.errors import UserError

log = logging.getLogger(__name__)

# What flock says on file systems that have no locks: some mounts of Lustre and NFS.
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}


def write_atomically(path: Path, content: str | bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file that appears under its name only when it is whole and on the disk; until then the old one stays.

    One process at a time may write a file: where several could, hold `locked`.

    Args:
        path: The file. Its folder must exist.
        content: Text (written as UTF-8), bytes, or a function that writes to an open binary file.

    Raises:
        OSError: The disk is full or cannot be written. The old file is unchanged and nothing else is left.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.errno and error.filename in (None, str(part)):
            error.filename = str(path)  # the name that the user knows; a full disk names none
        raise
    finally:
        part.unlink(missing_ok=True)


def need_writable(folder: Path, what: str, fix: str) -> None:
    """Check that a folder can be written, or made where it is missing. Called before the work whose result goes there.

    Args:
        folder: The folder.
        what: The value and its place, as the message begins ("--out report").
        fix: What to do, as the message ends.

    Raises:
        UserError: It cannot, or a file stands in its way.
    """
    there = folder.absolute()
    while True:
        try:
            os.lstat(there)
            break
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            there = there.parent
        except (OSError, ValueError) as error:  # a name too long, or with a NUL
            raise UserError(f"{what}: {getattr(error, 'strerror', error)}; {fix}") from error
    if not there.is_dir():
        raise UserError(f"{what}: {str(there)!r} is not a folder; {fix}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{what}: {str(there)!r} cannot be written; {fix}")


def need_writable_file(path: Path, option: str, example: str) -> None:
    """Check that a new file can be written that an option names. Called before the work whose result goes there.

    Args:
        path: The file.
        option: The option (`--out`).
        example: A fitting name, for the message.

    Raises:
        UserError: It exists, its folder is missing, or it cannot be written. A device or a pipe may exist.
    """
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: the folder {str(path.parent)!r} does not exist")
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file in it: {option} {path / example}")
    if path.is_file():
        raise UserError(f"{str(path)!r} exists; remove it, or name another file ({option})")
    if not _is_device(path):
        need_writable(path.parent, f"{option} {path}", "name a file in another folder")


def write_output(path: Path, content: bytes, option: str) -> None:
    """Write a file that an option names.

    Args:
        path: The file. A device or a pipe is written to; any other file appears when it is whole.
        content: Of the file.
        option: The option, for the message.

    Raises:
        UserError: It cannot be written.
    """
    try:
        if _is_device(path):
            path.write_bytes(content)
        else:
            write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}); name another file") from error


def _is_device(path: Path) -> bool:
    """Whether `path` is there and is no plain file: /dev/stdout must not be replaced."""
    return path.exists() and not path.is_file()


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def locked(
    path: Path, patience: float | None = None, busy: str = "", waiting: str = "", say: Callable[[str], object] = _to_stderr
) -> Iterator[None]:
    """Hold a lock that only one process has at a time. It ends with its process, however that ends.

    On a file system without locks the work continues without one, with a warning.

    Args:
        path: The lock file; made where it is missing.
        patience: Seconds to wait for another process; None waits for as long as it takes.
        busy: The message of the error.
        waiting: What is said, once, where another process holds the lock.
        say: Says it; by default on standard error.

    Raises:
        UserError: Another process still holds the lock after `patience` seconds.
    """
    deadline = None if patience is None else time.monotonic() + patience
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if deadline is None and not waiting else fcntl.LOCK_NB))
                break
            except BlockingIOError as error:
                if waiting:
                    say(waiting)
                    waiting = ""
                    continue
                if deadline is not None and time.monotonic() >= deadline:
                    raise UserError(busy or f"another process holds {str(path)!r}; wait for it, or end it") from error
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                log.warning("%s: this file system has no locks; do not work in this folder twice at once", path.parent)
                break
        yield
