"""Long-tail profiles: which training images of each class are kept. Validation and test sets are never touched."""

from __future__ import annotations

import json
from typing import assert_never

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.seeding import stream
from pipelines.config import CountsProfile, ExpProfile, ListProfile, NoProfile, Profile, StepProfile
from pipelines.prepare.sources import Images, class_counts, read_list


def exp_counts(classes: int, largest: int, imbalance: float) -> np.ndarray:
    """n_i = int(n_max · μ^(i/(C-1))), μ = 1/imbalance (Cui et al. 2019; the community's CIFAR-LT). int64 (C,)."""
    return np.array([int(largest * (1 / imbalance) ** (i / (classes - 1.0))) for i in range(classes)])


def step_counts(classes: int, largest: int, imbalance: float) -> np.ndarray:
    """n_max for the first half of the classes, int(n_max / imbalance) for the others (Buda et al. 2018). int64 (C,)."""
    return np.array([largest if i < classes // 2 else int(largest / imbalance) for i in range(classes)])


def carve_validation(images: Images, classes: int, fraction: float, seed: int) -> tuple[Images, Images]:
    """(training, validation): `fraction` of each class's images, at least one, drawn before any profile.

    A class with a single image keeps it for training.
    """
    rest, val = [], []
    for members in _shuffled(images.labels, classes, seed):
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        val.append(members[:count])
        rest.append(members[count:])
    if not sum(map(len, val)):
        raise UserError("data.val_fraction: no class has two training images, so none can be set aside for validation")
    return images.take(np.sort(np.concatenate(rest))), images.take(np.sort(np.concatenate(val)))


def apply_profile(profile: Profile, images: Images, classes: int, seed: int) -> Images:
    """The training images that `profile` keeps.

    The images of a class are a seeded shuffle's first n_i, so that a smaller imbalance's subset contains a larger's.
    Raises UserError where the profile asks for more images than a class has.
    """
    available = class_counts(images.labels, classes)
    match profile:
        case NoProfile():
            return images
        case ListProfile():
            return _named(profile, images)
        case CountsProfile():
            wanted = _counts_file(profile, classes)
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
    kept = [members[:count] for members, count in zip(_shuffled(images.labels, classes, seed), wanted, strict=True)]
    return images.take(np.sort(np.concatenate(kept)))


def _shuffled(labels: np.ndarray, classes: int, seed: int) -> list[np.ndarray]:
    """The indices of each class's images, in an order that depends on the seed and the class alone."""
    return [stream(seed, "subset", label).permutation(np.flatnonzero(labels == label)) for label in range(classes)]


def _named(profile: ListProfile, images: Images) -> Images:
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
    return images.take(np.array(sorted(kept), np.int64))


def _counts_file(profile: CountsProfile, classes: int) -> np.ndarray:
    try:
        content = json.loads(profile.path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"class counts {str(profile.path)!r} cannot be read as JSON: {error}") from error
    if isinstance(content, dict):
        content = [content.get(str(label)) for label in range(max(len(content), classes))]
    if not isinstance(content, list) or not all(isinstance(count, int) for count in content):
        raise UserError(f"{profile.path}: expected a list of counts, or a mapping of class index to count")
    if len(content) != classes:
        raise UserError(f"{profile.path} has {len(content)} counts, the source {classes} classes")
    return np.array(content, dtype=np.int64)
