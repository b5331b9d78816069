"""`python -m benchmarks.train MODE [--images FOLDER] [--quick]`: how fast training is, and what limits it.

CIFAR-10-LT, ResNet-32, batch 128, two views, CIBL. FOLDER: CIFAR-10 as an image folder (train/CLASS/*, test/CLASS/*); by
default torchvision's files in data/. The sides of a comparison take turns. Rates are images a second. Further --field value
pairs override the configuration. Modes:

train_step  Training end to end (images are read, cut, normalised and trained on) against the bare step (forward, loss,
            backward and optimizer on normalised batches in memory).
step        The bare step by precision, memory layout and compiler (torch.compile, not with --quick). arithmetic_share: the time
            that the network's multiply-adds would take at the best rate of a large product here, over the step's time.
            auto_over_best: the rate of what `train.precision: auto` and `train.compile: auto` choose, over that of the best
            of the fixed choices, all channels-last. used_over_eager_bf16: that rate over the eager step's in bf16.
resident    Training from images in memory, from FFCV, and by a plain PyTorch script: a DataLoader with one worker a core,
            torchvision's v2 functions on uint8 tensors (the fastest way in benchmarks.cifar_loader), eager, contiguous,
            float32; once more with bf16 autocast where this machine has bf16.
whole_run   A whole run of a published recipe, alone on the device: CIFAR-100-LT at imbalance factor 100, two strong views, 200
            epochs, as a process of its own, evaluation and checkpoints included, against the bare step before and after it.
            FOLDER: CIFAR-100. --compile: with torch.compile, on a GPU as CUDA graphs. Without a GPU it takes many hours;
            --quick: two epochs of ResNet-20 and few images.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as tv

from benchmarks.data import add_arguments, cifar10_lt
from benchmarks.measure import alternate, report
from benchmarks.reproduce.cells import cells
from benchmarks.reproduce.lines import source
from cibl_ray.config import RunConfig, load_config
from cibl_ray.hardware import resolve
from cibl_ray.losses.objective import Images, Objective
from cibl_ray.networks.network import Outputs, build_network
from cibl_ray.run.folder import RESULT
from cibl_ray.training.arithmetic import Arithmetic, fastest, time_steps
from cibl_ray.training.trainer import Trainer
from cibl_ray.world import World
from pipelines.common.cores import usable_cores
from pipelines.common.errors import UserError, run_command
from pipelines.prepare.build import ensure_prepared
from pipelines.prepare.prepared import Prepared

_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WHOLE_RUN_QUICK = (
    *("--backbone", "resnet20", "--epochs", "2", "--warmup_epochs", "0", "--batch_size", "64"),
    *("--data.profile", "{kind: exp, imbalance: 10, largest: 50}"),
)


def bare_step(trainer: Trainer, layout: torch.memory_format | None = None, steps: int | None = None) -> Callable[[], int]:
    """The step alone, on normalised batches that lie in memory.

    Args:
        trainer: Whose network and loader are used.
        layout: The memory format of network and batches; None leaves the trainer's.
        steps: How many batches; None takes an epoch's.

    Returns:
        A function that trains on the batches and returns how many images they have.
    """
    if layout is not None:
        trainer.network.to(memory_format=layout)
    batches: list[Images] = []
    for batch in trainer.train_loaders[0].epoch(0):
        pixels = trainer.normalize(batch.views.to(trainer.device))
        pixels = pixels if layout is None else pixels.contiguous(memory_format=layout)
        batches.append(Images(pixels, batch.labels.to(trainer.device, copy=True), batch.views.shape[1]))
        if len(batches) == steps:
            break

    def run() -> int:
        trainer.network.train()
        for images in batches:
            trainer.optimize([images])
        _wait(trainer.device)
        return len(batches) * trainer.config.train.batch_size

    return run


def end_to_end(trainer: Trainer) -> Callable[[], int]:
    """The trainer's own epoch: a function that trains one and returns its images."""

    def run() -> int:
        trainer.train_epoch()
        _wait(trainer.device)
        return trainer.train_loaders[0].batches * trainer.config.train.batch_size

    return run


def trainer_of(config: RunConfig, prepared: Prepared, precision: str | None = None, compiled: bool | None = None) -> Trainer:
    """A trainer whose run folder is a temporary one. precision, compiled: in place of the configuration's."""
    given = {"precision": precision, "compile": compiled}
    config = config.with_train(**{name: value for name, value in given.items() if value is not None})
    return Trainer(config, prepared, Path(tempfile.gettempdir()))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def flops(run: Callable[[], int]) -> float:
    """Floating-point operations of the convolutions and products, per image of the batch."""
    with FlopCounterMode(display=False) as counter:
        images = run()
    return counter.get_total_flops() / images


def peak(device: torch.device, precision: str) -> float:
    """The most floating-point operations a second that a large product reaches here.

    A product of matrices, or a 1x1 convolution, which on some CPUs runs in a faster library.
    """
    size = 8192 if device.type == "cuda" else 2048
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    pixels, weights = x.view(1, 1, size, size).permute(0, 3, 1, 2), x[:, :, None, None]
    best = 0.0
    with torch.no_grad():
        for product in 8 * [lambda: x @ x, lambda: torch.conv2d(pixels, weights)]:
            begun = time.perf_counter()
            product()
            _wait(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best


def train_step(arguments: argparse.Namespace, flags: list[str]) -> None:
    """The mode `train_step`."""
    # The quick one trains on fewer images, so that its rounds are short.
    config, prepared = cifar10_lt(arguments.images, *(["--data.profile.largest", "160"] if arguments.quick else []), *flags)
    config = resolve(config)
    trainer = trainer_of(config, prepared)
    sides = {"end_to_end": end_to_end(trainer), "bare_step": bare_step(trainer)}
    rates = alternate(sides, rounds=3 if arguments.quick else 5)
    report(
        images_per_s=rates,
        views=len(config.data.views),
        batch=config.train.batch_size,
        precision=config.train.precision,
        loader=trainer.train_loaders[0].name,
        ratios={"end_to_end_over_step": round(rates["end_to_end"]["median"] / rates["bare_step"]["median"], 3)},
    )


def step(arguments: argparse.Namespace, flags: list[str]) -> None:
    """The mode `step`."""
    few = () if any(flag.startswith("--data.profile") for flag in flags) else ("--data.profile.largest", "500")
    config, prepared = cifar10_lt(arguments.images, *few, "--loader.kind", "resident", *flags)
    config = resolve(config)
    precisions = ("fp32", "bf16") if config.train.precision == "bf16" else ("fp32",)
    steps = 2 if arguments.quick else 8

    def side(precision: str, layout: str, compiled: bool) -> Callable[[], int]:
        return bare_step(trainer_of(config, prepared, precision, compiled), _LAYOUTS[layout], steps)

    sides = {f"{precision}, {layout}": side(precision, layout, False) for precision in precisions for layout in _LAYOUTS}
    work = flops(sides["fp32, channels_last"])
    for precision in () if arguments.quick else precisions:
        sides[f"{precision}, channels_last, compiled"] = side(precision, "channels_last", True)
    rates = alternate(sides, rounds=2 if arguments.quick else 7)
    peaks = {precision: peak(torch.device(config.train.device), precision) for precision in precisions}
    used = f"{precisions[-1]}, channels_last"
    fixed = {
        Arithmetic("bf16" if side.startswith("bf16") else "fp32", side.endswith("compiled")): side
        for side in sides
        if "channels_last" in side
    }
    chosen = fixed[fastest(time_steps(config, len(prepared.classes), [*fixed]))]
    best = max(rates[side]["median"] for side in fixed.values())
    report(
        images_per_s=rates,
        megaflops_an_image=round(work / 1e6, 1),
        peak_gigaflops={precision: round(value / 1e9) for precision, value in peaks.items()},
        arithmetic_share={side: round(rates[side]["median"] * work / peaks[side.partition(",")[0]], 3) for side in sides},
        auto=chosen,
        ratios={"auto_over_best": round(rates[chosen]["median"] / best, 3)}
        | (
            {"used_over_eager_bf16": round(rates[chosen]["median"] / rates["bf16, channels_last"]["median"], 3)}
            if "bf16" in precisions
            else {}
        )
        | {
            f"used_over_{side.replace(', ', '_')}": round(rates[used]["median"] / rates[side]["median"], 2)
            for side in sides
            if side != used
        },
    )


class _Views(Dataset):
    """Two crops and flips of each image, normalised: float32 (2, 3, 32, 32)."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, config: RunConfig) -> None:
        self.images, self.labels = images, labels
        self.mean, self.std = list(config.data.mean), list(config.data.std)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        padded = tv.pad(self.images[index], [4])
        draws, flips = torch.randint(0, 9, (2, 2)).tolist(), (torch.rand(2) < 0.5).tolist()
        views = [padded[:, top : top + 32, left : left + 32] for top, left in draws]
        views = [tv.horizontal_flip(view) if flip else view for view, flip in zip(views, flips, strict=True)]
        return tv.normalize(torch.stack(views).float().div_(255), self.mean, self.std), self.labels[index]


def plain_script(config: RunConfig, prepared: Prepared, bf16: bool) -> Callable[[], int]:
    """What people write: a function that trains one epoch and returns its images."""
    beton, device = prepared.beton("train"), torch.device(config.train.device)
    pixels = np.stack([beton.image(row) for row in range(len(beton))])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    batch = config.train.batch_size
    data = _Views(images, torch.from_numpy(beton.labels.copy()), config)
    loader = DataLoader(
        data, batch, shuffle=True, drop_last=True, num_workers=usable_cores(), persistent_workers=True,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    network = build_network(config.network, len(prepared.classes), config.loss.needs, seed=0).to(device)
    network = network.to(memory_format=torch.contiguous_format)
    objective = Objective(config.loss, network, prepared.train_counts, device, World(), batch)
    rates = config.optimizer
    optimizer = torch.optim.SGD(
        network.parameters(), rates.lr, rates.momentum, weight_decay=rates.weight_decay, nesterov=rates.nesterov
    )

    def run(model: torch.nn.Module, x: torch.Tensor) -> Outputs:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return model(x)

    def epoch() -> int:
        network.train()
        seen = 0
        for views, labels in loader:
            stream = Images(views.flatten(0, 1).to(device, non_blocking=True), labels.to(device, non_blocking=True), 2)
            loss = objective(network, run, [stream], 0.0)["loss"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            seen += len(labels)
        _wait(device)
        return seen

    return epoch


def resident(arguments: argparse.Namespace, flags: list[str]) -> None:
    """The mode `resident`."""
    size = ["--data.profile.largest", "160" if arguments.quick else "2000"]
    config, prepared = cifar10_lt(arguments.images, *size, *flags)
    config = resolve(config)

    def loaded_by(kind: str) -> Callable[[], int]:
        loader = config.loader.model_copy(update={"kind": kind})
        return end_to_end(trainer_of(config.model_copy(update={"loader": loader}), prepared))

    sides = {"resident": loaded_by("resident"), "plain_script": plain_script(config, prepared, bf16=False)}
    if importlib.util.find_spec("ffcv") is not None:
        sides["ffcv"] = loaded_by("ffcv")
    if config.train.precision == "bf16":
        sides["plain_script_bf16"] = plain_script(config, prepared, bf16=True)
    rates = alternate(sides, rounds=2 if arguments.quick else 5)
    report(
        images_per_s=rates,
        batch=config.train.batch_size,
        views=len(config.data.views),
        precision=config.train.precision,
        ratios={
            f"resident_over_{name}": round(rates["resident"]["median"] / rates[name]["median"], 2)
            for name in sides
            if name != "resident"
        },
    )


def whole_run(arguments: argparse.Namespace, flags: list[str]) -> None:
    """The mode `whole_run`. Raises UserError where the run fails."""
    every = cells("cifar100_lt", "gpu", 1, 0.0)
    cell = next(cell for cell in every if cell.imbalance == 100 and cell.value == "CIBL, linear head")
    compiled = ("--train.compile", "true") if arguments.compile else ()
    quick = WHOLE_RUN_QUICK if arguments.quick else ()
    options = [*source("folder", arguments.images), *cell.options, *compiled, *quick, *flags]
    config = resolve(load_config(cell.config, options))
    prepared, train = ensure_prepared(config.data, config.seed), config.train
    bare = bare_step(trainer_of(config, prepared), torch.channels_last, 2 if arguments.quick else 8)
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
    eager = bare_step(trainer_of(config, prepared, compiled=False), torch.channels_last, 1)  # graphs hide what they compute
    share = result["images_per_s"] * flops(eager) / peak(torch.device(train.device), train.precision)
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


MODES = {"train_step": train_step, "step": step, "resident": resident, "whole_run": whole_run}


def main(mode: str | None = None) -> None:
    """Run a mode: the one named first on the command line, or that of an alias."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{mode or 'train'}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if mode is None:
        parser.add_argument("mode", choices=MODES)
    add_arguments(parser)
    parser.add_argument("--compile", action="store_true", help="whole_run with torch.compile, on a GPU as CUDA graphs")
    arguments, flags = parser.parse_known_args()  # any field of the configuration, as for training
    MODES[mode or arguments.mode](arguments, flags)


if __name__ == "__main__":
    run_command(main)
