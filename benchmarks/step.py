"""`python -m benchmarks.step [--images FOLDER]`: a bare step of training by arithmetic, layout and compiler.

ResNet-32, CIFAR-10-LT, batch 128, two views, CIBL, on batches that lie in memory: float32 or bf16 mixed precision, contiguous
or channels-last, eager or (channels-last, not with --quick) by torch.compile. They take turns. arithmetic_share: how long the
network's multiply-adds would take, forward and backward, at the best rate that a large product of the same precision reaches
here, over the whole step's time. Further --field value pairs override the configuration.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.data import add_arguments, cifar10_lt
from benchmarks.measure import alternate, report
from cibl_ray.config import RunConfig
from cibl_ray.hardware import resolve
from cibl_ray.losses.objective import Images
from cibl_ray.training.trainer import Trainer
from pipelines.common.errors import run_command
from pipelines.prepare.prepared import Prepared

_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def step_of(
    config: RunConfig, prepared: Prepared, precision: str, layout: str, compiled: bool, steps: int
) -> Callable[[], int]:
    """Some steps on batches in memory; returns their images. The first call compiles."""
    train = config.train.model_copy(update={"precision": precision, "compile": compiled})
    trainer = Trainer(config.model_copy(update={"train": train}), prepared, Path(tempfile.gettempdir()))
    trainer.network.to(memory_format=_LAYOUTS[layout])
    trainer.network.train()
    loader = trainer.train_loaders[0]
    batches = []
    for _, batch in zip(range(steps), loader.epoch(0), strict=False):
        pixels = trainer.normalize(batch.views.to(trainer.device)).contiguous(memory_format=_LAYOUTS[layout])
        batches.append(Images(pixels, batch.labels.to(trainer.device, copy=True), batch.views.shape[1]))

    def run() -> int:
        for images in batches:
            trainer.optimize([images])
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return len(batches) * config.train.batch_size

    return run


def flops(run: Callable[[], int]) -> float:
    """Floating-point operations of the convolutions and products, an image of the batch."""
    with FlopCounterMode(display=False) as counter:
        images = run()
    return counter.get_total_flops() / images


def peak(device: torch.device, precision: str) -> float:
    """The most floating-point operations a second that a large product reaches here: of matrices, or as a 1x1 convolution,
    which on some CPUs runs in a faster library."""
    size = 8192 if device.type == "cuda" else 2048
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    pixels, weights = x.view(1, 1, size, size).permute(0, 3, 1, 2), x[:, :, None, None]
    best = 0.0
    with torch.no_grad():
        for product in 8 * [lambda: x @ x, lambda: torch.conv2d(pixels, weights)]:
            begun = time.perf_counter()
            product()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    add_arguments(parser)
    arguments, flags = parser.parse_known_args()
    config, prepared = cifar10_lt(arguments.images, "--data.profile.largest", "500", "--loader.kind", "resident", *flags)
    config = resolve(config)
    device = torch.device(config.train.device)
    precisions = ("fp32", "bf16") if config.train.precision == "bf16" else ("fp32",)
    steps = 2 if arguments.quick else 8
    sides, shares = {}, {}
    for precision in precisions:
        for layout in _LAYOUTS:
            sides[f"{precision}, {layout}"] = step_of(config, prepared, precision, layout, False, steps)
    work = flops(sides["fp32, channels_last"])
    for precision in () if arguments.quick else precisions:
        sides[f"{precision}, channels_last, compiled"] = step_of(config, prepared, precision, "channels_last", True, steps)
    rates = alternate(sides, rounds=2 if arguments.quick else 7)
    peaks = {precision: peak(device, precision) for precision in precisions}
    for side in sides:
        shares[side] = round(rates[side]["median"] * work / peaks[side.partition(",")[0]], 3)
    used = f"{precisions[-1]}, channels_last"
    report(
        images_per_s=rates,
        megaflops_an_image=round(work / 1e6, 1),
        peak_gigaflops={precision: round(value / 1e9) for precision, value in peaks.items()},
        arithmetic_share=shares,
        ratios={
            f"used_over_{side.replace(', ', '_')}": round(rates[used]["median"] / rates[side]["median"], 2)
            for side in sides
            if side != used
        },
    )


if __name__ == "__main__":
    run_command(main)
