"""Every route over real HTTP: what clients get, and what they get when they are wrong."""

import asyncio
import base64
import concurrent.futures
import hashlib
import json
import shutil
import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest

from cibl_ray.bundle import open_bundle
from cibl_ray.runtime import Runtime
from pipelines.errors import UserError
from pipelines.pixels import decode
from serve import metrics, predict, store, v2
from serve.engine import Engine
from serve.errors import ProblemError
from serve.settings import check
from tests.serve.conftest import encoded, serving, until


def expected(bundle, data: bytes, shift: float = 0) -> np.ndarray:
    runtime = Runtime(bundle / "model.onnx", "cpu")
    return runtime(runtime.card.rule(decode(data))[None], np.array([shift], np.float32), ("probabilities",))[0][0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_raw_bytes(server, bundle, kind):
    data = encoded(kind, 3)
    answer = server.ask("POST", "/v1/predict?top_k=3&tail_shift=0.5", data)
    assert answer.status == 200, answer.body
    content = answer.json()
    probabilities = expected(bundle, data, 0.5)
    card = open_bundle(bundle).card
    (prediction,) = content["predictions"]
    best = np.argsort(-probabilities)[:3]
    assert [entry["label"] for entry in prediction["top"]] == [card.classes[i] for i in best]
    assert [entry["group"] for entry in prediction["top"]] == [card.groups[i] for i in best]
    assert [entry["probability"] for entry in prediction["top"]] == pytest.approx(probabilities[best].tolist(), abs=2e-6)
    assert content["model"] == "digits"
    assert content["sha256"] == open_bundle(bundle).models["fp32"].sha256


def test_multipart_and_json_give_what_raw_bytes_give(server):
    files = [encoded("PNG", n) for n in range(3)]
    single = [server.ask("POST", "/v1/predict?top_k=2", data).json()["predictions"][0] for data in files]
    body = b"".join(
        b'--X\r\nContent-Disposition: form-data; name="image"; filename="%d.png"\r\n\r\n%b\r\n' % (n, data)
        for n, data in enumerate(files)
    )
    body += b'--X\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n2\r\n--X--\r\n'
    form = server.ask("POST", "/v1/predict", body, Content_Type="multipart/form-data; boundary=X")
    assert form.status == 200, form.body
    text = json.dumps({"images": [base64.b64encode(data).decode() for data in files], "top_k": 2})
    as_json = server.ask("POST", "/v1/predict", text, Content_Type="application/json")
    assert as_json.status == 200, as_json.body
    for answer in (form, as_json):
        got = answer.json()["predictions"]
        assert [[entry["label"] for entry in one["top"]] for one in got] == [
            [entry["label"] for entry in one["top"]] for one in single
        ]
        flat = [entry["probability"] for one in got for entry in one["top"]]
        assert flat == pytest.approx([entry["probability"] for one in single for entry in one["top"]], abs=1e-5)


def png(width: int, height: int) -> bytes:
    """A PNG whose header announces more than its few bytes hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "code"),
    [
        ("/v1/predict", b"", {}, 400, "invalid_request"),
        ("/v1/predict", b"GIF89a" + bytes(50), {}, 415, "unsupported_image"),
        ("/v1/predict", b"hello", {}, 415, "unsupported_image"),
        ("/v1/predict", lambda: encoded("JPEG", size=200)[:-500], {}, 422, "invalid_image"),
        ("/v1/predict", lambda: encoded("PNG")[:60], {}, 422, "invalid_image"),
        ("/v1/predict", b"\xff\xd8\xff\xe0 not a JPEG at all", {}, 422, "invalid_image"),
        ("/v1/predict", png(50_000, 50_000), {}, 422, "invalid_image"),
        ("/v1/predict", png(900_000, 1), {}, 422, "invalid_image"),
        ("/v1/predict", b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), {}, 415, "unsupported_image"),
        ("/v1/predict?" + "&".join(f"f{n}=1" for n in range(40)), b"x", {}, 400, "invalid_request"),
        ("/v1/predict?top_k=0", b"x", {}, 400, "invalid_request"),
        ("/v1/predict?tail_shift=nan", b"x", {}, 400, "invalid_request"),
        ("/v1/predict?tail_shift=1e9", b"x", {}, 400, "invalid_request"),
        ("/v1/predict?topk=1", b"x", {}, 400, "invalid_request"),
        ("/v1/predict?model=other", lambda: encoded("PNG"), {}, 404, "no_model"),
        ("/v1/predict", b"{", {"Content_Type": "application/json"}, 400, "invalid_request"),
        ("/v1/predict", b"[" * 100_000, {"Content_Type": "application/json"}, 400, "invalid_request"),
        ("/v1/predict", b'{"image": "*"}', {"Content_Type": "application/json"}, 400, "invalid_request"),
        ("/v1/predict", b'{"images": []}', {"Content_Type": "application/json"}, 400, "invalid_request"),
        ("/v1/predict", b'{"images": [' + b"1," * 900 + b"1]}", {"Content_Type": "application/json"}, 400, "invalid_request"),
        ("/v1/predict", b'{"images": [' + b'"aGk=",' * 64 + b'"aGk="]}', {"Content_Type": "application/json"}, 413, "too_many"),
        ("/v1/predict", b'{"images": [' + b"1," * 400_000 + b"1]}", {"Content_Type": "application/json"}, 413, "too_many"),
        ("/v1/predict", b"--X\r\n", {"Content_Type": "multipart/form-data"}, 400, "invalid_request"),
        ("/v2/models/digits/infer", b"{}", {}, 400, "invalid_request"),
        ("/v2/models/digits/infer", b"[" + b"{}," * 60_000 + b"{}]", {}, 413, "too_many"),
        ("/v2/models/other/infer", b"{}", {}, 404, "no_model"),
        ("/v2/models/..%2f..%2fetc/infer", b"{}", {}, 404, "not_found"),
        ("/nowhere", b"", {}, 404, "not_found"),
        ("/v1/models", b"", {}, 405, "method_not_allowed"),
    ],
)
def test_errors_have_one_shape(server, path, body, headers, status, code):
    answer = server.ask("POST", path, body() if callable(body) else body, **headers)
    assert (answer.status, answer.json()["code"]) == (status, code), answer.body
    assert set(answer.json()) == {"error", "code", "request_id"}
    assert answer.headers["x-request-id"] == answer.json()["request_id"]


def test_a_progressive_jpeg_is_decoded_in_a_thread_and_its_scans_are_capped(server, monkeypatch):
    threads, work = server.app._predict._threads, []
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


def tensor(name, shape, datatype, data):
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


@pytest.mark.parametrize(
    "inputs",
    [
        [tensor("images", [1, 16, 16, 4], "UINT8", [0] * 1024)],
        [tensor("images", [1, 16, 16, 3], "FP32", [0] * 768)],
        [tensor("images", [1, 16, 16, 3], "UINT8", [0] * 767)],
        [tensor("images", [1, 16, 16, 3], "UINT8", [256] * 768)],
        [tensor("images", [1, 16, 16, 3], "UINT8", [0.5] * 768)],
        [tensor("images", [1, 16, 16, 3], "UINT8", ["a"] * 768)],
        [tensor("images", [0, 16, 16, 3], "UINT8", [])],
        [tensor("tail_shift", [0, 2**31 - 1, 2**31 - 1, 2**31 - 1], "FP32", [])],
        [tensor("images", [1, 16, 16, 3], "UINT8", ["a" * 10_000] + [""] * 40_000)],
        [tensor("images", [1, 16, 16, 3], "UINT8", [True] * 768)],
        [tensor("images", [1, 16, 16, 3], "UINT8", [[[[[[[[[[0] * 768]]]]]]]]])],
        [tensor("images", [1, 16, 16, 3], "UINT8", [0] * 768), tensor("tail_shift", [1], "FP32", [10**400])],
        [tensor("images", [-1, 16, 16, 3], "UINT8", [0] * 768)],
        [tensor("images", [2**31, 2**31, 2**31, 3], "UINT8", [0])],
        [tensor("images", [1, 16, 16, 3], "UINT8", [0] * 768)] * 2,
        [tensor("images", [1, 16, 16, 3], "UINT8", [0] * 768), tensor("tail_shift", [2], "FP32", [0, 1])],
        [tensor("images", [1, 16, 16, 3], "UINT8", [0] * 768), tensor("tail_shift", [1], "FP32", [1e30])],
        [tensor("images", [1, 16, 16, 3], "UINT8", None)],
        [{"name": "images", "shape": [1, 16, 16, 3], "datatype": "UINT8", "parameters": {"binary_data_size": 768}}],
        "images",
        [1],
    ],
)
def test_wrong_tensors_are_400(server, inputs):
    answer = server.ask("POST", "/v2/models/digits/infer", json.dumps({"inputs": inputs}))
    assert answer.status == 400, answer.body


def test_what_a_client_says_is_not_said_back_at_length(server):
    content = tensor("images", [1, 16, 16, 3], "UINT8", None) | {"parameters": {"binary_data_size": [0] * 700}}
    answer = server.ask("POST", "/v2/models/digits/infer", json.dumps({"inputs": [content]}))
    assert answer.status == 400
    assert "binary_data_size must be 768" in answer.json()["error"]
    assert len(answer.body) < 300


@pytest.mark.parametrize("wrong", [json.dumps({"images": [1] * 900}), json.dumps({f"k{n}": 0 for n in range(900)})])
def test_one_mistake_is_told_not_each(server, monkeypatch, wrong):
    """pydantic would describe every one of them, at a kilobyte a piece."""
    monkeypatch.setattr(predict._Json, "model_validate", None)
    answer = server.ask("POST", "/v1/predict", wrong, Content_Type="application/json")
    assert (answer.status, answer.json()["code"]) == (400, "invalid_request")
    assert len(answer.body) < 200


@pytest.mark.parametrize("path", ["/v1/predict", "/v2/models/digits/infer"])
def test_a_large_body_holds_nobody_up(server, path):
    """Its JSON is read in a thread, and the loop goes on."""
    images = np.full((40, 16, 16, 3), 200)
    file = base64.b64encode(encoded("PNG", size=300)).decode()
    content = {"inputs": [tensor("images", [40, 16, 16, 3], "UINT8", images.tolist())], "pad": " " * v2.LARGE}
    if path == "/v1/predict":
        content = {"images": [file] * (v2.LARGE // len(file) + 1)}
    seen, true = [], json.loads

    def loads(text, **more):
        seen.append((threading.current_thread().name, len(text)))
        return true(text, **more)

    body = json.dumps(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v2.json, "loads", loads)
        answer = server.ask("POST", path, body, Content_Type="application/json")
    assert answer.status == 200, answer.body
    ((thread, length),) = seen
    assert thread.startswith("decode")
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
        ("lists in UTF-16", ("[]," * 200_000).encode("utf-16")),
    ],
)
def test_json_that_a_parser_would_not_let_go_of_is_refused_before(server, name, body, monkeypatch):
    """json holds Python's lock but where it calls Python: at numbers."""
    # As many values as images of the usual size need.
    monkeypatch.setattr(v2.json, "loads", lambda *a, **k: pytest.fail("parsed"))
    for values in (64, 10_000_000):
        with pytest.raises(ProblemError) as refused:
            v2.parse_json(body, values)
        assert refused.value.status in (400, 413)


def test_a_large_form_is_read_in_a_thread(server, monkeypatch):
    import starlette.formparsers

    seen, true = [], starlette.formparsers.MultiPartParser.parse

    async def parse(self):
        seen.append(threading.current_thread().name)
        return await true(self)

    monkeypatch.setattr(starlette.formparsers.MultiPartParser, "parse", parse)
    part = b'--X\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n' + encoded("PNG") + b"\r\n"
    for body in (part + b"--X--\r\n", part + b"--X--\r\n" + bytes(v2.LARGE)):
        answer = server.ask("POST", "/v1/predict", body, Content_Type="multipart/form-data; boundary=X")
        assert answer.status == 200, answer.body
    small, large = seen
    assert not small.startswith("decode")
    assert large.startswith("decode")


def test_triton_client(server, bundle):
    from tritonclient import http as triton

    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.get_model_metadata("digits")["inputs"][0]["shape"] == [-1, 16, 16, 3]
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    shift = np.linspace(0, 2, 5).astype(np.float32)
    runtime = Runtime(bundle / "model.onnx", "cpu")
    for binary in (True, False):
        tensors = [triton.InferInput("images", images.shape, "UINT8"), triton.InferInput("tail_shift", [5], "FP32")]
        tensors[0].set_data_from_numpy(images, binary_data=binary)
        tensors[1].set_data_from_numpy(shift, binary_data=binary)
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("logits", "probabilities", "embedding")]
        for inputs, expected_of in ((tensors, shift), (tensors[:1], None)):
            result = client.infer("digits", inputs, outputs=outputs)
            for name, values in zip(
                ("logits", "probabilities", "embedding"),
                runtime(images, expected_of, ("logits", "probabilities", "embedding")),
                strict=True,
            ):
                assert np.abs(result.as_numpy(name) - values).max() < 1e-4, name
    with pytest.raises(Exception, match="no such model"):
        client.infer("other", tensors)
    client.close()


def test_a_version_in_the_path_is_the_models_or_404(server):
    body = json.dumps({"inputs": [tensor("images", [1, 16, 16, 3], "UINT8", [7] * 768)]})
    (version,) = server.ask("GET", "/v2/models/digits").json()["versions"]
    for method, rest in (("POST", "/infer"), ("GET", ""), ("GET", "/ready")):
        answer = server.ask(method, f"/v2/models/digits/versions/{version}{rest}", body)
        assert answer.status == 200, answer.body
        for other in ("999", version[:-1], "nonsense"):
            answer = server.ask(method, f"/v2/models/digits/versions/{other}{rest}", body)
            assert (answer.status, answer.json()["code"]) == (404, "no_version"), answer.body
            assert version in answer.json()["error"]


def test_download_resumes_and_names_its_checksum(server, bundle):
    whole = (bundle / "model.onnx").read_bytes()
    sha256 = hashlib.sha256(whole).hexdigest()
    path = "/v1/models/digits/fp32.onnx"
    listed = server.ask("GET", "/v1/models").json()["models"][0]["files"]
    assert listed["fp32"] == {"url": path, "sha256": sha256, "bytes": len(whole)}
    assert set(listed) == {"fp32", "fp16", "int8"}
    answer = server.ask("GET", path)
    assert answer.body == whole
    assert answer.headers["etag"] == f'"{sha256}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"
    for wanted, part, first in (
        ("bytes=0-99", whole[:100], 0),
        ("bytes=500-", whole[500:], 500),
        ("bytes=-7", whole[-7:], len(whole) - 7),
    ):
        answer = server.ask("GET", path, Range=wanted)
        assert (answer.status, answer.body) == (206, part)
        assert answer.headers["content-range"] == f"bytes {first}-{first + len(part) - 1}/{len(whole)}"
    assert server.ask("GET", path, Range="bytes=0-99", If_Range='"other"').status == 200
    beyond = server.ask("GET", path, Range=f"bytes={len(whole)}-")
    assert (beyond.status, beyond.json()["code"], beyond.headers["content-range"]) == (
        416,
        "no_such_range",
        f"bytes */{len(whole)}",
    )
    assert server.ask("GET", path, If_None_Match=f'"{sha256}"').status == 304
    head = server.ask("HEAD", path)
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(whole)))
    for other in ("fp64.onnx", "..%2fmanifest.json", "model.onnx", "%2e%2e", "README.md"):
        assert server.ask("GET", f"/v1/models/digits/{other}").status == 404


def test_metrics_docs_and_openapi(server):
    server.ask("POST", "/v1/predict", encoded("PNG", 0))
    text = server.ask("GET", "/metrics").body.decode()
    for name in (
        "cibl_ray_requests_total{",
        "cibl_ray_request_seconds_bucket{",
        "cibl_ray_batch_images_count{",
        "cibl_ray_waiting_requests",
        "cibl_ray_answers_total{",
    ):
        assert name in text, name
    document = server.ask("GET", "/openapi.json").json()
    assert "/v1/predict" in document["paths"]
    assert b"/v2/models/{name}/infer" in server.ask("GET", "/docs").body


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


def test_keys(bundle, tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("# ours\nsecret-one\n\n")
    monkeypatch.setenv("CIBL_RAY_API_KEYS", "secret-two")
    with serving([bundle], keys_file=tmp_path / "keys") as server:
        assert server.ask("GET", "/v2/health/ready").status == 200
        for path in ("/v1/models", "/metrics", "/docs", "/v1/models/digits/fp32.onnx", "/v2"):
            refused = server.ask("GET", path)
            assert (refused.status, refused.json()["code"]) == (401, "unauthorized")
        assert server.ask("GET", "/v1/models", X_API_Key="secret").status == 401
        assert server.ask("GET", "/v1/models", X_API_Key="secret-one").status == 200
        assert server.ask("GET", "/v1/models", Authorization="Bearer secret-two").status == 200
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(UserError, match="holds no key"), serving([bundle], keys_file=tmp_path / "keys"):
        pass


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
            until(lambda: server.app._held == 50_000)
            with sending(59_000) as other:
                answer = other.recv(4096)
            assert b" 503 " in answer.splitlines()[0]
            assert b"retry-after: 1" in answer
            assert server.ask("POST", "/v1/predict", encoded("PNG")).status == 200
        until(lambda: server.app._held == 0 and server.app._waiting == 0)


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
            until(lambda: server.app._held > 60 * 768)
            second = server.ask("POST", "/v1/predict", body, Content_Type="application/json")
            gate.set()
            assert (second.status, second.json()["code"]) == (503, "overloaded")
            assert first.result().status == 200
        until(lambda: server.app._held == 0)


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
        until(lambda: server.app._waiting == 9)
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


def test_several_models_and_a_swap_without_a_failed_request(bundle, run_folder, tmp_path):
    from cibl_ray.export import Options, export

    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(bundle, first)
    export(run_folder / "checkpoints" / "last.safetensors", second, Options(name="other", provider="cpu"))
    new = tmp_path / "new"
    export(run_folder / "checkpoints" / "previous.safetensors", new, Options(name="digits", provider="cpu"))
    with serving([first, second], watch_seconds=0.1) as server:
        assert {model["name"] for model in server.ask("GET", "/v1/models").json()["models"]} == {"digits", "other"}
        assert server.ask("POST", "/v1/predict", encoded("PNG")).status == 400  # which?
        answers, stop = [], threading.Event()

        def ask() -> None:
            while not stop.is_set():
                answers.append(server.ask("POST", "/v1/predict?model=digits", encoded("PNG")))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        first.rename(tmp_path / "old")
        new.rename(first)
        wanted = open_bundle(first).models["fp32"].sha256
        until(lambda: answers[-1].json().get("sha256") == wanted)
        # A version that does not load is not taken up, and what was there goes on.
        shutil.copytree(first, tmp_path / "broken")
        (tmp_path / "broken" / "model.onnx").write_bytes(b"broken")
        first.rename(tmp_path / "good")
        (tmp_path / "broken").rename(first)
        until(
            lambda: next(m for m in server.ask("GET", "/v1/models").json()["models"] if m["name"] == "digits")["failed_update"]
        )
        time.sleep(0.2)
        stop.set()
        for thread in threads:
            thread.join()
    assert {answer.status for answer in answers} == {200}
    assert {answer.json()["sha256"] for answer in answers} == {open_bundle(bundle).models["fp32"].sha256, wanted}


def test_a_failed_update_is_told_of_no_later_bundle(bundle, tmp_path):
    place, other = tmp_path / "place", tmp_path / "other"
    shutil.copytree(bundle, place)
    shutil.copytree(bundle, other)
    with serving([place], watch_seconds=0.1) as server:
        (place / "model.onnx").write_bytes(b"broken")
        until(lambda: server.ask("GET", "/v1/models").json()["models"][0]["failed_update"])
        server.run(server.app.store.set((other,)))
        assert server.ask("GET", "/v1/models").json()["models"][0]["failed_update"] is None


def test_metrics_of_a_dead_replica_may_be_gone_already(tmp_path, monkeypatch):
    """Two replicas that are asked at once both remove them."""
    (tmp_path / "gauge_livesum_999999999.db").write_bytes(b"")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))

    def gone(process):
        (tmp_path / f"gauge_livesum_{process}.db").unlink()
        raise FileNotFoundError

    monkeypatch.setattr(metrics.multiprocess, "mark_process_dead", gone)
    made = metrics.Metrics()
    made._shared = True
    assert isinstance(made.text(), bytes)


def test_a_bundle_of_another_name_takes_no_models_place(bundle, run_folder, tmp_path):
    from cibl_ray.export import Options, export

    place, new = tmp_path / "place", tmp_path / "new"
    shutil.copytree(bundle, place)
    export(run_folder / "checkpoints" / "last.safetensors", new, Options(name="other", provider="cpu"))
    with serving([place], watch_seconds=0.1) as server:
        place.rename(tmp_path / "old")
        new.rename(place)
        until(lambda: server.ask("GET", "/v1/models").json()["models"][0]["failed_update"])
        (model,) = server.ask("GET", "/v1/models").json()["models"]
        assert model["name"] == "digits"
        assert model["failed_update"].endswith(
            "has the name 'other'; export with --name digits, or restart the service to serve 'other' in its place"
        )
        assert server.ask("GET", "/v2/models/digits/ready").status == 200
        assert server.ask("POST", "/v1/predict?model=digits", encoded("PNG")).status == 200


def test_a_bundle_replaced_while_it_is_read_is_no_mixture(bundle, run_folder, tmp_path, monkeypatch):
    """Twice within a moment: the manifest was the second version's, the model that was then read the third's."""
    from cibl_ray.export import Options, export

    place, second, third = tmp_path / "place", tmp_path / "second", tmp_path / "third"
    shutil.copytree(bundle, place)
    export(run_folder / "checkpoints" / "last.safetensors", second, Options(name="digits", provider="cpu"))
    export(run_folder / "checkpoints" / "previous.safetensors", third, Options(name="digits", provider="cpu"))
    wanted = open_bundle(third).models["fp32"].sha256
    with serving([place], watch_seconds=0.1) as server:
        true, seen = store.Runtime, set()

        def late(path, *more):
            if third.exists():
                place.rename(tmp_path / "old 2")
                third.rename(place)
            return true(path, *more)

        monkeypatch.setattr(store, "Runtime", late)
        place.rename(tmp_path / "old 1")
        second.rename(place)

        def arrived() -> bool:
            model = server.app.store.models["digits"]
            seen.add((model.sha256, model.engine.runtime.card.source["checkpoint"]))
            return model.sha256 == wanted

        until(arrived)
        assert seen == {(open_bundle(bundle).models["fp32"].sha256, "best.safetensors"), (wanted, "previous.safetensors")}
        assert server.ask("GET", "/v1/models").json()["models"][0]["failed_update"] is None


def test_a_request_that_is_being_read_during_a_swap_is_answered(bundle, run_folder, tmp_path):
    from cibl_ray.export import Options, export

    place, new = tmp_path / "place", tmp_path / "new"
    shutil.copytree(bundle, place)
    export(run_folder / "checkpoints" / "last.safetensors", new, Options(name="digits", provider="cpu"))
    before, after = (open_bundle(path).models["fp32"].sha256 for path in (place, new))
    body = json.dumps({"inputs": [tensor("images", [1, 16, 16, 3], "UINT8", [7] * 768)]}).encode()
    with serving([place], watch_seconds=0.05) as server:
        old = server.app.store.models["digits"].engine
        with socket.create_connection(("127.0.0.1", server.port), timeout=15) as connection:
            head = f"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body[:100])
            until(lambda: server.app._waiting == 1)
            place.rename(tmp_path / "old")
            new.rename(place)
            until(lambda: server.app.store.models["digits"].sha256 == after)
            assert old.alive
            connection.sendall(body[100:])
            answer = connection.recv(65536)
            while before[:12].encode() not in answer and (more := connection.recv(65536)):
                answer += more
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert before[:12].encode() in answer
        until(lambda: not old.alive)  # nobody needs it any more


def test_a_client_that_hangs_up_is_no_failure_of_the_service(bundle, tmp_path):
    """Ray Serve cancels its request."""
    with serving([bundle], access_log=tmp_path / "log") as server:

        async def hang_up() -> None:
            scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": []}
            task = asyncio.create_task(server.app(scope, asyncio.Event().wait, None))
            while not server.app._waiting:
                await asyncio.sleep(0.01)
            task.cancel()
            await task

        with pytest.raises(concurrent.futures.CancelledError):
            server.run(hang_up())
        assert 'cibl_ray_requests_total{route="predict",status="499"} 1.0' in server.ask("GET", "/metrics").body.decode()
        assert server.app._waiting == 0
        (file,) = (tmp_path / "log").iterdir()
        assert json.loads(file.read_text().splitlines()[0])["status"] == 499


def test_nothing_of_a_request_forges_a_log_line(bundle, tmp_path):
    with serving([bundle], access_log=tmp_path / "log") as server:
        server.ask("GET", "/x%0a%7b%22status%22:200%7d", X_Request_Id="mine-1")
        server.ask("GET", "/y", X_Request_Id='"}{ evil')
        server.ask("POST", "/v1/predict", encoded("PNG"))
        (file,) = (tmp_path / "log").iterdir()
        until(lambda: len(file.read_text().splitlines()) == 3)  # a line is written after its answer
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["status"] for line in lines] == [404, 404, 200]
    assert lines[0]["request_id"] == "mine-1"
    assert "evil" not in lines[1]["request_id"]
    assert (lines[2]["route"], lines[2]["images"], lines[2]["model"]) == ("predict", 1, "digits")
