"""All trackers of a run or sweep as one. A tracker that fails is one warning, and is not used any more."""

from __future__ import annotations

import importlib.util
import logging
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cibl_ray.config import RunConfig
from cibl_ray.run.folder import TRACKERS
from cibl_ray.run.log import Row
from cibl_ray.tracking.base import Ended, Memory, Outcome, Status, Subject, Tracker, flat
from cibl_ray.tracking.local import CSV, TensorBoard
from cibl_ray.tracking.mlflow_runs import MLflow
from cibl_ray.tracking.wandb_runs import WandB

log = logging.getLogger(__name__)

KINDS: dict[str, type[Any]] = {kind.name: kind for kind in (TensorBoard, MLflow, WandB, CSV)}
_PATIENCE = 60.0  # seconds that the end of a run waits for trackers to send the rest
_PER_TRIAL = 10.0  # further seconds for each trial that is not sent yet


class Trackers:
    """The trackers of a run or sweep. None of its methods raises what a tracker raises, and none waits for one but `close`.

    Args:
        trackers: The trackers.
    """

    def __init__(self, trackers: list[Tracker]) -> None:
        self._channels = [_Thread(tracker) if tracker.sends else _Direct(tracker) for tracker in trackers]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process, or in a file of Ray Tune's, has no trackers: these are of this process."""
        return Trackers, ([],)

    def begin(self, epoch: int, rows: list[Row], wait: bool = False) -> None:
        """Start, or continue after `epoch` whole epochs.

        Args:
            epoch: Whole epochs that are trained.
            rows: Their rows.
            wait: Wait until every tracker has begun, a minute at most.
        """
        self._each(lambda tracker: tracker.begin(epoch, [*rows]))
        if wait:
            deadline = time.monotonic() + _PATIENCE
            for channel in self._channels:
                channel.wait(max(deadline - time.monotonic(), 0.0))

    def row(self, row: Row) -> None:
        """Record an epoch."""
        self._each(lambda tracker: tracker.row(row))

    def end(self, outcome: Outcome) -> None:
        """Record what the run or sweep ends with."""
        self._each(lambda tracker: tracker.end(outcome))

    def trial(self, ended: Ended) -> None:
        """Record a trial of the sweep."""
        self._each(lambda tracker: tracker.trial(ended))

    def bundle(self, folder: Path) -> None:
        """Keep a bundle with the run."""
        self._each(lambda tracker: tracker.bundle(folder))

    def close(self, status: Status, trials: int = 0) -> None:
        """End, and wait until everything is sent: a minute at most for all trackers together, and longer for trials.

        Args:
            status: How the run or sweep ended.
            trials: The number of trials that may still have to be sent.
        """
        self._each(lambda tracker: tracker.close(status))
        patience = _PATIENCE + trials * _PER_TRIAL
        deadline = time.monotonic() + patience
        for channel in self._channels:
            channel.last()
        for channel in self._channels:
            if not channel.finish(max(deadline - time.monotonic(), 0.0)):
                log.warning("tracker %s is still busy after %g s; what it has not sent is lost", channel.name, patience)
        self._channels = []

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for channel in self._channels:
            channel.do(act)


class _Direct:
    """A tracker that writes files: it works in the caller's thread."""

    def __init__(self, tracker: Tracker) -> None:
        self.name = tracker.name
        self._tracker, self._failed = tracker, False

    def do(self, act: Callable[[Tracker], None]) -> None:
        if self._failed:
            return
        try:
            act(self._tracker)
        except Exception as error:
            self._failed = True
            log.warning("%s", _problem(self._tracker, error))

    def wait(self, seconds: float) -> None:
        """What was asked for is done already."""

    def last(self) -> None:
        """Nothing more will be asked for."""

    def finish(self, seconds: float) -> bool:
        """What was asked for is done already."""
        return True


class _Thread(_Direct):
    """A tracker that talks to others: it works in a thread of its own, so that nothing waits for a slow host."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__(tracker)
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker-{tracker.name}")
        self._thread.start()

    def do(self, act: Callable[[Tracker], None]) -> None:
        self._tasks.put(partial(super().do, act))

    def wait(self, seconds: float) -> None:
        """Wait until what was asked for is done."""
        done = threading.Event()
        self._tasks.put(done.set)
        done.wait(seconds)

    def last(self) -> None:
        """End the thread after the rest."""
        self._tasks.put(None)

    def finish(self, seconds: float) -> bool:
        """Wait for the rest. Returns whether it was done in time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


def track_run(config: RunConfig, folder: Path, tags: dict[str, str]) -> Trackers:
    """The trackers of a run.

    Args:
        config: The run's configuration; `track` names the trackers.
        folder: The run folder.
        tags: Further facts, as text.
    """
    return _made(config.track, run_subject(config, folder, tags))


def track_sweep(config: RunConfig, folder: Path, params: dict[str, Any]) -> Trackers:
    """The trackers of a sweep: those that know parents and children.

    Args:
        config: The configuration that every trial starts from.
        folder: The sweep folder.
        params: What is searched, by dotted names.
    """
    subject = Subject(folder.name, folder, config.runs, flat(params), is_sweep=True)
    return _made(tuple(name for name in config.track if KINDS[name].sends), subject)


def track_bundle(config: RunConfig, folder: Path, bundle: Path) -> None:
    """Keep a bundle with its run, in the trackers that know the run.

    Args:
        config: The run's configuration.
        folder: The run folder.
        bundle: The bundle.
    """
    if not (folder / TRACKERS).is_file():
        return
    memory = Memory(folder)
    known = tuple(name for name, kind in KINDS.items() if kind.sends and memory.read(name))
    trackers = _made(known, run_subject(config, folder, {}))
    trackers.bundle(bundle)
    trackers.close("finished")


def run_subject(config: RunConfig, folder: Path, tags: dict[str, str]) -> Subject:
    """A run as trackers see it. It is a trial where it lies in the `trials` of a sweep that a tracker knows."""
    above = folder.absolute().parent
    sweep = above.parent if above.name == "trials" and (above.parent / TRACKERS).is_file() else None
    params = flat(config.model_dump(mode="json"))
    return Subject(folder.name, folder, config.runs, params, sweep, tags={"folder": str(folder.absolute()), **tags})


def _made(names: tuple[str, ...], subject: Subject) -> Trackers:
    trackers = []
    for name in dict.fromkeys(names):
        kind = KINDS[name]
        missing = [package for package in kind.packages if importlib.util.find_spec(package) is None]
        if missing:
            extra = "train" if name == "tensorboard" else "track"
            log.warning("track: %s is left out: %s is not installed; pip install 'cibl-ray[%s]'", name, missing[0], extra)
        else:
            trackers.append(kind(subject))
    return Trackers(trackers)


def _problem(tracker: Tracker, error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"track: {tracker.name} failed, and is not used any more in this run: {type(error).__name__}: {text}"
