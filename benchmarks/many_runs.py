"""Many training runs, several at a time; what has a result is not run again, what was stopped continues."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cibl_ray.config import RunConfig, load_config
from cibl_ray.hardware import resolve
from cibl_ray.run.folder import CONFIG, never_begun
from cibl_ray.run.log import read_metrics
from cibl_ray.run.stop import stop_signals
from pipelines.common.config_file import read_config
from pipelines.common.cores import CORES, usable_cores
from pipelines.common.errors import UserError
from pipelines.common.validation import validate
from pipelines.prepare.build import ensure_prepared, prepared_folder


@dataclass(frozen=True)
class Run:
    """A run folder's name, the configuration it begins with, and the options of a command line."""

    name: str
    config: str
    options: tuple[str, ...]

    def configuration(self, runs: Path) -> RunConfig:
        """What its folder's config.yaml says, or will say."""
        return resolve(load_config(self.config, ["--runs", str(runs), *self.options]))


class RunsFailedError(RuntimeError):
    """Some runs failed; the others continued. reasons: the last line of each, by its name."""

    def __init__(self, reasons: dict[str, str], of: int) -> None:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        super().__init__(f"{len(reasons)} of {of} runs failed: {listed}")
        self.reasons = reasons


def run_all(
    every: Sequence[Run],
    runs: Path,
    jobs: int,
    done: Callable[[Run, float | None], None] = lambda run, seconds: None,
    seconds: float | None = None,
    work: Callable[[RunConfig], float] = lambda config: 1.0,
    pace: float = 0.0,
) -> list[str]:
    """Train what has no result yet, `jobs` at a time, the cores shared out.

    Those that fail are reported when the others are done. Ctrl-C and SIGTERM stop all in order: each keeps a checkpoint to
    resume from.

    Args:
        every: The runs.
        runs: The folder of their run folders.
        jobs: Runs at a time.
        done: Called after each, in a thread, with the seconds that it took as a whole (None: it had been begun before).
        seconds: No run is begun that would end later than so many seconds from now; None: no limit.
        work: How much a run has to do, in any unit. Runs take as long for it as the slowest that this call has finished.
        pace: Seconds that a unit of work takes, as far as known before the first is finished.

    Returns:
        The names of those that were not begun, because they would end too late.

    Raises:
        RunsFailedError: Some runs failed.
        UserError: A folder holds a run of another configuration.
    """
    running: list[subprocess.Popen[bytes]] = []
    stopping = threading.Event()
    cores = str(max(1, usable_cores() // jobs))
    threads = {"OMP_NUM_THREADS": cores, CORES: cores}  # the network's and the loader's
    started = time.monotonic()
    failed: dict[str, str] = {}
    late: list[str] = []
    paces: list[float] = []
    configs = {run.name: run.configuration(runs) for run in every}
    for run in every:
        refuse_another(runs / run.name, configs[run.name])
    todo = [run for run in every if not (runs / run.name / "result.json").exists()]
    # Now, not by several processes at once: what is downloaded goes to one place.
    for config in {prepared_folder(one.data, one.seed): one for one in (configs[run.name] for run in todo)}.values():
        ensure_prepared(config.data, config.seed)

    def train(run: Run) -> None:
        begun, folder = time.monotonic(), runs / run.name
        epochs = configs[run.name].train.epochs
        rows = read_metrics(folder) if folder.exists() else []
        left = work(configs[run.name]) * (1 - min(rows[-1]["epoch"] / epochs, 1) if rows else 1)
        if seconds is not None and begun - started + left * max(paces, default=pace) > seconds:
            late.append(run.name)
            return
        if stopping.is_set():
            return
        if never_begun(folder):  # killed before its configuration was written
            shutil.rmtree(folder)
        fresh = not folder.exists()
        start = [run.config, "--runs", str(runs), "--name", run.name, *run.options] if fresh else ["--resume", str(folder)]
        process = subprocess.Popen(
            [sys.executable, "-m", "cibl_ray.train", *start],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | threads,
        )  # fmt: skip
        running.append(process)
        if stopping.is_set():  # the others have been asked already
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        running.remove(process)
        if process.returncode:
            failed[run.name] = (errors.decode(errors="replace").strip().splitlines() or ["it was killed"])[-1]
            return
        took = time.monotonic() - begun
        if left:
            paces.append(took / left)
        done(run, took if fresh else None)

    runs.mkdir(parents=True, exist_ok=True)
    with stop_signals(), ThreadPoolExecutor(jobs) as pool:
        try:
            for _ in tqdm(pool.map(train, todo), total=len(todo), unit="run", disable=None):
                pass
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*running]:
                process.send_signal(signal.SIGINT)
            raise
    if failed:
        raise RunsFailedError(failed, len(todo))
    return late


def computed(config: RunConfig) -> dict[str, Any]:
    """Of a configuration, what decides a run's result: not the places of its files, nor how it is executed."""
    content = config.model_dump(mode="json", exclude={"runs", "loader"})
    for part, name in (("data", "prepared"), ("data", "source"), *(("train", name) for name in _EXECUTION)):
        content[part].pop(name)
    return content


# A run's own folder says which precision was decided for it when it began.
_EXECUTION = ("device", "precision", "compile", "checkpoint_every", "checkpoint_minutes", "eval_batch_size")


def refuse_another(folder: Path, config: RunConfig) -> None:
    """Raises UserError where `folder` holds a run of another configuration: its result would stand under this one's name."""
    path = folder / CONFIG
    if not path.exists():
        return
    other = validate(RunConfig, read_config(path), str(path))
    there, wanted = computed(other), computed(config)
    changed = sorted(part for part in wanted if there[part] != wanted[part])
    if other.data.source.kind != config.data.source.kind:  # the same data set in another encoding has other pixels
        changed.append("data.source.kind")
    if changed:
        raise UserError(
            f"{str(folder)!r} holds a run of another configuration ({', '.join(changed)} differ): "
            "remove it, or choose another --runs"
        )
