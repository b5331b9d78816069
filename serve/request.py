"""One HTTP request, its body read within limits of size and time, and one way to answer."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl

from serve.errors import ProblemError, bad_request

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class GoneError(Exception):
    """The client has closed the connection; nobody waits for an answer."""


class Request:
    """What a route needs of an ASGI scope."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self._query: bytes = scope.get("query_string", b"")
        self._receive = receive
        client = scope.get("client")
        self.client = client[0] if client else ""
        given = self.headers.get(b"x-request-id", b"")
        self.id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.bytes_in = 0
        self.model: str | None = None  # of the path, where it names one
        self.version: str | None = None
        self.file: str | None = None

    @property
    def query(self) -> dict[str, str]:
        try:
            return dict(parse_qsl(self._query.decode("latin-1"), keep_blank_values=True, max_num_fields=32))
        except ValueError as error:
            raise bad_request("the query has more than 32 fields") from error

    @property
    def content_type(self) -> str:
        return self.headers.get(b"content-type", b"").decode("latin-1")

    async def body(self, limit: int, seconds: float, hold: Callable[[int], None]) -> bytes:
        """The whole body. Raises ProblemError: 413 before more than `limit` bytes are taken, 408 after `seconds`; GoneError.

        hold: told the bytes of each part that comes, and raises where there is no room for it.
        """
        length = self.headers.get(b"content-length", b"0")
        too_large = ProblemError(413, "too_large", f"the body may have {limit:,} bytes at most", ((b"connection", b"close"),))
        if not length.isdigit() or len(length) > 18:
            raise bad_request("Content-Length is not a number")
        if int(length) > limit:
            raise too_large
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise GoneError
                    chunk = message.get("body", b"")
                    self.bytes_in += len(chunk)
                    if self.bytes_in > limit:
                        raise too_large
                    hold(len(chunk))
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return chunks[0] if len(chunks) == 1 else b"".join(chunks)
        except TimeoutError:
            raise ProblemError(
                408, "too_slow", f"the body did not arrive within {seconds:g} seconds", ((b"connection", b"close"),)
            ) from None


async def respond(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """A whole answer at once."""
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
