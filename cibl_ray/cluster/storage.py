"""A run folder's copy in an object store (s3://, gs://, abfss://, file://), for clusters whose nodes share no disk.

Rank 0 works in a local folder. The copy is brought up to date after every checkpoint, beside training, and the run resumes
from it, on whatever node rank 0 then is. Its manifest, which lists every file with its digest, is written last: what an upload
that was cut short has changed is known by it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from cibl_ray.run.folder import CHECKPOINTS, CONFIG, COPY, LAST, LOCK, PREVIOUS, RESULT, copy_of, identity, is_run
from cibl_ray.run.head import reached, reached_in
from pipelines.common.errors import UserError

MANIFEST = "manifest.json"  # of a copy: its files, with digests
_AT_LAST = (LAST, RESULT)  # written when all else is there; `PREVIOUS` before them
_CHECKPOINTS = tuple(f"{CHECKPOINTS}/{name}" for name in (LAST, PREVIOUS))
_BLOCK = 2**20  # bytes
log = logging.getLogger(__name__)

Stamp = tuple[int, int, int]


def tidy(uri: str) -> str:
    """The one spelling of a place by which it is compared: without a slash at its end, an absolute path as a file:// URI."""
    if uri.startswith(("/", "~")):
        try:
            return Path(uri).expanduser().as_uri()
        except RuntimeError as error:
            raise UserError(f"storage {uri!r}: there is no such user; give a folder's full path, or a URI") from error
    path, mark, query = uri.partition("?")
    return f"{path.rstrip('/')}{mark}{query}"


def join(uri: str, name: str) -> str:
    """A run's place under `uri`, before what follows a question mark."""
    path, mark, query = uri.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def split(uri: str) -> tuple[str, str]:
    """(the storage, the run's name) of a run's place."""
    path, mark, query = tidy(uri).partition("?")
    storage, _, name = path.rpartition("/")
    return f"{storage}{mark}{query}", name


def remove(uri: str) -> None:
    """Remove a folder in a store, where it is there and can be removed."""
    from pyarrow import ArrowException, fs

    with suppress(ArrowException, OSError, ValueError):
        files, top = fs.FileSystem.from_uri(uri)
        files.delete_dir(top)


def fetched(uri: str) -> tuple[str, Path]:
    """Bring the files of a run here, unless later ones of it are here already.

    Args:
        uri: The run's place in a store.

    Returns:
        The storage, and the local folder.

    Raises:
        UserError: No run is there, the storage cannot be reached, or the folder holds another run.
    """
    storage, name = split(uri)
    folder = (Path("runs") / name).absolute()
    mirror = Mirror(folder, uri)
    if not mirror.exists():
        raise UserError(f"--resume {uri}: no run is there, it has no {CONFIG}")
    mirror.claim(resume=True)
    mirror.newer_wins()
    return storage, folder


def sync_with_copy(folder: Path, storage: str | None) -> str | None:
    """Bring a run's folder and its copy to the same state: the one that was trained further takes the place of the other.

    Args:
        folder: The local run folder.
        storage: The storage that was asked for; None: the one that the run had, so that its copy stays current.

    Returns:
        The storage; None where the run has none.

    Raises:
        UserError: The copy has another name, or the storage cannot be reached.
    """
    copy = copy_of(folder)
    if storage is None and copy is not None:
        storage, name = split(copy)
        if name != folder.name:
            raise UserError(
                f"--resume {folder}: its copy is {copy}, of another name; rename the folder to {name}, or give --storage URI "
                "to begin another copy"
            )
    if storage is None or not is_run(folder):
        return storage
    mirror = Mirror(folder, join(storage, folder.name))
    mirror.claim(resume=True)
    mirror.newer_wins()
    return storage


class Mirror:
    """The copy of a run folder in a store.

    Args:
        folder: The run folder.
        uri: The copy's own place. Its last part is the run's name.

    Raises:
        UserError: It cannot be reached.
    """

    def __init__(self, folder: Path, uri: str) -> None:
        from pyarrow import ArrowException, fs  # a run in one process does without

        self._folder, self.uri = folder, tidy(uri)
        try:
            self._files, self._top = fs.FileSystem.from_uri(self.uri)
            self._files.get_file_info(self._top)
        except (ArrowException, OSError, ValueError) as error:
            raise UserError(f"storage {uri!r} cannot be reached: {_first_line(error)}") from error
        self._run = ""
        self._sent: dict[str, tuple[Stamp, str]] = {}  # what the copy has of each file, with its SHA-256

    def exists(self) -> bool:
        """Whether a run with a configuration is there."""
        return bool(self._files.get_file_info(f"{self._top}/{CONFIG}").is_file)

    def claim(self, resume: bool, run: str = "") -> None:
        """Make the folder this run's.

        Args:
            resume: Whether the run has begun before.
            run: The identity of a run that begins, the same for workers that replace lost ones. A run that is resumed keeps
                the identity that its copy has. Runs of earlier versions have none.

        Raises:
            UserError: The folder holds another run, which would be continued, or whose files a download would replace.
        """
        known, here = copy_of(self._folder), identity(self._folder)
        try:
            there = self._listed("run")
        except OSError as error:
            raise UserError(f"storage {self.uri!r} cannot be read: {_first_line(error)}") from error
        same_place = known is not None and tidy(known) == self.uri
        same_run = here == run if not resume else there in (None, here) or not here
        if is_run(self._folder) and not (same_place and same_run) and (self.exists() or not resume):
            earlier = "an earlier" if same_place else "another"
            raise UserError(
                f"run folder {str(self._folder)!r} on {socket.gethostname()} holds {earlier} run than {self.uri}; "
                "move it away, or choose another --name"
            )
        self._run = str(there or here) if resume else run
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / COPY).write_text(f"{self.uri}\n{self._run}".strip())

    def behind(self) -> bool:
        """Whether the folder has been trained further than the copy: without it, or by a process that ended in between."""
        here, there = self._reached()
        return here > there

    def newer_wins(self) -> None:
        """Replace the folder by its copy, or the copy by the folder: the one that was trained further stays.

        A driver that was killed may have saved a checkpoint and not have sent it.

        Raises:
            UserError: The storage cannot be written.
        """
        if self.exists() and not self.behind():
            self.download()
            return
        try:
            self.upload()
        except OSError as error:
            raise UserError(f"{self.uri} cannot be written: {error}") from error

    def _reached(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(epoch, step) of the last checkpoint in the folder and in the copy."""
        there = (0, 0)
        for name in (LAST, PREVIOUS):
            path = f"{self._top}/{CHECKPOINTS}/{name}"
            if self._files.get_file_info(path).is_file:
                with self._files.open_input_stream(path) as file:
                    there = max(there, reached(file))
        return reached_in(self._folder / CHECKPOINTS), there

    def download(self) -> None:
        """Put the copy in the place of what the folder has; files that only the folder has stay.

        Raises:
            UserError: The folder has been trained further than the copy.
        """
        from pyarrow import fs

        here, there = self._reached()
        if here > there:
            raise UserError(
                f"run folder {str(self._folder)!r} has been trained further (to epoch {here[0]}, step {here[1]}) than its copy "
                f"{self.uri} (epoch {there[0]}, step {there[1]}); resume with --resume {self._folder} --cluster, which brings "
                "the copy up to date, or move the folder away"
            )
        digests, checkpoints = self._digests(), dict[str, str]()
        selector = fs.FileSelector(self._top, recursive=True)
        for info in self._files.get_file_info(selector):
            name = info.path[len(self._top) :].lstrip("/")
            if not info.is_file or info.path.endswith(".part") or name == MANIFEST:
                continue
            place = self._folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            with self._files.open_input_stream(info.path) as source, _part(place).open("wb") as target:
                digest = _copy(source, target)
            if name in _CHECKPOINTS:
                checkpoints[name] = digest
            else:
                self._take(name, digest)
        proven = {name for name, digest in checkpoints.items() if digest in digests.values()}
        for name, digest in checkpoints.items():
            if proven and name not in proven:  # an upload was cut short; the other one is whole
                log.warning("%s/%s is not what the copy's manifest says; the other checkpoint is used", self.uri, name)
                _part(self._folder / name).unlink()
            else:
                self._take(name, digest)

    def _take(self, name: str, digest: str) -> None:
        place = self._folder / name
        _part(place).replace(place)
        self._sent[name] = _stamp(place.stat()), digest

    def _digests(self) -> dict[str, str]:
        """SHA-256 of the files in the copy, from its manifest; empty where it has none, as those of earlier versions."""
        try:
            return {name: str(of["sha256"]) for name, of in self._listed("files").items()}
        except (KeyError, TypeError, AttributeError):
            return {}

    def _listed(self, key: str) -> Any:
        """What the copy's manifest says; None where it lacks that, is damaged or is not there."""
        try:
            with self._files.open_input_stream(f"{self._top}/{MANIFEST}") as file:
                return json.loads(file.read())[key]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def upload(self) -> None:
        """Bring the copy up to date.

        Raises:
            OSError: The storage is full or gone.
        """
        with self.snapshot() as files:
            self.send(files)

    @contextmanager
    def snapshot(self) -> Iterator[list[Frozen]]:
        """The folder's files as they are now, opened: what a run renames or replaces later stays readable."""
        with ExitStack() as stack:
            frozen = []
            for path in sorted(self._folder.rglob("*")):
                name = path.relative_to(self._folder).as_posix()
                if path.suffix == ".part" or path.name in (LOCK, COPY) or not path.is_file():
                    continue
                with suppress(FileNotFoundError):  # it was removed in between
                    content = stack.enter_context(path.open("rb"))
                    frozen.append(Frozen(name, content, _stamp(os.fstat(content.fileno()))))
            yield sorted(frozen, key=lambda file: (file.name.rpartition("/")[2] in _AT_LAST, file.name))

    def send(self, files: list[Frozen]) -> None:
        """Send the files of a snapshot that have changed, then the manifest. Nothing is removed.

        Raises:
            OSError: The storage is full or gone. Sending the same or a later snapshot completes the copy.
        """
        for file in files:
            if self._sent.get(file.name, (None,))[0] == file.stamp:
                continue
            digest = self._copied(file)
            if digest is None:
                digest = self._write(file.name, partial(self._stream, file))
            self._sent[file.name] = file.stamp, digest
        before, of = self._digests(), {file.name: self._sent[file.name][1] for file in files}
        if any(before.get(name) != digest for name, digest in of.items()):
            self._write(MANIFEST, partial(self._list, {**before, **of}))

    def _copied(self, file: Frozen) -> str | None:
        """Let the store copy what it has under another name: the last checkpoint became the one before it.

        Returns:
            The SHA-256; None where the store has no such file, or cannot copy.
        """
        from pyarrow import ArrowException

        for name, (stamp, digest) in self._sent.items():
            if stamp == file.stamp:
                with suppress(ArrowException, OSError):
                    self._write(file.name, partial(self._files.copy_file, f"{self._top}/{name}"))
                    return digest
        return None

    def _list(self, digests: dict[str, str], place: str) -> None:
        content: dict[str, Any] = {"run": self._run} if self._run else {}
        content |= {"files": {name: {"sha256": digest} for name, digest in sorted(digests.items())}}
        with self._files.open_output_stream(place) as target:
            target.write(json.dumps(content, indent=1).encode())

    def _stream(self, file: Frozen, place: str) -> str:
        file.content.seek(0)
        with self._files.open_output_stream(place) as target:
            return _copy(file.content, target, file.stamp[2])

    def _write(self, name: str, write: Callable[[str], Any]) -> Any:
        """Let `write` make an object, which appears when it is whole."""
        place = f"{self._top}/{name}"
        self._files.create_dir(place.rpartition("/")[0], recursive=True)
        # An object of a store appears when it is whole; a file of a mounted folder grows in sight.
        part = f"{place}.part" if self._files.type_name == "local" else place
        written = write(part)
        if part != place:
            self._files.move(part, place)
        return written


@dataclass(frozen=True)
class Frozen:
    """A file of a run folder at one moment.

    Attributes:
        name: Its path within the folder.
        content: Open for reading. Only as many bytes as the stamp says belong to it.
        stamp: What differs where the file does: inode, time of the last change in ns, size in bytes.
    """

    name: str
    content: IO[bytes]
    stamp: Stamp


def _part(place: Path) -> Path:
    return place.with_name(f"{place.name}.part")


def _copy(source: Any, target: Any, size: int | None = None) -> str:
    """Copy a stream, or `size` bytes of it. Returns the SHA-256 of what was copied."""
    digest, left = hashlib.sha256(), size
    while block := source.read(_BLOCK if left is None else min(_BLOCK, left)):
        digest.update(block)
        target.write(block)
        if left is not None:
            left -= len(block)
    return digest.hexdigest()


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
