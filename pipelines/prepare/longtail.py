"""Long-tail profiles: which training images of each class are kept. Validation and test sets are never touched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import assert_never

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.seeding import stream
from pipelines.config import CountsProfile, ExpProfile, ListProfile, NoProfile, Profile, StepProfile
from pipelines.prepare.sources import Images, class_counts, read_list
from pipelines.prepare.sources.names import name_key
from pipelines.prepare.split_groups import groups_aside

_MOST = 1 << 31  # images of a class: beyond any data set


def exp_counts(classes: int, largest: int, imbalance: float) -> np.ndarray:
    """Exponential profile: n_i = int(n_max · μ^(i/(C-1))), μ = 1/imbalance (Cui et al. 2019, as in CIFAR-LT).

    Args:
        classes: C, at least 2.
        largest: n_max, images of the largest class.
        imbalance: Images of the largest class for one of the smallest.

    Returns:
        Images of each class, int64 (C,).
    """
    return np.array([int(largest * (1 / imbalance) ** (i / (classes - 1.0))) for i in range(classes)])


def step_counts(classes: int, largest: int, imbalance: float) -> np.ndarray:
    """Step profile: n_max for the first half of the classes, int(n_max / imbalance) for the others (Buda et al. 2018).

    Args:
        classes: C.
        largest: n_max.
        imbalance: Images of a large class for one of a small one.

    Returns:
        Images of each class, int64 (C,).
    """
    return np.array([largest if i < classes // 2 else int(largest / imbalance) for i in range(classes)])


def carve(
    images: Images, classes: int, fraction: float, seed: int, draw: str = "subset", keep: int = 1
) -> tuple[Images, Images | None]:
    """Set a stratified share of the images aside, before any profile.

    Args:
        images: All images.
        classes: How many classes there are.
        fraction: The share of each class's images, at least one image.
        seed: Of the draw.
        draw: Name of the random stream.
        keep: The smallest number of images of each class that stay.

    Returns:
        The images that stay, and those set aside; None where no class has enough images.
    """
    if images.groups is not None:
        chosen = groups_aside(images.labels, images.groups, classes, fraction, stream(seed, draw, "groups"), keep)
        if not chosen.any():
            return images, None
        return images.take(np.flatnonzero(~chosen)), images.take(np.flatnonzero(chosen))
    rest, aside = [], []
    for members in _shuffled(images.labels, classes, seed, draw):
        count = max(0, min(max(1, round(len(members) * fraction)), len(members) - keep))
        aside.append(members[:count])
        rest.append(members[count:])
    if not sum(map(len, aside)):
        return images, None
    return images.take(np.sort(np.concatenate(rest))), images.take(np.sort(np.concatenate(aside)))


def apply_profile(profile: Profile, images: Images, classes: int, seed: int, names: Sequence[str] = ()) -> Images:
    """Choose the training images that `profile` keeps.

    Each class keeps the first n_i images of a seeded shuffle, so the subset of a smaller imbalance contains that of a larger.
    With `subset: field` the shuffle is that of the code behind the published CIFAR-LT tables, whatever the seed.

    Args:
        profile: The profile.
        images: All training images.
        classes: How many classes there are.
        seed: Of the shuffle.
        names: Class names in label order; a file of counts may use them.

    Returns:
        The kept images, in the order of `images`.

    Raises:
        UserError: The profile asks for more images than a class has, or leaves a class none.
    """
    available = class_counts(images.labels, classes)
    match profile:
        case NoProfile():
            return images
        case ListProfile():
            return _named(profile, images, classes, names)
        case CountsProfile():
            wanted = _counts_file(profile, classes, names)
        case ExpProfile():
            wanted = exp_counts(classes, profile.largest or int(available.min()), profile.imbalance)
        case StepProfile():
            wanted = step_counts(classes, profile.largest or int(available.min()), profile.imbalance)
        case _:
            assert_never(profile)
    keep_all = "--data.profile '{kind: none}'"
    for label in range(classes):
        if wanted[label] > available[label]:
            raise UserError(
                f"data.profile asks for {wanted[label]} images of class {label}, which has {available[label]}; "
                + ("lower data.profile.largest" if not isinstance(profile, CountsProfile) else f"mend {profile.path}")
            )
        if wanted[label] < 1:
            raise UserError(
                f"data.profile leaves class {label} no image; lower data.profile.imbalance, or keep all: {keep_all}"
            )
    of_field = isinstance(profile, ExpProfile) and profile.subset == "field"
    shuffled = _shuffled_by_the_field(images.labels, classes) if of_field else _shuffled(images.labels, classes, seed)
    kept = [members[:count] for members, count in zip(shuffled, wanted, strict=True)]
    return images.take(np.sort(np.concatenate(kept)))


def _shuffled(labels: np.ndarray, classes: int, seed: int, draw: str = "subset") -> list[np.ndarray]:
    """The indices of each class's images, in an order that depends on the seed and the class alone."""
    return [stream(seed, draw, label).permutation(np.flatnonzero(labels == label)) for label in range(classes)]


def _shuffled_by_the_field(labels: np.ndarray, classes: int) -> list[np.ndarray]:
    """The indices of each class's images as the published CIFAR-LT code shuffles them: one legacy generator, class by class."""
    random, orders = np.random.RandomState(0), []
    for label in range(classes):
        members = np.flatnonzero(labels == label)
        random.shuffle(members)
        orders.append(members)
    return orders


def _named(profile: ListProfile, images: Images, classes: int, class_names: Sequence[str]) -> Images:
    names, labels = read_list(profile.path)
    place = {name: i for i, name in enumerate(images.names)}
    kept: set[int] = set()
    for name, label in zip(names, labels, strict=True):
        index = place.get(name)
        if index is None:
            raise UserError(
                f"{profile.path} names {name!r}, which the source's training split lacks, or data.val_fraction sets aside"
            )
        if index in kept:
            raise UserError(f"{profile.path} names {name!r} twice")
        if images.labels[index] != label:
            raise UserError(f"{profile.path} gives {name!r} the label {label}, the source {images.labels[index]}")
        kept.add(index)
    absent = np.flatnonzero(class_counts(labels, classes) == 0)
    if absent.size:
        named = repr(class_names[absent[0]]) if class_names else absent[0]
        raise UserError(f"{profile.path} names no image of class {named}; each class needs one")
    return images.take(np.array(sorted(kept), np.int64))


def _counts_file(profile: CountsProfile, classes: int, names: Sequence[str]) -> np.ndarray:
    try:
        content = json.loads(profile.path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"class counts {str(profile.path)!r} cannot be read as JSON: {error}") from error
    if isinstance(content, dict):
        content = _in_label_order(content, classes, names, str(profile.path))
    if not isinstance(content, list) or not all(type(count) is int for count in content):
        raise UserError(f"{profile.path}: expected a list of counts, or a mapping of class name or index to count")
    if len(content) != classes:
        raise UserError(f"{profile.path} has {len(content)} counts, the source {classes} classes")
    wrong = next((count for count in content if not 1 <= count < _MOST), None)
    if wrong is not None:
        shown = wrong if abs(wrong) < 10**20 else f"{str(wrong)[:12]}... ({len(str(abs(wrong)))} digits)"
        raise UserError(f"{profile.path} has the count {shown}; counts are numbers of images, from 1 on")
    return np.array(content, dtype=np.int64)


def _in_label_order(content: dict[str, object], classes: int, names: Sequence[str], place: str) -> list[object]:
    """The values of a mapping by class name or by class index, which must not mean different classes."""
    by_index = [content.get(str(label)) for label in range(max(len(content), classes))]
    labels = {name_key(name): label for label, name in enumerate(names)}
    unknown = [key for key in content if name_key(key) not in labels]
    if names and len(unknown) < len(content):
        if unknown and not all(key.isdecimal() for key in content):
            raise UserError(f"{place}: {unknown[0]!r} is not one of the classes")
        if not unknown:
            keyed = {labels[name_key(key)]: count for key, count in content.items()}
            by_name = [keyed.get(label) for label in range(classes)]
            if all(key.isdecimal() for key in content) and by_name != by_index:
                raise UserError(f"{place}: the keys are class names and class indices of other classes; write a list instead")
            missing = [name for label, name in enumerate(names) if label not in keyed]
            if missing:
                raise UserError(f"{place} has no count of class {missing[0]!r}")
            return by_name
    return by_index
