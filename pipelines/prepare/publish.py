"""Copy a prepared folder to an object store, and open it from there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.common.errors import UserError
from pipelines.common.progress import counted
from pipelines.prepare.prepared import SIDECAR, WEIGHTS, Prepared, Split, is_whole, parse_sidecar, read_sidecar, write_sidecar
from pipelines.prepare.published import CACHE, Published
from pipelines.prepare.sources.addresses import fetch, file_system, patient
from pipelines.prepare.writer import Shard, file_entry, names_file

BEGUN = "publishing.json"  # the sidecar of what is being copied
_LARGEST = 1 << 30  # bytes of a sidecar
_WITHOUT_FOLDERS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az")  # stores in which a folder is a part of a name


def open_published(published: str, folder: Path, cache_gb: float) -> Prepared:
    """Open prepared data that were published. Their files are fetched when they are read.

    Args:
        published: The address of prepared folders.
        folder: The local prepared folder of the same data. Where it is whole and the same, it is used.
        cache_gb: GB of fetched files that may be kept.

    Returns:
        The prepared data.

    Raises:
        UserError: Nothing is published there, or it was published without digests.
        NetworkError: The network does not answer.
    """
    address = f"{published}/{folder.name}"
    content = _read(file_system(published.partition("://")[0]), f"{address}/{SIDECAR}")
    found = None if content is None else parse_sidecar(content, folder, f"{address}/{SIDECAR}")
    if found is None:
        raise UserError(
            f"data.published: nothing is published at {address}; publish it with python -m pipelines.prepare CONFIG "
            f"--data.published {published} and the same fields"
        )
    here = read_sidecar(folder)
    if here is not None and is_whole(here) and _all(here) == _all(found):
        return here
    if not all(shard.sha256 for split in found.splits.values() for shard in split.shards):
        raise UserError(
            f"data.published: {address}/{SIDECAR} has no digests; publish it again with python -m pipelines.prepare"
        )
    return replace(found, published=Published(address, folder.parent / CACHE, round(cache_gb * 1e9)))


def publish(prepared: Prepared, published: str) -> None:
    """Copy a prepared folder to an object store. A copy that was stopped continues after its last whole file.

    The sidecar is copied last: a folder without one is not whole.

    Args:
        prepared: The prepared data, on this machine.
        published: The address of prepared folders; a folder of the same name is made there.

    Raises:
        UserError: The address cannot be written.
        NetworkError: The network does not answer.
    """
    prepared = _with_digests(prepared)
    content = (prepared.folder / SIDECAR).read_bytes()
    scheme, place = published.partition("://")[0], f"{published}/{prepared.folder.name}"
    system = file_system(scheme)
    system.invalidate_cache()

    def write(call: Callable[[], Any], name: str) -> None:
        try:
            patient(call, f"{place}/{name}", what="written")
        except FileNotFoundError as error:
            raise UserError(f"data.published: {published} cannot be written: there is no such bucket or folder") from error

    if scheme not in _WITHOUT_FOLDERS:
        write(partial(system.makedirs, place, exist_ok=True), "")
    there, earlier = _sizes(system, place), _read(system, f"{place}/{SIDECAR}")
    entries = _files(prepared)
    if content not in (earlier, _read(system, f"{place}/{BEGUN}")):
        known = _digests(earlier, prepared.folder)
        same = {entry.file for entry in entries if known.get(entry.file) == entry.sha256}
        for name in sorted(there.keys() - same, key=lambda name: name != SIDECAR):  # the sidecar first: it says what is whole
            write(partial(system.rm_file, f"{place}/{name}"), name)
        there = {name: size for name, size in there.items() if name in same}
        write(partial(system.pipe_file, f"{place}/{BEGUN}", content), BEGUN)
    missing = [entry for entry in entries if there.get(entry.file) != entry.bytes]
    size = sum(entry.bytes for entry in missing)
    print(f"data: publishing {len(missing):,} of {len(entries):,} files, {size / 1e6:,.1f} MB, at {place}", file=sys.stderr)
    for entry in counted(missing, len(missing), "data: publishing", unit="files"):
        write(partial(system.put_file, str(prepared.folder / entry.file), f"{place}/{entry.file}"), entry.file)
    if SIDECAR not in there:
        write(partial(system.pipe_file, f"{place}/{SIDECAR}", content), SIDECAR)
    with contextlib.suppress(FileNotFoundError):
        patient(lambda: system.rm_file(f"{place}/{BEGUN}"), place, what="written")


def _with_digests(prepared: Prepared) -> Prepared:
    """The same with the digest of each file, which an earlier version did not keep."""
    if all(split.tables and all(shard.sha256 for shard in split.shards) for split in prepared.splits.values()):
        return prepared
    splits: dict[str, Split] = {}
    for name, split in prepared.splits.items():
        shards = [file_entry(prepared.folder / shard.file, shard.samples) for shard in split.shards]
        tables = [names_file(name), *([WEIGHTS] if split.weights else [])]
        entries = [file_entry(prepared.folder / table, split.samples) for table in tables]
        splits[name] = replace(split, shards=shards, tables=entries)
    prepared = replace(prepared, splits=splits)
    write_sidecar(prepared)
    return prepared


def _files(prepared: Prepared) -> list[Shard]:
    return [entry for split in prepared.splits.values() for entry in (*split.shards, *split.tables)]


def _digests(sidecar: bytes | None, folder: Path) -> dict[str, str]:
    """The digest of each file that an earlier sidecar has; empty where there is none, or it cannot be read."""
    with contextlib.suppress(UserError):
        earlier = None if sidecar is None else parse_sidecar(sidecar, folder, SIDECAR)
        return {} if earlier is None else {entry.file: entry.sha256 for entry in _files(earlier)}
    return {}


def _all(prepared: Prepared) -> tuple[list[str], dict[str, Any]]:
    return prepared.classes, {name: asdict(split) for name, split in prepared.splits.items()}


def _read(system: Any, address: str) -> bytes | None:
    """A small file; None where it is not there."""
    try:
        return fetch(system, address, _LARGEST)
    except FileNotFoundError:
        return None


def _sizes(system: Any, place: str) -> dict[str, int]:
    """The size of each file of a folder."""
    try:
        found = patient(lambda: system.find(place, detail=True), place)
    except FileNotFoundError:
        return {}
    assert isinstance(found, dict)
    return {path.rpartition("/")[2]: int(info["size"] or 0) for path, info in found.items()}
