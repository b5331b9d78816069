"""Every route over real HTTP: what clients get, and what they get when they are wrong."""

import asyncio
import base64
import concurrent.futures
import hashlib
import json
import re

import numpy as np
import pytest

from cibl_ray.bundle.card import open_bundle
from cibl_ray.bundle.runtime import Runtime
from pipelines.common.errors import UserError
from pipelines.pixels import decode
from serve import metrics
from serve import v1 as predict
from tests.serve.conftest import encoded, png, serving, tensor, until


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
    spent = re.fullmatch(r"decode;dur=(\d+\.\d\d), model;dur=(\d+\.\d\d)", answer.headers["server-timing"])
    assert all(float(milliseconds) > 0 for milliseconds in spent.groups())


def test_a_request_may_ask_for_another_precision(bundle, versions):
    """Of those that the service has loaded. Each answers as its own file does, and is named in the answer."""
    data, opened = encoded("PNG", 3), open_bundle(bundle)
    with serving([bundle], more_precisions=("int8",)) as server:
        assert server.ask("GET", "/v1/models").json()["models"][0]["precisions"] == ["fp32", "int8"]
        for query, precision in (("", "fp32"), ("&precision=fp32", "fp32"), ("&precision=int8", "int8")):
            answer = server.ask("POST", f"/v1/predict?logits=true{query}", data).json()
            assert (answer["precision"], answer["sha256"]) == (precision, opened.models[precision].sha256)
            runtime = Runtime(opened.models[precision].path, "cpu", 1)
            (logits,) = runtime(runtime.card.rule(decode(data))[None], outputs=("logits",))
            assert answer["predictions"][0]["logits"] == pytest.approx(logits[0].tolist(), abs=1e-5)
        refused = server.ask("POST", "/v1/predict?precision=fp16", data)
        assert refused.status == 400
        assert refused.json()["error"] == "'precision': this service has fp32, int8"
    with (
        pytest.raises(UserError, match="has no fp16 model; it has fp32"),
        serving([versions["last"]], more_precisions=("fp16",)),
    ):
        pass


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


def test_a_wrong_option_is_named_with_its_value(server):
    for query, told in (("top_k=zero", "top_k = 'zero': "), ("tail_shift=1e9", "tail_shift = '1e9': ")):
        assert server.ask("POST", f"/v1/predict?{query}", b"x").json()["error"].startswith(told)
    given = json.dumps({"image": "aGk=", "top_k": 2000})
    told = server.ask("POST", "/v1/predict", given, Content_Type="application/json").json()["error"]
    assert told.startswith("top_k = 2000: ")


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


def test_keys(bundle, tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("# ours\nsecret-one\n\n")
    monkeypatch.setenv("CIBL_RAY_API_KEYS", "secret-two")
    with serving([bundle], keys_file=tmp_path / "keys") as server:
        assert server.ask("GET", "/v2/health/ready").status == 200
        for path in ("/v1/models", "/metrics", "/v1/models/digits/fp32.onnx", "/v2"):
            refused = server.ask("GET", path)
            assert (refused.status, refused.json()["code"]) == (401, "unauthorized")
        assert server.ask("GET", "/v1/models", X_API_Key="secret").status == 401
        assert server.ask("GET", "/v1/models", X_API_Key="secret-one").status == 200
        assert server.ask("GET", "/v1/models", Authorization="Bearer secret-two").status == 200
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(UserError, match="holds no key"), serving([bundle], keys_file=tmp_path / "keys"):
        pass


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


def test_a_client_that_hangs_up_is_no_failure_of_the_service(bundle, tmp_path):
    """Ray Serve cancels its request."""
    with serving([bundle], access_log=tmp_path / "log") as server:

        async def hang_up() -> None:
            scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": []}
            task = asyncio.create_task(server.app(scope, asyncio.Event().wait, None))
            while not server.app.load.open:
                await asyncio.sleep(0.01)
            task.cancel()
            await task

        with pytest.raises(concurrent.futures.CancelledError):
            server.run(hang_up())
        assert 'cibl_ray_requests_total{route="predict",status="499"} 1.0' in server.ask("GET", "/metrics").body.decode()
        assert server.app.load.waiting == 0
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
