"""A zip or tar archive of class folders, read without unpacking it."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from pydantic import Field

from pipelines.common.errors import UserError
from pipelines.formats import readable_suffixes
from pipelines.image_files import LeftOut, is_leftover
from pipelines.prepare.sources.contents import Content, Slices, Spooled, ZipMembers
from pipelines.prepare.sources.dataset import Dataset, Images, SourceConfig, classes_of
from pipelines.prepare.sources.folder import SPLITS
from pipelines.prepare.sources.names import hint_for


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
        parts, top = _below_wrapper([PurePosixPath(name).parts for name in names])
        split_of = dict(zip(SPLITS, SPLITS, strict=True))
        splitted = all(each[0] in split_of and len(each) > 2 for each in parts)
        depth = 1 if splitted else 0
        flat = next((name for name, each in zip(names, parts, strict=True) if len(each) < depth + 2), None)
        if flat is not None:
            raise UserError(f"archive {str(self.path)!r}: {flat!r} is in no class folder; expected CLASS/* or train/CLASS/*")
        classes_there = [each[depth] for each in parts]
        splits = [each[0] if splitted else "train" for each in parts]
        if "train" not in splits:
            raise UserError(f"archive {str(self.path)!r} has a folder {splits[0]!r} and no 'train'; expected train/CLASS/*")
        of_train = {name for name, split in zip(classes_there, splits, strict=True) if split == "train"}
        classes, label_of = classes_of(of_train, f"{self.path}/{top}")
        strange = next((name for name in classes_there if name not in label_of), None)
        if strange is not None:
            raise UserError(f"archive {str(self.path)!r}: the class {strange!r} is not one of the training classes")
        labels = np.array([label_of[name] for name in classes_there], dtype=np.int64)
        images = Images(names, labels, content=content)
        chosen = {split: images.take(np.flatnonzero(np.array(splits) == split)) for split in SPLITS if split in splits}
        return Dataset(classes, chosen["train"], chosen.get("val"), chosen.get("test"))

    def present(self) -> bool:
        """Whether the archive exists."""
        return self.path.is_file()

    def _zip(self, left_out: LeftOut) -> tuple[list[str], Content]:
        with zipfile.ZipFile(self.path) as archive:
            locked = next((info.filename for info in archive.infolist() if info.flag_bits & 1), None)
            if locked is not None:
                raise UserError(f"archive {str(self.path)!r}: {locked!r} is encrypted; make an archive without a password")
            names = sorted(_images((info.filename for info in archive.infolist() if not info.is_dir()), left_out))
        return names, ZipMembers(self.path, names)

    def _tar(self, left_out: LeftOut) -> tuple[list[str], Content]:
        with tarfile.open(self.path) as archive:
            members = {member.name: member for member in archive if member.isfile()}
        names = sorted(_images(members, left_out))
        if _is_plain_tar(self.path):
            start = np.array([members[name].offset_data for name in names], dtype=np.int64)
            size = np.array([members[name].size for name in names], dtype=np.int64)
            return names, Slices([self.path], names, np.zeros(len(names), np.int32), start, size)
        stat = self.path.stat()
        in_file = [name for name in members if name in {*names}]
        rows = np.array([{name: row for row, name in enumerate(in_file)}[name] for name in names], dtype=np.int64)
        return names, Spooled(
            len(in_file),
            lambda: _unpacked(self.path, in_file),
            lambda row: f"{self.path}/{in_file[row]}",
            f"{stat.st_size} {stat.st_mtime_ns}".encode(),
            rows,
        )


def _is_plain_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False


def _unpacked(path: Path, names: list[str]) -> Iterator[bytes | None]:
    """The named members of a compressed tar, in its order."""
    wanted = {*names}
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            if member.isfile() and member.name in wanted:
                wanted.remove(member.name)
                file = archive.extractfile(member)
                yield file.read() if file is not None else None


def _images(names: Iterator[str] | dict[str, tarfile.TarInfo], left_out: LeftOut) -> Iterator[str]:
    """The names of images, without hidden files and leftovers, which are counted."""
    suffixes = readable_suffixes()
    for name in names:
        path = PurePosixPath(name)
        leftover = next((part for part in path.parts if is_leftover(part)), None)
        if leftover is not None:
            left_out.folders[leftover] += 1
        elif any(part.startswith(".") and part not in (".", "..") for part in path.parts):
            continue
        elif path.name.lower().endswith(suffixes):
            yield name
        else:
            left_out.endings[path.suffix.lower() or "without ending"] += 1


def _below_wrapper(parts: list[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], str]:
    """Paths without the folders that hold everything, as `photos/` in `photos/train/cat/1.jpg`, and those folders."""
    top: list[str] = []
    while len({each[0] for each in parts}) == 1 and parts[0][0] not in SPLITS and all(len(each) > 2 for each in parts):
        top.append(parts[0][0])
        parts = [each[1:] for each in parts]
    return parts, "/".join(top)
