"""`python -m serve.edge URL IMAGE...`: download a model from a service once, then classify without it.

URL is a service (http://HOST:8000), or a model's file there (.../v1/models/NAME/int8.onnx), or a local .onnx file. IMAGE is a
file, a folder, or '-' for a stream of JPEG images on standard input, as a camera's MJPEG. Needs numpy, Pillow and onnxruntime
alone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import ipaddress
import json
import math
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np

from cibl_ray.bundle.card import FORMATS, PROBABILITIES, file_sha256
from pipelines import jpeg
from pipelines.common.errors import CommandParser, UserError, run_command
from pipelines.pixels import BadImageError
from serve.decode import MAX_SHIFT, Limits, pixels, top

_CHUNK = 1 << 20
_LARGEST = 4 << 30  # bytes of a model
_AT_WORK = 3600  # seconds without a byte after which no command can still be at a download
_FRAME = 16 << 20  # bytes of a picture in a stream
_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp"}
_UNREAD = {".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}  # of images that training takes besides
# What a broken connection, a full disk, or an answer that is none of the service's may raise.
_ODD = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, StopIteration, http.client.HTTPException)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def main() -> None:
    parser = CommandParser(prog="python -m serve.edge", description=__doc__)
    parser.add_argument("model", metavar="URL", help="a service, a model's file there, or a local .onnx file")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="files, folders, or '-' for JPEG images on standard input")
    parser.add_argument("--name", help="which model, where the service has several")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="fp32")
    parser.add_argument("--top", type=_count, default=1, help="classes an image (default: 1)")
    parser.add_argument("--tail-shift", type=_shift, default=0.0, help="more of it favours rare classes (default: 0)")
    parser.add_argument("--threads", type=_count, help="of onnxruntime (default: all cores)")
    parser.add_argument(
        "--cache", type=Path, default=_default_cache(), help="folder for downloaded models (default: %(default)s)"
    )
    parser.add_argument("--key", default=os.environ.get("CIBL_RAY_API_KEY"), help="API key; by default CIBL_RAY_API_KEY")
    parser.add_argument("--json", action="store_true", help="a JSON object an image")
    arguments = parser.parse_args()
    path = Path(arguments.model)
    if not path.is_file():
        path = download(arguments.model, arguments.cache, arguments.name, arguments.precision, arguments.key)
    edge = Edge(path, arguments.threads)
    print(
        f"{edge.card.name} ({edge.card.precision}), {len(edge.card.classes)} classes, {edge.runtime.provider}", file=sys.stderr
    )
    failed = 0
    for place, data in _images(arguments.images):
        try:
            begun = time.perf_counter()
            answer = edge.classify(data, arguments.top, arguments.tail_shift)
        except BadImageError as error:
            failed += 1
            print(f"{place}: {error}", file=sys.stderr)
            continue
        if arguments.json:
            print(json.dumps({"image": place, "top": answer, "ms": round(1000 * (time.perf_counter() - begun), 2)}), flush=True)
        else:
            print(
                place,
                *(f"{entry['label']} {100 * entry['probability']:.1f} % ({entry['group']})" for entry in answer),
                sep="\t",
                flush=True,
            )
    if failed:
        raise UserError(f"{failed} images could not be read")


class Edge:
    """A downloaded model, alone."""

    def __init__(self, model: Path, threads: int | None = None) -> None:
        from cibl_ray.bundle.runtime import Runtime  # here, so that a missing onnxruntime is told in one line

        self.runtime = Runtime(model, "auto", threads)
        self.card = self.runtime.card

    def classify(self, data: bytes, k: int = 1, tail_shift: float = 0.0) -> list[dict[str, Any]]:
        """The k most likely classes of an image file: label, probability, shot group. Raises BadImageError."""
        image = pixels(data, self.card.rule, Limits())
        shift = np.array([tail_shift], np.float32) if tail_shift else None
        (probabilities,) = self.runtime(image[None], shift, (PROBABILITIES,))
        return top(self.card, probabilities[0], k)


def download(url: str, cache: Path, name: str | None = None, precision: str = "fp32", key: str | None = None) -> Path:
    """The model's file, from the cache where it is there and current. Raises UserError.

    A download that broke off is taken up where it ended; a file counts only when its SHA-256 is the one that the service names.
    Without the service, or where its new version does not come, what the cache has is used, and said.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UserError(f"{url!r}: {error}; give a service's URL (http://HOST:8000)") from error
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"{url!r} is neither a file nor a service's URL (http://HOST:8000)")
    base = f"{parts.scheme}://{parts.netloc}"
    if found := re.fullmatch(r"/v1/models/([A-Za-z0-9._-]+)/(fp32|fp16|int8)\.onnx", parts.path):
        name, precision = found[1], found[2]
    elif parts.path not in ("", "/"):
        raise UserError(f"{url!r}: give the service alone, {base}, or a file {base}/v1/models/NAME/fp32.onnx")
    key = _as_header(key)
    if key and parts.scheme == "http" and not _loopback(parts.hostname or ""):
        print(f"warning: the API key goes to {base} unencrypted; give an https URL", file=sys.stderr)
    remembered = cache / (hashlib.sha256(f"{base} {name} {precision}".encode()).hexdigest()[:16] + ".json")
    entry = None
    try:
        entry = _entry(base, name, precision, key)
        path = cache / f"{entry['sha256']}.onnx"
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache):
            if not (path.is_file() and file_sha256(path) == entry["sha256"]):
                _fetch(base + entry["url"], path, entry, key)
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
    except _ODD as error:
        problem = f"the download broke off: {error}; the same command goes on with it"
        if entry is None:
            problem = f"{base} does not answer: {error}"
    if (kept := _remembered(remembered, cache)) is None:
        raise UserError(problem)
    print(f"{problem}; using the model that was downloaded before", file=sys.stderr)
    return kept


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


def _entry(base: str, name: str | None, precision: str, key: str | None) -> dict[str, Any]:
    """What the service says of the file: url, sha256, bytes."""
    with _open(f"{base}/v1/models", key) as answer:
        content = json.loads(answer.read(64 << 20))
    models = {model["name"]: model for model in content["models"]}
    if name is None and len(models) > 1:
        raise UserError(f"{base} has several models, say which: --name {' | '.join(models)}")
    name = name or next(iter(models))
    if name not in models:
        raise UserError(f"{base} has no model {name!r}; it has {', '.join(models)}")
    files = models[name]["files"]
    if precision not in files:
        raise UserError(f"{name} has no {precision} file; it has {', '.join(files)}: --precision")
    found = files[precision]
    where, sha256, size = str(found["url"]), str(found["sha256"]), int(found["bytes"])
    if not (_SHA256.fullmatch(sha256) and 0 < size <= _LARGEST and where.startswith("/v1/")):
        raise UserError(f"{base} describes its files in a way that is not understood")
    return {"url": where, "sha256": sha256, "bytes": size}


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
    except _ODD:
        return f"{error.code} {error.reason}"


def _remembered(file: Path, cache: Path) -> Path | None:
    try:
        sha256 = json.loads(file.read_text())["sha256"]
        path = cache / f"{sha256}.onnx"
        return path if _SHA256.fullmatch(sha256) and file_sha256(path) == sha256 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tidy(cache: Path, path: Path) -> None:
    """Remove models, and parts of them, that no download stands for any more; never `path`, nor what another command may be
    downloading."""
    named = {path.stem}
    with contextlib.suppress(OSError):
        for file in cache.glob("*.json"):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged, it names nothing
                named.add(json.loads(file.read_text())["sha256"])
        for file in cache.iterdir():
            ours = _SHA256.fullmatch(file.stem) and file.suffix in (".onnx", ".part")
            if ours and file.stem not in named and time.time() - file.stat().st_mtime > _AT_WORK:
                file.unlink(missing_ok=True)


def _count(text: str) -> int:
    if not (text.isdecimal() and len(text) < 6 and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to 99999")
    return int(text)


def _shift(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_SHIFT:  # false for NaN too
        raise argparse.ArgumentTypeError(f"{text} is not a number from {-MAX_SHIFT:g} to {MAX_SHIFT:g}")
    return value


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cibl_ray"


def _images(names: list[str]) -> Iterator[tuple[str, bytes]]:
    """(place, bytes) of every image that is named."""
    for name in names:
        if name == "-":
            for number, frame in enumerate(frames(sys.stdin.buffer)):
                yield f"frame {number}", frame
        elif Path(name).is_dir():
            paths = sorted(path for path in Path(name).rglob("*") if path.is_file())
            if skipped := [path.suffix.lower() for path in paths if path.suffix.lower() in _UNREAD]:
                kinds, read = ", ".join(sorted({*skipped})), ", ".join(FORMATS)
                print(f"{name}: {len(skipped)} files ({kinds}) skipped, not of {read}; save them as PNG", file=sys.stderr)
            for path in paths:
                if path.suffix.lower() in _SUFFIXES:
                    yield str(path), path.read_bytes()
        else:
            try:
                yield name, Path(name).read_bytes()
            except OSError as error:
                raise UserError(f"{name}: {error.strerror}") from error


def frames(stream: BinaryIO) -> Iterator[bytes]:
    """The JPEG images of a stream that has one after another, with or without other bytes between (MJPEG)."""
    buffer = bytearray()
    while chunk := stream.read1(_CHUNK) if hasattr(stream, "read1") else stream.read(_CHUNK):
        buffer += chunk
        while True:
            start = buffer.find(b"\xff\xd8\xff")
            if start < 0:
                del buffer[:-2]
                break
            del buffer[:start]
            end = jpeg.end(buffer)
            if end is None:
                if len(buffer) > _FRAME:
                    del buffer[:2]  # not a picture after all
                    continue
                break
            yield bytes(buffer[:end])
            del buffer[:end]


if __name__ == "__main__":
    run_command(main, "onnxruntime")
