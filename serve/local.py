"""`python -m serve` on this machine: HAProxy in front, and a Ray cluster of its own with the replicas.

    this process ── HAProxy                      listens for clients
                 └─ serve.cluster ── Ray ── replicas, each on a Unix socket that HAProxy knows

Both children have sessions of their own, so a signal to this process's group reaches this process alone, which ends them in
order. Both end with this process, however it ends. All files are in one private folder, which goes at the end.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pipelines.common.errors import UserError
from serve.haproxy import HAProxy
from serve.settings import check

ANNOUNCE, ANSWER = 1.0, 5.0  # seconds of 503 before the listener closes; seconds for what was asked before
_END = 3.0  # seconds for Ray to end
_PREFIX = "cibl-serve-"


class LocalService:
    """A service that runs. `problem` says why it does not any more."""

    def __init__(self, folder: Path, args: dict[str, Any], host: str, port: int, cpus: int | None) -> None:
        """Start HAProxy and Ray. `deploy` starts the replicas.

        Args:
            folder: Private to the service.
            args: Field names of `ServiceConfig` with their values.
            host: The name or address to listen on.
            port: The port.
            cpus: How many CPUs Ray may count on; None: as many as the replicas ask for.

        Raises:
            UserError: A setting is wrong, or HAProxy does not start.
        """
        config = check(args)
        self._folder = folder
        self._told: set[str] = set()
        self._ending = False
        self._failed = 0
        self.problem: str | None = None
        most = max(config.max_replicas or 0, config.replicas) * (config.threads or 1)
        (folder / "metrics").mkdir()
        self._front = HAProxy(folder, config, host, port)
        try:
            # Replicas share cores where there are more of them than cores.
            self._ray = _Cluster(folder, cpus or max(len(os.sched_getaffinity(0)), most) + 1)
        except BaseException:
            self._front.kill()
            raise

    def deploy(self, args: dict[str, Any], cancelled: threading.Event | None = None) -> None:
        """Serve by these settings, in place of those before. Ports and limits on connections stay as they were.

        Args:
            args: Field names of `ServiceConfig` with their values.
            cancelled: Ends the waiting.

        Raises:
            UserError: A setting is wrong, or a replica does not start.
        """
        check(args)
        self._ray.send(args)
        while (answer := self._ray.answer(0.1)) is None:
            if self.problem is None and (reasons := self._failures()):
                raise UserError(f"the service did not start: {reasons[0]}")
            if not self._ray.alive:
                raise UserError(f"the service did not start: {self._ray.complaint()}")
            if cancelled is not None and cancelled.is_set():
                return
        if not answer["ok"]:
            raise UserError(f"the service did not start: {[*self._failures(), answer['error']][0]}")

    def watch(self) -> None:
        """Keep the service alive until `end`: call it in a thread."""
        while not self._ending:
            for failure in self._failures():
                print(f"error: a replica does not start: {failure}", file=sys.stderr)
            if not self._ray.alive and not self._ending:
                self.problem = f"Ray has ended: {self._ray.complaint()}"
                return
            try:
                if not self._ending and self._front.watch():
                    print("warning: HAProxy had ended, and was started again", file=sys.stderr)
            except UserError as error:
                self.problem = str(error)
                return
            time.sleep(0.5)

    def _failures(self) -> list[str]:
        """Why replicas did not start, since the last call, each text once. Their warnings are printed."""
        found = []
        for path in self._folder.glob("message-*[0-9]"):
            with suppress(OSError, ValueError):
                text = json.loads(path.read_text())
                path.unlink()
                warning = text.startswith("warning")
                if not warning:
                    self._failed += 1
                    self._front.count_failed(self._failed)
                if text in self._told:
                    continue
                self._told.add(text)
                if warning:
                    print(text, file=sys.stderr)
                else:
                    found.append(text)
        return found

    def end(self) -> None:
        """Answer what was asked, refuse what is new, then end all processes: within ten seconds."""
        self._ending = True
        self._front.stop(ANSWER, ANNOUNCE)
        self._ray.end()

    def kill(self) -> None:
        """End all processes at once."""
        self._ending = True
        self._front.kill()
        self._ray.end()


@contextmanager
def running(
    args: dict[str, Any], host: str, port: int, cpus: int | None = None, cancelled: threading.Event | None = None
) -> Iterator[LocalService]:
    """Serve until the end of the block, and then answer what was asked before.

    Args:
        args: Field names of `ServiceConfig` with their values.
        host: The name or address to listen on.
        port: The port.
        cpus: How many CPUs Ray may count on; None: as many as the replicas ask for.
        cancelled: Ends a start that is not over.

    Yields:
        The service.

    Raises:
        UserError: A setting is wrong, or the service does not start.
    """
    with private_folder() as folder:
        service = LocalService(folder, args, host, port, cpus)
        try:
            service.deploy(args, cancelled)
            threading.Thread(target=service.watch, daemon=True).start()
            yield service
        except BaseException:
            service.kill()
            raise
        service.end()


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder that this user alone can read, removed at the end. Folders of services that were killed are removed, too.

    Raises:
        UserError: There is no place for it.
    """
    # A short name: the path of a socket in it may have 107 bytes.
    top = Path(tempfile.gettempdir())
    if len(str(top)) > 30:
        top = Path("/tmp")  # noqa: S108  # the folder in it has a random name
    for old in top.glob(f"{_PREFIX}*"):
        with suppress(OSError), (old / "lock").open() as lock:
            if old.stat().st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=top))  # mode 700
    except OSError as error:
        raise UserError(f"{str(top)!r}: {error.strerror}; name a folder that can be written to: TMPDIR=FOLDER") from error
    try:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Cluster:
    """`python -m serve.cluster` as a child."""

    def __init__(self, folder: Path, cpus: int) -> None:
        self._log = folder / "ray.log"
        top = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [top, os.environ.get("PYTHONPATH")]))
        ours, theirs = os.pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "serve.cluster", str(folder), str(theirs)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
                pass_fds=(theirs,),
                start_new_session=True,
            )
        os.close(theirs)
        self._answers = os.fdopen(ours, "rb", buffering=0)
        self._unread = b""
        self.send(cpus)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, order: object) -> None:
        with suppress(OSError):  # it has ended, as `alive` reports
            stdin: IO[bytes] = self._process.stdin  # type: ignore[assignment]
            stdin.write(json.dumps(order).encode() + b"\n")
            stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next answer, if it comes in time."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            if selector.select(seconds):
                self._unread += self._answers.read(1 << 16) or b""
        line, end, rest = self._unread.partition(b"\n")
        if not end:
            if not self.alive:
                time.sleep(seconds)
            return None
        self._unread = rest
        return dict(json.loads(line))

    def complaint(self) -> str:
        """Why it has ended: the last line of its log, which is kept."""
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["it says nothing"]
        with suppress(OSError):
            descriptor, kept = tempfile.mkstemp(prefix="cibl-serve-log-", suffix=".txt")
            os.close(descriptor)
            shutil.copyfile(self._log, kept)
            return f"{lines[-1]} (the whole log: {kept})"
        return lines[-1]

    def end(self) -> None:
        """End it and all of its processes."""
        family = _descendants(self._process.pid)
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]  # it ends by itself
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END)
        self._process.kill()
        self._process.wait()
        for process in family:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        self._answers.close()


def _descendants(process: int) -> list[int]:
    """All children of a process, and theirs."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, fresh = [], [process]
    while fresh:
        fresh = [child for child, parent in parents.items() if parent in fresh]
        found += fresh
    return found
