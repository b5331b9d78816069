"""Bodies as real clients send them: compressed, in odd base64, under a wrong content type."""

import asyncio
import base64
import gzip
import json
import tempfile
import zlib

import numpy as np
import pytest

from cibl_ray.bundle.runtime import Runtime
from pipelines.pixels import decode
from serve import v1
from tests.serve.conftest import encoded, tensor

JSON = {"Content_Type": "application/json"}


def labels(answer) -> list[str]:
    assert answer.status == 200, answer.body
    return [entry["label"] for entry in answer.json()["predictions"][0]["top"]]


@pytest.mark.parametrize("written", ["plain", "url-safe", "lines", "no padding", "data", "data, url-safe"])
def test_base64_of_all_kinds(server, written):
    data = next(d for n in range(99) if b"+" in base64.b64encode(d := encoded("PNG", n)) and b"/" in base64.b64encode(d))
    text = base64.b64encode(data).decode()
    if "url-safe" in written:
        text = base64.urlsafe_b64encode(data).decode()
    if written == "lines":
        text = base64.encodebytes(data).decode().replace("\n", "\r\n")
    if written == "no padding":
        text = base64.b64encode(data + b"\0" * (1 + -len(data) % 3)).decode().rstrip("=")
    if "data" in written:
        text = f"data:image/png;base64,{text}"
    answer = server.ask("POST", "/v1/predict", json.dumps({"image": text}), **JSON)
    assert labels(answer) == labels(server.ask("POST", "/v1/predict", data))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:image/svg+xml,%3Csvg/%3E", "a data: URL without ';base64,'"),
        ("https://example.org/a.jpg", "an image is a URL; send its bytes, in base64"),
        ("not base64!", "an image is not valid base64"),
    ],
)
def test_what_is_no_base64_is_named(server, text, message):
    answer = server.ask("POST", "/v1/predict", json.dumps({"image": text}), **JSON)
    assert answer.status == 400
    assert message in answer.json()["error"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "raw deflate"])
@pytest.mark.parametrize("size", [None, 600])
def test_compressed_bodies(server, encoding, size):
    data = encoded("PNG", 4, size)
    body = json.dumps({"image": base64.b64encode(data).decode()}).encode()
    if encoding == "gzip":
        packed = gzip.compress(body)
    else:
        packer = zlib.compressobj(wbits=zlib.MAX_WBITS if encoding == "deflate" else -zlib.MAX_WBITS)
        packed = packer.compress(body) + packer.flush()
    answer = server.ask("POST", "/v1/predict", packed, Content_Encoding=encoding.split()[-1], **JSON)
    assert labels(answer) == labels(server.ask("POST", "/v1/predict", data))


def test_a_compressed_body_keeps_the_limits(server):
    """A kilobyte that becomes more than the megabyte that a body may have here."""
    bomb = gzip.compress(bytes(server.app.config.max_bytes + 1))
    assert len(bomb) < 2000
    answer = server.ask("POST", "/v1/predict", bomb, Content_Encoding="gzip")
    assert (answer.status, answer.json()["code"]) == (413, "too_large")
    assert "decompressed" in answer.json()["error"]
    for damaged in (b"no gzip", gzip.compress(b"x" * 99)[:-4], gzip.compress(b"x") + b"more"):
        answer = server.ask("POST", "/v1/predict", damaged, Content_Encoding="gzip")
        assert (answer.status, answer.json()["code"]) == (400, "invalid_request")
        assert "gzip" in answer.json()["error"]
    unknown = server.ask("POST", "/v1/predict", encoded("PNG"), Content_Encoding="br")
    assert (unknown.status, unknown.json()["code"]) == (415, "unsupported_encoding")
    assert unknown.headers["accept-encoding"] == "gzip, deflate, identity"
    assert server.app.load.held == 0


def test_tritons_client_compresses(server, bundle):
    from tritonclient import http as triton

    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    tensors = [triton.InferInput("images", images.shape, "UINT8")]
    tensors[0].set_data_from_numpy(images)
    (expected,) = Runtime(bundle / "model.onnx", "cpu")(images, None, ("probabilities",))
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    for algorithm in ("gzip", "deflate"):
        result = client.infer("digits", tensors, request_compression_algorithm=algorithm)
        assert np.abs(result.as_numpy("probabilities") - expected).max() < 1e-5
    client.close()


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("text/plain", b'{"image": "aGk="}', "Content-Type is 'text/plain', but it looks like JSON"),
        ("application/x-www-form-urlencoded", b'{"image": "aGk="}', "looks like JSON: send it as application/json"),
        ("application/x-www-form-urlencoded", b"image=aGk%3D", "'application/x-www-form-urlencoded', which is not read here"),
        (
            "application/octet-stream",
            b'--X\r\nContent-Disposition: form-data; name="i"; filename="i"\r\n\r\nx\r\n--X--\r\n',
            "looks like a form: send it as multipart/form-data",
        ),
    ],
)
def test_a_wrong_content_type_is_named(server, kind, body, message):
    answer = server.ask("POST", "/v1/predict", body, Content_Type=kind)
    assert (answer.status, answer.json()["code"]) == (415, "unsupported_type")
    assert message in answer.json()["error"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "image/gif", "text/plain", "nonsense"])
def test_an_image_under_any_content_type_is_read(server, kind):
    """`curl --data-binary` sends the first."""
    data = encoded("JPEG", 3)
    answer = server.ask("POST", "/v1/predict", data, Content_Type=kind)
    assert labels(answer) == labels(server.ask("POST", "/v1/predict", data))


@pytest.mark.parametrize(
    ("data", "name"),
    [(lambda: encoded("TIFF"), "TIFF"), (lambda: encoded("GIF"), "GIF"), (lambda: b"\0\0\0\x1cftypheic" + bytes(99), "HEIF")],
)
def test_a_format_that_is_not_taken_is_named(server, data, name):
    answer = server.ask("POST", "/v1/predict", data())
    assert (answer.status, answer.json()["code"]) == (415, "unsupported_image")
    assert answer.json()["error"] == f"a {name} file; send JPEG, PNG, WEBP"


def test_other_fields_of_a_form_are_ignored(server):
    """Browsers and libraries add some."""
    data = encoded("PNG", 6)
    body = b'--X\r\nContent-Disposition: form-data; name="csrf_token"\r\n\r\nabc\r\n'
    body += b'--X\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n2\r\n'
    body += b'--X\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n' + data + b"\r\n--X--\r\n"
    answer = server.ask("POST", "/v1/predict", body, Content_Type="multipart/form-data; boundary=X")
    assert labels(answer) == labels(server.ask("POST", "/v1/predict?top_k=2", data))


@pytest.mark.parametrize("size", [None, 300])
def test_a_part_without_a_filename_is_named(server, size):
    """`curl -F 'image=<photo.png'`, which looks much like the right one."""
    data = encoded("PNG", 6, size)
    body = b'--X\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + data + b"\r\n--X--\r\n"
    answer = server.ask("POST", "/v1/predict", body, Content_Type="multipart/form-data; boundary=X")
    assert answer.status == 400
    assert "an image's part needs a filename, as in curl -F image=@photo.jpg" in answer.json()["error"]


@pytest.mark.parametrize("count", [64, 65, 66, 300])
@pytest.mark.parametrize("kind", ["form", "json"])
def test_more_images_than_a_request_may_have_are_413(server, kind, count):
    data = encoded("PNG")
    if kind == "form":
        part = b'--X\r\nContent-Disposition: form-data; name="image"; filename="i.png"\r\n\r\n' + data + b"\r\n"
        body, header = part * count + b"--X--\r\n", "multipart/form-data; boundary=X"
    else:
        body, header = json.dumps({"images": [base64.b64encode(data).decode()] * count}), "application/json"
    answer = server.ask("POST", "/v1/predict", body, Content_Type=header)
    if count == 64:
        assert len(answer.json()["predictions"]) == 64
        return
    assert (answer.status, answer.json()["code"]) == (413, "too_many")
    assert "64" in answer.json()["error"]


def test_a_large_form_needs_no_temporary_file(monkeypatch):
    """A container's root may be read-only, without a folder for temporary files."""

    def no_folder(*arguments, **options):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", no_folder)
    large = bytes(3 << 20)
    body = b'--X\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n' + large + b"\r\n--X--\r\n"
    assert asyncio.run(v1._multipart("multipart/form-data; boundary=X", body, 1)) == ([large], {})


def test_a_weak_entity_tag_is_the_same_file(server):
    path = "/v1/models/digits/fp32.onnx"
    tag = server.ask("GET", path).headers["etag"]
    assert server.ask("GET", path, If_None_Match=f"W/{tag}").status == 304
    assert server.ask("GET", path, If_None_Match=f'"other", W/{tag}').status == 304
    assert server.ask("GET", path, If_None_Match='W/"other"').status == 200
    assert server.ask("GET", path, Range="bytes=0-9", If_Range=f"W/{tag}").status == 200  # which needs a strong one


def test_image_files_over_the_v2_protocol(server, bundle):
    """Triton's datatype BYTES: in JSON as base64, else each after its length."""
    from tritonclient import http as triton

    files = [encoded(kind, n) for n, kind in enumerate(("PNG", "JPEG", "WEBP"))]
    runtime = Runtime(bundle / "model.onnx", "cpu")
    images = np.stack([runtime.card.rule(decode(data)) for data in files])
    (expected,) = runtime(images, np.array([0, 1, 2], np.float32), ("probabilities",))
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    tensors = [triton.InferInput("images", [3], "BYTES"), triton.InferInput("tail_shift", [3], "FP32")]
    tensors[0].set_data_from_numpy(np.array(files, dtype=np.object_))
    tensors[1].set_data_from_numpy(np.array([0, 1, 2], np.float32))
    result = client.infer("digits", tensors)
    client.close()
    assert np.abs(result.as_numpy("probabilities") - expected).max() < 1e-5
    texts = [base64.b64encode(data).decode() for data in files]
    content = {"inputs": [tensor("images", [3, 1], "BYTES", texts), tensor("tail_shift", [3], "FP32", [0, 1, 2])]}
    answer = server.ask("POST", "/v2/models/digits/infer", json.dumps(content), **JSON)
    assert answer.status == 200, answer.body
    output = next(part for part in answer.json()["outputs"] if part["name"] == "probabilities")
    assert output["data"] == pytest.approx(expected.ravel().tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "data", "status", "code"),
    [
        ([1], ["aGk="], 415, "unsupported_image"),
        ([2], ["aGk="], 400, "invalid_request"),
        ([1], [7], 400, "invalid_request"),
        ([1], ["*"], 400, "invalid_request"),
        ([1], None, 400, "invalid_request"),
        ([65], ["aGk="] * 65, 413, "too_many"),
    ],
)
def test_wrong_image_files_over_the_v2_protocol(server, shape, data, status, code):
    content = {"inputs": [tensor("images", shape, "BYTES", data)]}
    answer = server.ask("POST", "/v2/models/digits/infer", json.dumps(content), **JSON)
    assert (answer.status, answer.json()["code"]) == (status, code), answer.body


def test_binary_image_files_whose_lengths_lie(server):
    for binary in (b"\xff\xff\xff\x7fabc", b"\3\0\0", b"\0\0\0\0", b"\1\0\0\0ab"):
        part = {"name": "images", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(binary)}}
        head = json.dumps({"inputs": [part]}).encode()
        answer = server.ask("POST", "/v2/models/digits/infer", head + binary, Inference_Header_Content_Length=str(len(head)))
        assert answer.status == 400, answer.body
        assert "each after its length" in answer.json()["error"]


def test_tritons_config_index_and_statistics(server):
    from tritonclient import http as triton

    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    config = client.get_model_config("digits")
    assert config["max_batch_size"] == server.app.config.max_images != server.app.config.max_batch
    assert config["input"][0] == {"name": "images", "data_type": "TYPE_UINT8", "dims": [16, 16, 3]}
    assert config["input"][1] == {"name": "tail_shift", "data_type": "TYPE_FP32", "dims": [1], "optional": True}
    (version,) = client.get_model_metadata("digits")["versions"]
    assert client.get_model_repository_index() == [{"name": "digits", "version": version, "state": "READY"}]

    def statistics() -> dict:
        (found,) = client.get_inference_statistics("digits")["model_stats"]
        assert client.get_inference_statistics()["model_stats"] == [found]
        return found

    before = statistics()
    images = triton.InferInput("images", [3, 16, 16, 3], "UINT8")
    images.set_data_from_numpy(np.zeros((3, 16, 16, 3), np.uint8))
    client.infer("digits", [images])
    server.ask("POST", "/v2/models/digits/infer", b"{}")
    after = statistics()
    assert after["inference_count"] == before["inference_count"] + 3
    assert after["execution_count"] == before["execution_count"] + 1
    counts = {
        name: after["inference_stats"][name]["count"] - before["inference_stats"][name]["count"] for name in ("success", "fail")
    }
    assert counts == {"success": 1, "fail": 1}
    assert after["inference_stats"]["compute_infer"]["ns"] > before["inference_stats"]["compute_infer"]["ns"]
    client.close()
