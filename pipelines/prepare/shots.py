"""Classes by their number of training images: many-shot, medium-shot and few-shot, and thirds."""

from __future__ import annotations

import numpy as np

MANY, FEW = 100, 20  # many: more than 100 training images; few: fewer than 20 (Liu et al. 2019)
GROUPS = ("many", "medium", "few")
THIRDS = ("head", "middle", "tail")


def shot_groups(train_counts: np.ndarray) -> list[str]:
    """The group of each class by its training images: 'many' (> 100), 'medium' (20 to 100), 'few' (< 20)."""
    return ["many" if count > MANY else "few" if count < FEW else "medium" for count in train_counts]


def thirds(train_counts: np.ndarray) -> list[str]:
    """'head', 'middle' or 'tail' of each class by its training images, (C,).

    The middle gets the remainder of C / 3: of 10 classes 3, 4 and 3; of two classes both.
    """
    classes = len(train_counts)
    names = ["middle"] * classes
    order = np.argsort(-train_counts, kind="stable").tolist()
    for place in range(classes // 3):
        names[order[place]], names[order[classes - 1 - place]] = "head", "tail"
    return names
