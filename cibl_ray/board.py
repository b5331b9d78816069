"""How rank 0's progress comes to the driver, on whatever node each is: notes, lines of JSON on a connection of their own.

(An actor of Ray's would do; but its process wakes a hundred times a second, on the cores that train.)
"""

from __future__ import annotations

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

from cibl_ray.progress import Lines, Progress

Note = tuple[str, Any]

_LONGEST = 1 << 20  # bytes of a note: a traceback, a row of the log
_PATIENCE = 10.0  # seconds for a driver to take a note; training goes on without it


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
        self._gone = False
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
        self._post("line", text)

    def error(self, text: str) -> None:
        """For the terminal's error stream."""
        self._post("error", text)

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
            if self._gone:
                return
            try:
                if self._connection is None:
                    self._connection = socket.create_connection((self._address.host, self._address.port), timeout=_PATIENCE)
                    self._connection.sendall(self._address.token.encode() + b"\n")
                self._connection.sendall(json.dumps([kind, content]).encode() + b"\n")
            except OSError:
                self._gone = True


@contextmanager
def shown(host: str, progress: Progress, waits: Callable[[], str | None]) -> Iterator[Address]:
    """Listen at an address of this node, and tell `progress` what arrives; after ten silent seconds also what `waits` says."""
    arrived: queue.SimpleQueue[Note | None] = queue.SimpleQueue()
    failed: list[BaseException] = []

    def watch() -> None:
        try:
            show()
        except BaseException as error:
            failed.append(error)

    def show() -> None:
        asked = False
        while True:
            try:
                note = arrived.get(timeout=None if asked else 10)
            except queue.Empty:
                if (text := waits()) is not None:
                    asked = True
                    progress.line(text)
                continue
            if note is None:
                return
            asked = False
            _tell(progress, note)

    with socket.create_server((host, 0)) as server:
        address = Address(host, server.getsockname()[1], secrets.token_hex(16))
        threading.Thread(target=_listen, args=(server, address.token, arrived), daemon=True).start()
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield address
        finally:
            arrived.put(None)
            thread.join(timeout=10)
            progress.close()
    if failed:
        raise failed[0]


def _listen(server: socket.socket, token: str, arrived: queue.SimpleQueue[Note | None]) -> None:
    with suppress(OSError):  # the server was closed: all is over
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_read, args=(connection, token, arrived), daemon=True).start()


def _read(connection: socket.socket, token: str, arrived: queue.SimpleQueue[Note | None]) -> None:
    """One worker's notes, until it ends them; nothing from whom does not know the secret."""
    with connection, connection.makefile("rb") as lines, suppress(OSError, ValueError):
        connection.settimeout(_PATIENCE)
        if not hmac.compare_digest(lines.readline(len(token) + 1), token.encode() + b"\n"):
            return
        connection.settimeout(None)
        while line := lines.readline(_LONGEST):
            kind, content = json.loads(line)
            arrived.put((kind, content))


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
