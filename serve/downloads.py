"""Model files for the edge: entity tags, ranges and checksums, so that a download resumes and is verified."""

from __future__ import annotations

import asyncio
import base64
import re
from pathlib import Path

from cibl_ray.bundle import FILES, MANIFEST
from serve.errors import ProblemError
from serve.http import Headers, Request, Send, respond
from serve.store import Model

_CHUNK = 1 << 20
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def file_of(model: Model, file: str) -> tuple[Path, str, str]:
    """(path, SHA-256, content type) of a file by the name that its URL ends with. Raises ProblemError: only what is listed."""
    if file == MANIFEST:
        return model.bundle.folder / MANIFEST, "", "application/json"
    precision = file.removesuffix(".onnx")
    if file.endswith(".onnx") and precision in FILES and precision in model.bundle.models:
        entry = model.bundle.models[precision]
        return entry.path, entry.sha256, "application/octet-stream"
    known = ", ".join(f"{name}.onnx" for name in model.bundle.models)
    raise ProblemError(404, "not_found", f"model {model.name!r} has no such file; it has {known}, {MANIFEST}")


async def send_file(request: Request, send: Send, path: Path, sha256: str, content_type: str, headers: Headers) -> int:
    """Answer with a file, or the part of it that is asked for; returns the status."""
    with await asyncio.to_thread(path.open, "rb") as file:
        size = (await asyncio.to_thread(path.stat)).st_size
        tag = f'"{sha256}"'.encode()
        headers = [*headers, (b"accept-ranges", b"bytes"), (b"content-type", content_type.encode())]
        if sha256:
            digest = base64.b64encode(bytes.fromhex(sha256))
            headers += [(b"etag", tag), (b"repr-digest", b"sha-256=:" + digest + b":"), (b"cache-control", b"no-cache")]
            known = [part.strip() for part in request.headers.get(b"if-none-match", b"").split(b",")]
            if tag in known or b"*" in known:
                await send({"type": "http.response.start", "status": 304, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
                return 304
        start, end, status = 0, size, 200
        wanted = request.headers.get(b"range", b"").decode("latin-1")
        condition = request.headers.get(b"if-range")
        if wanted and sha256 and (condition is None or condition == tag):
            part = _range(wanted, size)
            if part is None:
                await respond(send, 416, [*headers, (b"content-range", f"bytes */{size}".encode())], b"")
                return 416
            start, end, status = *part, 206 if part != (0, size) or wanted else 200
            headers.append((b"content-range", f"bytes {start}-{end - 1}/{size}".encode()))
        headers.append((b"content-length", str(end - start).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if request.method != "HEAD":
            file.seek(start)
            while start < end:
                chunk = await asyncio.to_thread(file.read, min(_CHUNK, end - start))
                if not chunk:
                    raise OSError(f"{path} has become shorter")
                start += len(chunk)
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return status


def _range(wanted: str, size: int) -> tuple[int, int] | None:
    """(start, end) of one range within `size` bytes; the whole where it is none that we read; None where it cannot be had."""
    found = _RANGE.fullmatch(wanted.strip())
    if found is None or found.groups() == ("", ""):
        return 0, size  # several ranges, or another unit: the whole is a right answer
    first, last = found.groups()
    if not first:
        return (max(0, size - int(last)), size) if int(last) > 0 else None
    start, end = int(first), min(int(last) + 1, size) if last else size
    return (start, end) if start < end else None
