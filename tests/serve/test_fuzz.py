"""Thousands of requests that no honest client would send: never a 500, never a hang, no growth; and then it still answers."""

import base64
import json
import random
import time

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.conftest import encoded

GROWTH = 96 << 20  # bytes that the process may grow by, after a first thousand requests have filled its caches
SEEDS = [
    encoded(kind, n, size) for n, (kind, size) in enumerate((k, s) for k in ("JPEG", "PNG", "WEBP") for s in (None, 40, 150))
]
PATHS = [
    "/v1/predict",
    "/v1/predict?top_k=2",
    "/v2/models/digits/infer",
    "/v1/models/digits/fp32.onnx",
    "/v1/models",
    "/v2",
    "/docs",
]


def acceptable(answer) -> bool:
    return answer.status < 500 or answer.status == 503


def mutated(chance: random.Random) -> bytes:
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.randint(1, 8)):
        match chance.randrange(5):
            case 0:
                data[chance.randrange(len(data))] = chance.randrange(256)
            case 1:
                del data[chance.randrange(len(data)) :]
            case 2:
                at = chance.randrange(len(data))
                data[at:at] = chance.randbytes(chance.randint(1, 40))
            case 3:
                at = chance.randrange(len(data))
                del data[at : at + chance.randint(1, 40)]
            case 4:
                data += chance.choice(SEEDS)
        if not data:
            data += b"\xff"
    return bytes(data)


def test_mutated_images(simple):
    process, chance, sizes = psutil.Process(), random.Random(0), {}
    for number in range(2000):
        data = mutated(chance)
        begun = time.monotonic()
        match number % 3:
            case 0:
                answer = simple.ask("POST", "/v1/predict", data)
            case 1:
                text = json.dumps({"images": [base64.b64encode(data).decode()]})
                answer = simple.ask("POST", "/v1/predict", text, Content_Type="application/json")
            case _:
                body = b'--X\r\nContent-Disposition: form-data; name="i"; filename="i"\r\n\r\n' + data + b"\r\n--X--\r\n"
                answer = simple.ask("POST", "/v1/predict", body, Content_Type="multipart/form-data; boundary=X")
        assert acceptable(answer), (number, answer.status, answer.body[:200])
        assert time.monotonic() - begun < 10
        if number in (999, 1999):
            sizes[number] = process.memory_info().rss
    assert sizes[1999] - sizes[999] < GROWTH
    assert simple.ask("POST", "/v1/predict", encoded("PNG")).status == 200


WORDS = "images tail_shift inputs outputs name shape datatype data id parameters image model top_k binary_data_size UINT8 FP32"
NAMES = st.sampled_from([*WORDS.split(), 1, 16, 3, 768, -1, 0.5, None, True])
VALUES = st.recursive(
    NAMES | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | NAMES.filter(lambda v: isinstance(v, str)), inner, max_size=5)
    ),
    max_leaves=20,
)
TENSOR = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["images", "tail_shift"]),
        "shape": VALUES,
        "datatype": st.sampled_from(["UINT8", "FP32", "BYTES"]),
        "data": VALUES,
    }
)


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
@settings(max_examples=400, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(content=VALUES | st.fixed_dictionaries({"inputs": st.lists(TENSOR, max_size=3)}), path=st.sampled_from(PATHS[:3]))
def test_json_of_all_kinds(simple, content, path):
    answer = simple.ask("POST", path, json.dumps(content), Content_Type="application/json")
    assert acceptable(answer), answer.body
    assert answer.status != 200 or path == "/v1/predict" or answer.json()["outputs"]


FIELDS = "Content_Type Range If_Range If_None_Match X_Request_Id Inference_Header_Content_Length Authorization Accept"
ODD = ["bytes=0-", "bytes=5-2", "bytes=-0", "multipart/form-data; boundary=", "application/json", "-1", "99999999999", "5"]
HEADERS = st.dictionaries(
    st.sampled_from(FIELDS.split()),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40) | st.sampled_from(ODD),
    max_size=4,
)


@settings(max_examples=400, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS"]),
    path=st.sampled_from(PATHS)
    | st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="#"), max_size=30).map(lambda t: "/" + t),
    headers=HEADERS,
    body=st.binary(max_size=300),
)
def test_any_request(simple, method, path, headers, body):
    answer = simple.ask(method, path, body, **headers)
    assert acceptable(answer), (answer.status, answer.body)


def test_it_still_answers(simple):
    assert simple.ask("GET", "/v2/health/ready").status == 200
    assert simple.ask("POST", "/v1/predict", encoded("JPEG", 1)).status == 200
