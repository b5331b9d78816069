"""A zip or tar archive of class folders, read without unpacking it."""

from __future__ import annotations

import posixpath
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from pipelines.common.errors import UserError
from pipelines.image_files import LeftOut
from pipelines.prepare.sources.contents import Content, Slices, Spooled, ZipMembers, is_file_or_link, link_target
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
            # Of two members with one name the later counts, as in a tar.
            files = dict.fromkeys(info.filename for info in archive.infolist() if not info.is_dir())
            names = Texts(sorted(name for name in files if is_image(name, left_out)))
        return names, ZipMembers(self.path, names)

    def _tar(self, left_out: LeftOut) -> tuple[Texts, Content]:
        with tarfile.open(self.path) as archive:
            # Of two members with one name the later counts.
            files = {posixpath.normpath(member.name): member for member in archive if is_file_or_link(member)}
        images: list[tuple[str, tarfile.TarInfo]] = []  # the name, and the member that has the bytes
        for member in files.values():
            if is_image(member.name, left_out):
                target = link_target(member, files)
                if target is None:
                    left_out.links += 1
                else:
                    images.append((member.name, target))
        images.sort(key=lambda each: each[0])
        names = Texts(name for name, _ in images)
        if _is_plain_tar(self.path) or not images:
            start = np.array([member.offset_data for _, member in images], dtype=np.int64)
            size = np.array([member.size for _, member in images], dtype=np.int64)
            return names, Slices([self.path], names, np.zeros(len(names), np.int32), start, size)
        stat = self.path.stat()
        # Each member is copied once, in the archive's order, also where several names lead to it.
        offsets, first, rows = np.unique([member.offset for _, member in images], return_index=True, return_inverse=True)
        copied = Texts(images[row][1].name for row in first)
        return names, Spooled(
            len(copied),
            lambda: _unpacked(self.path, offsets),
            lambda row: f"{self.path}/{copied[row]}",
            f"{stat.st_size} {stat.st_mtime_ns}".encode(),
            rows,
        )


def _is_plain_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False


def _unpacked(path: Path, offsets: np.ndarray) -> Iterator[bytes | None]:
    """Some members of a compressed tar, by the places of their headers, in its order."""
    wanted = {*offsets.tolist()}
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            if member.offset in wanted:
                file = archive.extractfile(member)
                yield file.read() if file is not None else None
