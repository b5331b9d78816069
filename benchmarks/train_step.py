"""`python -m benchmarks.train_step [--images FOLDER]`: end-to-end training against the bare step on batches in memory.

ResNet-32, CIFAR-10-LT, batch 128, two views, CIBL. End to end: images read, cut, normalised and trained on, by the trainer's
own epoch. The bare step: forward, loss, backward and optimizer on normalised batches that already lie in memory. The two take
turns, an epoch's batches each. Further --field value pairs override the configuration: --train.precision fp32.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.data import add_arguments, cifar10_lt
from benchmarks.measure import alternate, report
from cibl_ray.hardware import resolve
from cibl_ray.losses.objective import Images
from cibl_ray.training.trainer import Trainer
from pipelines.common.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    add_arguments(parser)
    arguments, flags = parser.parse_known_args()  # any field of the configuration, as for training
    # The quick one trains on fewer images, so that its rounds are short.
    config, prepared = cifar10_lt(arguments.images, *(["--data.profile.largest", "160"] if arguments.quick else []), *flags)
    config = resolve(config)
    trainer = Trainer(config, prepared, Path(tempfile.gettempdir()))
    batches = []
    for batch in trainer.train_loaders[0].epoch(0):
        pixels = trainer.normalize(batch.views.to(trainer.device))
        batches.append(Images(pixels, batch.labels.to(trainer.device, copy=True), batch.views.shape[1]))
    per_epoch = len(batches) * config.train.batch_size

    def bare_step() -> int:
        trainer.network.train()
        for images in batches:
            trainer.optimize([images])
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return per_epoch

    def end_to_end() -> int:
        trainer.train_epoch()
        return per_epoch

    rates = alternate({"end_to_end": end_to_end, "bare_step": bare_step}, rounds=3 if arguments.quick else 5)
    report(
        images_per_s=rates,
        views=len(config.data.views),
        batch=config.train.batch_size,
        precision=config.train.precision,
        loader=trainer.train_loaders[0].name,
        ratios={"end_to_end_over_step": round(rates["end_to_end"]["median"] / rates["bare_step"]["median"], 3)},
    )


if __name__ == "__main__":
    run_command(main)
