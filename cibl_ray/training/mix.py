"""Images mixed with each other, and their labels likewise: mixup, CutMix and CMO."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cibl_ray.losses.objective import Images


def mix(images: Images, mixup: float, cutmix: float, draw: np.random.Generator) -> Images:
    """Mix each sample with the one that stands as far from the end of the batch as it does from the start.

    One share and one rectangle are drawn for the whole batch, as timm does. Where both kinds are on, each has half the steps.

    Args:
        images: Images or features.
        mixup: α of the share λ ~ Beta(α, α), x ← λ·x + (1 - λ)·x' (Zhang et al. 2018, arXiv:1710.09412); 0: none.
        cutmix: α of the share of the image outside a rectangle that comes from the other (Yun et al. 2019,
            arXiv:1905.04899); 0: none.
        draw: The random numbers.

    Returns:
        The mixed images, with the labels of the others and the share of their own.
    """
    cut = cutmix > 0 and (mixup == 0 or draw.random() < 0.5)
    alpha = cutmix if cut else mixup
    share = float(draw.beta(alpha, alpha))
    by_sample = images.pixels.unflatten(0, (-1, images.views))
    others = by_sample.flip(0)
    if cut:
        height, width = by_sample.shape[-2:]
        top, bottom, left, right = _rectangle(share, height, width, draw)
        mixed = by_sample.clone()
        mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = share * by_sample + (1 - share) * others
    return replace(images, pixels=mixed.flatten(0, 1), mixed=(images.labels.flip(0), share))


def paste(images: Images, sources: Images, draw: np.random.Generator) -> Images:
    """Paste one rectangle of each source over the image in its row (CMO: Park et al. 2022, arXiv:2112.00412).

    The share of the image outside the rectangle is drawn uniformly, once for the batch.

    Args:
        images: The run's images.
        sources: As many others, with as many views, of rare classes as often as of common ones.
        draw: The random numbers.

    Returns:
        The mixed images, with the labels of the sources and the share of their own.
    """
    by_sample = images.pixels.unflatten(0, (-1, images.views))
    others = sources.pixels.unflatten(0, (-1, images.views))
    height, width = by_sample.shape[-2:]
    top, bottom, left, right = _rectangle(float(draw.random()), height, width, draw)
    mixed = by_sample.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return replace(images, pixels=mixed.flatten(0, 1), mixed=(sources.labels, share))


def _rectangle(share: float, height: int, width: int, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a rectangle of 1 - share of the area about a random point, clipped by the border."""
    half = np.array([height, width]) * np.sqrt(1 - share) / 2
    y, x = draw.integers(0, (height, width))
    return max(int(y - half[0]), 0), min(int(y + half[0]), height), max(int(x - half[1]), 0), min(int(x + half[1]), width)
