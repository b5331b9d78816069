"""Check a source's images: unreadable ones with their reasons, copies, and files in two places. Writes nothing."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.progress import counted
from pipelines.common.words import plural
from pipelines.config import DataConfig
from pipelines.pixels import BadImageError
from pipelines.prepare.doubles import find_copies, refuse_shared_files
from pipelines.prepare.sources import Images
from pipelines.prepare.writer import pack_all, with_setting


@dataclass
class Findings:
    """What a check found.

    Attributes:
        images: How many were checked.
        bad: Places and reasons of the unreadable images.
        copies: A line for each image with the bytes of another.
        kinds: The copies counted by kind, in words.
        shared: Why files are in two splits or classes; empty where none is.
    """

    images: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    kinds: str = ""
    shared: str = ""

    def lines(self) -> list[str]:
        """The findings, one a line."""
        bad = [f"unreadable: {place}: {reason}" for place, reason in self.bad]
        copies = [f"copy: {line.replace(chr(9), ' = ')}" for line in self.copies]
        return bad + copies + ([f"shared: {self.shared}"] if self.shared else [])

    def summary(self) -> str:
        """The counts in one line."""
        kinds = f" ({self.kinds})" if self.kinds else ""
        shared = ", and files that are in two places" if self.shared else ""
        copies = plural(len(self.copies), "copy")
        return f"{plural(self.images, 'image')}: {len(self.bad):,} unreadable, {copies}{kinds}{shared}"


def check(splits: Mapping[str, Images], data: DataConfig, seed: int) -> Findings:
    """Decode every image as preparing does, and compare them.

    Args:
        splits: The images by split.
        data: How they would be stored.
        seed: Of the run.

    Returns:
        All findings.
    """
    findings = Findings()
    try:
        refuse_shared_files(splits)
    except UserError as error:
        findings.shared = str(error)
    read: dict[str, tuple[array[int], bytearray]] = {}
    for split, images in splits.items():
        rows, digests = array("q"), bytearray()
        packed = pack_all(images, np.arange(len(images)), data, seed, lossless=split != "train")
        for index, result in counted(packed, len(images), f"check {split}"):
            findings.images += 1
            if isinstance(result, BadImageError):
                findings.bad.append((images.place(index, split), with_setting(result)))
                continue
            rows.append(index)
            digests += result[1][:16]
        read[split] = rows, digests
    copies = find_copies(splits, read)
    findings.copies, findings.kinds = copies.lines, copies.text()
    return findings
