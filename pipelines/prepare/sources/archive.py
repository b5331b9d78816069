"""A zip or tar archive of class folders, read without unpacking it."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from pipelines.common.errors import UserError
from pipelines.image_files import LeftOut
from pipelines.prepare.sources.contents import Content, Slices, Spooled, ZipMembers
from pipelines.prepare.sources.dataset import Dataset, SourceConfig
from pipelines.prepare.sources.names import hint_for
from pipelines.prepare.sources.texts import Texts
from pipelines.prepare.sources.tree import class_tree, is_image


class ArchiveSource(SourceConfig):
    """A zip or tar archive with `train/CLASS/*`, `val/CLASS/*` and `test/CLASS/*`, or `CLASS/*` alone, within any folder of it.

    Members of a zip and of a tar that is not compressed are read where they are. A compressed tar is copied once, unpacked, to
    a temporary file.
    """

    kind: Literal["archive"]
    path: Path = Field(description="the archive: .zip, .tar, .tar.gz, .tgz, .tar.bz2 or .tar.xz")

    def open(self) -> Dataset:
        """List the images of all class folders.

        Raises:
            UserError: It is no archive, is damaged, or a class has no images.
        """
        if not self.path.is_file():
            raise UserError(f"archive {str(self.path)!r} does not exist{hint_for(self.path)}")
        left_out = LeftOut()
        try:
            names, content = self._zip(left_out) if zipfile.is_zipfile(self.path) else self._tar(left_out)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise UserError(f"archive {str(self.path)!r} cannot be read: {error}; fetch it again") from error
        except OSError as error:
            raise UserError(f"archive {str(self.path)!r} cannot be read: {error.strerror or error}") from error
        left_out.tell(self.path)
        if not names:
            raise UserError(f"archive {str(self.path)!r} has no images")
        return class_tree(names, content, f"archive {str(self.path)!r}", str(self.path))

    def present(self) -> bool:
        """Whether the archive exists."""
        return self.path.is_file()

    def _zip(self, left_out: LeftOut) -> tuple[Texts, Content]:
        with zipfile.ZipFile(self.path) as archive:
            locked = next((info.filename for info in archive.infolist() if info.flag_bits & 1), None)
            if locked is not None:
                raise UserError(f"archive {str(self.path)!r}: {locked!r} is encrypted; make an archive without a password")
            files = (info.filename for info in archive.infolist() if not info.is_dir())
            names = Texts(sorted(name for name in files if is_image(name, left_out)))
        return names, ZipMembers(self.path, names)

    def _tar(self, left_out: LeftOut) -> tuple[Texts, Content]:
        with tarfile.open(self.path) as archive:
            # Of two members with one name the later counts.
            last = {member.name: (number, member) for number, member in enumerate(archive) if member.isfile()}
        in_file = sorted((each for each in last.values() if is_image(each[1].name, left_out)), key=lambda each: each[0])
        order = np.array(sorted(range(len(in_file)), key=lambda row: in_file[row][1].name), dtype=np.int64)
        names = Texts(in_file[row][1].name for row in order)
        if _is_plain_tar(self.path) or not in_file:
            start = np.array([in_file[row][1].offset_data for row in order], dtype=np.int64)
            size = np.array([in_file[row][1].size for row in order], dtype=np.int64)
            return names, Slices([self.path], names, np.zeros(len(names), np.int32), start, size)
        stat = self.path.stat()
        numbers = np.array([number for number, _ in in_file], dtype=np.int64)
        unsorted = Texts(member.name for _, member in in_file)
        return names, Spooled(
            len(unsorted),
            lambda: _unpacked(self.path, numbers),
            lambda row: f"{self.path}/{unsorted[row]}",
            f"{stat.st_size} {stat.st_mtime_ns}".encode(),
            order,
        )


def _is_plain_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False


def _unpacked(path: Path, numbers: np.ndarray) -> Iterator[bytes | None]:
    """Some members of a compressed tar, by their numbers in it, in its order."""
    wanted = {*numbers.tolist()}
    with tarfile.open(path, "r|*") as archive:
        for number, member in enumerate(archive):
            if number in wanted:
                file = archive.extractfile(member)
                yield file.read() if file is not None else None
