"""Answers to pages of other origins (`--cors`): the Fetch standard's preflight and headers. Off by default."""

from __future__ import annotations

import re

from serve.request import Headers, Request

ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?|https?://\[[0-9A-Fa-f:]+\](:\d{1,5})?")
_EXPOSED = b"etag, repr-digest, content-range, retry-after, x-request-id, server-timing, inference-header-content-length"
PREFLIGHT: Headers = [
    (b"access-control-allow-methods", b"GET, HEAD, POST"),
    (
        b"access-control-allow-headers",
        b"authorization, content-type, content-encoding, x-api-key, x-request-id, range, if-none-match, if-range, "
        b"inference-header-content-length",
    ),
    (b"access-control-max-age", b"600"),
]


def cors_headers(request: Request, origins: tuple[str, ...]) -> Headers:
    """Name the origin that may read an answer.

    Args:
        request: The request.
        origins: The origins that are allowed, such as "https://example.org"; "*" allows every one.

    Returns:
        Headers for the answer; none if no origin is allowed.
    """
    if not origins:
        return []
    if "*" in origins:
        return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
    origin = request.headers.get(b"origin", b"")
    headers: Headers = [(b"vary", b"origin")]
    if origin.decode("latin-1") in origins:
        headers += [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED)]
    return headers


def preflight(request: Request, origins: tuple[str, ...]) -> Headers | None:
    """Answer a browser that asks before it sends a request to another origin.

    Args:
        request: The request.
        origins: As in `cors_headers`.

    Returns:
        More headers of an empty answer; None if the request is no preflight, or if no origin is allowed.
    """
    if not origins or request.method != "OPTIONS" or b"access-control-request-method" not in request.headers:
        return None
    return PREFLIGHT
