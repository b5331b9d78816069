"""Images that are in the data twice. The same file twice is refused; copies of a file are reported."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.words import plural
from pipelines.prepare.sources import Images
from pipelines.prepare.sources.repeats import repeated

_NOWHERE = (1 << 64) - 1  # in the place of the device of a file that cannot be found


def refuse_shared_files(splits: Mapping[str, Images]) -> None:
    """Refuse a file that is in two splits or in two classes: by its path, a link, or a hard link.

    Args:
        splits: The images by split.

    Raises:
        UserError: There is such a file. The message counts them and names one.
    """
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], tuple[str, str]] = {}
    places: list[tuple[str, int]] = []
    identities = array("Q")  # device and number of each file
    for split, images in splits.items():
        places.append((split, len(identities) // 2))
        for file in images.files or ():
            try:
                identities.extend(_identity(file.stat()))
            except OSError:  # a bad image, which the writer names or skips
                identities.extend((_NOWHERE, len(identities)))
    for earlier, later in repeated(np.frombuffer(identities, dtype=np.uint64).reshape(-1, 2)):
        (other, number), (split, index) = _place(places, earlier), _place(places, later)
        before, images = splits[other], splits[split]
        if other == split and before.labels[number] == images.labels[index]:
            continue  # the same image twice in a class: reported as a copy
        assert before.files is not None
        assert images.files is not None
        file = images.files[index]
        # Some file systems give numbers twice: two names of one file are links, or it has several.
        if file.stat().st_nlink < 2 and os.path.realpath(file) != os.path.realpath(before.files[number]):
            continue
        counts[other, split] += 1
        first.setdefault((other, split), (before.names[number], images.names[index]))
    for (other, split), count in counts.items():
        one, two = first[other, split]
        what = f"{plural(count, f'{split} image', 'are')} {'in two classes' if other == split else f'also in {other}'}"
        raise UserError(f"{what}: the same files, such as {one!r} and {two!r}; remove the links, or one of the two lines")


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _place(places: list[tuple[str, int]], row: int) -> tuple[str, int]:
    """The split of a row of all splits, and its row there. places: of each split, its name and its first row."""
    split, begin = next((split, begin) for split, begin in reversed(places) if begin <= row)
    return split, row - begin


@dataclass
class Copies:
    """Images with the same bytes.

    Attributes:
        counts: Copies by split and kind, in words.
        lines: One for each copy: split and name, a tab, split and name of the image that it is a copy of.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The counts in words; empty where there is no copy."""
        counts = sorted(self.counts.items())
        return ", ".join(f"{plural(count, f'{split} image', 'are')} {kind}" for (split, kind), count in counts)

    def write(self, path: Path) -> None:
        """Write the lines to a file."""
        path.write_text("".join(f"{line}\n" for line in self.lines), errors="surrogateescape")


def find_copies(splits: Mapping[str, Images], read: Mapping[str, tuple[Sequence[int], bytes | bytearray]]) -> Copies:
    """Find images with the same bytes.

    Args:
        splits: The images by split.
        read: For each split, which of its images were read, and 16 bytes of a digest of each, one after another.

    Returns:
        All copies.
    """
    copies = Copies()
    places: list[tuple[str, int]] = []
    begin = 0
    for split, (rows, _) in read.items():
        places.append((split, begin))
        begin += len(rows)
    parts = [np.frombuffer(digests, dtype=np.uint64) for _, digests in read.values()]
    digests = (np.concatenate(parts) if len(parts) > 1 else parts[0]).reshape(-1, 2)
    for earlier, later in repeated(digests):
        (other, number), (split, index) = _place(places, earlier), _place(places, later)
        images, before = splits[split], splits[other]
        row, known = read[split][0][index], read[other][0][number]
        if other != split:
            kind = f"also in {other}"
        elif before.labels[known] == images.labels[row]:
            kind = "twice in a class"
        else:
            kind = "also in another class"
        copies.counts[split, kind] += 1
        copies.lines.append(f"{split} {images.names[row]}\t{other} {before.names[known]}".replace("\n", "\\n"))
    return copies
