"""Images and lists behind addresses, read through fsspec: http, https, s3, gs and what else it knows.

Credentials come from the environment, as each storage's own library has it. They are never written anywhere.
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np
from pydantic import BeforeValidator, StringConstraints

from pipelines.common.errors import UserError
from pipelines.prepare.sources.contents import place_in
from pipelines.prepare.sources.texts import Texts, joined

_TRIES, _FIRST_WAIT = 5, 0.5  # of a network read; each wait is twice the one before
_NO_ACCESS = {401, 403, 407}  # HTTP statuses, also of a signature that has expired meanwhile
_REFUSED = {*range(400, 500)} - _NO_ACCESS - {408, 425, 429}  # that stay: not those of a server that is slow or busy
LARGEST = 1 << 28  # bytes that are read from one address: a larger file is no image
_BLOCK = 1 << 22  # bytes of a file that are read at a time where its parts are looked for
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "updated", "Last-Modified")  # where storages keep what changes with a file

Result = TypeVar("Result")


class NetworkError(UserError):
    """The network or a node failed for good, or access was refused. The same command continues with what was written."""


class RefusedError(NetworkError):
    """A web server refuses one address for good (HTTP 4xx), such as a page that is gone."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def _public(value: object) -> object:
    """Refuse an address that holds credentials: it would be written into `config.yaml`."""
    if not isinstance(value, str) or "://" not in value:
        return value
    if "@" in urlsplit(value).netloc or "?" in value:
        raise ValueError("the address has a user's name, a password or a key in it; put credentials into the environment")
    return value.rstrip("/")


def _address(value: object) -> object:
    """Refuse what is no address, or holds credentials."""
    if isinstance(value, str) and "://" not in value:
        raise ValueError("it must be an address such as s3://bucket/folder")
    return _public(value)


Address = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z][a-zA-Z0-9+.-]*://")]
PublicAddress = Annotated[Address, BeforeValidator(_address)]
"""An address such as s3://bucket/folder, without credentials."""
Location = Annotated[Path | Address, BeforeValidator(_public)]
"""A path, or an address such as s3://bucket/folder."""


class Remote:
    """Images behind addresses. A read is tried again when the network fails.

    Args:
        addresses: One an image.
        stamps: One an image, which changes when the image is replaced; None: images are taken not to change.
        below: What stands before each of the addresses.
    """

    def __init__(self, addresses: Sequence[str], stamps: Sequence[str] | None = None, below: str = "") -> None:
        self._addresses = addresses if isinstance(addresses, Texts) else Texts(addresses)
        self._stamps = stamps if stamps is None or isinstance(stamps, Texts) else Texts(stamps)
        self._below = below
        self._systems: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (self._addresses, self._stamps, self._below)  # another process connects for itself

    def read(self, index: int) -> bytes:
        """Fetch one image."""
        address = self._below + self._addresses[index]
        try:
            return fetch(self._system(address.partition("://")[0]), address, LARGEST)
        except RefusedError as error:
            raise OSError(0, error.reason) from error
        except NetworkError as error:
            raise NetworkError(f"{error} (data.on_bad_image does not skip it: a later try may succeed)") from error

    def take(self, indices: np.ndarray) -> Remote:
        """Some of the images."""
        stamps = None if self._stamps is None else self._stamps.take(indices)
        return Remote(self._addresses.take(indices), stamps, self._below)

    def place(self, index: int) -> str:
        """The address, without the user's name and password."""
        return without_secrets(self._below + self._addresses[index])

    def stamp(self) -> Iterator[bytes]:
        """The addresses, and what the storage says of each."""
        yield from joined(self._addresses, self._below)
        if self._stamps:
            yield b"\0"
            yield from joined(self._stamps)

    def _system(self, scheme: str) -> Any:
        with self._lock:
            if scheme not in self._systems:
                self._systems[scheme] = file_system(scheme)
            return self._systems[scheme]


class RemoteSlices:
    """Pieces of files behind addresses: members of tar shards, each read by itself.

    Args:
        files: F addresses, each with its size in bytes and a stamp that changes with it.
        names: N names for messages.
        file: The number of each image's file, int32 (N,).
        start: Its first byte, int64 (N,).
        size: Its bytes, int64 (N,).
    """

    def __init__(
        self, files: Sequence[RemoteFile], names: Sequence[str], file: np.ndarray, start: np.ndarray, size: np.ndarray
    ) -> None:
        self._files, self._names = [*files], names if isinstance(names, Texts) else Texts(names)
        self._file, self._start, self._size = file, start, size
        self._system: Any = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        needed, file = np.unique(self._file, return_inverse=True)  # another process connects for itself
        files = [self._files[number] for number in needed]
        return RemoteSlices, (files, self._names, file.astype(np.int32), self._start, self._size)

    def read(self, index: int) -> bytes:
        """Fetch one piece."""
        size = int(self._size[index])
        if size > LARGEST:
            raise OSError(0, f"{size:,} bytes, too large for an image behind an address")
        if not size:
            raise OSError(0, "is empty")
        address = self._files[int(self._file[index])].address
        with self._lock:
            if self._system is None:
                self._system = file_system(address.partition("://")[0])
        return fetch_part(self._system, address, int(self._start[index]), size)

    def take(self, indices: np.ndarray) -> RemoteSlices:
        """Some of the pieces."""
        return RemoteSlices(
            self._files, self._names.take(indices), self._file[indices], self._start[indices], self._size[indices]
        )

    def place(self, index: int) -> str:
        """The shard's address and the name within it."""
        return place_in(self._files[int(self._file[index])].address, self._names[index])

    def stamp(self) -> Iterator[bytes]:
        """The places, and what the storage says of each file."""
        yield "\0".join(f"{file.address} {file.size} {file.stamp}" for file in self._files).encode()
        yield from (part.tobytes() for part in (self._file, self._start, self._size))


@dataclass(frozen=True)
class RemoteFile:
    """A file behind an address.

    Attributes:
        address: Where it is.
        size: Its bytes.
        stamp: What changes with it; empty where the storage does not tell.
    """

    address: str
    size: int
    stamp: str


class Stream(io.RawIOBase):
    """A file behind an address as a binary file, read in blocks. Each block is tried again when the network fails.

    Args:
        file: The file.
    """

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file, self._system = file, file_system(file.address.partition("://")[0])
        self._at = 0
        self._blocks: dict[int, bytes] = {}  # the last two: an archive looks back a byte before it goes on

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is: what is skipped is not read."""
        return True

    def tell(self) -> int:
        """The next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the block goes."""
        if self._at >= self._file.size:
            return 0
        number, begin = divmod(self._at, _BLOCK)
        if number not in self._blocks:
            first = number * _BLOCK
            block = fetch_part(self._system, self._file.address, first, min(_BLOCK, self._file.size - first))
            self._blocks = {**dict([*self._blocks.items()][-1:]), number: block}
        part = self._blocks[number][begin : begin + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def fetch_part(system: Any, address: str, start: int, size: int) -> bytes:
    """Read a part of a file.

    Args:
        system: Of `file_system`.
        address: The file.
        start: Its first byte.
        size: Bytes.

    Raises:
        OSError: Nothing is there.
        UserError: The server sends whole files only.
        NetworkError: The network does not answer, or less than that comes.
    """

    def read() -> bytes:
        data: bytes = system.cat_file(address, start=start, end=start + size)
        if len(data) < size:
            raise EOFError(f"{len(data):,} of {size:,} bytes have come")
        return data

    data = patient(read, address)
    if len(data) > size:
        raise UserError(
            f"{without_secrets(address)}: the server sends whole files only, no parts (HTTP range requests); copy the "
            "shards to a disk, or to a server that sends parts"
        )
    return data


def described(address: str) -> RemoteFile:
    """Ask the storage about a file.

    Args:
        address: The file.

    Raises:
        FileNotFoundError: Nothing is at the address.
        UserError: The server does not say how large the file is.
        NetworkError: The network does not answer, or access is refused.
    """
    scheme = address.partition("://")[0]
    system = file_system(scheme)

    def ask() -> Any:
        try:
            return system.info(address)
        except FileNotFoundError as error:  # by HTTP, fsspec says that of a connection that breaks, too
            if scheme in ("http", "https") and getattr(error.__cause__, "status", None) not in (404, 410):
                raise ConnectionError from error
            raise

    info = patient(ask, address)
    assert isinstance(info, dict)
    if info.get("size") is None:
        raise UserError(f"{without_secrets(address)}: the server does not say how large the file is; copy it to a disk")
    return RemoteFile(address, int(info["size"]), next((str(info[key]) for key in _STAMPS if info.get(key)), ""))


def matching(pattern: str) -> list[str]:
    """The addresses that a glob means, in order.

    Args:
        pattern: Such as s3://bucket/train-*.tar. A web server must list its folders as pages of links.

    Raises:
        UserError: The storage cannot be listed.
    """
    system = file_system(pattern.partition("://")[0])
    system.invalidate_cache()
    try:
        found = patient(lambda: system.glob(pattern), pattern)
    except FileNotFoundError:
        return []
    except NotImplementedError as error:
        raise UserError(f"{pattern!r} cannot be listed; name the shards by braces, as train-{{000..146}}.tar") from error
    return sorted(system.unstrip_protocol(path) for path in found)


def file_system(scheme: str) -> Any:
    """The fsspec file system of a scheme.

    Args:
        scheme: As 's3' or 'https'.

    Raises:
        UserError: It is unknown, or its library is not installed.
    """
    try:
        import fsspec

        return fsspec.filesystem(scheme)
    except ImportError as error:
        packages = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "abfs": "adlfs"}
        package = packages.get(scheme, "fsspec")
        raise UserError(f"{scheme}://... needs the package {package}: pip install {package}") from error
    except ValueError as error:
        raise UserError(f"{scheme}://... is no address that can be read; known are http, https, s3, gs and file") from error


def fetch(system: Any, address: str, limit: int) -> bytes:
    """Read a whole file.

    Args:
        system: Of `file_system`.
        address: The file.
        limit: Bytes that are read at most.

    Raises:
        OSError: Nothing is there, it is empty, or it is larger than the limit.
        RefusedError: A web server refuses the address.
        NetworkError: The network does not answer, or access is refused.
    """

    def read() -> bytes:
        data: bytes = system.cat_file(address, start=0, end=limit + 1)
        return data

    def empty() -> bool:  # storages refuse the first byte of an empty file in ways of their own
        with contextlib.suppress(Exception):
            return bool(system.size(address) == 0)
        return False

    data = patient(read, address, give_up=empty)
    if not data:
        raise OSError(0, "is empty")
    if len(data) > limit:
        raise OSError(0, f"has more than {limit:,} bytes, too many for an image or a list")
    return data


def patient(
    call: Callable[[], Result], address: str, give_up: Callable[[], bool] = lambda: False, what: str = "read"
) -> Result | bytes:
    """Call a storage's library, and call it again when the network fails.

    Args:
        call: What to do.
        address: Where, for messages.
        give_up: Whether another try is of no use; the result is then empty bytes.
        what: What is done, for messages: read or written.

    Raises:
        FileNotFoundError: Nothing is at the address.
        NetworkError: Access is refused, or it has failed five times.
    """
    wait = _FIRST_WAIT
    for left in reversed(range(_TRIES)):
        try:
            return call()
        except FileNotFoundError as error:
            raise FileNotFoundError(2, "nothing is at this address") from error
        except PermissionError as error:  # also of credentials that have expired meanwhile
            place = without_secrets(address)
            raise NetworkError(f"{place}: access is refused; set its credentials in the environment") from error
        except Exception as error:  # each storage's library has its own
            if give_up():
                return b""
            status = getattr(error, "status", None)
            if address.startswith("http") and status in _NO_ACCESS:
                raise NetworkError(
                    f"{without_secrets(address)}: access is refused, HTTP status {status}; renew its signature or credentials, "
                    "or take the address out"
                ) from error
            if address.startswith("http") and status in _REFUSED:
                reason = f"the server refuses it, HTTP status {status}"
                raise RefusedError(f"{without_secrets(address)}: {reason}", reason) from error
            if not left:
                reason = f"{type(error).__name__}{f', status {status}' if status else ''}"
                raise NetworkError(
                    f"{without_secrets(address)}: cannot be {what} after {_TRIES} tries: {reason}"
                ) from error  # its text may hold the whole address
        time.sleep(wait)
        wait *= 2
    raise AssertionError


def listed(address: str) -> Iterator[tuple[str, str]]:
    """All files below a folder, sorted by the parts of their plain names; one folder's list at a time is in memory.

    Args:
        address: The folder, such as s3://bucket/folder. A web server must list its folders as pages of links.

    Yields:
        Each file's name below the folder, as its address has it, and a stamp that changes with it.

    Raises:
        UserError: Nothing is there, or it cannot be listed.
    """
    scheme = address.partition("://")[0]
    system = file_system(scheme)
    system.invalidate_cache()
    some = False
    for name, info in _walked(system, address):
        some = True
        stamp = next((str(info[key]) for key in _STAMPS if info.get(key)), "")
        yield name.removeprefix(f"{address}/"), f"{info.get('size')} {stamp}"
    if not some:
        web = scheme in ("http", "https")
        pages = "; a web server must list its folders as pages of links, else list the images in a table" if web else ""
        raise UserError(f"image folder {address!r} has no files{pages}")


def plain_name(name: str, address: str) -> str:
    """A file's name as people write it: in the addresses of a web server, `great tit` is `great%20tit`.

    Args:
        name: As `listed` gives it.
        address: The folder.
    """
    return unquote(name, errors="surrogateescape") if address.startswith(("http://", "https://")) else name


def _walked(system: Any, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The address of each file below a folder, and what the storage says of it."""
    try:
        entries: Any = patient(lambda: system.ls(f"{folder}/", detail=True), folder)
        system.invalidate_cache()  # fsspec would keep all that it has listed
        inside = [
            (system.unstrip_protocol(entry["name"]).rstrip("/"), entry["type"] == "directory", entry) for entry in entries
        ]
        itself = (folder, True) in (each[:2] for each in inside)
        if itself and not folder.startswith("http"):  # a part of a key has no name (a//b), which `ls` cannot list
            found: Any = patient(lambda: system.find(f"{folder}/", detail=True), folder)
            inside = [(system.unstrip_protocol(path), False, entry) for path, entry in found.items()]
    except FileNotFoundError as error:
        raise UserError(f"image folder {folder!r}: {error.strerror}") from error
    except NotImplementedError as error:
        scheme = folder.partition("://")[0]
        raise UserError(f"image folder {folder!r}: {scheme}:// cannot be listed; list the images in a table") from error
    start = len(folder) + 1
    below = sorted(
        (each for each in inside if each[0].startswith(f"{folder}/")), key=lambda each: (plain_name(each[0], folder), each[1])
    )
    files = (
        file
        for address, is_folder, entry in below
        if not (is_folder and plain_name(address[start:], folder).startswith("."))
        for file in (_walked(system, address) if is_folder else [(address, entry)])
    )
    if any("/" in address[start:] for address, _, _ in below):  # a page may link files of folders that it links too
        yield from sorted(dict(files).items(), key=lambda file: plain_name(file[0], folder).split("/"))
    else:
        yield from files


def there(address: str) -> bool:
    """Whether something is at an address, as far as the network tells."""
    try:
        return bool(file_system(address.partition("://")[0]).exists(address))
    except Exception:  # each storage's library has its own
        return False


def without_secrets(address: str) -> str:
    """An address without the user's name, password and query, which may hold keys."""
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"
