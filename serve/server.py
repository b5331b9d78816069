"""The application behind uvicorn, in a thread with an event loop of its own.

Each replica of `python -m serve` runs one of these on a Unix socket behind HAProxy. `python -m serve --simple` runs one on the
service's port.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections import Counter
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from socket import socket
from typing import Any, TypeVar, cast

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from pipelines.common.errors import UserError
from serve.app import App
from serve.errors import page
from serve.request import within
from serve.settings import ReplicaConfig, ServiceConfig

T = TypeVar("T")
_LARGEST_HEAD = 64 << 10  # bytes of a request before its body
_UNREAD = 60  # seconds in which a client reads nothing of its answer, as HAProxy's `timeout client`
_STEP = 0.05  # seconds between two looks at whether all requests are answered


class Server:
    """One application at work."""

    def __init__(self, config: ReplicaConfig, listener: socket, front: ServiceConfig | None = None) -> None:
        """Start to answer: 503, until `load` has returned.

        Args:
            config: The application's settings.
            listener: A bound socket.
            front: Whose limits on connections and whose TLS files to apply; None behind HAProxy, which has them.
        """
        self.config, self._listener, self._front = config, listener, front
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._thread.start()
        self._ready.result()

    def load(self, bundles: tuple[Path, ...]) -> None:
        """Load the models. From now on requests are answered.

        Args:
            bundles: The folders.

        Raises:
            UserError: A bundle cannot be used.
        """
        self.call(self.app.start(bundles))

    def set(self, bundles: tuple[Path, ...]) -> None:
        """Serve other bundles.

        Args:
            bundles: The folders.

        Raises:
            UserError: One of them cannot be used. The models stay as they were.
        """
        self.call(self.app.store.set(bundles))

    @property
    def healthy(self) -> bool:
        """Whether the thread and each model's thread are alive."""
        return self._thread.is_alive() and self.app.store.healthy

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the application's event loop, from another thread.

        Args:
            work: The coroutine.

        Returns:
            Its result.
        """
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop(self, seconds: float, announce: float = 0.0) -> None:
        """Answer what was asked, then end.

        Args:
            seconds: How long to wait for answers.
            announce: Seconds in which new requests still get 503, so that clients and load balancers can go elsewhere. 0: the
                listener closes at once.
        """
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._stop(seconds, announce), self._loop)
            self._thread.join(seconds + announce + 2)

    async def _stop(self, seconds: float, announce: float) -> None:
        begun = self._loop.time()
        self.app.stopping = bool(announce)
        while (now := self._loop.time() - begun) < announce or (self.app.load.open and now < seconds):
            await asyncio.sleep(_STEP)
        self._server.should_exit = True

    def _run(self) -> None:
        try:
            import uvloop
        except ImportError:
            asyncio.run(self._main())
            return
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            self.app = App(self.config)
            self._server = uvicorn.Server(self._settings())
            task = asyncio.create_task(self._server.serve(sockets=[self._listener]))
            while not self._server.started and not task.done():
                await asyncio.sleep(0.005)
            if task.done():
                task.result()
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        await task
        await self.app.stop()

    def _settings(self) -> uvicorn.Config:
        front, more = self._front, {}
        if front is not None:
            more = {"http": limited_protocol(front), "timeout_keep_alive": int(front.idle_seconds)}
            if front.tls_certificate is not None:
                more |= {"ssl_certfile": str(front.tls_certificate), "ssl_keyfile": str(front.tls_key)}
        settings = uvicorn.Config(
            self.app,
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=2,
            **{"timeout_keep_alive": 75, **more},  # type: ignore[arg-type]
        )
        try:
            settings.load()
        except (ssl.SSLError, OSError) as error:
            raise UserError(f"tls_certificate, tls_key: {error}; give PEM files that belong together") from error
        return settings


def limited_protocol(limits: ServiceConfig) -> type[asyncio.Protocol]:
    """Make a class of uvicorn's that closes connections which only take up room.

    Without HAProxy in front nothing else limits how many connections there are, how long they wait for the head of a request,
    how large that is, and how long an answer waits for its client.

    Args:
        limits: `max_connections`, `max_connections_per_address`, `trusted_proxies` and `idle_seconds` count.

    Returns:
        A class for uvicorn's setting `http`.
    """
    open_: Counter[str] = Counter()
    most, networks = limits.max_connections_per_address or limits.max_connections, limits.networks

    class Limited(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            peer = transport.get_extra_info("peername")
            self._address = str(peer[0]) if isinstance(peer, tuple) else ""
            open_[self._address] += 1
            self._head, self._since, self._asked = 0, self.loop.time(), False
            self._unsent, self._moved = 0, self._since
            self._timer = self.loop.call_later(min(limits.idle_seconds, _UNREAD), self._look)
            too_many = open_[self._address] > most and not within(self._address, networks)
            if too_many or open_.total() > limits.max_connections:
                self._refuse(503, "Service Unavailable", "overloaded", "too many connections; close some, or try again")

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            open_[self._address] -= 1
            if not open_[self._address]:
                del open_[self._address]
            super().connection_lost(exc)

        def resume_writing(self) -> None:
            self._moved = self.loop.time()
            super().resume_writing()

        def data_received(self, data: bytes) -> None:
            now = self.loop.time()
            if not self.transport.get_write_buffer_size():  # answers before have been read
                self._moved = now
            if not self._head:
                self._since = now
            super().data_received(data)
            if self._answering():
                self._head, self._asked = 0, True
                return
            self._head += len(data)
            if self._head > _LARGEST_HEAD and not self.transport.is_closing():
                self._refuse(431, "Request Header Fields Too Large", "too_large", "the request's head is too large")

        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _look(self) -> None:
            """Close the connection if no request's head has arrived in time, or if the client does not read its answer.

            After an answer that was read, uvicorn closes it.
            """
            now, unsent = self.loop.time(), self.transport.get_write_buffer_size()
            if unsent < self._unsent or not unsent:
                self._moved = now
            self._unsent = unsent
            if now - self._moved >= _UNREAD:
                self.transport.abort()  # `close` would wait for the client
                return
            late = now - self._since >= limits.idle_seconds
            if late and not self._answering() and (self._head or not self._asked):
                self.transport.close()
            self._timer = self.loop.call_later(min(limits.idle_seconds, _UNREAD), self._look)

        def _refuse(self, status: int, reason: str, code: str, message: str) -> None:
            self.transport.write(page(status, reason, code, message))
            self.transport.close()

    return cast("type[asyncio.Protocol]", Limited)
