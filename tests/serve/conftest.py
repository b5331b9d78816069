"""The service in a thread: what a replica runs, without the seconds that Ray takes to start."""

from __future__ import annotations

import http.client
import io
import json
import random
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from serve.app import App
from serve.haproxy import HAProxy, socket_of
from serve.local import private_folder
from serve.server import Server
from serve.settings import ServiceConfig


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """A service in this process: the same application as in a replica, without the seconds that Ray takes to start."""

    port: int
    server: Server

    @property
    def app(self) -> App:
        return self.server.app

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
        return self.server.call(coroutine)


def free_port() -> int:
    """A port that stays free until the service binds it: below those that the kernel gives to sockets that ask for any."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@contextmanager
def serving(bundles: list[Path], way: str = "simple", **settings: Any) -> Iterator[Served]:
    """A service. way: `simple`, as `python -m serve --simple`; `haproxy`, behind HAProxy as a replica of `python -m serve`."""
    config = ServiceConfig.model_validate({"bundles": bundles, "provider": "cpu", **settings})
    with private_folder() as folder:
        if way == "simple":
            listener = socket.create_server(("127.0.0.1", 0))
            port, front = listener.getsockname()[1], config
        else:
            listener, port, front = socket.socket(socket.AF_UNIX), free_port(), None
            listener.bind(str(socket_of(folder, 0)))
        server = Server(config, listener, front)
        haproxy = None
        try:
            server.load(config.bundles)
            if way == "haproxy":
                haproxy = HAProxy(folder, config, "127.0.0.1", port)
                served = Served(port, server)
                until(lambda: served.ask("GET", "/v2/health/ready").status == 200)
            yield Served(port, server)
        finally:
            if haproxy is not None:
                haproxy.kill()
            server.stop(5)


@pytest.fixture(scope="session", params=["simple", "haproxy"])
def server(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Served]:
    with serving([bundle], request.param, max_bytes=1 << 20, max_pixels=1_000_000, body_seconds=2) as running:
        yield running


@pytest.fixture(scope="session")
def simple(bundle: Path) -> Iterator[Served]:
    """For tests of the application alone, which what is in front cannot change."""
    with serving([bundle], max_bytes=1 << 20, max_pixels=1_000_000, body_seconds=2) as running:
        yield running


@pytest.fixture(scope="session")
def versions(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """More bundles: `last` and `previous`, of the name `digits`, and `other`, of another name. Copy them: `shutil.copytree`."""
    from cibl_ray.exporting.make_bundle import Options, make_bundle

    folder = tmp_path_factory.mktemp("versions")
    for name, checkpoint in (("last", "last"), ("previous", "previous"), ("other", "last")):
        options = Options(name="other" if name == "other" else "digits", provider="cpu")
        make_bundle(run_folder / "checkpoints" / f"{checkpoint}.safetensors", folder / name, options)
    return {name: folder / name for name in ("last", "previous", "other")}


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
