"""One HTTP request, its body read within limits of size and time, and one way to answer."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import uuid
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from serve.errors import ProblemError, bad_request

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

T = TypeVar("T")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_CLOSE = (b"connection", b"close")
_PART = 256 << 10  # bytes of an answer that are sent at once
_DECODED_HERE = 16 << 10  # bytes of a compressed body that is decompressed in the event loop
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class GoneError(Exception):
    """The client has closed the connection; nobody waits for an answer."""


class Request:
    """What a route needs of an ASGI scope.

    Attributes:
        id: What the answer and the access log call the request: the client's own, if it has a valid form.
        model: The name in the path, if there is one; likewise `version` and `file`.
        bytes_in: Bytes of the body that have arrived.
        unread: Whether the client may still be sending its body.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        """Read the head of a request.

        Args:
            scope: Of ASGI.
            receive: Of ASGI.
        """
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self._query: bytes = scope.get("query_string", b"")
        self._receive = receive
        self.client = ""  # found when it is logged
        given = self.headers.get(b"x-request-id", b"")
        self.id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.bytes_in = 0
        self.unread = self.headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in self.headers
        self.model: str | None = None
        self.version: str | None = None
        self.file: str | None = None

    @property
    def query(self) -> dict[str, str]:
        """The fields of the query; of a field that stands twice, the last.

        Raises:
            ProblemError: There are more than 32.
        """
        try:
            return dict(parse_qsl(self._query.decode("latin-1"), keep_blank_values=True, max_num_fields=32))
        except ValueError as error:
            raise bad_request("the query has more than 32 fields") from error

    @property
    def content_type(self) -> str:
        """The header of the body's type, as it was sent."""
        return self.headers.get(b"content-type", b"").decode("latin-1")

    async def body(self, limit: int, seconds: float, hold: Callable[[int], None]) -> bytes:
        """Read the whole body, decompressed.

        Args:
            limit: Bytes that are allowed, also after decompression.
            seconds: In which it must arrive.
            hold: Called with the bytes of each part. It raises if there is no room for them.

        Returns:
            The body.

        Raises:
            ProblemError: 413 before more than `limit` bytes are read, 408 after `seconds`, 415 for a compression that is not
            known,
                400 for a damaged one.
            GoneError: The client has closed the connection.
        """
        encoding = self._encoding()
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
                        self.unread = False
                        break
        except TimeoutError:
            raise ProblemError(
                408, "too_slow", f"the body did not arrive within {seconds:g} seconds", ((b"connection", b"close"),)
            ) from None
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        if not encoding:
            return body
        if len(body) <= _DECODED_HERE and limit <= 1 << 20:
            body = decompressed(body, encoding, limit)
        else:
            body = await asyncio.to_thread(decompressed, body, encoding, limit)
        hold(len(body))
        return body

    async def unless_gone(self, work: Sequence[asyncio.Future[T]]) -> list[T]:
        """Await what the client waits for, as long as it does. The body must have been read.

        Args:
            work: Cancelled when the client goes.

        Returns:
            Their results.

        Raises:
            GoneError: The client has closed the connection.
        """

        def cancel(_: object) -> None:
            for future in work:
                future.cancel()

        gone = asyncio.ensure_future(self._gone())
        gone.add_done_callback(cancel)
        try:
            return await asyncio.gather(*work)
        except asyncio.CancelledError:
            if gone.done():
                raise GoneError from None
            raise
        finally:
            gone.cancel()

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def discard(self, limit: int, seconds: float) -> bool:
        """Read the rest of a body that nobody needs, so that the connection can be used for the next request.

        Args:
            limit: Bytes that a body may have.
            seconds: In which it must arrive.

        Returns:
            Whether all of it has been read. False for a client that asks first whether to send it (`Expect: 100-continue`).
        """
        length = self.headers.get(b"content-length", b"0")
        if b"expect" in self.headers or not length.isdigit() or len(length) > 18 or int(length) > limit:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.unread and self.bytes_in <= limit:
                    message = await self._receive()
                    self.bytes_in += len(message.get("body", b""))
                    self.unread = message.get("more_body", False)  # a client that has gone sends no more, either
        return not self.unread

    def _encoding(self) -> str:
        """How the body is compressed; empty: not at all. Raises ProblemError."""
        encoding = self.headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        if encoding in ("", "identity"):
            return ""
        if encoding not in ("gzip", "x-gzip", "deflate"):
            accepted = ((b"accept-encoding", b"gzip, deflate, identity"), (b"connection", b"close"))
            raise ProblemError(
                415,
                "unsupported_encoding",
                f"Content-Encoding {encoding[:64]!r} is not read here; send gzip or deflate",
                accepted,
            )
        return encoding


def decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """Decompress a body.

    Args:
        body: The bytes as they were sent.
        encoding: Of HTTP: `gzip`, or `deflate`, which some clients send without zlib's head.
        limit: Bytes that may come out.

    Returns:
        The bytes.

    Raises:
        ProblemError: 413 for more than `limit` bytes, 400 for damaged ones.
    """
    raw = encoding == "deflate" and body[:1] and (body[0] & 0x0F != 8 or int.from_bytes(body[:2]) % 31)
    decoder = zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)
    try:
        content = decoder.decompress(body, limit + 1)
    except zlib.error as error:
        raise bad_request(f"the body is not valid {encoding}, as its Content-Encoding says") from error
    if len(content) > limit:
        raise ProblemError(413, "too_large", f"the decompressed body may have {limit:,} bytes at most")
    if not decoder.eof or decoder.unused_data:
        raise bad_request(f"the body is not whole {encoding}, as its Content-Encoding says")
    return content


def client_of(scope: Scope, trusted: Sequence[Network]) -> str:
    """Find the client's address for the access log.

    Args:
        scope: Of ASGI. Behind HAProxy it has no address, and HAProxy has appended one to X-Forwarded-For.
        trusted: Networks of proxies. What they append to X-Forwarded-For is believed.

    Returns:
        The address; empty if there is none.
    """
    lines = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    hops = [hop.strip() for hop in b",".join(lines).decode("latin-1").split(",") if hop.strip()]
    peer = scope.get("client")
    client = str(peer[0]) if peer else (hops.pop() if hops else "")
    while hops and within(client, trusted) and _address(hops[-1]) is not None:
        client = hops.pop()
    return client


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def within(text: str, networks: Sequence[Network]) -> bool:
    """Whether an address is in one of the networks.

    Args:
        text: The address. IPv4 addresses may be written as IPv6 ones.
        networks: The networks.

    Returns:
        False also for a text that is no address.
    """
    address = _address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address is not None and any(address in network for network in networks)


def after_body(request: Request, send: Send, limit: int, seconds: float) -> Send:
    """Let an answer begin when its request's body has arrived.

    Many clients read nothing before they have sent everything, and take the rest of the connection for broken if it closes
    meanwhile. Where the rest is too much, or too slow, the answer has `Connection: close`.

    Args:
        request: The request.
        send: Of ASGI.
        limit: Bytes that a body may have.
        seconds: In which its rest must arrive.

    Returns:
        What to send the answer with.
    """

    async def begin(message: dict[str, Any]) -> None:
        begins = message["type"] == "http.response.start" and _CLOSE not in message["headers"]
        if begins and request.unread and not await request.discard(limit, seconds):
            message = {**message, "headers": [*message["headers"], _CLOSE]}
        await send(message)

    return begin


async def respond(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Send an answer with its Content-Length.

    A long one is sent in parts. uvicorn waits before each of them until the client has read most of those before, so this
    returns when the answer takes up no more memory than one part.

    Args:
        send: Of ASGI.
        status: Of HTTP.
        headers: All others, in lower case.
        body: The body.
    """
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    start = 0
    while len(body) - start > _PART:
        await send({"type": "http.response.body", "body": body[start : start + _PART], "more_body": True})
        start += _PART
    await send({"type": "http.response.body", "body": body[start:]})
