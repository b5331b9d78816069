"""Clients that send or read slowly take no place from others. A refused request leaves its connection usable."""

import http.client
import json
import socket
from contextlib import ExitStack

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from serve import server as server_module
from serve.server import limited_protocol
from serve.settings import check
from tests.serve.conftest import encoded, serving, until

WAYS = pytest.mark.parametrize("way", ["simple", "haproxy"])


@WAYS
def test_a_body_on_its_way_takes_no_place_in_the_queue(bundle, way):
    """HAProxy keeps bodies of up to 64 KiB to itself until they have arrived."""
    data = encoded("PNG")
    with serving([bundle], way, max_queue=2, body_seconds=60) as server, ExitStack() as open_:
        for _ in range(3):
            connection = open_.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + bytes(80_000))
        until(lambda: server.app.load.open == 3)
        assert server.ask("POST", "/v1/predict", data).status == 200
    until(lambda: (server.app.load.open, server.app.load.waiting, server.app.load.held) == (0, 0, 0))


def test_an_answer_is_counted_until_it_is_sent(bundle, monkeypatch):
    monkeypatch.setattr("serve.request._PART", 64)
    seen = []
    with serving([bundle]) as server:

        async def ask() -> list[bytes]:
            data, parts = encoded("PNG"), []

            async def receive():
                return {"type": "http.request", "body": data}

            async def send(message):
                seen.append(server.app.load.held)
                parts.append(message.get("body", b""))

            scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": []}
            await server.app(scope, receive, send)
            return parts

        parts = server.run(ask())
        assert max(map(len, parts)) == 64
        answer = b"".join(parts)
        assert json.loads(answer)["predictions"]
        assert min(seen) >= len(answer) + len(encoded("PNG"))
        assert server.app.load.held == 0


class Clock:
    """An event loop that does what is due when the test says so."""

    def __init__(self):
        self.now, self.due = 0.0, []

    def time(self):
        return self.now

    def call_later(self, seconds, work):
        self.due.append((self.now + seconds, work))
        return self

    def cancel(self):
        pass

    def wait(self, seconds):
        self.now += seconds
        ready = [work for at, work in self.due if at <= self.now]
        self.due = [(at, work) for at, work in self.due if at > self.now]
        for work in ready:
            work()


class Transport:
    def __init__(self, address="10.1.2.3"):
        self.address, self.unsent, self.written, self.ended = address, 0, b"", []

    def get_extra_info(self, name):
        return (self.address, 1) if name == "peername" else None

    def get_write_buffer_size(self):
        return self.unsent

    def write(self, data):
        self.written += data

    def is_closing(self):
        return bool(self.ended)

    def close(self):
        self.ended.append("close")

    def abort(self):
        self.ended.append("abort")


def connected(config, *transports):
    clock, kind = Clock(), limited_protocol(config)
    for transport in transports:
        protocol = kind(config=Config(None, log_config=None), server_state=ServerState(), app_state={}, _loop=clock)
        protocol.connection_made(transport)
    return clock, protocol


@pytest.mark.parametrize("reads", ["nothing", "slowly", "file after file"])
def test_a_client_that_reads_nothing_is_closed(reads):
    """Its answer may be complete, which is when uvicorn's `close` would wait for it for ever."""
    clock, protocol = connected(check({"bundles": ["x"], "idle_seconds": 10}), transport := Transport())
    protocol._asked, protocol._head = True, 0
    transport.unsent = 1_000_000
    for _ in range(20):
        clock.wait(10)
        if reads == "slowly":
            transport.unsent -= 1000
        if reads == "file after file":  # each of the same size
            protocol.resume_writing()
    assert transport.ended == (["abort"] if reads == "nothing" else [])


def test_a_client_that_reads_nothing_is_closed_by_the_service(bundle, monkeypatch):
    monkeypatch.setattr(server_module, "_UNREAD", 0.2)
    with serving([bundle], idle_seconds=1) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        asked = b"GET /v1/models/digits/fp32.onnx HTTP/1.1\r\nHost: x\r\n\r\n"
        connection.sendall(asked * (1 + (16 << 20) // (bundle / "model.onnx").stat().st_size))
        connections = server.server._server.server_state.connections
        until(lambda: connections)
        until(lambda: not connections)


def test_trusted_proxies_may_have_more_connections_than_one_address():
    config = check({"bundles": ["x"], "max_connections_per_address": 2, "trusted_proxies": ["10.0.0.0/8"]})
    proxy, other = [Transport("10.1.2.3") for _ in range(4)], [Transport("9.9.9.9") for _ in range(4)]
    connected(config, *proxy, *other)
    assert [transport.ended for transport in proxy] == [[]] * 4
    assert [transport.ended for transport in other] == [[], [], ["close"], ["close"]]
    assert b" 503 " in other[2].written


def test_a_body_that_is_not_needed_leaves_the_connection_usable(server):
    """It was taken for the head of the next request: a second answer, 431, to a request that nobody had sent."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for method, path, status in (
        ("POST", "/nowhere", 404),
        ("PUT", "/v1/predict", 405),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", "/v2/health/live", 200),
        ("POST", "/v2/repository/index", 200),
    ):
        connection.request(method, path, bytes(400_000))
        answer = connection.getresponse()
        answer.read()
        assert (answer.status, answer.getheader("connection")) == (status, None)
    first = connection.sock
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 200
    assert connection.sock is first
    connection.close()


def test_without_its_key_a_large_body_is_401_and_the_connection_usable(bundle, monkeypatch):
    monkeypatch.setenv("CIBL_RAY_API_KEYS", "secret")
    with serving([bundle]) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        for key, status in (("wrong", 401), ("secret", 415)):
            connection.request("POST", "/v1/predict", bytes(400_000), {"X-API-Key": key})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
        connection.close()


@pytest.mark.parametrize("head", [b"Content-Length: 90000\r\nExpect: 100-continue", b"Content-Length: 999999999"])
def test_a_body_that_is_not_waited_for_ends_the_connection(simple, head):
    with socket.create_connection(("127.0.0.1", simple.port), timeout=10) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        answer = connection.makefile("rb").read()  # until it is closed
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"connection: close" in answer
    assert answer.count(b"HTTP/1.1") == 1
