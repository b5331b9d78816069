"""`python -m benchmarks.cluster [--quick] [--images FOLDER]`: what Ray Train costs, and how long a start takes.

Two Ray workers beside two torchrun processes, one Ray worker beside one plain process, each on all cores and with one to spare
(two cores): the same command, data and threads.
Images a second are the median over the epochs after the first; the runs take turns. A start is the time from the command to the
first step of the first epoch, FFCV's compilation included where it is not cached.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
    if not arguments.quick:
        # With a core to spare: Ray's own processes then need none of what trains.
        sides |= {"ray1_spare": (train, ["--cluster", "--workers", "1", "--cpus-per-worker", "1"]), "plain_spare": (train, [])}
    folder = Path(tempfile.mkdtemp(prefix="cibl_ray_cluster_"))
    epochs, largest = ("3", "100") if arguments.quick else ("6", "500")
    options = ["--backbone", "resnet20", "--epochs", epochs, "--warmup_epochs", "0", "--data.profile.largest", largest]
    config, _ = cifar10_lt(arguments.images, *options, "--runs", str(folder))
    save_config(config, folder / "config.yaml")
    rates: dict[str, list[float]] = {side: [] for side in sides}
    starts: dict[str, list[float]] = {side: [] for side in sides}
    try:
        for number in range(1 if arguments.quick else 3):
            for side, (command, more) in sides.items():
                run = folder / f"{side}-{number}"
                threads = {"OMP_NUM_THREADS": "1"} if side == "plain_spare" else {}
                start, rows = _timed([*command, str(folder / "config.yaml"), "--name", run.name, *more], run, threads)
                starts[side].append(start)
                rates[side].append(statistics.median(row["rate"]["images_per_s"] for row in rows[1:]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    images = {side: round(statistics.median(values), 1) for side, values in rates.items()}

    def ratio(ours: str, theirs: str) -> float:
        """Round by round, of sides that ran one after the other: a machine that is slower for minutes is so for both."""
        return round(statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True)), 3)

    pairs = (("ray2", "torchrun2"), ("ray1", "plain"), ("ray1_spare", "plain_spare"))
    report(
        images_per_s=images,
        images_per_s_rounds={side: [round(value, 1) for value in values] for side, values in rates.items()},
        seconds_to_first_step={side: round(statistics.median(values), 1) for side, values in starts.items()},
        ratios={f"{ours}_over_{theirs}": ratio(ours, theirs) for ours, theirs in pairs if ours in rates},
    )


def _timed(command: list[str], run: Path, threads: dict[str, str]) -> tuple[float, list[dict]]:
    """Seconds from the command to its first step, and the rows of all epochs."""
    begun = time.time()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **threads}
    )
    first = None
    while process.poll() is None:
        if first is None and (run / METRICS).exists() and (rows := read_metrics(run)):
            spent = rows[0]["seconds"]
            first = time.time() - spent["epoch"] - spent["evaluation"]
        time.sleep(0.01)
    if process.returncode or first is None:
        assert process.stderr is not None
        raise RuntimeError(f"{' '.join(command)}: {process.stderr.read()}")
    return first - begun, read_metrics(run)


if __name__ == "__main__":
    main()
