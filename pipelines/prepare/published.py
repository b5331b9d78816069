"""The files of a prepared folder in an object store, fetched as they are needed, and kept in a cache of limited size.

A fetched file is known by its digest, which is in its name. A process that reads it holds a shared lock on the file itself. The
lock ends with the process; whoever makes room leaves locked files alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipelines.common.errors import UserError
from pipelines.common.files import locked, need_writable, write_atomically
from pipelines.common.progress import counted
from pipelines.common.words import plural
from pipelines.prepare.sources.addresses import fetch_part, file_system, patient
from pipelines.prepare.writer import Shard

CACHE = "cache"  # below data.prepared
_BLOCK = 16 << 20  # bytes of a request
_AT_ONCE = 4  # files


class _DamagedError(Exception):
    """A file is not the one that the sidecar describes; the text says what it is."""


@dataclass(frozen=True)
class Published:
    """The files of a prepared folder behind an address.

    Attributes:
        address: The prepared folder, such as s3://bucket/prepared/NAME.
        cache: The folder of fetched files on this machine, of this and other prepared folders.
        limit: Bytes that the cache may hold.
    """

    address: str
    cache: Path
    limit: int

    def open(self, shards: Sequence[Shard]) -> tuple[list[Path], list[int]]:
        """Open files of the folder, and fetch those that are not here. Nobody removes them until they are closed.

        Args:
            shards: The files, as the sidecar has them.

        Returns:
            Their paths in the cache, and descriptors that are open for reading.

        Raises:
            UserError: A file is missing or damaged in the store, or the cache has no room for it.
            NetworkError: The network does not answer.
        """
        paths = [self._path(shard) for shard in shards]
        opened = [_in_use(path, shard.bytes) for path, shard in zip(paths, shards, strict=True)]
        try:
            if None in opened:
                name = f"data.prepared {str(self.cache.parent)!r}"
                need_writable(self.cache, name, "name another folder: --data.prepared FOLDER")
                self.cache.mkdir(parents=True, exist_ok=True)
                with locked(self.cache / ".lock", waiting=f"data: another command fetches into {self.cache}; waiting for it"):
                    self._complete(shards, paths, opened)
            return paths, [file for file in opened if file is not None]
        except BaseException:
            for file in opened:
                if file is not None:
                    os.close(file)
            raise

    def _path(self, shard: Shard) -> Path:
        stem, dot, ending = shard.file.partition(".")
        return self.cache / self.address.rpartition("/")[2] / f"{stem}-{shard.sha256[:16]}{dot}{ending}"

    def _complete(self, shards: Sequence[Shard], paths: list[Path], opened: list[int | None]) -> None:
        """Open what is still missing, and fetch it where no other process has. The cache's lock is held."""
        for number, (shard, path) in enumerate(zip(shards, paths, strict=True)):
            if opened[number] is None:
                opened[number] = _in_use(path, shard.bytes)
        missing = [number for number, file in enumerate(opened) if file is None]
        if not missing:
            return
        size = sum(shards[number].bytes for number in missing)
        self._make_room(size)
        print(f"data: fetching {plural(len(missing), 'file')}, {size / 1e6:,.1f} MB, from {self.address}", file=sys.stderr)
        paths[missing[0]].parent.mkdir(exist_ok=True)
        system = file_system(self.address.partition("://")[0])
        system.invalidate_cache()
        pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch")
        try:
            done = pool.map(lambda number: self._fetch(system, shards[number], paths[number]), missing)
            for _ in counted(done, len(missing), "data: fetching", unit="files"):
                pass
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"the disk of {str(self.cache)!r} has no room for {size / 1e9:,.2f} GB from {self.address}; free some, lower "
                "data.cache_gb, or set data.prepared to a folder elsewhere"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
        for number in missing:
            opened[number] = _in_use(paths[number], shards[number].bytes)
            if opened[number] is None:
                raise UserError(f"{str(paths[number])!r} was removed while it was fetched; run the command again")

    def _fetch(self, system: Any, shard: Shard, path: Path) -> None:
        """Fetch a file, a second time where its digest is wrong."""
        address, found = f"{self.address}/{shard.file}", ""
        for _ in range(2):
            try:
                write_atomically(path, lambda file: _copy(system, address, shard, file))
                return
            except _DamagedError as error:
                found = str(error)
        raise UserError(
            f"{address} is damaged: it has {found}, and the data were published with {shard.bytes:,} bytes, SHA-256 "
            f"{shard.sha256 or 'unknown'}; remove it and publish the data again with pipelines.prepare"
        )

    def _make_room(self, size: int) -> None:
        """Remove what was used longest ago and is not in use. The cache's lock is held, so no file is being written.

        Raises:
            UserError: The limit is too low.
        """
        for part in self.cache.glob("*/*.part"):  # of a process that was killed
            part.unlink()
        files = [(path, path.stat()) for path in self.cache.glob("*/*")]
        held = sum(status.st_size for _, status in files)
        for path, status in sorted(files, key=lambda file: file[1].st_mtime_ns):
            if held + size <= self.limit:
                return
            if _remove(path):
                held -= status.st_size
        if held + size > self.limit:
            raise UserError(
                f"data.cache_gb {self.limit / 1e9:g} is too low: {size / 1e9:.3g} GB are to be fetched from {self.address}, "
                f"beside {held / 1e9:.3g} GB in use; raise it, or let more nodes share the files (loader.part: shards)"
            )


def _in_use(path: Path, size: int) -> int | None:
    """Open a fetched file and lock it against removal. None where it is not there, or not whole."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        if os.path.samestat(path.stat(), os.fstat(file)) and path.stat().st_size == size:  # not removed in between
            os.utime(file)
            return file
    os.close(file)
    return None


def _remove(path: Path) -> bool:
    """Remove a fetched file, unless a process reads it. Returns whether it is gone."""
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: readers have the file open, and keep its content
            pass
        path.unlink()
    return True


def _copy(system: Any, address: str, shard: Shard, target: IO[bytes]) -> None:
    """Copy a file from a store in blocks, each tried again where the network fails.

    Raises:
        _DamagedError: It has another size or digest.
        UserError: It is not there, or the server sends whole files only.
        NetworkError: The network does not answer.
    """
    try:
        size = patient(lambda: int(system.size(address)), address)
        assert isinstance(size, int)
        digest = hashlib.sha256()
        for begin in range(0, min(size, shard.bytes), _BLOCK):
            block = fetch_part(system, address, begin, min(_BLOCK, size - begin, shard.bytes - begin))
            digest.update(block)
            target.write(block)
    except FileNotFoundError as error:
        raise UserError(f"{address}: nothing is at this address; publish the data again with pipelines.prepare") from error
    if size != shard.bytes or digest.hexdigest() != shard.sha256:
        raise _DamagedError(f"{size:,} bytes, SHA-256 {digest.hexdigest()}")
