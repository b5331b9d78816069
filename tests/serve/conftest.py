"""The application behind uvicorn in a thread: what a replica runs, without the seconds that Ray takes to start."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from serve.app import App
from serve.settings import ReplicaConfig


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    port: int
    app: App
    loop: asyncio.AbstractEventLoop

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def run(self, coroutine: Any) -> Any:
        """Run in the application's own loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)


@contextmanager
def serving(bundles: list[Path], **settings: Any) -> Iterator[Server]:
    import uvicorn

    ready = threading.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        try:
            app = App(ReplicaConfig(**{"provider": "cpu", **settings}))
            await app.start(tuple(bundles))
        except Exception as error:
            found["error"] = error
            ready.set()
            return
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        found.update(app=app, server=server, port=port, loop=asyncio.get_running_loop())
        ready.set()
        await task
        await app.stop()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    ready.wait(60)
    if "error" in found:
        raise found["error"]
    try:
        yield Server(found["port"], found["app"], found["loop"])
    finally:
        found["server"].should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def server(bundle: Path) -> Iterator[Server]:
    with serving([bundle], max_bytes=1 << 20, max_pixels=1_000_000, body_seconds=2) as running:
        yield running


def encoded(kind: str, number: int = 0, size: int | None = None, **options: Any) -> bytes:
    """A real digit as an image file."""
    image = Image.fromarray((load_digits().images[number] * 15).astype(np.uint8)).convert("RGB")
    if size is not None:
        image = image.resize((size, size))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def until(true: Any, seconds: float = 20) -> None:
    """Wait until `true()` is."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def png(width: int, height: int) -> bytes:
    """A PNG whose header announces more than its few bytes hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def tensor(name, shape, datatype, data):
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}
