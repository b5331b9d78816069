"""Download a model from a service: resumed, verified, and kept in a cache."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import ipaddress
import json
import os
import re
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cibl_ray.bundle.card import NAME, file_sha256
from pipelines.common.errors import UserError

_CHUNK = 1 << 20
_LARGEST = 4 << 30  # bytes of a model
_AT_WORK = 3600  # seconds without a byte after which no command can still be at a download
# What a broken connection, a full disk, or an answer that is not the service's may raise.
ODD = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, StopIteration, http.client.HTTPException)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*/?")


def download(url: str, cache: Path, name: str | None = None, precision: str | None = None, key: str | None = None) -> Path:
    """Download a model, or take it from the cache where it is there and current.

    A download that broke off is resumed. A file counts only if its SHA-256 is the one that the service names. If the service
    does not answer, or its new version cannot be had, the cached model is used, with a line on standard error.

    Args:
        url: A service, or a model's file there.
        cache: Folder for models.
        name: Which model, where the service has several.
        precision: Which file; None: fp32, or the one that the URL names.
        key: API key.

    Returns:
        The ONNX file.

    Raises:
        UserError: There is no model, here or there; or the cache cannot be written.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UserError(f"{url!r}: {error}; give a service's URL (http://HOST:8000)") from error
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"{url!r} is neither a file nor a service's URL (http://HOST:8000)")
    base = f"{parts.scheme}://{parts.netloc}"
    prefix = parts.path
    if found := re.fullmatch(r"(.*)/v1/models/([A-Za-z0-9._-]+)/(fp32|fp16|int8)\.onnx", parts.path):
        if name not in (None, found[2]) or precision not in (None, found[3]):
            asked = f"{name or found[2]}, {precision or found[3]}"
            raise UserError(f"{url!r} names another file than {asked}; leave out name and precision, or give {base}")
        prefix, name, precision = found[1], found[2], found[3]
    if not _PREFIX.fullmatch(prefix) or "/v1/" in f"{prefix}/" or ".." in prefix:
        raise UserError(f"{url!r}: give the service alone, {base}, or a file {base}/v1/models/NAME/fp32.onnx")
    prefix, precision = prefix.rstrip("/"), precision or "fp32"
    key = _as_header(key)
    if key and parts.scheme == "http" and not _loopback(parts.hostname or ""):
        print(f"warning: the API key goes to {base} unencrypted; give an https URL", file=sys.stderr)
    remembered = cache / (hashlib.sha256(f"{base}{prefix} {name} {precision}".encode()).hexdigest()[:16] + ".json")
    entry = None
    try:
        entry = _entry(base, prefix, name, precision, key)
        path = cache / f"{entry['sha256']}.onnx"
        _make(cache)
        with _alone(cache):
            if not (path.is_file() and file_sha256(path) == entry["sha256"]):
                _fetch(f"{base}{prefix}/v1/models/{entry['name']}/{precision}.onnx", path, entry, key)
            part = remembered.with_suffix(".part")
            part.write_text(json.dumps(entry))
            part.replace(remembered)
            _tidy(cache, path)
        return path
    except urllib.error.HTTPError as error:
        problem = f"{base}: {_reason(error)}"
    except UserError as error:
        if entry is None:
            raise
        problem = str(error)
    except ODD as error:
        problem = f"the download broke off: {error}; the same command resumes it"
        if entry is None:
            problem = f"{base} does not answer: {error}"
    if (kept := _remembered(remembered, cache)) is None:
        raise UserError(problem)
    print(f"{problem}; using the model that was downloaded before", file=sys.stderr)
    return kept


def _make(cache: Path) -> None:
    """Raises UserError where the cache cannot be written."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise UserError(
            f"the cache {str(cache)!r} cannot be written: {error.strerror}; give another folder: --cache"
        ) from error


def _as_header(key: str | None) -> str | None:
    """The API key as urllib sends the bytes that the service compares. Raises UserError, which does not say the key."""
    if key is None:
        return None
    if not (key := key.strip()).isprintable():
        raise UserError("the API key (--key, or CIBL_RAY_API_KEY) holds a control character; give it as one line of text")
    return key.encode().decode("latin-1")


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """While no other command downloads into this cache: two at one file spoil it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder = os.open(cache, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _entry(base: str, prefix: str, name: str | None, precision: str, key: str | None) -> dict[str, Any]:
    """What the service lists of the file: name (of the model), sha256, bytes.

    Not its url there: the service does not know the prefix that a proxy strips.
    """
    with _open(f"{base}{prefix}/v1/models", key) as answer:
        content = json.loads(answer.read(64 << 20))
    models = {model["name"]: model for model in content["models"]}
    if not models:
        raise ValueError("it has no model yet; try again")
    if name is None and len(models) > 1:
        raise UserError(f"{base} has several models, say which: --name {' | '.join(models)}")
    name = name or next(iter(models))
    if name not in models:
        raise UserError(f"{base} has no model {name!r}; it has {', '.join(models)}")
    files = models[name]["files"]
    if precision not in files:
        raise UserError(f"{name} has no {precision} file; choose one that it has: {', '.join(files)}")
    found = files[precision]
    sha256, size = str(found["sha256"]), int(found["bytes"])
    if not (_SHA256.fullmatch(sha256) and 0 < size <= _LARGEST and NAME.fullmatch(name)):
        raise UserError(f"{base} describes its files in a way that is not understood")
    return {"name": name, "sha256": sha256, "bytes": size}


def _fetch(url: str, path: Path, entry: dict[str, Any], key: str | None) -> None:
    part = path.with_suffix(".part")
    have = part.stat().st_size if part.exists() else 0
    if have >= entry["bytes"]:
        have = 0
    headers = {"Range": f"bytes={have}-", "If-Range": f'"{entry["sha256"]}"'} if have else {}
    with _open(url, key, headers) as answer, part.open("ab" if answer.status == 206 else "wb") as file:
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            if file.tell() > entry["bytes"]:
                break
            if sys.stderr.isatty():
                print(f"\r{file.tell() / 1e6:.1f} of {entry['bytes'] / 1e6:.1f} MB", end="", file=sys.stderr)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    if size < entry["bytes"]:
        raise OSError(f"{size:,} of {entry['bytes']:,} bytes came")
    if file_sha256(part) != entry["sha256"]:
        part.unlink()
        raise UserError(f"{url}: what came has another checksum than the service names; nothing was kept")
    part.replace(path)


def _open(url: str, key: str | None, headers: dict[str, str] | None = None) -> Any:
    request = urllib.request.Request(url, headers={**(headers or {}), **({"x-api-key": key} if key else {})})  # noqa: S310  # http(s) alone
    return urllib.request.build_opener(_SameServer).open(request, timeout=30)


class _SameServer(urllib.request.HTTPRedirectHandler):
    """Follows redirects on the server that was asked alone: urllib takes the API key along to any other."""

    def redirect_request(self, req: urllib.request.Request, *rest: Any) -> urllib.request.Request | None:
        asked, there = urlsplit(req.full_url), urlsplit(rest[-1])
        if (asked.scheme, asked.hostname, asked.port) != (there.scheme, there.hostname, there.port):
            raise OSError(f"it redirects to another server, {there.scheme}://{there.netloc}; give that URL if it is meant")
        return super().redirect_request(req, *rest)


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return f"{error.code}: {json.loads(error.read(1 << 16))['error']}"
    except ODD:
        return f"{error.code} {error.reason}"


def _remembered(file: Path, cache: Path) -> Path | None:
    try:
        sha256 = json.loads(file.read_text())["sha256"]
        path = cache / f"{sha256}.onnx"
        return path if _SHA256.fullmatch(sha256) and file_sha256(path) == sha256 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tidy(cache: Path, path: Path) -> None:
    """Remove models, and parts of them, that belong to no download any more.

    Neither `path` nor what another command may be downloading is removed.
    """
    named = {path.stem}
    with contextlib.suppress(OSError):
        for file in cache.glob("*.json"):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged, it names nothing
                named.add(json.loads(file.read_text())["sha256"])
        for file in cache.iterdir():
            ours = _SHA256.fullmatch(file.stem) and file.suffix in (".onnx", ".part")
            if ours and file.stem not in named and time.time() - file.stat().st_mtime > _AT_WORK:
                file.unlink(missing_ok=True)
