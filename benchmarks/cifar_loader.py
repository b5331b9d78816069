"""`python -m benchmarks.cifar_loader [--images FOLDER]`: batches/s of the FFCV loader against torchvision's DataLoader.

The same CIFAR-10-LT images, two views, crop with padding 4 and flip, batch 128, and batches of uint8 pixels on both sides.
The peer gets two worker processes that stay alive, images held in memory as uint8 tensors (no decoding, no file), torchvision's
v2 transforms, and of three ways to use them the one that measures best: transforms as classes, as functions on tensors, or on
PIL images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from benchmarks.data import add_arguments, cifar10_lt
from benchmarks.measure import alternate, report
from pipelines.common.errors import run_command
from pipelines.config import LoaderConfig
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import train_plan

BATCH, WORKERS = 128, 2


class _Peer(Dataset):
    """Two crops and flips of each image by torchvision, uint8 (2, 3, 32, 32)."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, way: str) -> None:
        self.labels, self.way = labels, way
        self.transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
        self.images = images
        if way == "pil":
            self.pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        match self.way:
            case "classes":
                views = [self.transform(self.images[index]) for _ in range(2)]
            case "pil":
                views = [tv.pil_to_tensor(self.transform(self.pil[index])) for _ in range(2)]
            case _:
                padded = tv.pad(self.images[index], [4])
                draws = torch.randint(0, 9, (2, 2)).tolist()
                flips = (torch.rand(2) < 0.5).tolist()
                views = [padded[:, top : top + 32, left : left + 32] for top, left in draws]
                views = [tv.horizontal_flip(view) if flip else view for view, flip in zip(views, flips, strict=True)]
        return torch.stack(views), self.labels[index]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cifar_loader", description=__doc__)
    add_arguments(parser)
    arguments = parser.parse_args()
    config, prepared = cifar10_lt(arguments.images)
    beton = prepared.beton("train")
    images = torch.from_numpy(np.stack([beton.image(row) for row in range(len(beton))])).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(beton.labels.copy())

    ours = {
        kind: make_loader(prepared, "train", train_plan(config.data, BATCH, 0), LoaderConfig(kind=kind))
        for kind in ("ffcv", "torch")
    }
    peers = {
        way: DataLoader(
            _Peer(images, labels, way), BATCH, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True
        )
        for way in ("classes", "functions", "pil")
    }
    epochs = iter(range(10**6))

    def run_ours(kind: str, repeats: int) -> int:
        return sum(1 for _ in range(repeats) for _ in ours[kind].epoch(next(epochs)))

    def run_peer(way: str) -> int:
        return sum(1 for _ in peers[way])

    sides: dict[str, Callable[[], int]] = {
        "ffcv": lambda: run_ours("ffcv", repeats=4),  # one epoch is over in a blink
        "our_torch_loader": lambda: run_ours("torch", repeats=1),
        **{f"torchvision_{way}": partial(run_peer, way) for way in peers},
    }
    rates = alternate(sides, rounds=2 if arguments.quick else 7)
    best = max((rate["median"], name) for name, rate in rates.items() if name.startswith("torchvision"))
    report(
        batches_per_s=rates,
        batch=BATCH,
        views=2,
        peer=best[1],
        ratios={
            "ffcv_over_torchvision": round(rates["ffcv"]["median"] / best[0], 2),
            "our_torch_loader_over_torchvision": round(rates["our_torch_loader"]["median"] / best[0], 2),
        },
    )


if __name__ == "__main__":
    run_command(main)
