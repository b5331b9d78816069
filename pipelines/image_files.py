"""The image files of a folder: which endings count, what is left out, and the report of it. One for every command."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.formats import LEFTOVERS, left_out_text, readable_suffixes


@dataclass
class LeftOut:
    """What was not read of a folder.

    Attributes:
        endings: Files by their ending.
        folders: Folders that operating systems and archive programs leave behind, by name.
        links: Images of an archive that are links to a file that it does not have.
    """

    endings: Counter[str] = field(default_factory=Counter)
    folders: Counter[str] = field(default_factory=Counter)
    links: int = 0

    def lines(self, place: Path | str) -> list[str]:
        """The report: a line for files, one for folders and one for links, each where there are any."""
        found = []
        if self.endings:
            found.append(f"left out of {str(place)!r}: {left_out_text(self.endings)}")
        if self.folders:
            kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(self.folders.items()))
            found.append(f"left out of {str(place)!r}: folders that systems leave there: {kinds}")
        if self.links:
            found.append(f"left out of {str(place)!r}: {self.links:,} links to files that are not in it")
        return found

    def tell(self, place: Path | str, before: str = "data: ") -> None:
        """Print the report to standard error, with `before` at the start of each line."""
        for line in self.lines(place):
            print(f"{before}{line}", file=sys.stderr)


def is_leftover(name: str) -> bool:
    """Whether a folder is one that an operating system or an archive program makes."""
    return name.lower() in LEFTOVERS


def class_folders(folder: Path, left_out: LeftOut) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones and leftovers, which are counted."""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_dir())
    left_out.folders.update(name for name in names if is_leftover(name))
    return [name for name in names if not is_leftover(name)]


def loose_images(folder: Path) -> int:
    """Images directly in a folder."""
    suffixes = readable_suffixes()
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sum(entry.name.lower().endswith(suffixes) and entry.is_file() for entry in entries)


def image_files(folder: Path, left_out: LeftOut) -> list[str]:
    """List the image files anywhere below a folder.

    Hidden files, hidden folders and leftovers are left out. Links are followed. A folder that is reached twice is read once.

    Args:
        folder: The folder; one that does not exist has no files.
        left_out: Counts what is not read.

    Returns:
        Paths relative to the folder, sorted by their parts.

    Raises:
        UserError: A folder below cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename!r} cannot be read: {error.strerror}; make it readable or take it out") from error

    found: list[str] = []
    if not folder.is_dir():
        return found
    suffixes = readable_suffixes()
    seen = {_identity(parent) for parent in folder.resolve().parents}  # a link upwards would bring in other classes
    # Strings: a hundred thousand objects of pathlib take seconds.
    for place, inner, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (identity := _identity(Path(place))) in seen:
            inner.clear()
            continue
        seen.add(identity)
        # Links last, else by name: which of two names a folder is read under is the same on every machine.
        folders = [name for name in inner if not name.startswith(".")]
        left_out.folders.update(name for name in folders if is_leftover(name))
        folders = [name for name in folders if not is_leftover(name)]
        inner[:] = sorted(folders, key=lambda name: (Path(place, name).is_symlink(), name))
        inside = os.path.relpath(place, folder)
        names = [name for name in names if not name.startswith(".")]
        images = [name for name in names if name.lower().endswith(suffixes)]
        if len(images) < len(names):
            left_out.endings.update(Path(name).suffix.lower() or "without ending" for name in {*names} - {*images})
        found += images if inside == "." else [f"{inside}/{name}" for name in images]
    return sorted(found, key=lambda path: path.split("/"))


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino
