"""`python -m benchmarks.resident [--images FOLDER]`: training from images in memory, from FFCV, and by a plain PyTorch script.

ResNet-32, CIFAR-10-LT, batch 128, two views of crop and flip, CIBL: the same network, loss, optimizer on all sides. The plain
script is what people write: a DataLoader with a worker a core that stays alive, torchvision's v2 functions on uint8 tensors in
memory (the fastest of three ways, see benchmarks.cifar_loader), normalisation in the workers, eager, contiguous, float32. It is
measured once more with bf16 autocast, where this machine has bf16. Images a second, end to end. Further --field value pairs
override the configuration.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as tv

from benchmarks.data import add_arguments, cifar10_lt
from benchmarks.measure import alternate, report
from cibl_ray.config import RunConfig
from cibl_ray.hardware import resolve
from cibl_ray.losses.objective import Images, Objective
from cibl_ray.networks.network import Outputs, build_network
from cibl_ray.training.trainer import Trainer
from cibl_ray.world import World
from pipelines.common.cores import usable_cores
from pipelines.common.errors import run_command
from pipelines.prepare.prepared import Prepared


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
    """An epoch of the plain script; returns the images it trained on."""
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
        if device.type == "cuda":
            torch.cuda.synchronize()
        return seen

    return epoch


def trainer_side(config: RunConfig, prepared: Prepared, kind: str) -> Callable[[], int]:
    loader = config.loader.model_copy(update={"kind": kind})
    trainer = Trainer(config.model_copy(update={"loader": loader}), prepared, Path(tempfile.gettempdir()))

    def epoch() -> int:
        trainer.train_epoch()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return trainer.train_loaders[0].batches * config.train.batch_size

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resident", description=__doc__)
    add_arguments(parser)
    arguments, flags = parser.parse_known_args()
    size = ["--data.profile.largest", "160" if arguments.quick else "2000"]
    config, prepared = cifar10_lt(arguments.images, *size, *flags)
    config = resolve(config)
    sides = {
        "resident": trainer_side(config, prepared, "resident"),
        "plain_script": plain_script(config, prepared, bf16=False),
    }
    if importlib.util.find_spec("ffcv") is not None:
        sides["ffcv"] = trainer_side(config, prepared, "ffcv")
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


if __name__ == "__main__":
    run_command(main)
