"""`python -m benchmarks.sweep [--quick] [--images FOLDER]`: a sweep of 8 short trials beside the same 8 by a shell loop.

The loop's runs have all cores each, one after another; the sweep's have one core each, side by side. Both start from prepared
data alone, so that the starts of Ray and of each process count: the longer a trial (`--epochs`), the less they do.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.data import add_arguments, cifar10_lt
from benchmarks.measure import report
from cibl_ray.config import save_config
from cibl_ray.tuning.folder import read_trials
from pipelines.common.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--epochs", type=int, default=1, help="of each trial, of 2,478 images (default: %(default)s)")
    arguments = parser.parse_args()
    count, epochs, largest = (2, "1", "100") if arguments.quick else (8, str(arguments.epochs), "1000")
    folder = Path(tempfile.mkdtemp(prefix="cibl_ray_sweep_"))
    options = ["--backbone", "resnet20", "--epochs", epochs, "--warmup_epochs", "0", "--data.profile.largest", largest]
    config, _ = cifar10_lt(arguments.images, *options, "--val_fraction", "0.1", "--runs", str(folder))
    save_config(config, folder / "config.yaml")
    sweep = {
        "base": str(folder / "config.yaml"),
        "search": {"loss.tail_skew": {"kind": "log_uniform", "low": 0.005, "high": 5}},
        "trials": count,
        "algorithm": "random",
        "asha": None,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    try:
        begun = time.perf_counter()
        _run("tune", str(folder / "sweep.yaml"), "--sweeps", str(folder), "--name", "sweep")
        seconds = {"sweep": time.perf_counter() - begun}
        trials = read_trials(folder / "sweep")
        assert [trial.state for trial in trials] == ["completed"] * count
        begun = time.perf_counter()
        for trial in trials:
            skew = str(trial.params["loss.tail_skew"])
            _run("train", str(folder / "config.yaml"), "--name", trial.name, "--loss.tail_skew", skew)
        seconds["loop"] = time.perf_counter() - begun
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(
        seconds={side: round(value, 1) for side, value in seconds.items()},
        trials_per_hour={side: round(count * 3600 / value, 1) for side, value in seconds.items()},
        ratios={"sweep_over_loop": round(seconds["loop"] / seconds["sweep"], 2)},
    )


def _run(module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"cibl_ray.{module}", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cibl_ray.{module} {' '.join(arguments)}: {done.stderr}")


if __name__ == "__main__":
    run_command(main)
