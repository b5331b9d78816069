"""Many training runs, several at a time; what has a result is not run again, what was stopped goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


@dataclass(frozen=True)
class Run:
    """A run folder's name, the configuration it begins with, and the options of a command line."""

    name: str
    config: str
    options: tuple[str, ...]


def run_all(every: Sequence[Run], runs: Path, jobs: int, done: Callable[[Run], None] = lambda run: None) -> None:
    """Train what has no result yet, `jobs` at a time, the cores shared out; `done` is called after each, in a thread.

    Ctrl-C, or one that fails, stops all in order: each keeps a checkpoint to go on from.
    """
    running: list[subprocess.Popen[bytes]] = []
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}

    def train(run: Run) -> None:
        folder = runs / run.name
        if (folder / "result.json").exists():
            return
        fresh = [run.config, "--runs", str(runs), "--name", run.name]
        start = ["--resume", str(folder)] if folder.exists() else fresh
        process = subprocess.Popen(
            [sys.executable, "-m", "cibl_ray.train", *start, *run.options],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | threads,
        )  # fmt: skip
        running.append(process)
        _, errors = process.communicate()
        running.remove(process)
        if process.returncode:
            raise RuntimeError(f"{run.name}: {(errors.decode().strip().splitlines() or ['it was killed'])[-1]}")
        done(run)

    runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for _ in tqdm(pool.map(train, every), total=len(every), unit="run", disable=None):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.send_signal(signal.SIGINT)
            raise
