"""What augmentation does to each sample of a batch: drawn on the CPU in small arrays, from named streams.

A recipe unrolls to stages. In a stage each sample undergoes one operation or none, with one number that says how much. The
draw is apart from its application (`apply`, and `pixel_kernel` for bytes on a CPU), so that every
device, and torchvision in the tests, can apply the same one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import assert_never

import numpy as np

from pipelines.config import Augmentation, AutoAugment, Blur, ColorJitter, Cutout, Grayscale, RandAugment


class Op(IntEnum):
    """The operations, grouped by how they are computed, and what a stage's `value` means to each."""

    IDENTITY = 0
    # A pixel's new value depends on its old one alone, given statistics of the image: by table.
    BRIGHTNESS = 1  # factor
    CONTRAST = 2  # factor
    POSTERIZE = 3  # width of a level: 2 to the number of bits dropped
    SOLARIZE = 4  # threshold, 0 to 255
    SOLARIZE_ADD = 5  # what is added to values below 128
    INVERT = 6
    AUTO_CONTRAST = 7
    EQUALIZE = 8
    # Pixels move.
    SHEAR_X = 9  # pixels right for each pixel up
    SHEAR_Y = 10  # pixels down for each pixel left
    TRANSLATE_X = 11  # pixels right
    TRANSLATE_Y = 12  # pixels down
    ROTATE = 13  # degrees anti-clockwise
    # Channels or neighbours mix.
    SATURATION = 14  # factor
    HUE = 15  # turns of the colour circle
    GRAYSCALE = 16
    SHARPNESS = 17  # factor
    BLUR = 18  # standard deviation in pixels
    CUTOUT = 19  # number of the centre pixel: row · S + column


NEAREST, BILINEAR, BICUBIC = 1, 2, 4  # pixels a side that a moved pixel is made of


@dataclass(frozen=True)
class Stage:
    """One step of a recipe for a batch of B samples.

    Attributes:
        op: int8 (B,), an Op each.
        value: float64 (B,), read as the Op says.
        size: A blur's taps or a cutout's width, else 0.
        sampling: int8 (B,), how a sample whose pixels move is read: NEAREST, BILINEAR or BICUBIC; None: the nearest pixel.
        fill: The colour of what lies outside an image whose pixels move.
    """

    op: np.ndarray
    value: np.ndarray
    size: int = 0
    sampling: np.ndarray | None = None
    fill: tuple[int, int, int] = (0, 0, 0)

    @property
    def taps(self) -> np.ndarray:
        """`sampling`, for every sample."""
        return np.full(len(self.op), NEAREST, np.int8) if self.sampling is None else self.sampling

    def rows(self, part: slice | np.ndarray) -> Stage:
        """The draws of some samples."""
        sampling = None if self.sampling is None else self.sampling[part]
        return Stage(self.op[part], self.value[part], self.size, sampling, self.fill)

    @staticmethod
    def join(parts: Sequence[Stage]) -> Stage:
        """The same step of a recipe for several batches, one after the other."""
        op, value = (np.concatenate([getattr(part, name) for part in parts]) for name in ("op", "value"))
        sampling = None if parts[0].sampling is None else np.concatenate([part.taps for part in parts])
        return Stage(op, value, parts[0].size, sampling, parts[0].fill)


def draw(augmentation: Augmentation, size: int, batch: int, random: np.random.Generator) -> list[Stage]:
    """Draw the stages of one entry of a recipe.

    Args:
        augmentation: The entry.
        size: Width and height of the images, pixels.
        batch: How many images there are.
        random: Where the draws come from.

    Returns:
        The stages, in order.
    """
    match augmentation:
        case AutoAugment():
            return _auto_augment(size, batch, random, augmentation.style == "authors")
        case RandAugment(style="timm"):
            return [_of_timm(augmentation, size, batch, random) for _ in range(augmentation.count)]
        case RandAugment():
            return _rand_augment(augmentation, size, batch, random)
        case ColorJitter():
            return _color_jitter(augmentation, batch, random)
        case Grayscale():
            gray = random.random(batch) < augmentation.probability
            return [Stage(_where(gray, Op.GRAYSCALE), np.zeros(batch))]
        case Blur():
            blurred = random.random(batch) < augmentation.probability
            return [Stage(_where(blurred, Op.BLUR), random.uniform(*augmentation.sigma, size=batch), taps(augmentation, size))]
        case Cutout():
            centres = random.integers(size * size, size=batch).astype(np.float64)
            return [Stage(np.full(batch, Op.CUTOUT, dtype=np.int8), centres, augmentation.size)]
        case _:
            assert_never(augmentation)


def taps(blur: Blur, size: int) -> int:
    """The width of a blur's kernel: an odd number, by default four of the largest standard deviation to each side.

    A kernel of three taps has a standard deviation of .8 at most, whatever σ says. The image's width is the limit.
    """
    return blur.kernel if blur.kernel is not None else min(2 * math.ceil(4 * blur.sigma[1]) + 1, 2 * size - 1)


def _where(chosen: np.ndarray, op: Op) -> np.ndarray:
    return np.where(chosen, op, Op.IDENTITY).astype(np.int8)


def _color_jitter(jitter: ColorJitter, batch: int, random: np.random.Generator) -> list[Stage]:
    """Four stages: each sample's own permutation of the four operations."""
    ops = np.array([Op.BRIGHTNESS, Op.CONTRAST, Op.SATURATION, Op.HUE], dtype=np.int8)
    reach = np.array([jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue])
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.where(ops == Op.HUE, -reach, np.maximum(0, centre - reach))
    values = random.uniform(low, centre + reach, size=(batch, 4))
    chosen = random.random(batch) < jitter.probability
    order = random.permuted(np.tile(np.arange(4), (batch, 1)), axis=1)
    # An operation of no reach is left out, as torchvision does: turning the hue by nothing still rounds.
    drawn = np.where(chosen[:, None] & (reach > 0)[order], ops[order], Op.IDENTITY).astype(np.int8)
    values = np.take_along_axis(values, order, axis=1)
    return [Stage(drawn[:, step], values[:, step]) for step in range(4)]


def _rand_augment(augmentation: RandAugment, size: int, batch: int, random: np.random.Generator) -> list[Stage]:
    """Any of 14 operations with equal chances, of the strength in bin `magnitude` of 31."""
    strength = _strengths(31, size)
    ops = np.array(RAND_AUGMENT_OPS, dtype=np.int8)
    table = np.array([strength[op][augmentation.magnitude] for op in RAND_AUGMENT_OPS])
    stages = []
    for _ in range(augmentation.count):
        choice = random.integers(len(ops), size=batch)
        stage = _signed(ops[choice], table[choice], random)
        if augmentation.probability < 1:
            happens = random.random(batch) < augmentation.probability
            stage = Stage(np.where(happens, stage.op, Op.IDENTITY).astype(np.int8), stage.value)
        stages.append(stage)
    return stages


def _of_timm(augmentation: RandAugment, size: int, batch: int, random: np.random.Generator) -> Stage:
    """One operation of timm's rand-nN-mM-mstdS: of 15 with equal chances, of a level drawn about `magnitude`, 0 to 10.

    Posterize and solarize weaken with the level there, and brightness, contrast, saturation and sharpness run from .1 to 1.9.
    Pixels that move are read bilinearly or bicubically, by lot.
    """
    ops = np.array(TIMM_OPS, dtype=np.int8)[random.integers(len(TIMM_OPS), size=batch)]
    happens = random.random(batch) < augmentation.probability
    level = np.clip(augmentation.magnitude + augmentation.noise * random.standard_normal(batch), 0, 10) / 10
    signed = np.where(random.random(batch) < 0.5, -level, level)
    sampling = random.choice(np.array([BILINEAR, BICUBIC], np.int8), size=batch)
    values = {
        **dict.fromkeys(_FACTORS, 0.1 + 1.8 * level),
        **dict.fromkeys((Op.SHEAR_X, Op.SHEAR_Y), 0.3 * signed),
        **dict.fromkeys((Op.TRANSLATE_X, Op.TRANSLATE_Y), 0.45 * size * signed),
        Op.ROTATE: 30 * signed,
        Op.POSTERIZE: 2.0 ** (8 - np.trunc(4 * level)),
        Op.SOLARIZE: np.trunc(256 * level),
        Op.SOLARIZE_ADD: np.trunc(110 * level),
    }
    value = np.zeros(batch)
    for op, drawn in values.items():
        value = np.where(ops == op, drawn, value)
    return Stage(np.where(happens, ops, Op.IDENTITY).astype(np.int8), value, 0, sampling, _IMAGENET_MEAN)


def _auto_augment(size: int, batch: int, random: np.random.Generator, authors: bool) -> list[Stage]:
    """One of 25 sub-policies each; of its two operations, each with its own chance, of the strength in its bin of 10."""
    strength = _strengths(10, size)
    if authors:
        share = np.arange(10) / 9
        strength |= dict.fromkeys((Op.TRANSLATE_X, Op.TRANSLATE_Y), share * (size * 150 / 331)) | {
            Op.SOLARIZE: 256 * (1 - share)
        }
    ops = np.array([[op for op, _, _ in pair] for pair in CIFAR10_POLICY], dtype=np.int8)
    chances = np.array([[chance for _, chance, _ in pair] for pair in CIFAR10_POLICY])
    values = np.array([[strength[op][level] for op, _, level in pair] for pair in CIFAR10_POLICY])
    choice = random.integers(len(ops), size=batch)
    stages = []
    for step in range(2):
        happens = random.random(batch) < chances[choice, step]
        op = np.where(happens, ops[choice, step], Op.IDENTITY).astype(np.int8)
        stage = _signed(op, values[choice, step], random)
        stages.append(_as_authors(stage) if authors else stage)
    return stages


def _as_authors(stage: Stage) -> Stage:
    """AutoAugment's moves as Pillow makes them in the published long-tail code."""
    op, value = stage.op, stage.value
    value = np.where(op == Op.ROTATE, np.abs(value), value)  # one way
    # Pillow takes the pixel in which x + 1/2 + shift lies.
    value = np.where(np.isin(op, (Op.TRANSLATE_X, Op.TRANSLATE_Y)), -np.floor(0.5 - value), value)
    sampling = np.where(np.isin(op, (Op.SHEAR_X, Op.SHEAR_Y)), BICUBIC, NEAREST).astype(np.int8)
    return Stage(op, value, 0, sampling, (128, 128, 128))


_FACTORS = (Op.BRIGHTNESS, Op.CONTRAST, Op.SATURATION, Op.SHARPNESS)
_MOVES = (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE)


def _signed(op: np.ndarray, strength: np.ndarray, random: np.random.Generator) -> Stage:
    """Strengths to values: half of the moves go the other way, half of the factors lie below 1."""
    signed = np.where(random.random(len(op)) < 0.5, -strength, strength)
    value = np.where(np.isin(op, _MOVES), signed, strength)
    return Stage(op, np.where(np.isin(op, _FACTORS), 1 + signed, value))


def _strengths(bins: int, size: int) -> dict[Op, np.ndarray]:
    """The strength of each operation in each bin, as torchvision's AutoAugment (10 bins) and RandAugment (31) have it."""
    share = np.arange(bins) / (bins - 1)
    none = np.zeros(bins)
    shift = np.trunc(share * (size * 150 / 331))  # whole pixels; 150 of the 331 that the policy was searched with
    levels = 2.0 ** np.rint(4 * share)
    return {
        **dict.fromkeys((Op.IDENTITY, Op.INVERT, Op.AUTO_CONTRAST, Op.EQUALIZE), none),
        **dict.fromkeys((Op.SHEAR_X, Op.SHEAR_Y), 0.3 * share),
        **dict.fromkeys((Op.TRANSLATE_X, Op.TRANSLATE_Y), shift),
        Op.ROTATE: 30 * share,
        **dict.fromkeys(_FACTORS, 0.9 * share),
        Op.POSTERIZE: levels,
        Op.SOLARIZE: 255 * (1 - share),
    }


RAND_AUGMENT_OPS = (
    Op.IDENTITY,
    *_MOVES,
    *_FACTORS,
    Op.POSTERIZE,
    Op.SOLARIZE,
    Op.AUTO_CONTRAST,
    Op.EQUALIZE,
)

TIMM_OPS = (
    *_MOVES,
    *_FACTORS,
    Op.POSTERIZE,
    Op.SOLARIZE,
    Op.SOLARIZE_ADD,
    Op.INVERT,
    Op.AUTO_CONTRAST,
    Op.EQUALIZE,
)
_IMAGENET_MEAN = (124, 116, 104)

# Cubuk et al., AutoAugment, arXiv:1805.09501, table 7, as torchvision has it: operation, probability, bin.
CIFAR10_POLICY = (
    ((Op.INVERT, 0.1, 0), (Op.CONTRAST, 0.2, 6)),
    ((Op.ROTATE, 0.7, 2), (Op.TRANSLATE_X, 0.3, 9)),
    ((Op.SHARPNESS, 0.8, 1), (Op.SHARPNESS, 0.9, 3)),
    ((Op.SHEAR_Y, 0.5, 8), (Op.TRANSLATE_Y, 0.7, 9)),
    ((Op.AUTO_CONTRAST, 0.5, 0), (Op.EQUALIZE, 0.9, 0)),
    ((Op.SHEAR_Y, 0.2, 7), (Op.POSTERIZE, 0.3, 7)),
    ((Op.SATURATION, 0.4, 3), (Op.BRIGHTNESS, 0.6, 7)),
    ((Op.SHARPNESS, 0.3, 9), (Op.BRIGHTNESS, 0.7, 9)),
    ((Op.EQUALIZE, 0.6, 0), (Op.EQUALIZE, 0.5, 0)),
    ((Op.CONTRAST, 0.6, 7), (Op.SHARPNESS, 0.6, 5)),
    ((Op.SATURATION, 0.7, 7), (Op.TRANSLATE_X, 0.5, 8)),
    ((Op.EQUALIZE, 0.3, 0), (Op.AUTO_CONTRAST, 0.4, 0)),
    ((Op.TRANSLATE_Y, 0.4, 3), (Op.SHARPNESS, 0.2, 6)),
    ((Op.BRIGHTNESS, 0.9, 6), (Op.SATURATION, 0.2, 8)),
    ((Op.SOLARIZE, 0.5, 2), (Op.INVERT, 0.0, 0)),
    ((Op.EQUALIZE, 0.2, 0), (Op.AUTO_CONTRAST, 0.6, 0)),
    ((Op.EQUALIZE, 0.2, 0), (Op.EQUALIZE, 0.6, 0)),
    ((Op.SATURATION, 0.9, 9), (Op.EQUALIZE, 0.6, 0)),
    ((Op.AUTO_CONTRAST, 0.8, 0), (Op.SOLARIZE, 0.2, 8)),
    ((Op.BRIGHTNESS, 0.1, 3), (Op.SATURATION, 0.7, 0)),
    ((Op.SOLARIZE, 0.4, 5), (Op.AUTO_CONTRAST, 0.9, 0)),
    ((Op.TRANSLATE_Y, 0.9, 9), (Op.TRANSLATE_Y, 0.7, 9)),
    ((Op.AUTO_CONTRAST, 0.9, 0), (Op.SOLARIZE, 0.8, 3)),
    ((Op.EQUALIZE, 0.8, 0), (Op.INVERT, 0.1, 0)),
    ((Op.TRANSLATE_Y, 0.7, 9), (Op.AUTO_CONTRAST, 0.9, 0)),
)
