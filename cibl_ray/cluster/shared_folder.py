"""Whether the nodes of a cluster see the folder in which the driver keeps a run."""

from __future__ import annotations

import fcntl
import glob
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.common.errors import UserError


@contextmanager
def mark_beside(folder: Path, storage: str | None) -> Iterator[str | None]:
    """Keep a file beside the run folder while the run lasts. A worker that sees it shares the folder with this node.

    The file is locked. A file without a lock was left by a driver that was killed, and is removed.

    Args:
        folder: The run folder.
        storage: The store that keeps the run; None: there is none.

    Yields:
        The path of the file; None where a store keeps the run.
    """
    if storage is not None:
        yield None
        return
    mark = folder.parent / ".ray" / f"{folder.name}.{secrets.token_hex(8)}.mark"
    mark.parent.mkdir(parents=True, exist_ok=True)
    for left in mark.parent.glob(f"{glob.escape(folder.name)}.{16 * '[0-9a-f]'}.mark"):
        with suppress(OSError), left.open() as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
    with mark.open("w") as held:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        try:
            yield str(mark)
        finally:
            mark.unlink(missing_ok=True)
            with suppress(OSError):
                mark.parent.rmdir()  # where nothing else is in it


def same_folder(folder: Path, mark: str | None, option: str = "--runs") -> None:
    """Check that this node sees the driver's files: a run that begins here would otherwise be lost with the node.

    Args:
        folder: The run or sweep folder.
        mark: The mark that the driver made beside it; None: there is none to look for.
        option: The option that names the folder's place, for the error.

    Raises:
        UserError: It does not see them.
    """
    if mark is not None and not Path(mark).exists():
        raise UserError(
            f"{socket.gethostname()} does not see {str(folder.parent)!r} as the driver does; give {option} a folder that all "
            f"nodes share{', or --storage URI' if option == '--runs' else ''}"
        )
