"""`python -m benchmarks.whole_run [--images FOLDER] [--compile]`: a whole run of a published recipe, alone on the device.

CIFAR-100-LT at imbalance factor 100, ResNet-32, CIBL with two strong views, 200 epochs: `python -m cibl_ray.train` as a process
of its own, from its start to its last picture, evaluation and checkpoints included; the .beton files are there before. Beside
it the limit: the bare step of the same recipe on batches in memory, before the run and after. arithmetic_share: as in
benchmarks.step. FOLDER: CIFAR-100 as an image folder (train/CLASS/*, test/CLASS/*); by default torchvision's files in data/.

Without a GPU that takes many hours; --quick: two epochs of ResNet-20 and of few images. Further --field value pairs override
the recipe.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import alternate, report
from benchmarks.reproduce_cells import cells
from benchmarks.reproduce_lines import source
from benchmarks.step import flops, peak, step_of
from cibl_ray.config import load_config
from cibl_ray.hardware import resolve
from cibl_ray.run.folder import RESULT
from pipelines.common.errors import UserError, run_command
from pipelines.prepare.build import ensure_prepared

_QUICK = (
    *("--backbone", "resnet20", "--epochs", "2", "--warmup_epochs", "0", "--batch_size", "64"),
    *("--data.profile", "{kind: exp, imbalance: 10, largest: 50}"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path)
    parser.add_argument("--compile", action="store_true", help="with torch.compile, on a GPU as CUDA graphs")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    arguments, flags = parser.parse_known_args()
    every = cells("cifar100_lt", "gpu", 1, 0.0)
    cell = next(cell for cell in every if cell.imbalance == 100 and cell.value == "CIBL, linear head")
    compiled = ("--train.compile", "true") if arguments.compile else ()
    options = [*source("folder", arguments.images), *cell.options, *compiled, *(_QUICK if arguments.quick else ()), *flags]
    config = resolve(load_config(cell.config, options))
    prepared = ensure_prepared(config.data, config.seed)
    train = config.train
    bare = step_of(config, prepared, train.precision, "channels_last", train.compile, 2 if arguments.quick else 8)
    rounds = 2 if arguments.quick else 5
    before = alternate({"step": bare}, rounds)["step"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cibl_ray.train", cell.config, *options, "--runs", folder, "--name", "run"]
        begun = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - begun
        if done.returncode:
            raise UserError((done.stderr.strip().splitlines() or ["the run was killed"])[-1])
        result = json.loads((Path(folder) / "run" / RESULT).read_text())
    after = alternate({"step": bare}, rounds)["step"]
    limit = (before["median"] + after["median"]) / 2
    device = torch.device(train.device)
    eager = step_of(config, prepared, train.precision, "channels_last", False, 1)  # graphs hide what they compute
    share = result["images_per_s"] * flops(eager) / peak(device, train.precision)
    report(
        epochs=train.epochs,
        precision=train.precision,
        compile=train.compile,
        seconds=round(seconds, 1),
        seconds_by_part={name: round(value, 1) for name, value in result["time"].items()},
        images_per_s={"run": round(result["images_per_s"], 1), "bare_step_before": before, "bare_step_after": after},
        arithmetic_share=round(share, 3),
        overall=round(100 * result["last"]["scores"]["overall"], 2),
        ratios={"run_over_bare_step": round(result["images_per_s"] / limit, 2)},
    )


if __name__ == "__main__":
    run_command(main)
