"""What follows from the looks at all images: findings, each with its images and with what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pipelines.common.words import agreed, plural
from pipelines.doctor.examine import Examined, Look
from pipelines.doctor.pairs import clusters, near, same_bytes
from pipelines.pixels import BadImageError
from pipelines.prepare.shots import FEW
from pipelines.prepare.sources import class_counts

_TINY, _NARROW = 32, 4.0  # pixels of the shorter side; longer over shorter side
_FLAT = 4.0  # standard deviation of an image that shows nothing
_DARK, _BRIGHT, _FAINT = 12.0, 243.0, 20.0  # mean of an image that is nearly black or white, and the most that it varies
_RARE_MODE = 0.05  # a kind of pixels that fewer images than this share have is odd
# The difference of two splits' means that is worth a look: in standard deviations of the images, and in standard errors.
_SHIFT, _CHANCE = 0.25, 4.0


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found.

    Attributes:
        kind: A short name for programs.
        severity: 'fault': scores or training are wrong by it. 'look': a person should look. 'note': good to know.
        title: What was found, with its count.
        advice: What to do.
        groups: Images that belong together, such as the two of a duplicate; numbers of `Examined`.
        exclude: Images that `data.exclude` should take, where that is the remedy.
        suspects: Images that a person must look at first, for a list of their own.
    """

    kind: str
    severity: Literal["fault", "look", "note"]
    title: str
    advice: str
    groups: list[list[int]] = field(default_factory=list)
    exclude: list[int] = field(default_factory=list)
    suspects: list[int] = field(default_factory=list)


def find(examined: Examined) -> list[Finding]:
    """All findings that need no look at the content.

    Args:
        examined: What was seen of the images.
    """
    return [
        *_unreadable(examined),
        *_duplicates(examined),
        *of_classes(examined.classes, counts_of(examined)),
        *_single_images(examined),
        *_shift(examined),
    ]


def worst_first(found: list[Finding]) -> list[Finding]:
    """Faults, then what a person should look at, then notes."""
    order = {"fault": 0, "look": 1, "note": 2}
    return sorted(found, key=lambda finding: order[finding.severity])


def counts_of(examined: Examined) -> dict[str, np.ndarray]:
    """Images of each class by split."""
    return {split: class_counts(images.labels, len(examined.classes)) for split, images in examined.splits.items()}


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of class sizes: 0 for equal classes, towards 1 where few classes have nearly all images.

    Args:
        counts: Images of each class, (C,).
    """
    ordered = np.sort(counts).astype(np.float64)
    ranks = np.arange(1, len(ordered) + 1)
    return float((2 * ranks - len(ordered) - 1).dot(ordered) / (len(ordered) * ordered.sum()))


def _unreadable(examined: Examined) -> Iterator[Finding]:
    bad = [number for number, look in enumerate(examined.look) if isinstance(look, BadImageError)]
    if bad:
        yield Finding(
            "unreadable", "fault", f"{plural(len(bad), 'image')} cannot be read",
            "Mend or remove them, or set data.on_bad_image: skip.", [[number] for number in bad], bad,
        )  # fmt: skip


def _duplicates(examined: Examined) -> Iterator[Finding]:
    good = [number for number, look in enumerate(examined.look) if isinstance(look, Look)]
    looks = [look for look in examined.look if isinstance(look, Look)]
    if not looks:
        return
    exact = [(good[a], good[b]) for a, b in same_bytes([look.digest for look in looks])]
    hashes = np.array([look.hash for look in looks], dtype=np.uint64)
    # Images without structure all have the same hash, and say nothing.
    shows = np.array([look.spread >= _FLAT for look in looks])
    chosen = np.flatnonzero(shows)
    pairs = near(hashes[chosen], np.stack([looks[number].small for number in chosen])) if chosen.size else []
    alike = {(good[int(chosen[a])], good[int(chosen[b])]) for a, b in pairs} - {*exact}
    known = {number: cluster[0] for cluster in clusters(exact) for number in cluster}
    alike = {(a, b) for a, b in alike if known.get(a, a) != known.get(b, b)}
    for pairs_of, how, kind in ((exact, "the same bytes", "duplicate"), (sorted(alike), "nearly the same picture", "near")):
        yield from _duplicates_by_place(examined, pairs_of, how, kind)


def _duplicates_by_place(examined: Examined, pairs: list[tuple[int, int]], how: str, kind: str) -> Iterator[Finding]:
    """Duplicates across splits, across classes, and within a class, which differ in what they do to a score."""
    severity: Literal["fault", "look"] = "fault" if kind == "duplicate" else "look"
    across, conflict, within = [], [], []
    for pair in pairs:
        a, b = pair
        if examined.label[a] != examined.label[b]:
            conflict.append(pair)
        elif examined.split[a] != examined.split[b]:
            across.append(pair)
        else:
            within.append(pair)
    both = [pair for pair in conflict if examined.split[pair[0]] != examined.split[pair[1]]]
    if across or both:
        of_train = [_in_train(examined, pair) for pair in (*across, *both)]
        groups = clusters([*across, *both])
        title = f"{plural(len(of_train), 'pair')} across two splits {agreed(len(of_train), 'have')} {how}"
        yield Finding(
            f"{kind}_across_splits", severity, title,
            "A held-out image that is also a training image is remembered, not recognised. Leave the training image out.",
            groups, sorted({number for number in of_train if number is not None}),
        )  # fmt: skip
    if conflict:
        title = f"{plural(len(conflict), 'pair')} with {how} {agreed(len(conflict), 'have')} two labels"
        yield Finding(
            f"{kind}_label_conflict", severity, title,
            "One of the labels is wrong, or the classes overlap. Correct it, or leave both out.",
            clusters(conflict), sorted({number for pair in conflict for number in pair}) if kind == "duplicate" else [],
        )  # fmt: skip
    if within:
        groups = clusters(within)
        repeats = sum(len(group) - 1 for group in groups)
        title = f"{plural(repeats, 'image')} of a class and split {agreed(repeats, 'have')} {how} as another"
        yield Finding(
            f"{kind}_within_class", "look", title,
            "They count as several images of a class that may have few. Keep one of each.",
            groups, sorted(number for group in groups for number in group[1:]) if kind == "duplicate" else [],
        )  # fmt: skip


def _in_train(examined: Examined, pair: tuple[int, int]) -> int | None:
    return next((number for number in pair if examined.split[number] == "train"), None)


def of_classes(classes: list[str], counts: Mapping[str, np.ndarray]) -> Iterator[Finding]:
    """What classes lack, from their counts alone.

    Args:
        classes: C names in label order.
        counts: Images of each class, (C,), by split.
    """
    train = counts["train"]
    single = [name for name, count in zip(classes, train, strict=True) if count == 1]
    if single:
        yield Finding(
            "single_image_class", "look", f"{plural(len(single), 'class', 'have')} one training image: {some_of(single)}",
            "Nothing can be held out of them, and one image decides. Add images, or merge the class with another.",
        )  # fmt: skip
    for split, of_split in counts.items():
        absent = [name for name, count in zip(classes, of_split, strict=True) if not count]
        if split != "train" and absent:
            yield Finding(
                "class_not_tested", "look", f"{split}: {plural(len(absent), 'class', 'have')} no image: {some_of(absent)}",
                f"Their accuracy is not measured. Add images, or set a share aside with data.{split}_fraction.",
            )  # fmt: skip
    few = [(name, FEW - int(count)) for name, count in zip(classes, train, strict=True) if count < FEW]
    if few:
        lacking = some_of([f"{name} {lack}" for name, lack in sorted(few, key=lambda item: item[1])])
        yield Finding(
            "few_shot_classes", "note", f"{plural(len(few), 'class', 'have')} fewer than {FEW} training images (few-shot)",
            f"Images that each lacks to be medium-shot, the nearest first: {lacking}.",
        )  # fmt: skip


def _single_images(examined: Examined) -> Iterator[Finding]:
    def those(seen: Callable[[Look], bool]) -> list[int]:
        return [number for number, look in enumerate(examined.look) if isinstance(look, Look) and seen(look)]

    rules: list[tuple[str, Literal["look", "note"], str, str, Callable[[Look], bool]]] = [
        ("blank", "look", "show nothing: one colour or nearly", "Remove them; a camera or a download has failed.",
         lambda look: look.spread < _FLAT),
        ("dark", "look", "are nearly black", "Remove those in which nobody recognises the class.",
         lambda look: look.mean < _DARK and _FLAT <= look.spread < _FAINT),
        ("bright", "look", "are nearly white", "Remove those in which nobody recognises the class.",
         lambda look: look.mean > _BRIGHT and _FLAT <= look.spread < _FAINT),
        ("tiny", "look", f"have a side below {_TINY} pixels", "They may be thumbnails. Bring the originals, or leave them out.",
         lambda look: min(look.width, look.height) < _TINY),
        ("narrow", "look", f"are more than {_NARROW:g} times as long as wide", "A central crop loses most of them.",
         lambda look: max(look.width, look.height) > _NARROW * min(look.width, look.height)),
        ("rotated", "note", "are turned by EXIF", "Nothing: training, evaluation and service all turn them.",
         lambda look: look.orientation != 1),
    ]  # fmt: skip
    for kind, severity, title, advice, rule in rules:
        numbers = those(rule)
        # Data sets of small pictures are small throughout.
        if numbers and not (kind == "tiny" and len(numbers) > len(examined.look) // 2):
            verb, _, what = title.partition(" ")
            title = f"{plural(len(numbers), 'image', verb)} {what}"
            yield Finding(kind, severity, title, advice, [[number] for number in numbers])
    modes = Counter(look.mode for look in examined.look if isinstance(look, Look))
    usual = modes.most_common(1)[0][0] if modes else ""
    for mode, count in modes.items():
        if mode != usual and count < _RARE_MODE * len(examined.look):
            numbers = those(lambda look, mode=mode: look.mode == mode)  # type: ignore[misc]
            yield Finding(
                "odd_mode", "note", f"{plural(count, 'image', 'are')} {mode}, most are {usual}",
                "They are converted to RGB. Look whether a class can be told by that alone.", [[number] for number in numbers],
            )  # fmt: skip
    sizes = np.array([look.width * look.height if isinstance(look, Look) else 0 for look in examined.look])
    usual_size = float(np.median(sizes[sizes > 0])) if (sizes > 0).any() else 0.0
    huge = np.flatnonzero(sizes > max(16 * usual_size, 1 << 24)).tolist()
    if huge:
        yield Finding(
            "huge", "note", f"{plural(len(huge), 'image', 'have')} more than 16 times the usual pixels",
            "They slow preparing down. Look whether they are photographs of the same kind.", [[number] for number in huge],
        )  # fmt: skip


def _shift(examined: Examined) -> Iterator[Finding]:
    """Brightness, contrast and size of a held-out split beside training."""
    values = {
        "brightness": [look.mean if isinstance(look, Look) else np.nan for look in examined.look],
        "contrast": [look.spread if isinstance(look, Look) else np.nan for look in examined.look],
        "size": [np.log(look.width * look.height) if isinstance(look, Look) else np.nan for look in examined.look],
    }
    split_of = np.array(examined.split)
    for name, each in values.items():
        of_all = np.array(each)
        spread = float(np.nanstd(of_all))
        if not spread > 1e-6:  # all alike, but for rounding
            continue
        train = _class_means(of_all, examined.label, split_of == "train", len(examined.classes))
        for split in {*examined.split} - {"train"}:
            other = _class_means(of_all, examined.label, split_of == split, len(examined.classes))
            # Classes are weighed alike: a balanced test set has another mix of classes than a long tail.
            both = np.isfinite(other - train)
            if not both.any():
                continue
            difference = float((other - train)[both].mean()) / spread
            counts = [np.bincount(examined.label[split_of == name], minlength=len(both))[both] for name in ("train", split)]
            chance = float(np.sqrt(sum((1 / count).sum() for count in counts))) / int(both.sum())
            if abs(difference) > max(_SHIFT, _CHANCE * chance):
                yield Finding(
                    "split_shift", "look", f"{split} differs from train in {name} by {difference:+.2f} standard deviations",
                    "Scores may not hold for images like the training images. Look whether the splits come from one place.",
                )  # fmt: skip


def _class_means(values: np.ndarray, labels: np.ndarray, chosen: np.ndarray, classes: int) -> np.ndarray:
    use = chosen & np.isfinite(values)
    count = np.bincount(labels[use], minlength=classes).astype(np.float64)
    total = np.bincount(labels[use], weights=values[use], minlength=classes)
    return np.divide(total, count, out=np.full(classes, np.nan), where=count > 0)


def some_of(names: list[str]) -> str:
    """The first eight of some names, and how many others there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} others" if len(names) > 8 else "")
