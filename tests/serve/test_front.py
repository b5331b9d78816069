"""What stands in front of the application, with --simple and behind HAProxy: start, end, connections, prefix, proxies, TLS."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from pipelines.common.errors import UserError
from serve.edge.download import download
from serve.haproxy import HAProxy, socket_of
from serve.local import private_folder
from serve.server import Server
from serve.settings import check
from tests.conftest import REPOSITORY
from tests.serve.conftest import Served, encoded, free_port, serving, until

WAYS = pytest.mark.parametrize("way", ["simple", "haproxy"])


@WAYS
def test_until_the_models_are_loaded_it_answers_503(bundle, way):
    config = check({"bundles": [bundle], "provider": "cpu", "cors": ["https://example.org"]})
    with private_folder() as folder:
        if way == "simple":
            listener = socket.create_server(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            server, haproxy = Server(config, listener, config), None
        else:
            port = free_port()
            haproxy = HAProxy(folder, config, "127.0.0.1", port)
        served = Served(port, None)
        live, ready, predict = (
            served.ask(*request)
            for request in (("GET", "/v2/health/live"), ("GET", "/v2/health/ready"), ("POST", "/v1/predict", encoded("PNG")))
        )
        assert (live.status, live.json()) == (200, {"live": True})
        assert (ready.status, ready.json(), ready.headers["retry-after"]) == (503, {"ready": False}, "1")
        assert (predict.status, predict.headers["retry-after"]) == (503, "1")
        assert set(predict.json()) == {"error", "code", "request_id"}
        assert served.ask("GET", "/v1/models").status == 503
        with pytest.raises(UserError, match=r"503: (the service is starting|no replica answered)"):
            download(f"http://127.0.0.1:{port}", folder)
        # A page elsewhere asks first whether it may ask, and can then read the 503.
        first = served.ask("OPTIONS", "/v1/predict", Origin="https://example.org", Access_Control_Request_Method="POST")
        assert (first.status, first.body) == (204, b"")
        assert first.headers["access-control-allow-origin"] == "https://example.org"
        assert "x-api-key" in first.headers["access-control-allow-headers"]
        assert first.headers["access-control-max-age"] == "600"
        foreign = served.ask("OPTIONS", "/v1/predict", Origin="https://example.com", Access_Control_Request_Method="POST")
        assert "access-control-allow-origin" not in foreign.headers
        if haproxy is not None:
            assert served.ask("GET", "/metrics").body == b"cibl_ray_failed_updates_total 0\n"
            haproxy.count_failed(3)
            assert served.ask("GET", "/metrics").body == b"cibl_ray_failed_updates_total 3\n"
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(socket_of(folder, 0)))
            server = Server(config, listener)
        server.load(config.bundles)
        until(lambda: served.ask("GET", "/v2/health/ready").status == 200)
        assert served.ask("POST", "/v1/predict", encoded("PNG")).status == 200
        if haproxy is not None:
            haproxy.kill()
        server.stop(5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_simple_command_ends_in_order(bundle, number):
    """Ready, then a signal to all processes of its group: 503 for what is new, an answer for what was asked."""
    port = free_port()
    served = Served(port, None)
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", str(bundle), "--simple", "--port", str(port), "--cors", "https://example.org"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline().startswith("serving digits (fp32) on http://127.0.0.1:")
    data = encoded("PNG")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data[:20])
        time.sleep(0.3)
        os.killpg(process.pid, number)
        seen = []
        until(lambda: seen.append(served.ask("POST", "/v1/predict", data)) or seen[-1].status != 200, 5)
        assert (seen[-1].status, seen[-1].json()["code"]) == (503, "stopping")
        assert (seen[-1].headers["retry-after"], seen[-1].headers["connection"]) == ("1", "close")
        assert served.ask("GET", "/v2/health/ready").status == 503
        asks = {"Origin": "https://example.org", "Access_Control_Request_Method": "POST"}
        assert served.ask("OPTIONS", "/v1/predict", **asks).status == 204
        connection.sendall(data[20:])
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert output == "answering what was asked, then ending\n"


@WAYS
def test_one_address_has_so_many_connections(bundle, way):
    """More are refused; those that send nothing are closed, and then there is room again."""
    with serving([bundle], way, max_connections_per_address=8, idle_seconds=1) as server, ExitStack() as open_:

        def connect() -> socket.socket | None:
            try:
                return open_.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            except OSError:
                return None

        def closed(connection: socket.socket | None) -> bool:
            if connection is None:
                return True
            connection.setblocking(False)
            try:
                got = connection.recv(100, socket.MSG_PEEK)
                return not got or b" 503 " in got or b" 408 " in got
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                return True

        idle = [connect() for _ in range(12)]
        until(lambda: sum(map(closed, idle)) >= 4, 5)
        until(lambda: all(map(closed, idle)), 10)
        for connection in idle:
            if connection is not None:
                connection.close()

        def answered() -> bool:
            try:
                return server.ask("POST", "/v1/predict", encoded("PNG")).status == 200
            except OSError:
                return False

        until(answered, 10)


@WAYS
def test_half_a_head_is_not_waited_for(bundle, way):
    with (
        serving([bundle], way, idle_seconds=1, body_seconds=1) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection,
    ):
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\n")
        rest = connection.makefile("rb").read()  # until it is closed
        assert rest == b"" or b" 408 " in rest.splitlines()[0]


@WAYS
def test_a_head_of_megabytes_is_refused(bundle, way):
    with serving([bundle], way) as server, socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        try:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 100_000)
            status = connection.recv(100).split()[1]
        except OSError:  # closed while it was sent
            status = b"431"
        assert status in (b"400", b"431")
        assert server.ask("GET", "/v2/health/ready").status == 200


@WAYS
def test_a_path_prefix(bundle, way):
    with serving([bundle], way, path_prefix="/models/") as server:
        assert server.ask("POST", "/models/v1/predict", encoded("PNG")).status == 200
        assert server.ask("POST", "/v1/predict", encoded("PNG")).status == 404
        assert server.ask("GET", "/modelsandmore").status == 404
        assert server.ask("POST", "/models").status == 404
        there = server.ask("GET", "/models")  # the page's own links need the slash
        assert (there.status, there.headers["location"]) == (307, "models/")
        for path in ("/v2/health/ready", "/models/v2/health/ready", "/models/", "/models/docs"):
            assert server.ask("GET", path).status == 200, path
        url = server.ask("GET", "/models/v1/models").json()["models"][0]["files"]["fp32"]["url"]
        assert url == "/models/v1/models/digits/fp32.onnx"
        assert server.ask("GET", url).body == (bundle / "model.onnx").read_bytes()
        assert server.ask("GET", "/models/openapi.json").json()["servers"] == [{"url": "/models"}]


@pytest.mark.parametrize("prefix", ["models", "/a b", "/a//b", "/{x}", '/"'])
def test_a_prefix_that_is_no_path_is_refused(prefix):
    with pytest.raises(UserError, match="path_prefix = .*: give a path such as /models"):
        check({"bundles": ["x"], "path_prefix": prefix})


@WAYS
@pytest.mark.parametrize(
    ("trusted", "sent", "client"),
    [
        ((), "9.9.9.9", "127.0.0.1"),
        (("127.0.0.1",), "9.9.9.9", "9.9.9.9"),
        (("127.0.0.0/8", "10.0.0.0/8"), "6.6.6.6, 9.9.9.9, 10.1.2.3", "9.9.9.9"),
        (("127.0.0.1",), "nonsense", "127.0.0.1"),
    ],
)
def test_who_asked(bundle, way, trusted, sent, client, tmp_path):
    """X-Forwarded-For is believed as far as trusted proxies have written it."""
    with serving([bundle], way, trusted_proxies=trusted, access_log=tmp_path) as server:
        server.ask("GET", "/v1/models", X_Forwarded_For=sent)
        (file,) = tmp_path.iterdir()
        until(lambda: "/v1/models" in file.read_text())
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["client"] for line in lines if line["path"] == "/v1/models"] == [client]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    done = subprocess.run([*command.split(), "-keyout", folder / "key", "-out", folder / "cert"], capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder / "cert", folder / "key"


@WAYS
def test_tls(bundle, way, certificate):
    cert, key = certificate
    if way == "haproxy":  # the check below speaks HTTP
        with private_folder() as folder:
            config = check({"bundles": [bundle], "tls_certificate": cert, "tls_key": key})
            port = free_port()
            haproxy = HAProxy(folder, config, "127.0.0.1", port)
            assert (folder / "tls.pem").stat().st_mode & 0o777 == 0o600
            assert secure(port, cert, "/v2/health/live").startswith(b"HTTP/1.1 200")
            haproxy.kill()
        return
    with serving([bundle], way, tls_certificate=cert, tls_key=key) as server:
        assert secure(server.port, cert, "/v2/health/ready").startswith(b"HTTP/1.1 200")


def secure(port: int, certificate, path: str) -> bytes:
    context = ssl.create_default_context(cafile=str(certificate))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return connection.recv(4096)


def test_tls_files_that_do_not_fit(certificate, bundle, tmp_path):
    cert, key = certificate
    with pytest.raises(UserError, match="belong together"):
        check({"bundles": ["x"], "tls_certificate": cert})
    with pytest.raises(UserError, match="tls_key = .*No such file"):
        check({"bundles": ["x"], "tls_certificate": cert, "tls_key": tmp_path / "none"})
    with (
        pytest.raises(UserError, match="give PEM files that belong together"),
        serving([bundle], tls_certificate=key, tls_key=cert),
    ):
        pass


def test_keys_are_read_again_when_their_file_changes(bundle, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first\n")
    with serving([bundle], keys_file=keys, watch_seconds=0.05) as server:
        assert server.ask("GET", "/v1/models", X_API_Key="first").status == 200
        keys.write_text("second\nthird\n")
        until(lambda: server.ask("GET", "/v1/models", X_API_Key="third").status == 200)
        assert server.ask("GET", "/v1/models", X_API_Key="first").status == 401
        keys.write_text("# no key at all: nothing is open by mistake\n")
        time.sleep(0.3)
        assert server.ask("GET", "/v1/models").status == 401
        assert server.ask("GET", "/v1/models", X_API_Key="third").status == 200
        keys.unlink()
        time.sleep(0.3)
        assert server.ask("GET", "/v1/models", X_API_Key="third").status == 200


def test_a_small_image_does_not_wait_for_large_ones(bundle, monkeypatch):
    """Large ones are decoded one at a time, and no more of them wait than may."""
    from serve import v1

    gate, true, at_once, most = threading.Event(), v1.pixels, [0], [0]

    def decoded(data, rule, limits):
        if len(data) > 40_000:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            gate.wait(20)
            at_once[0] -= 1
        return true(data, rule, limits)

    monkeypatch.setattr(v1, "pixels", decoded)
    large, small = encoded("PNG", size=4100), encoded("JPEG", size=400)
    assert len(large) > 40_000 > len(small)
    with serving([bundle], max_waiting_pixels=3 * 4100**2) as server:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(server.ask("POST", "/v1/predict", large))) for _ in range(5)]
        for thread in threads:
            thread.start()
        until(lambda: len(answers) == 2)  # there is no place for them
        assert [(answer.status, answer.json()["code"]) for answer in answers] == [(503, "overloaded")] * 2
        assert server.ask("POST", "/v1/predict", small).status == 200
        gate.set()
        for thread in threads:
            thread.join()
        assert sorted(answer.status for answer in answers) == [200] * 3 + [503] * 2
        assert most[0] == 1
        until(lambda: server.app._predict._large.waiting == 0)
