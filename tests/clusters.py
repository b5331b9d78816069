"""The command that trains on a cluster, started for real: what tests of it share."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil

from cibl_ray.run.log import read_metrics
from tests.conftest import REPOSITORY

EPOCHS = 6
OPTIONS = ["--epochs", EPOCHS, "--warmup_epochs", "1", "--batch_size", "62", "--loader.kind", "torch"]
LAST = Path("checkpoints") / "last.safetensors"


NOTEBOOK = "import asyncio, cibl_ray.train\nasync def cell(): cibl_ray.train.main()\nasyncio.run(cell())"


def start(folder, *arguments, workers="2", cwd=REPOSITORY, notebook=False):
    """The command, with its output in a file: (process, file). notebook: within a running event loop."""
    log = folder / f"{time.time_ns()}.log"
    program = ["-c", NOTEBOOK] if notebook else ["-m", "cibl_ray.train"]
    command = [sys.executable, *program, *arguments, "--cluster", "--workers", workers]
    with log.open("w") as output:
        process = subprocess.Popen([*map(str, command)], stdout=output, stderr=subprocess.STDOUT, cwd=cwd)
    return process, log


def new(folder, name, *more):
    return ["quickstart", "--name", name, "--runs", folder / "runs", "--prepared", folder / "prepared", *OPTIONS, *more]


def ended(process, log, status=0):
    """The output of a command that has ended, as it should; none of its processes is left."""
    below, begun = set(), time.monotonic()
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            below |= {*psutil.Process(process.pid).children(recursive=True)}
        assert time.monotonic() - begun < 240, log.read_text()
        time.sleep(0.2)
    assert process.returncode == status, log.read_text()
    assert not psutil.wait_procs(below, timeout=30)[1]
    return log.read_text()


def wait_for_epoch(run, epoch, process):
    while not any(row["epoch"] >= epoch for row in read_metrics(run)):
        assert process.poll() is None
        time.sleep(0.02)


def wait_for_text(text, process, log):
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
