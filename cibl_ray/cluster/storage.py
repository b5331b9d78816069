"""A run folder's copy in an object store (s3://, gs://, abfss://, file://), for clusters whose nodes share no disk.

Rank 0 works in a local folder. The copy is brought up to date after every checkpoint, and the run resumes from it, on
whatever node rank 0 then is.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from cibl_ray.run.folder import CHECKPOINTS, CONFIG, COPY, LAST, LOCK, PREVIOUS, RESULT, copy_of, is_run
from cibl_ray.run.head import reached, reached_in
from pipelines.common.errors import UserError

_AT_LAST = (LAST, RESULT)  # written when all else is there


def join(uri: str, name: str) -> str:
    """A run's place under `uri`, before what follows a question mark."""
    path, mark, query = uri.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def split(uri: str) -> tuple[str, str]:
    """(the storage, the run's name) of a run's place."""
    path, mark, query = uri.partition("?")
    storage, _, name = path.rstrip("/").rpartition("/")
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

        self._folder, self._uri = folder, uri
        try:
            self._files, self._top = fs.FileSystem.from_uri(uri)
            self._files.get_file_info(self._top)
        except (ArrowException, OSError, ValueError) as error:
            raise UserError(f"storage {uri!r} cannot be reached: {_first_line(error)}") from error
        self._sent: dict[Path, tuple[int, int]] = {}

    def exists(self) -> bool:
        """Whether a run with a configuration is there."""
        return bool(self._files.get_file_info(f"{self._top}/{CONFIG}").is_file)

    def claim(self, resume: bool) -> None:
        """Make the folder this run's.

        Args:
            resume: Whether the run has begun before.

        Raises:
            UserError: The folder holds another run, whose files a download would replace.
        """
        known = copy_of(self._folder)
        if is_run(self._folder) and known != self._uri and (self.exists() or not resume):
            raise UserError(
                f"run folder {str(self._folder)!r} holds another run than {self._uri}; move it away, or choose another --name"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / COPY).write_text(self._uri)

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
            raise UserError(f"{self._uri} cannot be written: {error}") from error

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
                f"{self._uri} (epoch {there[0]}, step {there[1]}); resume with --resume {self._folder} --cluster, which brings "
                "the copy up to date, or move the folder away"
            )
        selector = fs.FileSelector(self._top, recursive=True)
        for info in self._files.get_file_info(selector):
            if not info.is_file or info.path.endswith(".part"):
                continue
            place = self._folder / info.path[len(self._top) :].lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            part = place.with_name(place.name + ".part")
            with self._files.open_input_stream(info.path) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
            part.replace(place)
            self._sent[place] = _stamp(place)

    def upload(self) -> None:
        """Bring the copy up to date.

        Raises:
            OSError: The storage is full or gone.
        """
        files = [
            path
            for path in self._folder.rglob("*")
            if path.is_file() and path.suffix != ".part" and path.name not in (LOCK, COPY)
        ]
        for path in sorted(files, key=lambda path: (path.name in _AT_LAST, path)):
            stamp = _stamp(path)
            if self._sent.get(path) == stamp:
                continue
            place = f"{self._top}/{path.relative_to(self._folder).as_posix()}"
            self._files.create_dir(place.rpartition("/")[0], recursive=True)
            # An object appears when it is whole; a file of a mounted folder grows in sight.
            part = f"{place}.part" if self._files.type_name == "local" else place
            with path.open("rb") as source, self._files.open_output_stream(part) as target:
                shutil.copyfileobj(source, target)
            if part != place:
                self._files.move(part, place)
            self._sent[path] = stamp


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
