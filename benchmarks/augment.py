"""`python -m benchmarks.augment [--images FOLDER] [--quick]`: images/s of batched augmentation against torchvision's v2.

The same recipes on the same images, uint8 in and uint8 out, crop and flip on neither side:
- cifar: AutoAugment (CIFAR-10 policy) and Cutout 16, CIFAR-10 at 32x32, batch 256;
- simclr: color jitter with probability .8 and grayscale with .2, the same images;
- imagenet: simclr's and a Gaussian blur of 23 taps with probability .5, crops of photographs at 224x224, batch 32;
- randaugment: two operations of magnitude 10, the same crops.

Ours runs in the training process, on the CPU that both sides share. The peer gets two worker processes that stay alive, one
torch thread each, and images held in memory; of uint8 tensors and PIL images the one that measures best counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from benchmarks.data import add_arguments, cifar10_lt
from benchmarks.measure import alternate, report
from pipelines.augment.draws import taps
from pipelines.augment.recipe import Augment
from pipelines.common.errors import run_command
from pipelines.config import Augmentation, AutoAugment, Blur, ColorJitter, Cutout, Grayscale, RandAugment, View

WORKERS = 2
JITTER, GRAY, BLUR = ColorJitter(kind="color_jitter"), Grayscale(kind="grayscale"), Blur(kind="blur")
RECIPES: dict[str, tuple[Augmentation, ...]] = {
    "cifar": (AutoAugment(kind="auto_augment"), Cutout(kind="cutout")),
    "simclr": (JITTER, GRAY),
    "imagenet": (JITTER, GRAY, BLUR),
    "randaugment": (RandAugment(kind="rand_augment"),),
}
BATCH = {"cifar": 256, "simclr": 256, "imagenet": 32, "randaugment": 32}


class _Cutout(torch.nn.Module):
    """Cutout of one image, a tensor (3, S, S) or a PIL image: torchvision has none with DeVries & Taylor's border."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, image: torch.Tensor | Image.Image) -> torch.Tensor | Image.Image:
        size = image.size[0] if isinstance(image, Image.Image) else image.shape[-1]
        y, x = torch.randint(size, (2,)).tolist()
        top, left = max(0, y - self.width // 2), max(0, x - self.width // 2)
        bottom, right = min(size, y + self.width // 2), min(size, x + self.width // 2)
        if isinstance(image, Image.Image):
            image = image.copy()
            image.paste((0, 0, 0), (left, top, right, bottom))
            return image
        return tv.erase(image, top, left, bottom - top, right - left, torch.zeros(3, 1, 1, dtype=torch.uint8))


def _peer_transform(recipe: tuple[Augmentation, ...], size: int) -> Callable:
    """The recipe in torchvision's classes."""
    steps: list[Callable] = []
    for part in recipe:
        match part:
            case AutoAugment():
                steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10))
            case RandAugment():
                steps.append(v2.RandAugment(part.count, part.magnitude))
            case Cutout():
                steps.append(_Cutout(part.size))
            case ColorJitter():
                jitter = v2.ColorJitter(part.brightness, part.contrast, part.saturation, part.hue)
                steps.append(v2.RandomApply([jitter], part.probability))
            case Grayscale():
                steps.append(v2.RandomGrayscale(part.probability))
            case Blur():
                steps.append(v2.RandomApply([v2.GaussianBlur(taps(part, size), part.sigma)], part.probability))
    return v2.Compose(steps)


class _Peer(Dataset):
    """Each image after torchvision's transform, uint8 (3, S, S)."""

    def __init__(self, images: torch.Tensor, transform: Callable, pil: bool) -> None:
        self.transform, self.pil = transform, pil
        self.images = [tv.to_pil_image(image) for image in images] if pil else images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = self.transform(self.images[index])
        return tv.pil_to_tensor(image) if self.pil else image


def _cifar(arguments: argparse.Namespace) -> torch.Tensor:
    """Images of CIFAR-10-LT, uint8 (N, 3, 32, 32)."""
    _, prepared = cifar10_lt(arguments.images)
    beton = prepared.beton("train")
    rows = np.random.default_rng(0).permutation(len(beton))[: 2560 if arguments.quick else 7680]
    return torch.from_numpy(np.stack([beton.image(row) for row in rows])).permute(0, 3, 1, 2).contiguous()


def _photographs(count: int, size: int) -> torch.Tensor:
    """Crops of scikit-learn's two photographs, uint8 (count, 3, size, size)."""
    photographs = load_sample_images().images
    random = np.random.default_rng(0)
    corners = random.integers(0, [427 - size, 640 - size], size=(count, 2))
    crops = [photographs[row % 2][top : top + size, left : left + size] for row, (top, left) in enumerate(corners)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def _rates(recipe: str, images: torch.Tensor, rounds: int) -> dict[str, dict[str, float]]:
    size, batch = images.shape[-1], BATCH[recipe]
    augment = Augment((View(augment=RECIPES[recipe]),), size, seed=0)
    batches = images.permute(0, 2, 3, 1).unsqueeze(1).contiguous().split(batch)
    epochs = iter(range(10**6))

    def run_ours() -> int:
        repeats, epoch = 3, next(epochs)  # a round of ours would else be over in a blink
        return sum(len(augment(views, epoch, step)) for step, views in enumerate(batches * repeats))

    def run_peer(loader: DataLoader) -> int:
        return sum(len(result) for result in loader)

    transform = _peer_transform(RECIPES[recipe], size)
    peers = {
        way: DataLoader(_Peer(images, transform, way == "pil"), batch, num_workers=WORKERS, persistent_workers=True)
        for way in ("tensor", "pil")
    }
    sides: dict[str, Callable[[], int]] = {
        "batched": run_ours,
        **{f"torchvision_{way}": partial(run_peer, loader) for way, loader in peers.items()},
    }
    return alternate(sides, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.augment", description=__doc__)
    add_arguments(parser)
    arguments = parser.parse_args()
    small = _cifar(arguments)
    large = _photographs(64 if arguments.quick else 256, 224)
    rates, ratios = {}, {}
    for recipe in RECIPES:
        rates[recipe] = _rates(recipe, large if BATCH[recipe] == 32 else small, rounds=3 if arguments.quick else 7)
        peer = max(rate["median"] for side, rate in rates[recipe].items() if side != "batched")
        ratios[recipe] = round(rates[recipe]["batched"]["median"] / peer, 2)
    report(images_per_s=rates, batch=BATCH, ratios={"batched_over_torchvision": min(ratios.values()), **ratios})


if __name__ == "__main__":
    run_command(main)
