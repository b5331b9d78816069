"""Findings that need to see the content: likely wrong labels, classes that look alike, splits of different images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipelines.common.seeding import stream
from pipelines.common.words import agreed, plural
from pipelines.doctor.examine import Examined
from pipelines.doctor.findings import Finding, some_of
from pipelines.doctor.held_out import HeldOut, judge

# An image's label is in doubt where another class has at least this chance, and its own at most that.
_OTHER, _OWN = 0.5, 0.05
_KNOWS = 0.5  # share of images that the classifier must judge as they are labelled before it may doubt any
_ALIKE, _OFTEN = 0.1, 3  # share and number of images by which two classes are taken for each other
_SHIFT, _CHANCE = 0.15, 4.0  # the area under the curve above one half that is worth a look, and the same in standard errors
_A_SPLIT = 20  # images of each split that a comparison needs


def find_by_content(examined: Examined, features: np.ndarray) -> list[Finding]:
    """The findings that follow from features.

    Args:
        examined: What was seen of the images.
        features: float32 (N, d) of length 1; NaN where an image cannot be read.
    """
    held_out = judge(features, examined.label, len(examined.classes))
    judged = held_out.best >= 0
    right = judged & (held_out.best == examined.label)
    found = [*_shift(examined, features)]
    if judged.any() and right.sum() >= _KNOWS * judged.sum():
        found += [*_wrong_labels(examined, features, held_out), *_alike(examined, features, held_out)]
    return found


def _wrong_labels(examined: Examined, features: np.ndarray, held_out: HeldOut) -> Iterator[Finding]:
    doubted = (held_out.best >= 0) & (held_out.best != examined.label) & (held_out.top > _OTHER) & (held_out.own < _OWN)
    numbers = np.flatnonzero(doubted)
    if not numbers.size:
        return
    numbers = numbers[np.argsort(held_out.own[numbers], kind="stable")]
    groups = [[number, _nearest(features, number, examined.label == held_out.best[number])] for number in numbers.tolist()]
    yield Finding(
        "wrong_label", "look", f"{plural(len(groups), 'image', 'look')} like another class than the label's",
        "Each stands beside the most similar image of the class that it looks like, the clearest first. "
        "Correct the labels that are wrong. suspects.txt lists the images.",
        groups, suspects=[group[0] for group in groups],
    )  # fmt: skip


def _alike(examined: Examined, features: np.ndarray, held_out: HeldOut) -> Iterator[Finding]:
    classes = len(examined.classes)
    judged = held_out.best >= 0
    counts = np.bincount(examined.label[judged], minlength=classes)
    wrong = np.flatnonzero(judged & (held_out.best != examined.label))
    pairs: dict[tuple[int, int], list[int]] = {}
    for number in wrong.tolist():
        one, other = sorted((int(examined.label[number]), int(held_out.best[number])))
        pairs.setdefault((one, other), []).append(number)
    found = []
    for (one, other), numbers in pairs.items():
        share = sum((examined.label[numbers] == label).sum() / counts[label] for label in (one, other)) / 2
        if share >= _ALIKE and len(numbers) >= _OFTEN:
            found.append((share, one, other, numbers))
    if found:
        found.sort(key=lambda each: (-each[0], each[1:3]))
        named = [f"{examined.classes[one]} and {examined.classes[other]} ({share:.0%})" for share, one, other, _ in found]
        groups = [
            [number, _nearest(features, number, examined.label == held_out.best[number])]
            for _, _, _, numbers in found
            for number in (min(numbers, key=lambda number: float(held_out.own[number])),)
        ]
        title = f"{plural(len(found), 'pair')} of classes {agreed(len(found), 'look')} alike: {some_of(named)}"
        yield Finding(
            "classes_alike", "note", title,
            "In brackets: how often a classifier takes one for the other. Merge them, or expect most errors there.", groups,
        )  # fmt: skip


def _shift(examined: Examined, features: np.ndarray) -> Iterator[Finding]:
    """Whether a classifier can tell images of a held-out split from training images of the same classes."""
    split_of, usable = np.array(examined.split), np.isfinite(features[:, 0])
    for split in dict.fromkeys(examined.split):
        if split == "train":
            continue
        random = stream(0, "doctor", split)
        rows: list[np.ndarray] = []
        for label in range(len(examined.classes)):
            of_class = [np.flatnonzero((split_of == name) & usable & (examined.label == label)) for name in ("train", split)]
            count = min(map(len, of_class))
            rows += [random.choice(each, count, replace=False) for each in of_class]
        chosen = np.concatenate(rows)
        held_out = (split_of[chosen] == split).astype(np.int64)
        count = int(held_out.sum())
        if count < _A_SPLIT:
            continue
        answer = judge(features[chosen], held_out, 2)
        score = np.where(held_out == 1, answer.own, 1 - answer.own)
        ranks = np.argsort(np.argsort(score))
        area = float(ranks[held_out == 1].sum() - count * (count - 1) / 2) / count**2
        error = float(np.sqrt((2 * count + 1) / 12)) / count
        if area - 0.5 > max(_SHIFT, _CHANCE * error):
            yield Finding(
                "content_shift", "look", f"{split} can be told from train by its pictures: {area:.0%} of pairs (by chance 50%)",
                "The splits may come from different cameras, places or times. Scores then mean less for either.",
            )  # fmt: skip


def _nearest(features: np.ndarray, number: int, among: np.ndarray) -> int:
    """The image of some that is most similar to another."""
    others = np.flatnonzero(among & np.isfinite(features[:, 0]))
    return int(others[(features[others] @ features[number]).argmax()])
