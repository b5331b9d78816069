"""Names of classes and files, compared as people read them: without invisible characters, accents in one spelling."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.prepare.sources.addresses import LARGEST, Location, fetch, file_system


def name_key(name: str) -> str:
    """A key that is equal for all spellings of a name: Unicode's composed form (NFC), without format characters."""
    if name.isascii():
        return name.strip()
    visible = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
    return unicodedata.normalize("NFC", visible).strip()


def refuse_alike(names: Sequence[str], places: Sequence[str]) -> None:
    """Refuse classes that have the same name, or names that look the same.

    Args:
        names: The classes.
        places: Where each was found, for the message.

    Raises:
        UserError: Two names are alike.
    """
    seen: dict[str, int] = {}
    for number, name in enumerate(names):
        first = seen.setdefault(name_key(name), number)
        if first == number:
            continue
        if names[first] == name:
            problem = f"the class {name!r} stands twice, first in {places[first]}; give each class a name of its own"
        else:
            codes = " and ".join(ascii(each) for each in (names[first], name))
            problem = f"two classes differ only in invisible characters or in how accents are written: {codes}; rename one"
        raise UserError(f"{places[number]}: {problem}")


def read_text(path: Location, what: str, errors: str = "strict") -> str:
    """Read a list that the user made: UTF-8, with or without a byte order mark.

    Args:
        path: The file.
        what: What it is, for the message.
        errors: As in `bytes.decode`; 'surrogateescape' for names of files, which may be in another encoding.

    Raises:
        UserError: It cannot be read as text. The message says what it is instead.
    """
    try:
        data = fetch(file_system(path.partition("://")[0]), path, LARGEST) if isinstance(path, str) else path.read_bytes()
        if errors != "strict" and (kind_of(data) or b"\0" in data):  # no text of any encoding that has names of files
            raise UserError(f"{what} {str(path)!r} cannot be read: {_not_text(data, 'it is no text')}")
        return data.decode("utf-8-sig", errors)
    except OSError as error:
        hint = "" if isinstance(path, str) else hint_for(path)
        raise UserError(f"{what} {str(path)!r} cannot be read: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {str(path)!r} cannot be read: {_not_text(data, error)}") from error


def read_lines(path: Location, what: str) -> Iterator[str]:
    """The lines of a list that the user made, as `read_text` reads it; a file on disk is not held in memory.

    Args:
        path: The file.
        what: What it is, for the message.

    Raises:
        UserError: It cannot be read as text.
    """
    if isinstance(path, str):
        yield from io.StringIO(read_text(path, what), newline=None)
        return
    try:
        with path.open("rb") as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            start = file.peek(512)[:512]
            kind = kind_of(start) if b"\0" in start else ""
            if kind:
                raise UserError(f"{what} {str(path)!r} cannot be read: it is {kind}")
            yield from text
    except OSError as error:
        raise UserError(f"{what} {str(path)!r} cannot be read: {error.strerror}{hint_for(path)}") from error
    except UnicodeDecodeError:
        read_text(path, what)  # it knows the place in the file
        raise


def _not_text(data: bytes, error: object) -> str:
    kind = kind_of(data)
    return f"it is {kind}" if kind else f"{error}; save it as UTF-8"


def kind_of(start: bytes) -> str:
    """What a file is by its first bytes, such as "an image; give a list of images"; empty for text and unknown files."""
    kinds = {
        b"PK\x03\x04": "a zip archive; unpack it, or set data.source.kind: archive",
        b"\x1f\x8b": "a gzip archive; unpack it, or, if it is a .tar.gz, set data.source.kind: archive",
        b"7z\xbc\xaf": "a 7z archive; unpack it first",
        b"BZh": "a bzip2 archive; unpack it first",
        b"\xfd7zXZ": "an xz archive; unpack it first",
        b"\x89PNG": "an image; give a list of images",
        b"\xff\xd8\xff": "an image; give a list of images",
        b"PAR1": "a Parquet file; set data.source.kind: table",
        b"\xff\xfe": "UTF-16 text; save it as UTF-8",
        b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    }
    found = [kind for magic, kind in kinds.items() if start.startswith(magic)]
    if not found and start[257:262] == b"ustar":
        found = ["a tar archive; unpack it, or set data.source.kind: archive"]
    return found[0] if found else ""


_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
_ADDRESSES = ("s3:/", "gs:/", "http:/", "https:/", "hdfs:/", "abfs:/", "abfss:/", "ftp:/", "file:/", "dbfs:/", "hf:/")


def hint_for(path: Path) -> str:
    """What a missing path seems to be, and what to do, for the end of a message; empty where nothing is known."""
    text = f"/{path}"
    scheme = next((address for address in _ADDRESSES if f"/{address}" in text), None)
    if scheme == "file:/":
        return "; write the path without file://"
    if scheme is not None:
        return f"; {scheme}/... is an address: copy the data to a folder, mount it, or list the images in a table"
    if path.is_file():
        try:
            with path.open("rb") as file:
                kind = kind_of(file.read(512))
        except OSError:
            kind = ""
        if kind:
            return f"; it is {kind}"
        of_table = path.suffix.lower() in _TABLES
        return f"; it is a {'table' if of_table else 'file'}; set data.source.kind: {'table' if of_table else 'lists'}"
    return ""
