"""Notes of a worker reach the driver, and its request to stop reaches the worker. One Ray cluster for the whole file."""

import gc
import logging
import time
import warnings

import pytest

from cibl_ray.cluster.environment import configure_ray_env
from cibl_ray.run.progress import Silent

configure_ray_env(own=True)

import ray  # noqa: E402

from cibl_ray.cluster import progress  # noqa: E402
from cibl_ray.cluster.progress import RelayedProgress, RelayedStop, show_progress  # noqa: E402
from cibl_ray.cluster.session import cluster  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def own_cluster():
    with cluster(None):
        yield
    with warnings.catch_warnings():  # Ray leaves the handles of its processes to the collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


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
    with show_progress(heard, lambda: None) as watch:
        posted = RelayedProgress(watch.relay)
        posted.begin(100, 20)
        for _ in range(5):
            posted.advance(16)  # less than half a second apart: told together
        posted.epoch({"epoch": 1, "train": {"loss": 0.5}}, "epoch 1/1\nof one")
        log = logging.getLogger("test_progress")
        log.addHandler(posted.log_handler())
        log.warning("ünïcode")
        posted.close()
        posted.error("Traceback of a rank")
        posted.stopped()
        posted.finish()
    counted = [note for note in heard.notes if isinstance(note, int)]
    rest = [note for note in heard.notes if not isinstance(note, int)]
    assert (sum(counted), len(counted)) == (80, 2)
    assert rest == [(100, 20), ({"epoch": 1, "train": {"loss": 0.5}}, "epoch 1/1\nof one"), "ünïcode"]
    assert "Traceback of a rank" in capsys.readouterr().err
    assert watch.stopped


def test_a_lost_relay_stops_no_training(monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 1.0)
    with show_progress(Heard(), lambda: None) as watch:
        ray.kill(watch.relay)
        posted, stop = RelayedProgress(watch.relay), RelayedStop(watch.relay)
        for _ in range(100):
            posted.line("to nobody")
            assert not stop.asked()
        posted.finish()
        assert not stop.ask()


def test_a_worker_hears_that_it_should_stop():
    with show_progress(Silent(), lambda: None) as watch:
        stop = RelayedStop(watch.relay)
        assert not stop.ask()
        ray.get(watch.relay.stop.remote())
        while not stop.asked():  # it does not wait for the answer
            time.sleep(0.01)
        assert stop.ask()


def test_a_reason_to_wait_is_shown_once_and_only_if_it_lasts(monkeypatch):
    monkeypatch.setattr(progress, "_SILENCE", 0.01)
    heard, reasons = Heard(), ["a short one", None, "the nodes", "the nodes", "the nodes"]
    with show_progress(heard, lambda: reasons.pop(0) if reasons else None):
        while reasons:
            time.sleep(0.01)
    assert heard.notes == ["the nodes"]


def test_what_goes_wrong_while_showing_is_raised():
    class Broken(Silent):
        def line(self, text):
            raise ValueError(text)

    with pytest.raises(ValueError, match="hello"), show_progress(Broken(), lambda: None) as watch:
        posted = RelayedProgress(watch.relay)
        posted.line("hello")
        posted.finish()
