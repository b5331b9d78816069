"""Images that are in the data twice. The same file twice is refused; copies of a file are reported."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.prepare.sources import Images


def refuse_shared_files(splits: Mapping[str, Images]) -> None:
    """Refuse a file that is in two splits or in two classes: by its path, a link, or a hard link.

    Args:
        splits: The images by split.

    Raises:
        UserError: There is such a file. The message counts them and names one.
    """
    seen: dict[tuple[int, int], tuple[str, int]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for split, images in splits.items():
        for index, file in enumerate(images.files or ()):
            try:
                stat = file.stat()
            except OSError:  # a bad image, which the writer names or skips
                continue
            other, number = seen.setdefault(_identity(stat), (split, index))
            if (other, number) == (split, index):
                continue
            before = splits[other]
            if other == split and before.labels[number] == images.labels[index]:
                continue  # the same image twice in a class: reported as a copy
            assert before.files is not None
            # Some file systems give numbers twice: two names of one file are links, or it has several.
            if stat.st_nlink < 2 and os.path.realpath(file) != os.path.realpath(before.files[number]):
                continue
            counts[other, split] += 1
            first.setdefault((other, split), (before.names[number], images.names[index]))
    for (other, split), count in counts.items():
        one, two = first[other, split]
        what = f"{count:,} {split} images are " + ("in two classes" if other == split else f"also {other} images")
        raise UserError(f"{what}: the same files, such as {one!r} and {two!r}; remove the links, or one of the two lines")


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


@dataclass
class Copies:
    """Images with the same bytes.

    Attributes:
        counts: Copies by kind, in words.
        lines: One for each copy: split and name, a tab, split and name of the image that it is a copy of.
    """

    counts: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The counts in words; empty where there is no copy."""
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.counts.items()))

    def write(self, path: Path) -> None:
        """Write the lines to a file."""
        path.write_text("".join(f"{line}\n" for line in self.lines), errors="surrogateescape")


def find_copies(splits: Mapping[str, tuple[list[str], list[int], list[str]]]) -> Copies:
    """Find images with the same bytes.

    Args:
        splits: For each split the names, the labels, and a digest of each image's bytes.

    Returns:
        All copies.
    """
    seen: dict[str, tuple[str, str, int]] = {}
    copies = Copies()
    for split, (names, labels, digests) in splits.items():
        for name, label, digest in zip(names, labels, digests, strict=True):
            other, before, known = seen.setdefault(digest, (split, name, label))
            if (other, before) == (split, name):
                continue
            if other != split:
                kind = f"{split} images are also {other} images"
            else:
                kind = f"{split} images are twice in a class" if known == label else f"{split} images are also in another class"
            copies.counts[kind] += 1
            copies.lines.append(f"{split} {name}\t{other} {before}".replace("\n", "\\n"))
    return copies
