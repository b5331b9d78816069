"""Images that belong together, of one patient, camera or site: they stay in one split, or the test would measure memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pipelines.common.errors import UserError
from pipelines.prepare.sources import Images


def grouped(images: Images, split_by: str) -> Images:
    """Give each image its group.

    Args:
        images: The images of a split.
        split_by: 'group': the groups that the source gave. Else a regular expression with one group, searched in the names.

    Returns:
        The images, with `groups`.

    Raises:
        UserError: The source gives no groups, or the expression is not found in a name.
    """
    if split_by == "group":
        if images.groups is None:
            raise UserError(
                "data.split_by: group, but the source has no group column; set data.source.group, or set data.split_by to a "
                "regular expression over the images' names, such as '(patient[0-9]+)'"
            )
        return images
    pattern = re.compile(split_by)
    found = [pattern.search(name) for name in images.names]
    without = next((name for name, match in zip(images.names, found, strict=True) if match is None or match[1] is None), None)
    if without is not None:
        raise UserError(f"data.split_by: {split_by!r} is not found in the image's name {without!r}")
    return replace(images, groups=np.array([_number(match[1]) for match in found if match is not None], dtype=np.int64))


def refuse_shared_groups(splits: Mapping[str, Images | None]) -> None:
    """Refuse a source whose own splits share a group.

    Args:
        splits: The images by split, with `groups`.

    Raises:
        UserError: A validation or test image is of a group that training has, too.
    """
    known: dict[str, set[int]] = {}
    for split, images in splits.items():
        if images is None or images.groups is None:
            continue
        own = {*images.groups.tolist()}
        for other, theirs in known.items():
            shared = own & theirs
            if shared:
                count = int(np.isin(images.groups, [*shared]).sum())
                name = images.names[int(np.flatnonzero(np.isin(images.groups, [*shared]))[0])]
                raise UserError(
                    f"data.split_by: {count:,} {split} images, such as {name!r}, are of groups that {other} has, too; "
                    "correct the splits, or leave them out and set data.val_fraction and data.test_fraction"
                )
        known[split] = own


def groups_aside(
    labels: np.ndarray, groups: np.ndarray, classes: int, fraction: float, random: np.random.Generator, keep: int
) -> np.ndarray:
    """Choose whole groups, so that each class comes as near to its share as they allow.

    Groups are taken in random order, those with rare classes first, while the counts come nearer to the shares.

    Args:
        labels: int64 (N,).
        groups: int64 (N,).
        classes: How many classes there are.
        fraction: The share of each class's images.
        random: Decides the order.
        keep: The smallest number of images of each class that stay.

    Returns:
        bool (N,): whether an image is set aside.
    """
    names, of_image = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), classes), dtype=np.int64)
    np.add.at(counts, (of_image, labels), 1)
    total = counts.sum(0)
    wanted = np.minimum(np.maximum(1, np.round(total * fraction)), np.maximum(total - keep, 0))
    # Distance to the shares, each class in units of its share: a tail class counts as much as a head class.
    weight = 1 / np.maximum(wanted, 1)
    rarest = np.array([total[row > 0].min() for row in counts])
    order = random.permutation(len(names))
    order = order[np.argsort(rarest[order], kind="stable")]
    taken, chosen = np.zeros(classes), np.zeros(len(names), dtype=bool)
    for group in order:
        after = taken + counts[group]
        nearer = (np.abs(wanted - after) * weight).sum() < (np.abs(wanted - taken) * weight).sum()
        if nearer and np.all((total - after >= keep) | (counts[group] == 0)):
            taken, chosen[group] = after, True
    return np.asarray(chosen[of_image])


def _number(name: str) -> int:
    """The same number for the same name in every split."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big", signed=True)
