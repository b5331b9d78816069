"""`python -m benchmarks.cluster [--quick] [--images FOLDER]`: what Ray Train costs, and how long a start takes.

Two Ray workers beside two torchrun processes, one Ray worker beside one plain process: the same command, data and threads.
Images a second are the median over the epochs after the first; the runs take turns. A start is the time from the command to the
first step of the first epoch, FFCV's compilation included where it is not cached. Beside it: the CPU time a second of all
processes but those that train (Ray's services and the driver, torchrun's agent), between the ends of the
first and of the last but one epoch.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.data import add_arguments, cifar10_lt
from benchmarks.measure import report
from cibl_ray.config import save_config
from cibl_ray.runlog import METRICS, read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    add_arguments(parser)
    arguments = parser.parse_args()
    train = [sys.executable, "-m", "cibl_ray.train"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cibl_ray.train"]
    sides = {
        "ray2": (train, ["--cluster", "--workers", "2"]),
        "torchrun2": (torchrun, []),
        "ray1": (train, ["--cluster", "--workers", "1"]),
        "plain": (train, []),
    }
    folder = Path(tempfile.mkdtemp(prefix="cibl_ray_cluster_"))
    epochs, largest = ("4", "200") if arguments.quick else ("6", "1000")
    options = ["--backbone", "resnet20", "--epochs", epochs, "--warmup_epochs", "0", "--data.profile.largest", largest]
    config, _ = cifar10_lt(arguments.images, *options, "--runs", str(folder))
    save_config(config, folder / "config.yaml")
    rates: dict[str, list[float]] = {side: [] for side in sides}
    starts: dict[str, list[float]] = {side: [] for side in sides}
    others: dict[str, list[float]] = {side: [] for side in sides}
    try:
        for number in range(1 if arguments.quick else 5):
            for side, (command, more) in sides.items():
                run = folder / f"{side}-{number}"
                start, other, rows = _timed([*command, str(folder / "config.yaml"), "--name", run.name, *more], run)
                others[side].append(other)
                starts[side].append(start)
                rates[side].append(statistics.median(row["rate"]["images_per_s"] for row in rows[1:]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    images = {side: round(statistics.median(values), 1) for side, values in rates.items()}

    def ratio(ours: str, theirs: str) -> float:
        """Round by round, of sides that ran one after the other: a machine that is slower for minutes is so for both."""
        return round(statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True)), 3)

    pairs = (("ray2", "torchrun2"), ("ray1", "plain"))
    report(
        images_per_s=images,
        images_per_s_rounds={side: [round(value, 1) for value in values] for side, values in rates.items()},
        seconds_to_first_step={side: round(statistics.median(values), 1) for side, values in starts.items()},
        cpu_ms_per_s_beside_training={side: round(statistics.median(values), 1) for side, values in others.items()},
        ratios={f"{ours}_over_{theirs}": ratio(ours, theirs) for ours, theirs in pairs},
    )


def _timed(command: list[str], run: Path) -> tuple[float, float, list[dict]]:
    """Seconds from the command to its first step, ms of CPU time a second beside training, and the rows of all epochs."""
    begun = time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    first, spent = None, []
    while process.poll() is None:
        if (run / METRICS).exists() and (rows := read_metrics(run)):
            if first is None:
                first = time.time() - rows[0]["seconds"]["epoch"] - rows[0]["seconds"]["evaluation"]
            if len(rows) > len(spent):
                with suppress(psutil.NoSuchProcess):  # at the end
                    spent.append((time.monotonic(), _cpu_beside_training(process.pid, command)))
        time.sleep(0.01 if first is None else 0.2)
    if process.returncode or first is None or len(spent) < 3:
        assert process.stderr is not None
        raise RuntimeError(f"{' '.join(command)}: {process.stderr.read()}")
    rows = read_metrics(run)
    (at, before), (to, after) = spent[0], spent[-2]  # with the last epoch, processes begin to end
    return first - begun, 1000 * (after - before) / (to - at), rows


def _cpu_beside_training(pid: int, command: list[str]) -> float:
    """Seconds that the processes of a command have run, from `pid` down, without those that train."""
    root = psutil.Process(pid)
    below = root.children(recursive=True)
    if "--cluster" in command:
        training = [process for process in below if "RayTrainWorker" in process.name()]
    else:
        training = below if "torch.distributed.run" in command else [root, *below]
    times = [process.cpu_times() for process in (root, *below) if process not in training]
    return sum(time.user + time.system for time in times)


if __name__ == "__main__":
    main()
