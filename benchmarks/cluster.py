"""`python -m benchmarks.cluster [--quick] [--images FOLDER]`: what Ray Train costs, and how long a start takes.

Two Ray workers beside two torchrun processes, one Ray worker beside one plain process: the same command, data and threads. A
machine's own speed may change by a tenth within minutes, so the two sides of a pair are started once and then take turns every
few seconds (more where epochs are long, so that some end within the turns). All processes of the other side are stopped
meanwhile (SIGSTOP), and images a second count the time in turn alone.
A start is the time from the command to the first step of the first epoch, FFCV's compilation included where it is not cached.
Beside it: the CPU time a second of all processes but those that train (Ray's services and the driver, torchrun's agent).
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

from benchmarks.data import add_arguments, cifar10_lt
from benchmarks.measure import report
from cibl_ray.config import save_config
from cibl_ray.run.log import METRICS, read_metrics
from pipelines.common.errors import run_command

TURN = 12.0  # seconds, more where epochs are long
LARGEST = 300  # images of the data set's largest class
EPOCHS = 6  # that each side must have time for in all its turns together, by the last epoch of its warm-up


class Side:
    """A training command that runs for ever, in turns.

    start: seconds from the command to the first step.
    epoch: seconds from one epoch's end to the next one's, while the other side is stopped.
    """

    def __init__(self, command: list[str], run: Path) -> None:
        self._command, self._run = command, run
        begun = time.time()
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.start = 0.0
        ends: list[float] = []
        try:
            while len(ends) < 3:  # the first epochs warm up
                self._alive()
                time.sleep(0.02)
                ends += [time.time()] * (self._done() - len(ends))
                if not self.start and ends:
                    self.start = ends[0] - begun - read_metrics(run)[0]["seconds"]["epoch"]
        except BaseException:
            self.end()
            raise
        self.epoch = ends[-1] - ends[-2]
        self.active = self.beside = 0.0
        self._bounds = [0.0]  # time in turn, where one ends
        self.epochs: list[tuple[float, int]] = []  # time in turn, epochs done by then
        self._all(signal.SIGSTOP)

    def turn(self, seconds: float) -> None:
        """Run for so long, and note when each epoch ends."""
        before, known = self._cpu_beside_training(), self._done()
        self._all(signal.SIGCONT)
        begun = time.monotonic()
        while (passed := time.monotonic() - begun) < seconds:
            if (now := self._done()) > known:
                self.epochs.append((self.active + passed, now))
                known = now
            time.sleep(0.05)
        self._all(signal.SIGSTOP)
        self.active += time.monotonic() - begun
        self._bounds.append(self.active)
        self.beside += self._cpu_beside_training() - before
        self._alive()

    def by_turn(self) -> tuple[np.ndarray, np.ndarray]:
        """Epochs done in each turn (parts of one too) and its seconds; without what lies before the first epoch's end seen in
        turn, and after the last's."""
        if len(self.epochs) < 2:
            raise RuntimeError(f"too few epochs end within the turns: give more --turns than {len(self._bounds) - 1}")
        times, done = (np.array(each, dtype=float) for each in zip(*self.epochs, strict=True))
        bounds = np.clip(self._bounds, times[0], times[-1])
        return np.diff(np.interp(bounds, times, done)), np.diff(bounds)

    def end(self) -> None:
        below = self._tree()
        self._all(signal.SIGCONT)
        self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=60)
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _done(self) -> int:
        """Epochs, counted without much work: the side in turn wants both cores."""
        path = self._run / METRICS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _alive(self) -> None:
        if self._process.poll() is not None:
            assert self._process.stderr is not None
            raise RuntimeError(f"{' '.join(self._command)}: {self._process.stderr.read()}")

    def _tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _all(self, number: signal.Signals) -> None:
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _cpu_beside_training(self) -> float:
        """Seconds that the processes of the command have run, without those that train."""
        root, *below = self._tree()
        if "--cluster" in self._command:
            training = [process for process in below if "RayTrainWorker" in process.name()]
        else:
            training = below if "torch.distributed.run" in self._command else [root, *below]
        times = [process.cpu_times() for process in (root, *below) if process not in training]
        return sum(time.user + time.system for time in times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--turns", type=int, help=f"of {TURN:g} s of each side, or longer; by default 15")
    arguments = parser.parse_args()
    shortest, largest, turns = (3.0, 100, 2) if arguments.quick else (TURN, LARGEST, arguments.turns or 15)
    train = [sys.executable, "-m", "cibl_ray.train"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cibl_ray.train"]
    pairs: dict[tuple[str, str], tuple] = {
        ("ray2", "torchrun2"): ((train, ["--cluster", "--workers", "2"]), (torchrun, [])),
        ("ray1", "plain"): ((train, ["--cluster", "--workers", "1"]), (train, [])),
    }
    folder = Path(tempfile.mkdtemp(prefix="cibl_ray_cluster_"))
    options = ["--backbone", "resnet20", "--epochs", "100000", "--warmup_epochs", "0", "--checkpoint_every", "100000"]
    config, prepared = cifar10_lt(arguments.images, *options, "--data.profile.largest", str(largest), "--runs", str(folder))
    save_config(config, folder / "config.yaml")
    size = config.train.batch_size
    images = int(prepared.train_counts.sum()) // size * size
    rates, spread, starts, beside, lengths = {}, {}, {}, {}, {}
    try:
        for names, commands in pairs.items():
            sides: dict[str, Side] = {}
            try:
                for name, (command, more) in zip(names, commands, strict=True):
                    arguments_of = [*command, str(folder / "config.yaml"), "--name", name, *more]
                    sides[name] = Side(arguments_of, folder / name)
                # Epochs may be long here: some must end within the turns.
                turn = max(shortest, *(EPOCHS * side.epoch / turns for side in sides.values()))
                for number in range(turns):
                    # ABBA: neither side always follows the other.
                    for side in [*sides.values()][:: 1 if number % 2 == 0 else -1]:
                        side.turn(turn)
            finally:
                for side in sides.values():
                    side.end()
            key = "_over_".join(names)
            lengths[key] = round(turn, 1)
            rates[key], spread[key] = _ratio(*sides.values())
            for name, side in sides.items():
                done, seconds = side.by_turn()
                starts[name] = round(side.start, 1)
                beside[name] = round(1000 * side.beside / side.active, 1)
                rates[name] = round(float(done.sum() / seconds.sum()) * images, 1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(
        images_per_s={name: rates[name] for names in pairs for name in names},
        seconds_to_first_step=starts,
        cpu_ms_per_s_beside_training=beside,
        turns=turns,
        seconds_a_turn=lengths,
        ratio_with_95_percent_interval=spread,
        ratios={key: round(rates[key], 3) for key in spread},
    )


def _ratio(ours: Side, theirs: Side) -> tuple[float, list[float]]:
    """The ratio of the rates over all turns, and its 95 % interval: the pairs of turns resampled (bootstrap)."""
    both = ours.by_turn(), theirs.by_turn()

    def ratio(chosen: np.ndarray) -> float:
        rate, other = (epochs[chosen].sum() / seconds[chosen].sum() for epochs, seconds in both)
        return float(rate / other)

    random, count = np.random.default_rng(0), len(both[0][0])
    drawn = [ratio(random.integers(count, size=count)) for _ in range(2000)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return ratio(np.arange(count)), [round(float(low), 3), round(float(high), 3)]


if __name__ == "__main__":
    run_command(main)
