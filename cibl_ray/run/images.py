"""Which images a run was trained on and chosen by: later, when images were added, they may be among the test images."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from cibl_ray.run.checkpoint import Checkpoint
from cibl_ray.run.folder import CHECKPOINTS, IMAGES
from pipelines.common.files import write_atomically
from pipelines.prepare.prepared import Prepared

_SEEN = {"test": ("train", "val"), "val": ("train",), "train": ()}  # of which splits a run has seen too much for a split
_MOST = 1_000_000  # images, beyond which the names would take hundreds of megabytes of memory


def keep_images(folder: Path, prepared: Prepared) -> None:
    """Write the names of a run's training and validation images into its folder, once.

    Not where two splits share names, as with data sets whose images are numbered within each split: there a name says nothing.
    Nor of more than a million images.

    Args:
        folder: The run folder.
        prepared: Its images.
    """
    if (folder / IMAGES).exists() or sum(split.samples for split in prepared.splits.values()) > _MOST:
        return
    names = {split: prepared.names(split) for split in prepared.splits}
    known = [name for of_split in names.values() for name in of_split]
    if len({*known}) < len(known):
        return
    lines = "".join(f"{split}\t{name}\n" for split in _SEEN["test"] for name in names.get(split, ()))
    write_atomically(folder / IMAGES, gzip.compress(lines.encode(errors="surrogateescape"), mtime=0))


def changed(checkpoint: Checkpoint, prepared: Prepared, split: str) -> str:
    """Say that a split is no longer that of a checkpoint's run, and how many of its images the run has seen; empty: it is.

    Args:
        checkpoint: The checkpoint.
        prepared: The images as they are now.
        split: Which of them are scored.
    """
    if prepared.splits[split].has(checkpoint.data.get(split)):
        return ""
    text = f"the {split} images have changed since this checkpoint was trained"
    seen, names = _seen(checkpoint.place, _SEEN[split]), prepared.names(split)
    if count := sum(name in seen for name in names):
        used = "trained on or chosen by" if split == "test" else "trained on"
        way = "train again, or keep test images in a folder of their own"
        text += f": it was {used} {count:,} of these {len(names):,}, so the scores are too high; {way}"
    return text


def _seen(checkpoint: Path | None, splits: tuple[str, ...]) -> set[str]:
    """Names that `keep_images` wrote; none where the file is gone or damaged, or the checkpoint is in no run folder."""
    if checkpoint is None or checkpoint.parent.name != CHECKPOINTS:
        return set()
    try:
        content = gzip.decompress((checkpoint.parent.parent / IMAGES).read_bytes())
    except (OSError, EOFError, zlib.error):
        return set()
    lines = (line.partition("\t") for line in content.decode(errors="surrogateescape").split("\n"))
    return {name for split, _, name in lines if split in splits}
