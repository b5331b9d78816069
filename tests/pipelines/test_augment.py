"""Augmentation against torchvision, one sample at a time, on the same draw.

Equal to the byte, but for these, of which the tests state the distance:
- hue: torchvision goes by way of HSV in other steps of rounding, at most 1/255 apart;
- blur: taps beyond four standard deviations are left out, and the sums are taken across and down, at most 1/255 apart.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from pipelines.augment import apply as augment_apply
from pipelines.augment.draws import (
    BICUBIC,
    BILINEAR,
    CIFAR10_POLICY,
    NEAREST,
    RAND_AUGMENT_OPS,
    TIMM_OPS,
    Op,
    Stage,
    draw,
    taps,
)
from pipelines.augment.recipe import Augment, _kernel
from pipelines.common.errors import UserError
from pipelines.common.seeding import stream
from pipelines.common.validation import validate
from pipelines.config import AutoAugment, Blur, ColorJitter, Cutout, Grayscale, RandAugment, View
from pipelines.prepare.command import PrepareConfig
from tests.conftest import data_config

NAMES = {
    "Identity": Op.IDENTITY,
    "ShearX": Op.SHEAR_X,
    "ShearY": Op.SHEAR_Y,
    "TranslateX": Op.TRANSLATE_X,
    "TranslateY": Op.TRANSLATE_Y,
    "Rotate": Op.ROTATE,
    "Brightness": Op.BRIGHTNESS,
    "Color": Op.SATURATION,
    "Contrast": Op.CONTRAST,
    "Sharpness": Op.SHARPNESS,
    "Posterize": Op.POSTERIZE,
    "Solarize": Op.SOLARIZE,
    "AutoContrast": Op.AUTO_CONTRAST,
    "Equalize": Op.EQUALIZE,
    "Invert": Op.INVERT,
}


def torchvision_op(image: torch.Tensor, op: Op, value: float, size: int) -> torch.Tensor:
    """torchvision's function for one operation on one image (3, S, S)."""

    def affine(translate=(0, 0), shear=(0.0, 0.0), center=None):
        return tv.affine(image, 0.0, list(translate), 1.0, [math.degrees(math.atan(x)) for x in shear], center=center)

    functions = {
        Op.IDENTITY: lambda: image,
        Op.BRIGHTNESS: lambda: tv.adjust_brightness(image, value),
        Op.CONTRAST: lambda: tv.adjust_contrast(image, value),
        Op.POSTERIZE: lambda: tv.posterize(image, 8 - int(math.log2(value))),
        Op.SOLARIZE: lambda: tv.solarize(image, value),
        Op.SOLARIZE_ADD: lambda: torch.where(image < 128, (image.int() + int(value)).clamp(max=255), image.int()).byte(),
        Op.INVERT: lambda: tv.invert(image),
        Op.AUTO_CONTRAST: lambda: tv.autocontrast(image),
        Op.EQUALIZE: lambda: tv.equalize(image),
        Op.SHEAR_X: lambda: affine(shear=(value, 0.0), center=[0, 0]),
        Op.SHEAR_Y: lambda: affine(shear=(0.0, value), center=[0, 0]),
        Op.TRANSLATE_X: lambda: affine(translate=(int(value), 0)),
        Op.TRANSLATE_Y: lambda: affine(translate=(0, int(value))),
        Op.ROTATE: lambda: tv.rotate(image, value),
        Op.SATURATION: lambda: tv.adjust_saturation(image, value),
        Op.HUE: lambda: tv.adjust_hue(image, value),
        Op.GRAYSCALE: lambda: tv.rgb_to_grayscale(image, 3),
        Op.SHARPNESS: lambda: tv.adjust_sharpness(image, value),
        Op.BLUR: lambda: tv.gaussian_blur(image, [size, size], [value, value]),
        Op.CUTOUT: lambda: cut_out(image, int(value), size),
    }
    return functions[op]()


def cut_out(image: torch.Tensor, centre: int, width: int) -> torch.Tensor:
    """DeVries & Taylor's own reference: a mask whose corners are clipped."""
    size = image.shape[-1]
    y, x = divmod(centre, size)
    mask = np.ones((size, size), np.uint8)
    top, bottom = np.clip([y - width // 2, y + width // 2], 0, size)
    left, right = np.clip([x - width // 2, x + width // 2], 0, size)
    mask[top:bottom, left:right] = 0
    return image * torch.from_numpy(mask)


def apply(stages: list[Stage], planes: torch.Tensor) -> torch.Tensor:
    """The stages as a GPU applies them; what is compiled for a CPU gives the same bytes, but for a blur's."""
    result = augment_apply.apply(stages, planes)
    if importlib.util.find_spec("numba") is not None:
        from pipelines.augment import pixel_kernel

        views = planes.permute(0, 2, 3, 1).unsqueeze(1).repeat(1, 2, 1, 1, 1)
        compiled = torch.zeros_like(views)
        pixel_kernel.augment(views, compiled, 1, stages)
        rounded = any((stage.op == Op.BLUR).any() or stage.sampling is not None for stage in stages)
        assert distance(compiled[:, 1].permute(0, 3, 1, 2), result)[1] <= rounded
        assert not compiled[:, 0].any()
    return result


def one_by_one(planes: torch.Tensor, stages: list[Stage]) -> torch.Tensor:
    """The same draw through torchvision, sample by sample."""
    results = []
    for row, image in enumerate(planes):
        for stage in stages:
            image = torchvision_op(image, Op(stage.op[row]), float(stage.value[row]), stage.size)
        results.append(image)
    return torch.stack(results)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, int]:
    """Mean and greatest difference, in 1/255."""
    difference = (ours.int() - theirs.int()).abs()
    return float(difference.float().mean()), int(difference.max())


def crops(count: int, size: int) -> torch.Tensor:
    """Crops of two photographs, uint8 (count, 3, size, size)."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    photos = load_sample_images().images
    corners = random.integers(0, [427 - size, 640 - size], size=(count, 2))
    cut = [photos[row % 2][top : top + size, left : left + size] for row, (top, left) in enumerate(corners)]
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).contiguous()


def edge_cases(size: int) -> torch.Tensor:
    """Images on which statistics degenerate: one value, two values, one odd pixel, noise, pure colours, a digit."""
    from sklearn.datasets import load_digits

    random = torch.Generator().manual_seed(0)
    constant = [torch.full((3, size, size), level) for level in (0, 1, 127, 254, 255)]
    two = torch.where(torch.rand(3, size, size, generator=random) < 0.3, 17, 200)
    odd = torch.full((3, size, size), 90)
    odd[:, 1, 2] = 91
    noise = torch.randint(0, 256, (3, size, size), generator=random)
    pure = torch.tensor([0, 255])[torch.randint(0, 2, (3, size, size), generator=random)]
    digit = np.kron(load_digits().images[0] * 15, np.ones((8, 8)))[:size, :size]
    digit = torch.from_numpy(np.resize(digit, (size, size))).expand(3, -1, -1)
    return torch.stack([image.to(torch.uint8) for image in (*constant, two, odd, noise, pure, digit)])


VALUES = {
    Op.BRIGHTNESS: (0.0, 0.1, 0.73, 1.0, 1.4, 1.9),
    Op.CONTRAST: (0.0, 0.1, 0.73, 1.0, 1.4, 1.9),
    Op.POSTERIZE: (1, 2, 4, 8, 16, 128),
    Op.SOLARIZE: (0.0, 56.6667, 113.3333, 128, 254.5, 255),
    Op.SOLARIZE_ADD: (0, 40, 110),
    Op.INVERT: (0,),
    Op.AUTO_CONTRAST: (0,),
    Op.EQUALIZE: (0,),
    Op.SHEAR_X: (-0.3, -0.1, 0.0, 0.0667, 0.2333),
    Op.SHEAR_Y: (-0.3, -0.1, 0.0, 0.0667, 0.2333),
    Op.TRANSLATE_X: (-14, -4, 0, 1, 9),
    Op.TRANSLATE_Y: (-14, -4, 0, 1, 9),
    Op.ROTATE: (-30, -6.6667, 0.0, 10, 27.3),
    Op.SATURATION: (0.0, 0.1, 0.73, 1.0, 1.4, 1.9),
    Op.HUE: (-0.5, -0.1, 0.0, 0.03, 0.1, 0.5),
    Op.GRAYSCALE: (0,),
    Op.SHARPNESS: (0.0, 0.1, 0.73, 1.0, 1.4, 1.9),
    Op.BLUR: (0.1, 0.5, 1.3, 2.0),
    Op.CUTOUT: (0, 31, 200, 333, 1023),
}
SIZES = {Op.BLUR: 7, Op.CUTOUT: 16}
ROUNDED = {Op.HUE: 1, Op.BLUR: 1}  # greatest distance where the definition is not torchvision's to the byte


@pytest.mark.parametrize("op", VALUES, ids=lambda op: op.name)
@pytest.mark.parametrize("size", [32, 45])
def test_each_operation_is_torchvisions(op, size):
    images = torch.cat([crops(6, size), edge_cases(size)])
    for value in VALUES[op]:
        stage = Stage(np.full(len(images), op, np.int8), np.full(len(images), float(value)), SIZES.get(op, 0))
        mean, greatest = distance(apply([stage], images), one_by_one(images, [stage]))
        assert greatest <= ROUNDED.get(op, 0), (value, mean)
        assert mean < 0.05


def test_a_stage_of_every_operation_at_once():
    """Grouping: each sample gets its own operation and value, and comes back to its own row."""
    ops = list(VALUES)
    random = np.random.default_rng(3)
    codes = random.permutation(np.repeat(ops, 4)).astype(np.int8)
    codes[::7] = Op.IDENTITY
    values = np.array([float(random.choice(VALUES.get(Op(code), (0.0,)))) for code in codes])
    images = crops(len(codes), 32)
    stage = Stage(codes, values, 7)  # 7: taps of the blurs and, as an odd width, of the squares
    chosen = codes != Op.CUTOUT
    ours = apply([stage], images)
    assert distance(ours[chosen], one_by_one(images, [stage])[chosen])[1] <= 1


MOVED_AS_PILLOW_DOES = (
    AutoAugment(kind="auto_augment", style="authors"),
    RandAugment(kind="rand_augment", style="timm", noise=0.5, probability=0.5),
)
RECIPES = {
    "auto_augment": AutoAugment(kind="auto_augment"),
    "rand_augment": RandAugment(kind="rand_augment"),
    "color_jitter": ColorJitter(kind="color_jitter"),
    "grayscale": Grayscale(kind="grayscale"),
    "blur": Blur(kind="blur"),
    "cutout": Cutout(kind="cutout"),
}


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize(("size", "count"), [(32, 150), (96, 24)])
def test_whole_recipes_are_torchvisions(kind, size, count):
    """The same draws through torchvision's functions, one sample at a time: at most 4/255 apart, less than 1/255 on average."""
    images = crops(count, size)
    stages = draw(RECIPES[kind], size, count, stream(0, kind))
    mean, greatest = distance(apply(stages, images), one_by_one(images, stages))
    assert mean < 0.1
    assert greatest <= 4


def test_large_images_are_computed_in_pieces_of_one_group_or_by_several_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    images = crops(12, 224)
    for kind in ("color_jitter", "blur", "rand_augment", "auto_augment"):
        stages = draw(RECIPES[kind], 224, 12, stream(1, kind))
        assert distance(apply(stages, images), one_by_one(images, stages))[1] <= 4


@pytest.mark.parametrize("size", [32, 224, 331])
def test_auto_augments_policy_is_torchvisions(size):
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    assert len(CIFAR10_POLICY) == 25
    stages = draw(RECIPES["auto_augment"], size, 20_000, stream(0))
    possible = [{(Op.IDENTITY, 0.0)}, {(Op.IDENTITY, 0.0)}]
    for ours, pair in zip(CIFAR10_POLICY, theirs._policies, strict=True):
        for step, ((op, chance, _), (name, probability, level)) in enumerate(zip(ours, pair, strict=True)):
            assert (op, chance) == (NAMES[name], probability)
            possible[step] |= expected_values(name, theirs._AUGMENTATION_SPACE, 10, level, size)
    for stage, allowed in zip(stages, possible, strict=True):
        assert drawn(stage) <= {(op, round(value, 3)) for op, value in allowed}


@pytest.mark.parametrize("magnitude", [0, 10, 30])
def test_rand_augments_strengths_are_torchvisions(magnitude):
    theirs = v2.RandAugment(2, magnitude)
    assert {NAMES[name] for name in theirs._AUGMENTATION_SPACE} == set(RAND_AUGMENT_OPS)
    assert len(RAND_AUGMENT_OPS) == len(theirs._AUGMENTATION_SPACE)
    config = RandAugment(kind="rand_augment", magnitude=magnitude)
    for size in (32, 224):
        allowed = set()
        for name in theirs._AUGMENTATION_SPACE:
            allowed |= expected_values(name, theirs._AUGMENTATION_SPACE, theirs.num_magnitude_bins, magnitude, size)
        stages = draw(config, size, 5000, stream(0))
        assert len(stages) == 2
        for stage in stages:
            assert drawn(stage) == {(op, round(value, 3)) for op, value in allowed}


def expected_values(name: str, space: dict, bins: int, level: int | None, size: int) -> set[tuple[Op, float]]:
    """Every value that torchvision may give an operation, in our units."""
    op = NAMES[name]
    function, signed = space[name]
    magnitudes = function(bins, size, size)
    if magnitudes is None:
        return {(op, 0.0)}
    strength = float(magnitudes[level])
    if op == Op.POSTERIZE:
        return {(op, 2.0 ** (8 - strength))}
    if op == Op.SOLARIZE:
        return {(op, 255 * strength)}
    if op in (Op.TRANSLATE_X, Op.TRANSLATE_Y):
        strength = float(int(strength))
    offset = 1 if op in (Op.BRIGHTNESS, Op.SATURATION, Op.CONTRAST, Op.SHARPNESS) else 0
    return {(op, offset + strength), (op, offset - strength)} if signed else {(op, strength)}


def drawn(stage: Stage) -> set[tuple[Op, float]]:
    values = np.where(stage.op == Op.IDENTITY, 0, stage.value)
    return {(Op(op), round(float(value), 3) + 0.0) for op, value in zip(stage.op, values, strict=True)}


def test_auto_augment_draws_each_operation_as_often_as_the_policy_says():
    count = 50_000
    for step, stage in enumerate(draw(RECIPES["auto_augment"], 32, count, stream(0))):
        expected: Counter[Op] = Counter()
        for pair in CIFAR10_POLICY:
            expected[pair[step][0]] += pair[step][1] / 25
        for op, share in expected.items():
            assert np.mean(stage.op == op) == pytest.approx(share, abs=0.01)
        rotated = stage.value[np.isin(stage.op, [Op.SHEAR_Y, Op.TRANSLATE_Y, Op.ROTATE])]
        assert np.mean(rotated < 0) == pytest.approx(0.5, abs=0.03)


def test_rand_augment_draws_all_operations_alike_and_independently():
    first, second = draw(RECIPES["rand_augment"], 32, 50_000, stream(0))
    for op in RAND_AUGMENT_OPS:
        assert np.mean(first.op == op) == pytest.approx(1 / 14, abs=0.006)
        assert np.mean(second.op[first.op == op] == op) == pytest.approx(1 / 14, abs=0.03)


SMOOTH = {BILINEAR: Image.Resampling.BILINEAR, BICUBIC: Image.Resampling.BICUBIC, NEAREST: Image.Resampling.NEAREST}


def pillows_move(image: Image.Image, op: Op, value: float, taps: int, fill: tuple[int, int, int]) -> Image.Image:
    """As timm and the published long-tail code call Pillow."""
    rows = {
        Op.SHEAR_X: (1, value, 0, 0, 1, 0),
        Op.SHEAR_Y: (1, 0, 0, value, 1, 0),
        Op.TRANSLATE_X: (1, 0, -value, 0, 1, 0),
        Op.TRANSLATE_Y: (1, 0, 0, 0, 1, -value),
    }
    if op == Op.ROTATE:
        return image.rotate(value, SMOOTH[taps], fillcolor=fill)
    return image.transform(image.size, Image.Transform.AFFINE, rows[op], SMOOTH[taps], fillcolor=fill)


@pytest.mark.parametrize("sampling", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("size", [32, 45])
def test_pixels_read_between_others_are_pillows(sampling, size):
    """At most 1/255 apart, where both have the pixel within the image; a place on its very border may fall on either side."""
    images, fill = torch.cat([crops(4, size), edge_cases(size)]), (124, 116, 104)
    moves = {
        Op.SHEAR_X: (-0.3, 0.17),
        Op.SHEAR_Y: (0.3, -0.05),
        Op.TRANSLATE_X: (4.3, -9.5),
        Op.TRANSLATE_Y: (0.25, 14),
        Op.ROTATE: (27.3, -9),
    }
    for op, values in moves.items():
        for value in values:
            count = len(images)
            stage = Stage(np.full(count, op, np.int8), np.full(count, float(value)), 0, np.full(count, sampling, np.int8), fill)
            ours = apply([stage], images).permute(0, 2, 3, 1).numpy().astype(int)
            theirs = [
                np.asarray(pillows_move(Image.fromarray(image.permute(1, 2, 0).numpy()), op, value, sampling, fill), int)
                for image in images
            ]
            apart = np.abs(ours - np.stack(theirs)).max(3)
            assert (apart > 1).any(0).sum() <= 2, (op, value, apart.max())


def test_moved_images_may_have_grey_outside():
    images = crops(4, 32)
    stage = Stage(np.full(4, Op.TRANSLATE_X, np.int8), np.full(4, 9.0), 0, None, (128, 128, 128))
    moved = apply([stage], images)
    assert (moved[..., :9] == 128).all()
    assert torch.equal(moved[..., 9:], images[..., :-9])


def test_timms_rand_augment_has_timms_operations_and_strengths():
    timm = pytest.importorskip("timm.data.auto_augment")
    names = {**NAMES, "SolarizeAdd": Op.SOLARIZE_ADD, "TranslateXRel": Op.TRANSLATE_X, "TranslateYRel": Op.TRANSLATE_Y}
    assert sorted(names[name] for name in timm._RAND_TRANSFORMS) == sorted(TIMM_OPS)
    for level in (0, 3, 10):
        config = RandAugment(kind="rand_augment", style="timm", magnitude=level)
        stages = draw(config, 224, 5000, stream(0))
        assert len(stages) == 2
        allowed = set()
        for name in timm._RAND_TRANSFORMS:
            function, op = timm.LEVEL_TO_ARG[name], names[name]
            if function is None:
                allowed.add((op, 0.0))
            for _ in range(30 if function is not None else 0):
                (value,) = function(level, {})
                value = {Op.POSTERIZE: lambda bits: 2.0 ** (8 - bits)}.get(op, float)(value)
                value *= 224 if op in (Op.TRANSLATE_X, Op.TRANSLATE_Y) else 1
                allowed.add((op, round(value, 3) + 0.0))
        for stage in stages:
            assert drawn(stage) == allowed
            assert {*stage.taps.tolist()} == {BILINEAR, BICUBIC}


def test_timms_rand_augment_draws_levels_about_the_magnitude_and_each_operation_by_chance():
    config = RandAugment(kind="rand_augment", style="timm", magnitude=9, noise=0.5, probability=0.5)
    for stage in draw(config, 224, 50_000, stream(0)):
        assert np.mean(stage.op == Op.IDENTITY) == pytest.approx(0.5, abs=0.01)
        assert np.mean(stage.op == Op.ROTATE) == pytest.approx(0.5 / 15, abs=0.004)
        levels = np.abs(stage.value[stage.op == Op.ROTATE]) / 3
        assert levels.mean() == pytest.approx(9, abs=0.05)
        assert levels.std() == pytest.approx(0.5, abs=0.05)
        assert levels.max() <= 10
    chance = draw(RandAugment(kind="rand_augment", probability=0.25), 32, 20_000, stream(0))[0]
    assert np.mean(chance.op != Op.IDENTITY) == pytest.approx(0.25 * 13 / 14, abs=0.01)


def test_the_authors_auto_augment_moves_as_pillow_does_in_their_code():
    """Grey 128 outside, bicubic shears, rotations one way; all else is drawn as in torchvision's style."""
    config = AutoAugment(kind="auto_augment", style="authors")
    images = crops(400, 32)
    theirs, ours = (draw(each, 32, 400, stream(0)) for each in (RECIPES["auto_augment"], config))
    seen, shifts = Counter(), {np.trunc(shift): shift for shift in np.linspace(0, 32 * 150 / 331, 10)}
    for before, stage in zip(theirs, ours, strict=True):
        assert (before.op == stage.op).all()
        other = ~np.isin(stage.op, (Op.IDENTITY, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE, Op.SOLARIZE))
        assert (before.value == stage.value)[other].all()
        assert (stage.value[stage.op == Op.ROTATE] > 0).all()
        assert stage.fill == (128, 128, 128)
        moved = apply([stage], images).permute(0, 2, 3, 1).numpy().astype(int)
        for row, (op, value) in enumerate(zip(stage.op, stage.value, strict=True)):
            if not Op.SHEAR_X <= op <= Op.ROTATE:
                continue
            image = Image.fromarray(images[row].permute(1, 2, 0).numpy())
            if op in (Op.TRANSLATE_X, Op.TRANSLATE_Y):  # pixels, of the strength before it was rounded
                value = np.sign(before.value[row]) * shifts[abs(before.value[row])]
            taps = BICUBIC if op in (Op.SHEAR_X, Op.SHEAR_Y) else NEAREST
            expected = np.asarray(pillows_move(image, Op(op), value, taps, stage.fill), int)
            seen[op] += 1
            assert (np.abs(moved[row] - expected).max(2) > 1).sum() <= 2, (Op(op).name, value)
    assert {*seen} == {Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE}
    solarized = {value for stage in ours for value in stage.value[stage.op == Op.SOLARIZE].round(2)}
    assert solarized == {199.11, 28.44, 113.78, 170.67}


def test_color_jitter_draws_what_torchvision_draws():
    count = 40_000
    stages = draw(RECIPES["color_jitter"], 32, count, stream(0))
    ops, values = np.stack([stage.op for stage in stages]), np.stack([stage.value for stage in stages])
    jittered = ops[0] != Op.IDENTITY
    assert np.mean(jittered) == pytest.approx(0.8, abs=0.01)
    assert ((ops != Op.IDENTITY) == jittered).all()
    orders = Counter(map(tuple, ops[:, jittered].T.tolist()))
    assert len(orders) == 24
    assert max(orders.values()) < 1.25 * min(orders.values())
    for op, low, high in ((Op.BRIGHTNESS, 0.6, 1.4), (Op.CONTRAST, 0.6, 1.4), (Op.SATURATION, 0.6, 1.4), (Op.HUE, -0.1, 0.1)):
        of_op = values[ops == op]
        assert low <= of_op.min() < of_op.max() <= high
        assert of_op.mean() == pytest.approx((low + high) / 2, abs=(high - low) / 100)
        assert of_op.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.02)


def test_color_jitter_leaves_out_what_has_no_reach():
    config = ColorJitter(kind="color_jitter", hue=0, contrast=0, brightness=3, probability=1)
    stages = draw(config, 32, 1000, stream(0))
    assert {Op(op) for stage in stages for op in stage.op} == {Op.IDENTITY, Op.BRIGHTNESS, Op.SATURATION}
    brightness = np.concatenate([stage.value[stage.op == Op.BRIGHTNESS] for stage in stages])
    assert len(brightness) == 1000
    assert 0 <= brightness.min() < brightness.max() <= 4  # max(0, 1 - 3) to 1 + 3


def test_blur_and_cutout_draw_over_their_whole_range():
    (blur,) = draw(RECIPES["blur"], 224, 20_000, stream(0))
    assert blur.size == 17
    assert np.mean(blur.op == Op.BLUR) == pytest.approx(0.5, abs=0.01)
    assert 0.1 <= blur.value.min() < 0.11
    assert 1.99 < blur.value.max() <= 2.0
    (squares,) = draw(RECIPES["cutout"], 8, 20_000, stream(0))
    assert np.bincount(squares.value.astype(int), minlength=64).min() > 200
    assert len(np.unique(squares.value)) == 64


@pytest.mark.parametrize(
    ("size", "sigma", "expected"), [(4, 2.0, 7), (8, 2.0, 15), (32, 2.0, 17), (32, 0.6, 7), (224, 2.0, 17)]
)
def test_a_blurs_kernel_is_sized_by_its_sigma(size, sigma, expected):
    assert taps(Blur(kind="blur", sigma=(0.1, sigma)), size) == expected
    assert taps(Blur(kind="blur", kernel=5), size) == 5


def test_a_blur_spreads_a_point_as_far_as_pillows():
    """σ = 2 on 32 pixels: a kernel of three taps would spread .8."""
    point = np.zeros((32, 32, 3), np.uint8)
    point[16, 16] = 255
    pillow = np.asarray(Image.fromarray(point).filter(ImageFilter.GaussianBlur(2)), float)[..., 0]
    size = taps(Blur(kind="blur"), 32)
    stage = Stage(np.array([Op.BLUR], np.int8), np.array([2.0]), size)
    ours = apply([stage], torch.from_numpy(point).permute(2, 0, 1)[None])[0, 0].double().numpy()
    places = np.arange(32)
    spread = [np.sqrt((image.sum(0) * (places - 16) ** 2).sum() / image.sum()) for image in (ours, pillow)]
    assert spread[0] == pytest.approx(spread[1], abs=0.25)  # bytes cut the tails off
    assert spread[0] > 1.6


def views_of(images: torch.Tensor, count: int) -> torch.Tensor:
    """(B, 3, S, S) as a loader gives them: (B, V, S, S, 3)."""
    return images.permute(0, 2, 3, 1).unsqueeze(1).repeat(1, count, 1, 1, 1)


FULL = (*RECIPES.values(), *MOVED_AS_PILLOW_DOES)


def full(seed: int = 0) -> Augment:
    return Augment((View(augment=FULL), View(augment=FULL)), 32, seed)


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_compiled_code_takes_what_fits_alone():
    """It looks at no bounds, so that is done before."""
    from pipelines.augment import pixel_kernel

    views = crops(4, 32).permute(0, 2, 3, 1).unsqueeze(1).contiguous()
    short = Stage(np.full(3, Op.INVERT, np.int8), np.zeros(3))
    right = Stage(np.full(4, Op.INVERT, np.int8), np.zeros(4))
    for stages, given, result in (
        ([short], views, torch.empty_like(views)),
        ([right], views, torch.empty_like(views[:3])),
        ([right], views.float(), torch.empty_like(views)),
        ([right], views.permute(0, 1, 3, 2, 4), torch.empty_like(views)),
    ):
        with pytest.raises(ValueError, match="samples for views"):
            pixel_kernel.augment(given, result, 0, stages)
    pixel_kernel.augment(views[:0], views[:0], 0, [Stage(right.op[:0], right.value[:0])])
    augment = Augment((View(augment=(RECIPES["rand_augment"],)),), 32, seed=0)
    with pytest.raises(ValueError, match="samples for views"):
        augment(views, 0, 0, slice(0, 3), 8)


def test_without_numba_or_where_it_fails_the_bytes_are_the_same(monkeypatch, caplog):
    views = crops(6, 32).permute(0, 2, 3, 1).unsqueeze(1).contiguous()
    augment = Augment((View(augment=(RECIPES["auto_augment"],)),), 32, seed=0)
    compiled = augment(views, 0, 0)
    monkeypatch.setitem(sys.modules, "pipelines.augment.pixel_kernel", None)
    monkeypatch.delattr("pipelines.augment.pixel_kernel", raising=False)
    _kernel.cache_clear()
    try:
        assert torch.equal(augment(views, 0, 0), compiled)
    finally:
        _kernel.cache_clear()
    assert importlib.util.find_spec("numba") is None or "without numba" in caplog.text


def test_without_a_recipe_the_very_same_tensor_comes_back():
    views = views_of(crops(2, 32), 2)
    assert Augment((View(), View()), 32, 0)(views, 0, 0) is views


def test_a_view_without_a_recipe_stays_as_it_is_and_the_input_too():
    views = views_of(crops(8, 32), 3)
    before = views.clone()
    result = Augment((View(), View(augment=FULL), View()), 32, 0)(views, 0, 0)
    assert result.shape == views.shape
    assert result.dtype == torch.uint8
    assert result.is_contiguous()
    assert torch.equal(views, before)
    assert torch.equal(result[:, ::2], views[:, ::2])
    assert not torch.equal(result[:, 1], views[:, 1])


def test_each_sample_of_each_view_has_its_own_draw():
    views = views_of(crops(1, 32).repeat(16, 1, 1, 1), 2)
    result = full()(views, 0, 0).flatten(0, 1)
    assert len({tuple(image.flatten().tolist()) for image in result}) == 32


def test_a_draw_depends_on_seed_epoch_and_step_alone():
    views = views_of(crops(8, 32), 2)
    augment = full()
    first = augment(views, 3, 5)
    augment(views, 3, 6)
    assert torch.equal(augment(views, 3, 5), first)
    assert torch.equal(full()(views, 3, 5), first)  # as a resumed run makes it
    for other in (augment(views, 4, 5), augment(views, 3, 6), full(seed=1)(views, 3, 5)):
        assert not torch.equal(other, first)


def test_processes_that_share_a_batch_draw_as_one():
    views = views_of(crops(12, 32), 2)
    whole = full()(views, 1, 2)
    halves = [full()(views[part], 1, 2, rows=part, batch=12) for part in (slice(0, 6), slice(6, 12))]
    assert torch.equal(torch.cat(halves), whole)


@pytest.mark.parametrize("rows", [None, slice(2, 6)])
def test_several_steps_at_once_draw_as_one_after_the_other(rows):
    augment = full()
    steps = views_of(crops(24, 32), 2).split(8)
    own = slice(None) if rows is None else rows
    one_by_one = [augment(views[own], 3, 5 + number, rows, 8) for number, views in enumerate(steps)]
    together = augment(torch.cat([views[own] for views in steps]), 3, 5, rows, None if rows is None else 8, steps=3)
    assert torch.equal(together, torch.cat(one_by_one))


def test_views_are_laid_out_as_the_network_expects():
    """Channels last in, channels last out, each view by its own recipe, in the recipe's order."""
    images = crops(20, 32)
    recipe = (ColorJitter(kind="color_jitter"), Cutout(kind="cutout"))
    augment = Augment((View(), View(augment=recipe)), 32, 7)
    result = augment(views_of(images, 2), 0, 0)[:, 1].permute(0, 3, 1, 2)
    expected = one_by_one(images, augment.draw(1, 0, 0, 20))
    assert distance(result, expected)[1] <= 4
    assert isinstance(augment, nn.Module)


def test_grayscale_of_probability_nought_and_one():
    views = views_of(crops(5, 32), 1)
    never = Augment((View(augment=(Grayscale(kind="grayscale", probability=0),)),), 32, 0)(views, 0, 0)
    always = Augment((View(augment=(Grayscale(kind="grayscale", probability=1),)),), 32, 0)(views, 0, 0)
    assert torch.equal(never, views)
    assert (always == always[..., :1]).all()
    assert always.float().std() > 10


@pytest.mark.parametrize(
    ("centre", "width", "hidden"),
    [
        ((4, 4), 4, (2, 6, 2, 6)),
        ((0, 7), 4, (0, 2, 5, 8)),
        ((7, 0), 16, (0, 8, 0, 8)),
        ((3, 3), 1, (3, 4, 3, 4)),
        ((3, 3), 3, (2, 5, 2, 5)),
    ],
)
def test_cutout_hides_the_square_about_its_centre(centre, width, hidden):
    images = torch.full((1, 3, 8, 8), 9, dtype=torch.uint8)
    stage = Stage(np.array([Op.CUTOUT], np.int8), np.array([centre[0] * 8.0 + centre[1]]), width)
    expected = images.clone()
    top, bottom, left, right = hidden
    expected[:, :, top:bottom, left:right] = 0
    assert torch.equal(apply([stage], images), expected)


def test_a_recipe_is_read_from_a_configuration():
    view = validate(View, {"augment": [{"kind": "auto_augment"}, {"kind": "cutout", "size": 8}]}, "here")
    assert view.augment == (AutoAugment(kind="auto_augment"), Cutout(kind="cutout", size=8))


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ({"kind": "blur", "kernel": 4}, "odd"),
        ({"kind": "blur", "sigma": [2, 1]}, "low <= high"),
        ({"kind": "blur", "sigma": [0, 1]}, "low <= high"),
        ({"kind": "color_jitter", "hue": 0.6}, "less than or equal to 0.5"),
        ({"kind": "color_jitter", "probability": 2}, "less than or equal to 1"),
        ({"kind": "rand_augment", "magnitude": 31}, "less than or equal to 30"),
        ({"kind": "rand_augment", "magnitude": 11, "style": "timm"}, "timm's is 0 to 10"),
        ({"kind": "rand_augment", "noise": 0.5}, "noise is timm's"),
        ({"kind": "auto_augment", "policy": "svhn"}, "cifar10"),
        ({"kind": "cutout", "width": 3}, "unknown key"),
        ({"kind": "mixup"}, "auto_augment"),
    ],
)
def test_a_mistake_in_a_recipe_is_told_in_one_line(part, complaint):
    with pytest.raises(UserError, match=complaint) as raised:
        validate(View, {"augment": [part]}, "here")
    assert "\n" not in str(raised.value)


def test_a_kernel_wider_than_the_mirrored_image_is_refused():
    def views(kernel):
        return [{}, {"augment": [{"kind": "grayscale"}, {"kind": "blur", "kernel": kernel, "probability": 1}]}]

    line = r"^test: data: views\.1 has a blur kernel of 17, too wide for images of 8x8; set it to 15 at most$"
    with pytest.raises(UserError, match=line):
        validate(PrepareConfig, {"data": {"source": {"kind": "digits"}, "size": 8, "views": views(17)}}, "test")
    widest = data_config(size=8, views=views(15))
    assert Augment(widest.views, 8, 0)(torch.zeros(1, 2, 8, 8, 3, dtype=torch.uint8), 0, 0).max() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_what_the_cpu_gives():
    views = views_of(crops(64, 32), 2)
    mean, greatest = distance(full().cuda()(views.cuda(), 0, 0).cpu(), full()(views, 0, 0))
    assert mean < 0.1
    assert greatest <= 4
