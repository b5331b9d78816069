"""What a replica takes at most: bytes, pixels, passes, requests; and how those wait that it takes."""

import asyncio
import base64
import concurrent.futures
import json
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.common.errors import UserError
from serve import json_body, v2
from serve import v1 as predict
from serve.engine import Engine, Spent
from serve.errors import ProblemError
from serve.settings import check
from tests.serve.conftest import encoded, png, serving, tensor, until


def test_a_progressive_jpeg_is_decoded_in_a_thread_and_its_scans_are_capped(server, monkeypatch):
    threads, work = server.app._predict._usual._threads, []
    submit = threads.submit
    monkeypatch.setattr(threads, "submit", lambda *call: work.append(call) or submit(*call))
    assert server.ask("POST", "/v1/predict", encoded("JPEG", size=100)).status == 200
    assert not work
    data = encoded("JPEG", size=100, progressive=True)
    assert server.ask("POST", "/v1/predict", data).status == 200
    assert len(work) == 1
    last = data[data.rfind(b"\xff\xda") : -2]
    answer = server.ask("POST", "/v1/predict", data[:-2] + last * 100 + data[-2:])
    assert (answer.status, answer.json()["code"]) == (422, "invalid_image")
    assert "more than 100 scans" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/v1/predict", "/v2/models/digits/infer"])
def test_a_large_body_holds_nobody_up(server, path):
    """Its JSON is read in a thread, and the loop goes on."""
    images = np.full((40, 16, 16, 3), 200)
    file = base64.b64encode(encoded("PNG", size=300)).decode()
    content = {"inputs": [tensor("images", [40, 16, 16, 3], "UINT8", images.tolist())], "pad": " " * json_body.LARGE}
    if path == "/v1/predict":
        content = {"images": [file] * (json_body.LARGE // len(file) + 1)}
    seen, true = [], json.loads

    def loads(text, **more):
        seen.append((threading.current_thread().name, len(text)))
        return true(text, **more)

    body = json.dumps(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_body.json, "loads", loads)
        answer = server.ask("POST", path, body, Content_Type="application/json")
    assert answer.status == 200, answer.body
    ((thread, length),) = seen
    assert thread.startswith("parse")
    assert length == len(body)
    if path != "/v1/predict":
        small = json.dumps({"inputs": [tensor("images", [1, 16, 16, 3], "UINT8", images[:1].tolist())]})
        one = server.ask("POST", path, small).json()["outputs"][0]["data"]
        assert answer.json()["outputs"][0]["data"] == pytest.approx(one * 40, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("lists", b"[ ]," * 200_000),
        ("texts", b'"",' * 200_000),
        ("words", b"true," * 200_000),
        ("deep lists", (b"[" * 900 + b"0" + b"]" * 900 + b",") * 500),
        ("lists of one number", b"[1]," * 200_000),
        ("lists in UTF-16", ("[]," * 200_000).encode("utf-16")),
    ],
)
def test_json_that_a_parser_would_not_let_go_of_is_refused_before(server, name, body, monkeypatch):
    """json holds Python's lock but where it calls Python: at numbers."""
    # As many values as images of the usual size need.
    monkeypatch.setattr(json_body.json, "loads", lambda *a, **k: pytest.fail("parsed"))
    for values in (64, 10_000_000):
        with pytest.raises(ProblemError) as refused:
            json_body.parse_json(body, values)
        assert refused.value.status in (400, 413)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("many", [1, 200_000])
def test_numbers_that_json_does_not_have_are_refused(constant, many, monkeypatch):
    """The first of them ends the parsing: at these the parser calls no Python that would let others work."""
    body = ("[" + f"{constant}," * many + "0]").encode()
    with pytest.raises(ProblemError, match="not valid JSON"):
        json_body.parse_json(body, 10_000_000)


def test_a_nested_tensor_of_images_is_parsed():
    """With a list for each image, row and pixel."""
    images = np.full((7, 96, 96, 3), 255).tolist()
    body = json.dumps({"inputs": images}, separators=(",", ":")).encode()
    assert len(body) > json_body.LARGE
    assert json_body.parse_json(body, 7 * 96 * 96 * 3) == {"inputs": images}


def test_an_answer_of_too_many_numbers_is_refused_unless_it_is_binary(simple, monkeypatch):
    monkeypatch.setattr(v2, "MAX_NUMBERS", 39)  # ten classes
    for count, binary, status in ((1, False, 200), (2, False, 413), (2, True, 200)):
        images = tensor("images", [count, 16, 16, 3], "UINT8", [7] * 768 * count)
        body = json.dumps({"inputs": [images], "parameters": {"binary_data_output": binary}})
        answer = simple.ask("POST", "/v2/models/digits/infer", body)
        assert answer.status == status, answer.body
        if status == 413:
            assert answer.json()["error"].startswith("an answer of 40 numbers in JSON, 39 at most; send fewer images")
    assert simple.app.load.held == 0


@pytest.mark.parametrize("name", ["idle_seconds", "body_seconds", "watch_seconds"])
@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), 1e9, 0])
def test_times_have_bounds(name, seconds):
    """HAProxy's go to 24 days."""
    with pytest.raises(UserError, match=f"{name} = "):
        check({"bundles": ["x"], name: seconds})


def test_a_large_form_is_read_in_a_thread(server, monkeypatch):
    import starlette.formparsers

    seen, true = [], starlette.formparsers.MultiPartParser.parse

    async def parse(self):
        seen.append(threading.current_thread().name)
        return await true(self)

    monkeypatch.setattr(starlette.formparsers.MultiPartParser, "parse", parse)
    part = b'--X\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n' + encoded("PNG") + b"\r\n"
    for body in (part + b"--X--\r\n", part + b"--X--\r\n" + bytes(json_body.LARGE)):
        answer = server.ask("POST", "/v1/predict", body, Content_Type="multipart/form-data; boundary=X")
        assert answer.status == 200, answer.body
    small, large = seen
    assert not small.startswith("parse")
    assert large.startswith("parse")


def test_slow_senders_are_cut_off(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        begun = time.monotonic()
        answer = connection.recv(4096)
        assert b" 408 " in answer.splitlines()[0]
        assert time.monotonic() - begun < 5


def test_a_body_is_refused_before_it_is_sent(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
        assert b" 413 " in connection.recv(4096).splitlines()[0]


def test_a_full_queue_is_503_and_the_rest_is_answered(bundle):
    with serving([bundle], max_queue=4, max_batch=1) as server:
        engine = server.app.store.models["digits"].engine
        true, gate = engine.runtime, threading.Event()
        engine.runtime = lambda *a: gate.wait(10) and true(*a)
        engine.runtime.card = true.card
        data, answers = encoded("PNG"), []
        threads = [threading.Thread(target=lambda: answers.append(server.ask("POST", "/v1/predict", data))) for _ in range(12)]
        for thread in threads:
            thread.start()
        until(lambda: len(answers) == 8)
        assert {answer.status for answer in answers} == {503}
        assert {answer.headers["retry-after"] for answer in answers} == {"1"}
        gate.set()
        for thread in threads:
            thread.join()
        assert sorted(answer.status for answer in answers) == [200] * 4 + [503] * 8


def test_the_pixels_of_all_images_of_a_request_are_capped_together(bundle, monkeypatch):
    with serving([bundle], max_pixels=1_000_000, max_request_pixels=2_000_000) as server:

        def ask(*files: bytes):
            text = json.dumps({"images": [base64.b64encode(data).decode() for data in files]})
            return server.ask("POST", "/v1/predict", text, Content_Type="application/json")

        assert ask(*[encoded("PNG", size=800)] * 3).status == 200
        monkeypatch.setattr(predict, "pixels", None)  # nothing is decoded
        answer = ask(*[png(1000, 700)] * 3)
        assert (answer.status, answer.json()["code"]) == (413, "too_large")
        assert ask(png(1000, 700), b"GIF89a").status == 415
        assert ask(png(1000, 700), png(2000, 700)).status == 422


def test_the_scans_of_all_images_of_a_request_are_capped_together(bundle, monkeypatch):
    data = encoded("JPEG", size=100, progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    many = base64.b64encode(data[:-2] + last * 80 + data[-2:]).decode()
    with serving([bundle], max_pixels=1_000_000, max_request_pixels=100_000) as server:
        few = server.ask("POST", "/v1/predict", json.dumps({"images": [many]}), Content_Type="application/json")
        assert few.status == 200, few.body
        monkeypatch.setattr(predict, "pixels", None)  # nothing is decoded
        answer = server.ask("POST", "/v1/predict", json.dumps({"images": [many] * 2}), Content_Type="application/json")
        assert (answer.status, answer.json()["code"]) == (413, "too_large")
        assert "scans of the images go over more than 1,500,000 pixels" in answer.json()["error"]


def test_a_replica_must_have_room_for_one_body():
    with pytest.raises(UserError, match="max_held_bytes = 2000: less than one body"):
        check({"bundles": ["x"], "max_held_bytes": 2000})


def test_bodies_that_a_replica_has_no_room_for_are_503(bundle):
    with serving([bundle], max_held_bytes=100_000) as server:

        def sending(held: int) -> socket.socket:
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + bytes(held))
            return connection

        with sending(50_000):
            until(lambda: server.app.load.held == 50_000)
            with sending(59_000) as other:
                answer = other.recv(4096)
            assert b" 503 " in answer.splitlines()[0]
            assert b"retry-after: 1" in answer
            assert server.ask("POST", "/v1/predict", encoded("PNG")).status == 200
        until(lambda: server.app.load.held == 0 and server.app.load.waiting == 0)


@pytest.mark.parametrize("room", [100_000, 30_000])
def test_decoded_images_that_a_replica_has_no_room_for_are_503(bundle, room):
    """However few bytes they came in; but one request that is alone is answered."""
    body = json.dumps({"images": [base64.b64encode(encoded("PNG")).decode()] * 60})
    assert len(body) < 60 * 768 < 50_000
    with serving([bundle], max_held_bytes=room) as server:
        engine = server.app.store.models["digits"].engine
        true, gate = engine.runtime, threading.Event()
        engine.runtime = lambda *a: gate.wait(10) and true(*a)
        engine.runtime.card = true.card
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            first = threads.submit(server.ask, "POST", "/v1/predict", body, Content_Type="application/json")
            until(lambda: server.app.load.held > 60 * 768)
            second = server.ask("POST", "/v1/predict", body, Content_Type="application/json")
            gate.set()
            assert (second.status, second.json()["code"]) == (503, "overloaded")
            assert first.result().status == 200
        until(lambda: server.app.load.held == 0)


def test_waiting_requests_make_one_batch(bundle):
    with serving([bundle], max_batch=32) as server:
        engine = server.app.store.models["digits"].engine
        true, gate, sizes = engine.runtime, threading.Event(), []

        def gated(images, *more):
            sizes.append(len(images))
            gate.wait(10)
            return true(images, *more)

        gated.card = true.card
        engine.runtime = gated
        data, answers = encoded("PNG"), []
        threads = [threading.Thread(target=lambda: answers.append(server.ask("POST", "/v1/predict", data))) for _ in range(9)]
        for thread in threads:
            thread.start()
        until(lambda: server.app.load.waiting == 9)
        gate.set()
        for thread in threads:
            thread.join()
        assert [answer.status for answer in answers] == [200] * 9
        assert sizes == [1, 8] or (sum(sizes) == 9 and len(sizes) <= 3)


@pytest.mark.parametrize(("provider", "expected"), [("CPUExecutionProvider", {4}), ("CUDAExecutionProvider", {31, 32})])
def test_batches_on_a_cpu_end_when_their_answers_would_wait_too_long(provider, expected):
    """Two milliseconds an image: four of them and no more, where a longer batch is no more efficient."""
    sizes: list[int] = []

    class Slow:
        def __call__(self, images, shift, names):
            sizes.append(len(images))
            time.sleep(0.002 * len(images))
            return [np.zeros((len(images), 3), np.float32) for _ in names]

    async def ask() -> None:
        runtime = Slow()
        runtime.provider = provider
        engine = Engine(runtime, 32)
        images = np.zeros((1, 4, 4, 3), np.uint8)
        await engine.submit(images)
        await asyncio.gather(*(engine.submit(images) for _ in range(64)))
        engine.close()

    asyncio.run(ask())
    assert sum(sizes) == 65
    assert max(sizes) in expected


def test_the_time_of_a_request_leaves_out_its_wait(monkeypatch):
    """Two requests, one call each, by a clock that only the model moves: the second one has waited for the first."""
    clock = [0.0]
    monkeypatch.setattr("serve.engine.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Slow:
        provider = "CPUExecutionProvider"

        def __call__(self, images, shift, names):
            clock[0] += 0.005
            return [np.zeros((len(images), 3), np.float32) for _ in names]

    async def ask() -> list[Spent]:
        engine = Engine(Slow(), 1)
        spent = [Spent(decode=[0.001, 0.0015]), Spent()]
        await asyncio.gather(*(engine.submit(np.zeros((1, 4, 4, 3), np.uint8), spent=one) for one in spent))
        engine.close()
        return spent

    first, second = asyncio.run(ask())
    assert clock[0] == pytest.approx(0.01)
    assert first.header() == b"decode;dur=2.50, model;dur=5.00"
    assert second.header() == b"decode;dur=0.00, model;dur=5.00"
