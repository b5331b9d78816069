"""Images that wait to be decoded: how many may, which goes first, and those whose client has gone."""

import concurrent.futures
import socket
import threading

import numpy as np
import pytest

from serve import v1
from tests.serve.conftest import encoded, png, serving, until


def form(*files: bytes) -> tuple[bytes, str]:
    head = b'--XX\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return b"".join(head + data + b"\r\n" for data in files) + b"--XX--\r\n", "multipart/form-data; boundary=XX"


@pytest.fixture
def gate(monkeypatch):
    """Decoders wait until it is set. They give black pixels of every image; `gate.begun` has the sizes of their files."""
    gate = threading.Event()
    gate.begun = []

    def decoded(data, rule, limits):
        if limits.max_scans == 1:
            return true(data, rule, limits)
        gate.begun.append(len(data))
        gate.wait(20)
        return np.zeros((rule.size, rule.size, 3), np.uint8)

    true = v1.pixels
    monkeypatch.setattr(v1, "pixels", decoded)
    yield gate
    gate.set()


def test_64_photographs_at_once_are_answered_by_default(bundle, gate):
    """12 million pixels each, of as many clients."""
    photo = png(4032, 3024)
    with serving([bundle]) as server, concurrent.futures.ThreadPoolExecutor(64) as clients:
        answers = [clients.submit(server.ask, "POST", "/v1/predict", photo) for _ in range(64)]
        until(lambda: server.app._predict._usual.waiting == 64 * 4032 * 3024)
        gate.set()
        assert {answer.result().status for answer in answers} == {200}
        until(lambda: server.app._predict._usual.waiting == 0)


@pytest.mark.parametrize(("side", "lane"), [(3990, "_usual"), (4010, "_large")])
def test_beyond_the_pixels_that_may_wait_the_answer_is_503(bundle, gate, side, lane):
    """Those of a few kilobytes, too, and those just below what is large; the other images are answered meanwhile."""
    body, kind = form(*[png(side, side)] * 3)
    assert len(body) < 5_000
    with serving([bundle], max_waiting_pixels=7 * side**2) as server, concurrent.futures.ThreadPoolExecutor(2) as clients:
        waits = getattr(server.app._predict, lane)
        answers = [clients.submit(server.ask, "POST", "/v1/predict", body, Content_Type=kind) for _ in range(2)]
        until(lambda: waits.waiting == 6 * side**2)
        refused = server.ask("POST", "/v1/predict", body, Content_Type=kind)
        assert (refused.status, refused.json()["code"], refused.headers["retry-after"]) == (503, "overloaded", "1")
        assert refused.json()["error"] == f"images of {6 * side**2:,} pixels wait to be decoded; try again"
        assert server.ask("POST", "/v1/predict", encoded("PNG")).status == 200
        gate.set()
        assert {answer.result().status for answer in answers} == {200}
        until(lambda: waits.waiting == 0)


def test_a_small_image_goes_before_larger_ones(bundle, gate):
    large, kind = form(*[png(3990, 3990)] * 10)
    photo, kind = form(png(200, 200) + bytes(20_000))
    with serving([bundle]) as server, concurrent.futures.ThreadPoolExecutor(2) as clients:
        first = clients.submit(server.ask, "POST", "/v1/predict", large, Content_Type=kind)
        until(lambda: server.app._predict._usual.waiting == 10 * 3990**2 and len(gate.begun) == 2)
        second = clients.submit(server.ask, "POST", "/v1/predict", photo, Content_Type=kind)
        until(lambda: server.app._predict._usual.waiting == 10 * 3990**2 + 200**2)
        gate.set()
        assert {first.result().status, second.result().status} == {200}
    assert max(gate.begun[2:4]) > 20_000  # the next thread that was free took it


@pytest.mark.parametrize("way", ["simple", "haproxy"])
@pytest.mark.parametrize("side", [3990, 4010])
def test_images_whose_client_has_gone_are_not_decoded(bundle, gate, way, side):
    body, kind = form(*[png(side, side)] * 9)
    with serving([bundle], way) as server:
        predict = server.app._predict
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            until(lambda: predict._usual.waiting + predict._large.waiting == 9 * side**2 and gate.begun)
        until(lambda: (predict._usual.waiting, predict._large.waiting, server.app.load.waiting) == (0, 0, 0))
        gate.set()
        assert server.ask("POST", "/v1/predict", form(png(side, side))[0], Content_Type=kind).status == 200
        assert len(gate.begun) <= 3 + 1  # two threads, or one, had begun
