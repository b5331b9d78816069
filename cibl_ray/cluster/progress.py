"""Progress goes from rank 0 to the driver, and the request to stop from the driver to all workers, through an actor."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cibl_ray.run.progress import Lines, Progress
from cibl_ray.run.stop import Stop
from pipelines.common.words import agreed, plural

_LONGEST_TEXT = 1 << 16  # characters of a line, or of a traceback, whose end says most
_PATIENCE = 10.0  # seconds to wait for a relay that does not answer
_UNANSWERED = 1000  # notes on their way to a relay that does not answer, after which more are dropped
_INTERVAL = 0.5  # seconds between two counts of images, two looks of the driver, two questions whether to stop
_DRAIN = 120.0  # seconds that Ray Train waits for a node whose notice names no time
_SILENCE = 5.0  # seconds without a note after which the driver looks for a reason


class Relay:
    """An actor on the driver's node. Workers post notes, the driver takes them. The driver asks to stop, workers look.

    It is not an asynchronous actor: Ray keeps the order of one caller's notes only in actors that do one thing after another.
    """

    def __init__(self) -> None:
        self._notes: list[tuple[str, Any]] = []
        self._stop = False
        self._met: dict[str, dict[int, Any]] = {}

    def post(self, kind: str, content: Any) -> None:
        """Add a note. Notes of one worker keep their order."""
        self._notes.append((kind, content))

    def take(self) -> list[tuple[str, Any]]:
        """All notes that are there."""
        notes, self._notes = self._notes, []
        return notes

    def stop(self) -> None:
        """Ask the workers to save and end."""
        self._stop = True

    def stop_asked(self) -> bool:
        """Whether the workers should save and end."""
        return self._stop

    def meet(self, place: str, rank: int, value: Any) -> dict[int, Any]:
        """Keep a worker's value under a name. Returns the values of all workers that came so far, by rank."""
        met = self._met.setdefault(place, {})
        met[rank] = value
        return met


class RelayedProgress:
    """`Progress` of a worker: posts notes to a `Relay`, without waiting for it. A lost relay does not stop training.

    Args:
        relay: The relay's handle.
    """

    def __init__(self, relay: Any) -> None:
        self._relay, self._images, self._told = relay, 0, 0.0
        self._sent: list[Any] = []
        self._lock = threading.Lock()  # log messages come from any thread

    def begin(self, total: int, done: int) -> None:
        """Post how many images the run has, and how many are done."""
        self._post("begin", (total, done))

    def advance(self, images: int) -> None:
        """Count images, and post the sum a few times a second."""
        self._images += images
        if time.monotonic() - self._told >= _INTERVAL:
            self._tell_images()

    def epoch(self, row: dict[str, Any], text: str) -> None:
        """Post an epoch's scores, and the line about them."""
        self._post("epoch", (row, text))

    def line(self, text: str) -> None:
        """Post a line of the log."""
        self._post("line", text[-_LONGEST_TEXT:])

    def error(self, text: str) -> None:
        """Show text on the driver's standard error."""
        self._post("error", text[-_LONGEST_TEXT:])

    def stopped(self) -> None:
        """Post that the run has saved and stopped."""
        self._post("stopped", None)

    def close(self) -> None:
        """Post the images that were counted since the last note."""
        self._tell_images()

    def log_handler(self) -> logging.Handler:
        """A handler that posts log messages as lines."""
        return Lines(self)

    def finish(self) -> None:
        """Return when the relay has all notes, or after ten seconds."""
        with self._lock, suppress(RayError):
            if self._sent:
                ray.wait(self._sent, num_returns=len(self._sent), timeout=_PATIENCE)
            self._sent = []

    def _tell_images(self) -> None:
        if self._images:
            self._post("advance", self._images)
        self._images, self._told = 0, time.monotonic()

    def _post(self, kind: str, content: Any) -> None:
        with self._lock, suppress(RayError):
            if self._sent:
                _, self._sent = ray.wait(self._sent, num_returns=len(self._sent), timeout=0)
            if len(self._sent) < _UNANSWERED:
                self._sent.append(self._relay.post.remote(kind, content))


class RelayedStop(Stop):
    """Whether the driver asked a worker to stop. It looks twice a second, without waiting for the answer.

    Args:
        relay: The relay's handle.
        hears_notices: Whether to ask Ray for nodes that are taken away: on a cluster that was joined, by all workers together.
    """

    def __init__(self, relay: Any, hears_notices: bool = False) -> None:
        self._relay, self._asked, self._next = relay, False, 0.0
        self.hears_notices = hears_notices
        self._answer: Any = None

    def asked(self) -> bool:
        """Whether the driver asked, as far as is known: an answer arrives within a second."""
        if self._asked or time.monotonic() < self._next:
            return self._asked
        try:
            if self._answer is None:
                self._answer = self._relay.stop_asked.remote()
            elif ray.wait([self._answer], timeout=0)[0]:
                answer, self._answer = self._answer, None
                self._next = time.monotonic() + _INTERVAL
                self._asked = ray.get(answer)
        except RayError:  # the driver is lost, and the cluster ends this worker
            self._answer, self._next = None, time.monotonic() + _PATIENCE
        return self._asked

    def ask(self) -> bool:
        """The same, and wait for the answer."""
        with suppress(RayError):
            self._asked = ray.get(self._relay.stop_asked.remote(), timeout=_PATIENCE)
        return self._asked

    def notice(self) -> float | None:
        """Seconds until Ray drains a node of this run, as a cloud's or an operator's notice has it."""
        if not self.hears_notices:
            return None
        # Alpha in Ray 2.60, and not there in 2.59.
        info = ask() if (ask := getattr(ray.train, "get_preemption_info", None)) is not None else None
        if info is None:
            return None
        return _DRAIN if info.deadline_ms is None else max(info.deadline_ms / 1000 - time.time(), 0.0)


class Watch:
    """What the driver knows of its workers.

    Attributes:
        relay: The handle that workers post to.
        stopped: Whether they saved and stopped, because they were asked to.
    """

    def __init__(self, relay: Any) -> None:
        self.relay = relay
        self.stopped = False


def start_relay() -> Any:
    """Start a `Relay` on this node. It ends with the last handle to it.

    Returns:
        Its handle.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Relay)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote()


@contextmanager
def show_progress(progress: Progress, reason_to_wait: Callable[[], str | None]) -> Iterator[Watch]:
    """Start a relay, and show what workers post, until the end of the block.

    Args:
        progress: Where it is shown.
        reason_to_wait: Called every five seconds in which nothing arrives. What it returns twice in a row is shown once.

    Raises:
        Exception: What `progress` raised; the rest was not shown.
    """
    watch = Watch(start_relay())
    failed: list[BaseException] = []

    def show() -> None:
        try:
            _show(watch, progress, reason_to_wait)
        except RayError:  # the relay is lost, and the cluster with it
            pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        with suppress(RayError):
            ray.get(watch.relay.post.remote("end", None), timeout=_PATIENCE)
        thread.join(timeout=_PATIENCE)
        progress.close()
    if failed:
        raise failed[0]


def _show(watch: Watch, progress: Progress, reason_to_wait: Callable[[], str | None]) -> None:
    shown = before = None
    images = 0  # that the run has trained
    heard = time.monotonic()
    while True:
        notes = ray.get(watch.relay.take.remote())
        for kind, content in notes:
            shown = before = None
            match kind:
                case "begin":
                    progress.close()
                    if (lost := images - content[1]) > 0:
                        progress.line(
                            f"lost: {plural(lost, 'image')} that {agreed(lost, 'were')} trained after that checkpoint"
                        )
                    images = content[1]
                    progress.begin(*content)
                case "advance":
                    images += content
                    progress.advance(content)
                case "epoch":
                    progress.epoch(*content)
                case "line":
                    progress.line(content)
                case "error":
                    print(content, file=sys.stderr)
                case "stopped":
                    watch.stopped = True
                case "end":
                    return
        if notes:
            heard = time.monotonic()
        elif time.monotonic() - heard >= _SILENCE:
            heard = time.monotonic()
            text = reason_to_wait()
            if text is not None and text == before != shown:
                shown = text
                progress.line(text)
            before = text
        time.sleep(_INTERVAL)
