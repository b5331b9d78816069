"""Handwritten digits of scikit-learn."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.prepare.sources.dataset import Dataset, Images, SourceConfig


class DigitsSource(SourceConfig):
    """1,797 handwritten digits of scikit-learn, 8x8 pixels: real images that need no download."""

    kind: Literal["digits"]

    def open(self) -> Dataset:
        """Training images, and every fourth image of each class for testing."""
        table = _table()
        images, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
        pixels = np.repeat((images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=-1)
        # Every fourth image of each class is for testing: fixed, so that no seed moves images between the splits.
        rank = np.zeros(len(labels), dtype=np.int64)
        for label in range(10):
            rank[labels == label] = np.arange((labels == label).sum())
        everything = Images([str(i) for i in range(len(labels))], labels, pixels=pixels)
        train, test = np.flatnonzero(rank % 4 != 3), np.flatnonzero(rank % 4 == 3)
        return Dataset([str(i) for i in range(10)], everything.take(train), test=everything.take(test))


def _table() -> np.ndarray:
    """Pixels from 0 to 16 and label of each digit, (1797, 65).

    From scikit-learn's file, which its function reads too: importing scikit-learn takes two seconds, in every process.
    """
    package = find_spec("sklearn")
    if package is not None and package.origin is not None:
        file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.exists():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack((digits.data, digits.target))
