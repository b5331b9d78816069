"""Encoded images in archives and in tables, read one at a time, in any order, by several threads."""

from __future__ import annotations

import errno
import os
import posixpath
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipelines.common.errors import UserError, in_the_file
from pipelines.prepare.sources.texts import Texts

_MEMBER = 1 << 30  # bytes of an image file within an archive: a larger one is a mistake
_LINKS = 40  # links that lead to links, as Linux follows them


class Content(Protocol):
    """The encoded images of a split."""

    def read(self, index: int) -> bytes:
        """The file of one image. Several threads call it.

        Raises:
            OSError: The image cannot be read; others may, where it is `in_the_file`.
            NetworkError: The network does not answer.
        """
        ...

    def take(self, indices: np.ndarray) -> Content:
        """The images at `indices`, in that order."""
        ...

    def place(self, index: int) -> str:
        """Where an image is, for messages."""
        ...

    def stamp(self) -> Iterable[bytes]:
        """Bytes that change when an image is replaced, in parts: together they may take much memory."""
        ...


def is_file_or_link(member: tarfile.TarInfo) -> bool:
    """Whether a member of a tar archive is a file, or a link to another member. `tar` links a file given twice to itself."""
    itself = member.islnk() and posixpath.normpath(member.linkname) == posixpath.normpath(member.name)
    return member.isfile() or member.issym() or (member.islnk() and not itself)


def link_target(member: tarfile.TarInfo, files: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The file that a link in a tar archive leads to; None where the archive does not have it.

    Args:
        member: A hard or symbolic link.
        files: All files and links of the archive by their normal path (`posixpath.normpath`).
    """
    target: tarfile.TarInfo | None = member
    for _ in range(_LINKS):
        if target is None or target.isfile():
            return target
        folder = posixpath.dirname(target.name) if target.issym() else ""  # a hard link names a path from the top
        target = files.get(posixpath.normpath(posixpath.join(folder, target.linkname)))
    return None


def place_in(file: str, name: str) -> str:
    """Where a piece of a file is, for messages.

    Args:
        file: The file's path or address.
        name: The piece's name, which may begin with that of the file, and of folders above it.
    """
    parts = file.split("/")
    ends = ("/".join(parts[begin:]) + "/" for begin in reversed(range(len(parts))))
    return f"{file}/{name.removeprefix(next((end for end in ends if name.startswith(end)), ''))}"


def cannot_read(place: str, error: OSError) -> UserError:
    """What an error means that is not `in_the_file`, so that a sound image is not taken for a bad one.

    Args:
        place: Where the image is.
        error: What its reading raised.
    """
    many = error.errno in (errno.EMFILE, errno.ENFILE)
    fix = "raise the limit of open files (ulimit -n)" if many else "check its disk, or take the image out"
    return UserError(
        f"{place}: cannot be read: {error.strerror}; {fix} (data.on_bad_image does not skip it: a later try may succeed)"
    )


class ZipMembers:
    """Files in a zip archive, read without unpacking it.

    Args:
        path: The archive.
        names: Its members.
        opened: The archive, where it is open already; several threads may read it.
    """

    def __init__(self, path: Path, names: Sequence[str], opened: zipfile.ZipFile | None = None) -> None:
        self._path, self._names = path, names if isinstance(names, Texts) else Texts(names)
        self._zip = opened or zipfile.ZipFile(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return ZipMembers, (self._path, self._names)  # another process opens it for itself

    @property
    def files(self) -> list[Path]:
        """The archive."""
        return [self._path]

    def read(self, index: int) -> bytes:
        """Inflate one member; its CRC is checked."""
        try:
            info = self._zip.getinfo(self._names[index])
            if info.file_size > _MEMBER:
                raise OSError(0, f"{info.file_size:,} bytes, too large for an image")
            return self._zip.read(info)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError) as error:
            # RuntimeError: encrypted, or compressed in a way that Python does not know.
            raise OSError(0, f"damaged in the archive: {error or type(error).__name__}") from error

    def take(self, indices: np.ndarray) -> ZipMembers:
        """Some of the members."""
        return ZipMembers(self._path, self._names.take(indices), self._zip)

    def place(self, index: int) -> str:
        """The archive's path and the member's name."""
        return f"{self._path}/{self._names[index]}"

    def stamp(self) -> Iterator[bytes]:
        """Sizes and CRCs of the members: a copy of the archive has the same."""
        infos = (self._zip.getinfo(name) for name in self._names)
        yield np.array([(info.file_size, info.CRC) for info in infos], dtype=np.int64).tobytes()


class Slices:
    """Pieces of files: members of a tar archive that is not compressed, or of WebDataset shards.

    Args:
        paths: F files.
        names: N names for messages; some begin with the name of their file, and of folders above it.
        file: The number of each image's file, int32 (N,).
        start: Its first byte, int64 (N,).
        size: Its bytes, int64 (N,).
    """

    def __init__(
        self, paths: Sequence[Path], names: Sequence[str], file: np.ndarray, start: np.ndarray, size: np.ndarray
    ) -> None:
        self._paths, self._names = [*paths], names if isinstance(names, Texts) else Texts(names)
        self._file, self._start, self._size = file, start, size

    @property
    def files(self) -> list[Path]:
        """The files."""
        return self._paths

    def read(self, index: int) -> bytes:
        """Read one piece."""
        size = int(self._size[index])
        if size > _MEMBER:
            raise OSError(0, f"{size:,} bytes, too large for an image")
        # Opened for each read, which costs little beside the decoding: there may be more files than a process may have open.
        with self._paths[int(self._file[index])].open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, int(self._start[index]))
        if len(data) < size:
            raise OSError(0, f"cut short: {len(data):,} of {size:,} bytes are there")
        return data

    def take(self, indices: np.ndarray) -> Slices:
        """Some of the pieces."""
        return Slices(self._paths, self._names.take(indices), self._file[indices], self._start[indices], self._size[indices])

    def place(self, index: int) -> str:
        """The file's path and the piece's name."""
        return place_in(str(self._paths[int(self._file[index])]), self._names[index])

    def stamp(self) -> Iterator[bytes]:
        """The places, and size and time of change of the files."""
        stats = [path.stat() for path in self._paths]
        files = np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats], dtype=np.int64)
        yield from (part.tobytes() for part in (files, self._file, self._start, self._size))


class Spooled:
    """Images that can only be read from first to last, such as a Parquet column or a compressed tar.

    At the first read they are copied once to a temporary file, which has no name and goes with the process.

    Args:
        count: N images.
        images: Yields the N images in their order; None stands for one that is not there.
        places: Where each is, for messages.
        stamp: Changes when they are replaced.
        rows: Which of the images are meant, int64; None: all.
    """

    def __init__(
        self,
        count: int,
        images: Callable[[], Iterator[bytes | None]],
        places: Callable[[int], str],
        stamp: bytes,
        rows: np.ndarray | None = None,
        spool: _Spool | None = None,
    ) -> None:
        self._places, self._stamp = places, stamp
        self._rows = np.arange(count) if rows is None else rows
        self._spool = spool or _Spool(count, images, places(0))

    def __reduce__(self) -> tuple[Any, ...]:
        return held(self, len(self._rows))  # the temporary file is this process's

    def read(self, index: int) -> bytes:
        """Read one image from the temporary file."""
        return self._spool.read(int(self._rows[index]))

    def take(self, indices: np.ndarray) -> Spooled:
        """Some of the images; they share the temporary file."""
        return Spooled(0, self._spool.images, self._places, self._stamp, self._rows[indices], self._spool)

    def place(self, index: int) -> str:
        """Where an image is."""
        return self._places(int(self._rows[index]))

    def stamp(self) -> Iterator[bytes]:
        """As given, and which rows are meant."""
        yield self._stamp
        yield self._rows.tobytes()


class Held:
    """Images in memory: a few of `Spooled`, on their way to another process.

    Args:
        images: N files; None stands for one that is not there.
        places: Where each was, for messages.
    """

    def __init__(self, images: Sequence[bytes | None], places: Sequence[str]) -> None:
        self._images, self._places = [*images], [*places]

    def read(self, index: int) -> bytes:
        """One of the files."""
        image = self._images[index]
        if image is None:
            raise OSError(0, "no image: the cell is empty")
        return image

    def take(self, indices: np.ndarray) -> Held:
        """Some of the images."""
        return Held([self._images[i] for i in indices], [self._places[i] for i in indices])

    def place(self, index: int) -> str:
        """Where an image was."""
        return self._places[index]

    def stamp(self) -> Iterator[bytes]:
        """The images."""
        yield from (image or b"" for image in self._images)


def held(content: Content, count: int) -> tuple[type[Held], tuple[list[bytes | None], list[str]]]:
    """What `__reduce__` of a content gives that only this process can read: its images themselves.

    Args:
        content: A few images.
        count: How many.
    """
    images: list[bytes | None] = []
    for index in range(count):
        try:
            images.append(content.read(index))
        except OSError as error:
            if not in_the_file(error):
                raise cannot_read(content.place(index), error) from error
            images.append(None)
    return Held, (images, [content.place(index) for index in range(count)])


class _Spool:
    def __init__(self, count: int, images: Callable[[], Iterator[bytes | None]], place: str) -> None:
        self._count, self.images, self._place = count, images, place
        self._lock = threading.Lock()
        self._file: Any = None
        self._ends = np.zeros(0, dtype=np.int64)

    def read(self, row: int) -> bytes:
        with self._lock:
            if self._file is None:
                self._copy()
        start, end = int(self._ends[row - 1]) if row else 0, int(self._ends[row])
        if start == end:
            raise OSError(0, "no image: the cell is empty")
        return os.pread(self._file.fileno(), end - start, start)

    def _copy(self) -> None:
        try:
            file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the images are read
        except OSError as error:
            raise UserError(
                f"the images cannot be copied to a temporary file: {error.strerror}; set TMPDIR to a folder with some room"
            ) from error
        sizes = np.zeros(self._count, dtype=np.int64)
        row = -1
        try:
            for row, image in enumerate(self.images()):
                if image is not None:
                    sizes[row] = file.write(image)
            file.flush()
            if row + 1 < self._count:  # tarfile takes a header that is cut for the end
                raise EOFError(f"it ends after {row + 1:,} of {self._count:,} images")
        except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:  # pyarrow's errors are ValueErrors
            file.close()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"the images cannot be copied to {tempfile.gettempdir()!r}: {error.strerror}; free some room there, "
                    "or set TMPDIR to a folder elsewhere"
                ) from error
            if isinstance(error, OSError) and not in_the_file(error):
                raise
            raise UserError(f"{self._place}: damaged: {' '.join(str(error).split())}; fetch it again") from error
        self._ends, self._file = np.cumsum(sizes), file

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()
