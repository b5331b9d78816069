"""How rank 0's progress comes to the driver, on whatever node each is: notes on a board."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from cibl_ray.progress import Lines, Progress


@ray.remote(num_cpus=0, max_restarts=-1)
class Board:
    """Where rank 0 leaves what is to be shown, and the driver fetches it."""

    def __init__(self) -> None:
        self._notes: list[tuple[str, Any]] = []

    def post(self, notes: list[tuple[str, Any]]) -> None:
        self._notes += notes

    def take(self) -> list[tuple[str, Any]]:
        notes, self._notes = self._notes, []
        return notes


class Posted:
    """`Progress` of a worker: notes for the board, images twice a second at most."""

    def __init__(self, board: Any) -> None:
        self._board, self._images, self._told = board, 0, 0.0

    def begin(self, total: int, done: int) -> None:
        self._board.post.remote([("begin", (total, done))])

    def advance(self, images: int) -> None:
        self._images += images
        if time.monotonic() - self._told >= 0.5:
            self._tell_images()

    def epoch(self, row: dict[str, Any], text: str) -> None:
        self._board.post.remote([("epoch", (row, text))])

    def line(self, text: str) -> None:
        self._board.post.remote([("line", text)])

    def close(self) -> None:
        self._tell_images()

    def log_handler(self) -> logging.Handler:
        return Lines(self)

    def _tell_images(self) -> None:
        self._board.post.remote([("advance", self._images)])
        self._images, self._told = 0, time.monotonic()


@contextmanager
def shown(board: Any, progress: Progress, waits: Callable[[], str | None]) -> Iterator[None]:
    """Tell `progress` what arrives on the board; after ten silent seconds also what `waits` says, if anything."""
    ended = threading.Event()
    failed: list[BaseException] = []

    def watch() -> None:
        try:
            show()
        except BaseException as error:
            failed.append(error)

    def show() -> None:
        heard, asked = time.monotonic(), False
        while True:
            last = ended.wait(0.3)
            try:
                notes = ray.get(board.take.remote(), timeout=5)
            except RayError:
                notes = []
            for note in notes:
                heard, asked = time.monotonic(), False
                _tell(progress, note)
            if last:
                return
            if not asked and time.monotonic() - heard > 10 and (text := waits()) is not None:
                asked = True
                progress.line(text)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)
        progress.close()
    if failed:
        raise failed[0]


def _tell(progress: Progress, note: tuple[str, Any]) -> None:
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
