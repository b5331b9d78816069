"""How rank 0's progress comes to the driver, on whatever node each is: notes, lines of JSON on a connection of their own.

(An actor of Ray's would do; but its process wakes a hundred times a second, on the cores that train.)
"""

from __future__ import annotations

import errno
import hmac
import json
import logging
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from cibl_ray.run.progress import Lines, Progress

Note = tuple[str, Any]

_LONGEST = 1 << 20  # bytes of a note
_LONGEST_TEXT = 1 << 16  # characters of a line, or of a traceback, whose end says most
_PATIENCE = 10.0  # seconds for a driver to take a note; training goes on without it
_AGAIN = 30.0  # seconds before a driver that was lost is tried again
_STRANGERS = threading.BoundedSemaphore(16)  # connections at a time that have not told the secret yet


@dataclass(frozen=True)
class Address:
    """Where the driver listens, and the secret that it wants to hear first."""

    host: str
    port: int
    token: str


class Posted:
    """`Progress` of a worker: notes for the driver, images twice a second at most. A driver that is gone stops nothing."""

    def __init__(self, address: Address) -> None:
        self._address, self._images, self._told = address, 0, 0.0
        self._connection: socket.socket | None = None
        self._lost: float | None = None  # when the driver did not answer
        self._lock = threading.Lock()  # log messages come from any thread

    def begin(self, total: int, done: int) -> None:
        self._post("begin", (total, done))

    def advance(self, images: int) -> None:
        self._images += images
        if time.monotonic() - self._told >= 0.5:
            self._tell_images()

    def epoch(self, row: dict[str, Any], text: str) -> None:
        self._post("epoch", (row, text))

    def line(self, text: str) -> None:
        self._post("line", text[-_LONGEST_TEXT:])

    def error(self, text: str) -> None:
        """For the terminal's error stream."""
        self._post("error", text[-_LONGEST_TEXT:])

    def close(self) -> None:
        self._tell_images()

    def log_handler(self) -> logging.Handler:
        return Lines(self)

    def finish(self) -> None:
        """Return when the driver has read all."""
        with self._lock, suppress(OSError):
            if self._connection is not None:
                self._connection.shutdown(socket.SHUT_WR)
                self._connection.recv(1)
                self._connection.close()

    def _tell_images(self) -> None:
        self._post("advance", self._images)
        self._images, self._told = 0, time.monotonic()

    def _post(self, kind: str, content: Any) -> None:
        with self._lock:
            if self._lost is not None and time.monotonic() - self._lost < _AGAIN:
                return
            try:
                if self._connection is None:
                    self._connection = socket.create_connection((self._address.host, self._address.port), timeout=_PATIENCE)
                    self._connection.sendall(self._address.token.encode() + b"\n")
                self._connection.sendall(json.dumps([kind, content]).encode() + b"\n")
                self._lost = None
            except OSError:
                self._lost = time.monotonic()
                if self._connection is not None:
                    self._connection.close()
                self._connection = None


@contextmanager
def shown(host: str, progress: Progress, waits: Callable[[], str | None]) -> Iterator[Address]:
    """Listen at an address of this node, and tell `progress` what arrives; every ten silent seconds also what `waits` says,
    where that is news."""
    arrived: queue.SimpleQueue[Note | None] = queue.SimpleQueue()
    failed: list[BaseException] = []

    def watch() -> None:
        try:
            show()
        except BaseException as error:
            failed.append(error)

    def show() -> None:
        told = None
        while True:
            try:
                note = arrived.get(timeout=10)
            except queue.Empty:
                if (text := waits()) not in (None, told):
                    told = text
                    progress.line(text)
                continue
            if note is None:
                return
            told = None
            _tell(progress, note)

    with _server(host) as server:
        address = Address(host, server.getsockname()[1], secrets.token_hex(16))
        threading.Thread(target=_listen, args=(server, address.token, arrived), daemon=True).start()
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield address
        finally:
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept(), which closing alone does not
            arrived.put(None)
            thread.join(timeout=10)
            progress.close()
    if failed:
        raise failed[0]


def _server(host: str) -> socket.socket:
    """On any port of this node's own address; where that is one that others know it by alone, on all it has."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, 0), family=family)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return socket.create_server(("", 0), family=family)


def _listen(server: socket.socket, token: str, arrived: queue.SimpleQueue[Note | None]) -> None:
    while True:
        _STRANGERS.acquire()
        try:
            connection, _ = server.accept()
        except OSError as error:
            _STRANGERS.release()
            if error.errno in (errno.EINVAL, errno.EBADF):  # shut down: all is over
                return
            time.sleep(0.1)  # no file handle is free, or who called is gone
            continue
        threading.Thread(target=_read, args=(connection, token, arrived), daemon=True).start()


def _read(connection: socket.socket, token: str, arrived: queue.SimpleQueue[Note | None]) -> None:
    """One worker's notes, until it ends them; nothing from whom does not know the secret."""
    with connection, suppress(OSError):
        try:
            known = _knows(connection, token)
        finally:
            _STRANGERS.release()
        if not known:
            return
        connection.settimeout(None)
        with connection.makefile("rb") as lines:
            while line := lines.readline(_LONGEST):
                with suppress(ValueError):  # cut short, as its writer was
                    kind, content = json.loads(line)
                    arrived.put((kind, content))


def _knows(connection: socket.socket, token: str) -> bool:
    """Whether the secret comes first, and soon."""
    deadline, wanted, said = time.monotonic() + _PATIENCE, token.encode() + b"\n", b""
    while len(said) < len(wanted) and (left := deadline - time.monotonic()) > 0:
        connection.settimeout(left)
        more = connection.recv(len(wanted) - len(said))
        if not more:
            return False
        said += more
    return hmac.compare_digest(said, wanted)


def _tell(progress: Progress, note: Note) -> None:
    kind, content = note
    match kind:
        case "begin":
            progress.close()
            progress.begin(*content)
        case "advance":
            progress.advance(content)
        case "epoch":
            progress.epoch(*content)
        case "line":
            progress.line(content)
        case "error":
            print(content, file=sys.stderr)
