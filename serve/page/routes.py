"""Routes of the page. They need no API key: the page asks for it, and sends it with every request for data.

GET /  GET /docs  GET /page/FILE  GET /page/config.json
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from serve.openapi import openapi
from serve.page.docs import docs_page
from serve.page.files import INDEX, POLICY, asset, names
from serve.page.ort import has_webgpu
from serve.request import Headers, Request, Send, respond
from serve.settings import ReplicaConfig

Handler = Callable[[Request, Send, Headers], Awaitable[tuple[int, dict[str, Any]]]]

# Isolated from other origins, the page may use threads in WebAssembly.
_PAGE: Headers = [
    (b"content-security-policy", f"{POLICY}; frame-ancestors 'none'".encode()),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-embedder-policy", b"require-corp"),
    (b"referrer-policy", b"no-referrer"),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=()"),
    (b"cache-control", b"no-cache"),
]


class Page:
    """Answers for the page's files."""

    def __init__(self, config: ReplicaConfig, keys: bool) -> None:
        """Prepare what the page must know before it asks for anything else.

        Args:
            config: The limits, which the page checks before it sends an image.
            keys: Whether the service asks for API keys.
        """
        self._document = openapi(config, keys)
        self._facts = {
            "mode": "service",
            "keys": keys,
            "max_bytes": config.max_bytes,
            "max_pixels": min(config.max_pixels, config.max_request_pixels),
            "formats": list(config.formats),
            "browser": "ort/ort.wasm.js" in names(),
            "webgpu": has_webgpu(),
        }

    def route(self, path: str) -> Handler | None:
        """Find the handler of a path.

        Args:
            path: The request's path.

        Returns:
            Its handler; None if the path is not the page's.
        """
        if path == "/":
            return self._file(INDEX)
        if path == "/docs":
            return self._docs
        if path == "/openapi.json":
            return self._openapi
        if path == "/page/config.json":
            return self._config_json
        if path.startswith("/page/"):
            return self._file(path.removeprefix("/page/"))
        return None

    def _file(self, name: str) -> Handler | None:
        async def handler(request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
            file = await asyncio.to_thread(asset, name)  # the first time it is read and compressed
            assert file is not None
            headers = [(b"etag", file.tag), (b"vary", b"accept-encoding"), *_PAGE, *common]
            if file.tag in [tag.strip().removeprefix(b"W/") for tag in request.headers.get(b"if-none-match", b"").split(b",")]:
                await send({"type": "http.response.start", "status": 304, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
                return 304, {}
            content = file.content
            if file.packed is not None and b"gzip" in request.headers.get(b"accept-encoding", b""):
                content = file.packed
                headers.append((b"content-encoding", b"gzip"))
            await respond(send, 200, [(b"content-type", file.kind.encode()), *headers], content)
            return 200, {}

        return handler if name in names() else None

    async def _config_json(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        headers = [(b"content-type", b"application/json"), *_PAGE, *common]
        await respond(send, 200, headers, json.dumps(self._facts).encode())
        return 200, {}

    async def _openapi(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        await respond(send, 200, [(b"content-type", b"application/json"), *common], json.dumps(self._document).encode())
        return 200, {}

    async def _docs(self, request: Request, send: Send, common: Headers) -> tuple[int, dict[str, Any]]:
        headers = [(b"content-type", b"text/html; charset=utf-8"), *_PAGE, *common]
        await respond(send, 200, headers, docs_page(self._document))
        return 200, {}
