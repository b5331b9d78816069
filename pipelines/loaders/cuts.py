"""What each view of each sample shows: boxes drawn from the seed and the epoch, the same for every loader.

A cut is five int32 numbers: top, left, height, width, flip. A box of the output's size is copied, with black where it
leaves the image; any other box lies within the image and is resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, assert_never

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.seeding import stream
from pipelines.config import CenterCrop, RandomCrop, RandomResizedCrop, Sampling, View

TOP, LEFT, HEIGHT, WIDTH, FLIP = range(5)
_TRIES = 10  # torchvision's number of attempts before it falls back to a centre crop
# A class of n images comes in proportion to n to this power; with weights, n is their sum.
_POWERS = {"square_root": 0.5, "class_balanced": 0.0, "weighted": 1.0}
_ROUNDS, _EXACT = 1000, 1e-9  # of `worker_weights`: a dozen rounds where files are random samples of the data


def epoch_order(
    labels: np.ndarray,
    sampling: Sampling | None,
    seed: int,
    epoch: int,
    weights: tuple[float, ...] | None = None,
    row_weights: np.ndarray | None = None,
) -> np.ndarray:
    """Draw the rows of one epoch.

    Args:
        labels: Of the file's rows, (N,).
        sampling: 'instance': each row once. 'square_root' and 'class_balanced': N·√n_c/Σ√n or N/C of the rows are of class c,
            rounded by a draw so that the mean over epochs is exact. Within a class no row comes two times more than another.
            'weighted': N·w/Σw times each row, rounded likewise; so are the rows of each class. None: the file's order.
        seed: The run's seed.
        epoch: The epoch.
        weights: Of each class, in place of √n_c, 1 or Σw, where these rows are only one worker's (`worker_weights`).
        row_weights: Of each row, for 'weighted', float64 (N,), at least 0.

    Returns:
        Rows in their order, int64 (N,): as many as there are, whatever the sampling.

    Raises:
        UserError: All of the rows' weights are 0.
    """
    match sampling:
        case None:
            return np.arange(len(labels))
        case "instance":
            return stream(seed, "order", epoch).permutation(len(labels))
        case "square_root" | "class_balanced":
            random = stream(seed, "order", epoch)
            members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
            members = [rows for rows in members if len(rows)]
            if weights is None:
                shares = np.array([len(rows) ** _POWERS[sampling] for rows in members])
            else:
                shares = np.array([weights[labels[rows[0]]] for rows in members])
            quotas = _quotas(shares, len(labels), random)
            chosen = [_evenly(rows, quota, random) for rows, quota in zip(members, quotas, strict=True)]
            return random.permutation(np.concatenate(chosen))
        case "weighted":
            assert row_weights is not None
            random = stream(seed, "order", epoch)
            shares = row_weights
            if weights is not None:
                sums = np.bincount(labels, row_weights, len(weights))
                shares = row_weights * (np.array(weights) / np.where(sums > 0, sums, 1))[labels]
            rows = random.permutation(np.flatnonzero(shares))
            if not len(rows):
                raise UserError("data.sampling is 'weighted', but no training image here has a weight above 0")
            # Class by class, so that one draw rounds the shares of the classes, too.
            rows = rows[np.argsort(labels[rows], kind="stable")]
            return random.permutation(np.repeat(rows, _quotas(shares[rows], len(labels), random)))
    assert_never(sampling)


def _quotas(shares: np.ndarray, total: int, random: np.random.Generator) -> np.ndarray:
    """`total` in proportion to positive shares, in whole numbers, int64.

    Systematic sampling: one draw rounds all quotas up or down, each with the right chance, to the right sum. That holds for the
    sum of neighbours, too.
    """
    edges = np.floor(np.cumsum(shares) * (total / shares.sum()) + random.random()).astype(np.int64)
    edges = np.minimum(edges, total)  # sums are rounded
    edges[-1] = total
    return np.diff(edges, prepend=0)


def worker_weights(
    counts: np.ndarray, sampling: Literal["square_root", "class_balanced", "weighted"], images_per_step: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Compute how often each of R workers that read files of their own draws each class.

    Of one reader of all files, class c has n_c^p of the draws, p = 1/2 or 0; a worker with n_rc of its images would draw it
    n_rc·n_c^(p-1) times as often as others. But every worker fills its batches, whether or not its files hold more of the tail
    than another's. So worker r draws n_rc·n_c^(p-1)·a_c·b_r, with b such that its batches are full and a such that the workers
    together give every class its share: iterative proportional fitting (Deming & Stephan 1940), which finds the nearest table
    that does both. Where none does (classes that one worker alone has, and whose shares are more than it draws), batches are
    full and the classes' sums the nearest.

    Args:
        counts: Images in each worker's files, of each class at least one, int64 (R, C). For 'weighted' the sums of their
            weights, float64 (R, C): no worker's and no class's sum is 0.
        sampling: How often one reader of all files would draw each class.
        images_per_step: Of each worker, (R,).

    Returns:
        The draws, float64 (R, C), whose rows add up to 1; and what each class gets of its share over all workers, float64
        (C,), 1 where it is exact.
    """
    classes = counts.sum(0) ** _POWERS[sampling]
    classes, workers = classes / classes.sum(), np.array(images_per_step) / sum(images_per_step)
    drawn = counts * (classes / counts.sum(0))
    for _ in range(_ROUNDS):
        drawn *= (workers / drawn.sum(1))[:, None]
        got = drawn.sum(0) / classes
        if np.abs(got - 1).max() < _EXACT:
            break
        drawn /= got
    drawn /= drawn.sum(1, keepdims=True)
    return drawn, (workers @ drawn) / classes


def _evenly(rows: np.ndarray, quota: int, random: np.random.Generator) -> np.ndarray:
    """`quota` of `rows`: each as often as the others, what is left over drawn without repetition."""
    whole, left = divmod(int(quota), len(rows))
    return np.concatenate([np.tile(rows, whole), random.choice(rows, left, replace=False)])


def draw_cuts(views: tuple[View, ...], size: int, heights: np.ndarray, widths: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Draw the cuts of one epoch.

    Position, not image, decides a draw, so that an image that comes twice in an epoch is cut twice. Every sample of every
    view has a draw of its own.

    Args:
        views: The views.
        size: Width and height of a view, pixels.
        heights: Of the images in the epoch's order, pixels, (N,).
        widths: Likewise, (N,).
        seed: The run's seed.
        epoch: The epoch.

    Returns:
        int32 (N, V, 5).

    Raises:
        UserError: An image is too small for a crop without resizing.
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    cuts = np.empty((len(heights), len(views), 5), dtype=np.int32)
    for number, view in enumerate(views):
        random = stream(seed, "cut", epoch, number)
        match view.cut:
            case RandomCrop():
                boxes = _random_crop(view.cut, size, heights, widths, random)
            case RandomResizedCrop():
                boxes = _random_resized_crop(view.cut, heights, widths, random)
            case CenterCrop():
                boxes = _center_crop(view.cut, heights, widths)
            case _:
                assert_never(view.cut)
        cuts[:, number, :FLIP] = np.stack(boxes, axis=1)
        cuts[:, number, FLIP] = random.random(len(heights)) < view.flip
    return cuts


Boxes = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _random_crop(cut: RandomCrop, size: int, heights: np.ndarray, widths: np.ndarray, random: np.random.Generator) -> Boxes:
    room_y, room_x = heights + 2 * cut.padding - size, widths + 2 * cut.padding - size
    if len(heights) and min(room_y.min(), room_x.min()) < 0:
        row = int(np.minimum(room_y, room_x).argmin())
        raise UserError(
            f"an image of {widths[row]}x{heights[row]} with padding {cut.padding} is smaller than the crop of {size}x{size}; "
            "use a cut of kind 'resized', or set data.store.square"
        )
    top = random.integers(0, room_y + 1) - cut.padding
    left = random.integers(0, room_x + 1) - cut.padding
    return top, left, np.full_like(top, size), np.full_like(left, size)


def _random_resized_crop(cut: RandomResizedCrop, heights: np.ndarray, widths: np.ndarray, random: np.random.Generator) -> Boxes:
    """Draw as torchvision's RandomResizedCrop.get_params, for all images at once."""
    count = len(heights)
    low, high = np.log(cut.ratio)
    height, width = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for _ in range(_TRIES):
        area = heights * widths * random.uniform(*cut.scale, size=count)
        ratio = np.exp(random.uniform(low, high, size=count))
        w, h = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (height == 0) & (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
        height, width = np.where(fits, h, height), np.where(fits, w, width)
    open_ = height == 0
    fallback_h, fallback_w = _inside_ratio(heights, widths, cut.ratio)
    height, width = np.where(open_, fallback_h, height), np.where(open_, fallback_w, width)
    top, left = random.integers(0, heights - height + 1), random.integers(0, widths - width + 1)
    top, left = np.where(open_, (heights - height) // 2, top), np.where(open_, (widths - width) // 2, left)
    return top, left, height, width


def _inside_ratio(heights: np.ndarray, widths: np.ndarray, ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """The largest box of an allowed aspect ratio."""
    aspect = widths / heights
    height = np.where(aspect < ratio[0], np.rint(widths / ratio[0]), heights).astype(np.int64)
    width = np.where(aspect > ratio[1], np.rint(heights * ratio[1]), widths).astype(np.int64)
    return np.clip(height, 1, heights), np.clip(width, 1, widths)


def _center_crop(cut: CenterCrop, heights: np.ndarray, widths: np.ndarray) -> Boxes:
    side = np.maximum(1, np.rint(cut.ratio * np.minimum(heights, widths)).astype(np.int64))
    return (heights - side) // 2, (widths - side) // 2, side, side
