"""Notes from a worker to the driver: in order, all of them, and from those alone who know the secret."""

import contextlib
import logging
import socket
import threading
import time

import pytest

from cibl_ray.cluster.progress_socket import Address, Posted, shown
from cibl_ray.run.progress import Silent

LOOPBACK = "127.0.0.1"


class Heard(Silent):
    def __init__(self):
        self.notes = []

    def begin(self, total, done):
        self.notes.append((total, done))

    def advance(self, images):
        self.notes.append(images)

    def epoch(self, row, text):
        self.notes.append((row, text))

    def line(self, text):
        self.notes.append(text)


def test_what_is_posted_arrives_in_order_before_the_end(capsys):
    heard = Heard()
    with shown(LOOPBACK, heard, lambda: None) as address:
        posted = Posted(address)
        posted.begin(100, 20)
        for _ in range(5):
            posted.advance(16)  # less than half a second apart: told together
        posted.epoch({"epoch": 1, "train": {"loss": 0.5}}, "epoch 1/1\nof one")
        log = logging.getLogger("test_board")
        log.addHandler(posted.log_handler())
        log.warning("ünïcode")
        posted.close()
        posted.error("Traceback of a rank")
        posted.finish()
    counted = [note for note in heard.notes if isinstance(note, int)]
    rest = [note for note in heard.notes if not isinstance(note, int)]
    assert (sum(counted), len(counted)) == (80, 2)
    assert rest == [(100, 20), ({"epoch": 1, "train": {"loss": 0.5}}, "epoch 1/1\nof one"), "ünïcode"]
    assert "Traceback of a rank" in capsys.readouterr().err


def test_who_does_not_know_the_secret_is_not_heard():
    heard = Heard()
    with shown(LOOPBACK, heard, lambda: None) as address:
        for secret in (b"\n", b"x" * 32 + b"\n", address.token.encode()[:-1] + b"\n", b"x" * 100_000):
            with socket.create_connection((address.host, address.port), timeout=5) as stranger:
                with contextlib.suppress(OSError):  # hung up on before all was sent
                    stranger.sendall(secret + b'["line", "I was here"]\n')
                    stranger.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):  # closed with what it had not read
                    assert stranger.recv(1) == b""
        worker = Posted(address)
        worker.line("and I was heard")
        worker.finish()
    assert heard.notes == ["and I was heard"]


def test_a_driver_that_is_gone_stops_no_training():
    with shown(LOOPBACK, Heard(), lambda: None) as address:
        pass
    posted = Posted(address)
    begun = time.monotonic()
    for _ in range(100):
        posted.line("to nobody")
    posted.finish()
    assert time.monotonic() - begun < 5
    assert posted._lost is not None  # refused: nobody listens any more


def test_a_driver_that_does_not_read_stops_no_training(monkeypatch):
    monkeypatch.setattr("cibl_ray.cluster.progress_socket._PATIENCE", 0.2)
    with socket.create_server((LOOPBACK, 0)) as server:  # which accepts nobody
        posted = Posted(Address(LOOPBACK, server.getsockname()[1], "0" * 32))
        writer = threading.Thread(target=lambda: [posted.line("x" * 100_000) for _ in range(1000)], daemon=True)
        writer.start()
        writer.join(timeout=30)
        assert not writer.is_alive()
        posted.finish()


def test_what_goes_wrong_while_showing_is_raised():
    class Broken(Silent):
        def line(self, text):
            raise ValueError(text)

    with pytest.raises(ValueError, match="hello"), shown(LOOPBACK, Broken(), lambda: None) as address:
        posted = Posted(address)
        posted.line("hello")
        posted.finish()
