"""Training images in folds, for heads that are each scored on images that they were not trained on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from cibl_ray.features.loader import FeatureLoader
from pipelines.common.seeding import stream
from pipelines.loaders.reading import ReadPlan

ALWAYS_TRAINED = -1


def fold_numbers(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Deal the images of each class to the folds in turn, in an order drawn from the seed.

    Args:
        labels: int64 (N,).
        count: How many folds.
        seed: The run's.

    Returns:
        The fold that holds each image out, int64 (N,). `ALWAYS_TRAINED` for the image of a class that has only one.
    """
    random, numbers = stream(seed, "folds"), np.full(len(labels), ALWAYS_TRAINED)
    dealt = 0  # over the classes, so that folds are alike in size although many classes are small
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        if len(rows) > 1:
            numbers[rows] = (dealt + np.arange(len(rows))) % count
            dealt += len(rows)
    return numbers


def fold_rows(numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows to train on and the rows to score, of each fold that holds images out."""
    for number in np.unique(numbers[numbers != ALWAYS_TRAINED]):
        yield np.flatnonzero(numbers != number), np.flatnonzero(numbers == number)


class FoldFeatures:
    """Features of one fold, in place of `FeatureLoaders`: 'train' and 'val' are parts of the training images.

    Args:
        features: Of all training images, float32 (N, K, d). Validation has the first of the K, that of evaluation's rule.
        labels: int64 (N,).
        train: The rows to train on.
        held_out: The rows to score.
        device: Where the batches are wanted.
        weights: How often data.sampling 'weighted' draws each training image, float64 (N,).
    """

    def __init__(
        self,
        features: torch.Tensor,
        labels: np.ndarray,
        train: np.ndarray,
        held_out: np.ndarray,
        device: torch.device,
        weights: np.ndarray | None = None,
    ) -> None:
        self._features, self._labels, self._device, self._weights = features, labels, device, weights
        self._rows = {"train": train, "val": held_out}

    def train(self, plan: ReadPlan) -> FeatureLoader:
        """Batches of the images to train on."""
        return self._loader("train", plan)

    def evaluation(self, split: str, plan: ReadPlan) -> FeatureLoader:
        """Each image of a part once."""
        return self._loader(split, plan)

    def features(self, split: str) -> torch.Tensor:
        """The features of a part, float32 (N, K, d); K is 1 for 'val'."""
        kept = self._features[torch.from_numpy(self._rows[split])]
        return kept if split == "train" else kept[:, :1]

    def labels(self, split: str) -> np.ndarray:
        """The labels of a part, int64 (N,)."""
        return self._labels[self._rows[split]].astype(np.int64)

    def weights(self, split: str) -> np.ndarray | None:
        """How often data.sampling 'weighted' draws each image of a part, float64 (N,)."""
        return None if self._weights is None else self._weights[self._rows[split]]

    def _loader(self, split: str, plan: ReadPlan) -> FeatureLoader:
        return FeatureLoader(self.features(split), self.labels(split), plan, self._device, split, self.weights(split))
