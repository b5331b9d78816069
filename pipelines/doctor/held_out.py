"""What a classifier of features says of images that it has not seen: which labels and classes it doubts.

A Gaussian for each class with one covariance (linear discriminant analysis), all classes equally likely, so that a large
class does not win by its size. It has a closed form: five fits take seconds, and no learning rate has to be chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.common.seeding import stream

_FOLDS = 5
_SHRINK = 0.2  # share of the sphere in the covariance: dimensions outnumber the images of most classes
_ROWS = 4096  # images at once


@dataclass(frozen=True)
class HeldOut:
    """The classifier's answers, one an image.

    Attributes:
        best: The most likely class, int64 (N,); -1 where an image was not judged.
        top: Probability of that class, (N,).
        own: Probability of the class that the image has, (N,).
    """

    best: np.ndarray
    top: np.ndarray
    own: np.ndarray


def judge(features: np.ndarray, labels: np.ndarray, classes: int) -> HeldOut:
    """Judge each image by a classifier of the others' features and labels.

    Images are dealt to five folds, class by class. Those of a fold are judged by the other four. Probabilities are calibrated
    by one temperature, the likeliest for the labels of the first fold.

    Args:
        features: float32 (N, d); rows of NaN are left out.
        labels: int64 (N,).
        classes: C.

    Returns:
        The answers. An image is not judged if it has no features, or if its class has no image in the other folds.
    """
    usable = np.flatnonzero(np.isfinite(features[:, 0]))
    fold = np.full(len(labels), -1)
    fold[usable] = _folds(labels[usable])
    best, top, own = np.full(len(labels), -1), np.zeros(len(labels)), np.ones(len(labels))
    scale = 0.0
    for number in range(_FOLDS):
        fit, held = usable[fold[usable] != number], usable[fold[usable] == number]
        if not fit.size:
            continue
        there = np.bincount(labels[fit], minlength=classes) > 0
        weights, offsets = _discriminant(features, labels, fit, classes)
        held = held[there[labels[held]]]
        for begin in range(0, len(held), _ROWS):
            rows = held[begin : begin + _ROWS]
            scores = features[rows] @ weights + offsets
            scores[:, ~there] = -np.inf
            scale = scale or _scale(scores, labels[rows])
            chances = _softmax(scale * scores)
            best[rows], top[rows] = chances.argmax(1), chances.max(1)
            own[rows] = chances[np.arange(len(rows)), labels[rows]]
    return HeldOut(best, top, own)


def _folds(labels: np.ndarray) -> np.ndarray:
    """Deal the images of each class in turn, in a seeded order; int64 (N,)."""
    random, fold = stream(0, "doctor"), np.empty(len(labels), np.int64)
    order = random.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold[order] = np.arange(len(labels)) % _FOLDS
    return fold


def _discriminant(features: np.ndarray, labels: np.ndarray, rows: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (d, C) and offsets (C,) of the class scores, from some of the images."""
    counts = np.bincount(labels[rows], minlength=classes)
    width = features.shape[1]
    means, scatter = np.zeros((classes, width)), np.zeros((width, width))
    for begin in range(0, len(rows), _ROWS):
        part = rows[begin : begin + _ROWS]
        np.add.at(means, labels[part], features[part])
    means /= np.maximum(counts, 1)[:, None]
    for begin in range(0, len(rows), _ROWS):
        part = rows[begin : begin + _ROWS]
        residual = features[part] - means[labels[part]]
        scatter += residual.T @ residual
    scatter /= len(rows)
    sphere = max(np.trace(scatter) / width, 1e-12)
    covariance = (1 - _SHRINK) * scatter + _SHRINK * sphere * np.eye(width)
    weights = np.linalg.solve(covariance, means.T)
    return weights.astype(np.float32), (-0.5 * (means.T * weights).sum(0)).astype(np.float32)


def _scale(scores: np.ndarray, labels: np.ndarray) -> float:
    """The inverse temperature, a power of two, by which the labels are likeliest."""

    def loss(scale: float) -> float:
        return float(-np.log(np.maximum(_softmax(scale * scores)[np.arange(len(labels)), labels], 1e-12)).mean())

    return min((2.0**power for power in range(-10, 6)), key=loss)


def _softmax(scores: np.ndarray) -> np.ndarray:
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    return chances
