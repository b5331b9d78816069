"""Model files for the edge: entity tags, ranges and checksums, so that a download resumes and is verified."""

from __future__ import annotations

import asyncio
import base64
import os
import re

from cibl_ray.bundle.card import MANIFEST
from serve.errors import ProblemError
from serve.request import Headers, Request, Send
from serve.store import Model

_CHUNK = 1 << 20
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def file_of(model: Model, file: str) -> tuple[int, str]:
    """Find a model's file.

    Args:
        model: The model.
        file: The name that the URL ends with, such as `fp32.onnx`.

    Returns:
        Its descriptor and its SHA-256.

    Raises:
        ProblemError: 404 for any other name.
    """
    precision = file.removesuffix(".onnx")
    if file.endswith(".onnx") and precision in model.files:
        return model.files[precision], model.bundle.models[precision].sha256
    known = ", ".join(f"{name}.onnx" for name in model.files)
    raise ProblemError(404, "not_found", f"model {model.name!r} has no such file; it has {known}, {MANIFEST}")


async def send_file(request: Request, send: Send, file: int, sha256: str, headers: Headers) -> int:
    """Answer with a file, or with the part of it that is asked for.

    Args:
        request: The request, with its conditions and range.
        send: Of ASGI.
        file: The descriptor.
        sha256: Of the file.
        headers: More headers.

    Returns:
        The status: 200, 206 or 304.

    Raises:
        ProblemError: 416 where the file has nothing in the range.
    """
    size = os.fstat(file).st_size
    tag = f'"{sha256}"'.encode()
    digest = base64.b64encode(bytes.fromhex(sha256))
    headers = [
        *headers,
        (b"accept-ranges", b"bytes"),
        (b"cache-control", b"no-cache"),
        (b"content-type", b"application/octet-stream"),
        (b"etag", tag),
        (b"repr-digest", b"sha-256=:" + digest + b":"),
    ]
    # RFC 9110, 13.1.2: tags are compared weakly here, because a proxy that compresses makes them weak. If-Range needs a strong
    # one.
    known = [part.strip().removeprefix(b"W/") for part in request.headers.get(b"if-none-match", b"").split(b",")]
    if tag in known or b"*" in known:
        await send({"type": "http.response.start", "status": 304, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        return 304
    start, end, status = 0, size, 200
    condition = request.headers.get(b"if-range")
    if b"range" in request.headers and condition in (None, tag):
        part = _range(request.headers[b"range"].decode("latin-1"), size)
        if part == (0, 0):
            whole = (b"content-range", f"bytes */{size}".encode())
            raise ProblemError(416, "no_such_range", f"the file has {size:,} bytes, none of them in this range", (whole,))
        if part is not None:
            start, end, status = *part, 206
            headers.append((b"content-range", f"bytes {start}-{end - 1}/{size}".encode()))
    headers.append((b"content-length", str(end - start).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    while request.method != "HEAD" and start < end:
        chunk = await asyncio.to_thread(os.pread, file, min(_CHUNK, end - start), start)
        if not chunk:
            raise OSError("a model's file has become shorter")
        start += len(chunk)
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
    return status


def _range(wanted: str, size: int) -> tuple[int, int] | None:
    """The (start, end) of the range that is asked for.

    (0, 0): the file has nothing there. None: not one range of bytes, so the whole file is sent.
    """
    found = _RANGE.fullmatch(wanted.strip())
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        return (max(0, size - int(last)), size) if int(last) else (0, 0)
    start, end = int(first), min(int(last) + 1, size) if last else size
    return (start, end) if start < end else (0, 0)
