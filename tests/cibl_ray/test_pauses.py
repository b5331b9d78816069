"""When a run saves and stops: by the clock, on request, and when a machine is about to be taken away."""

import logging
import signal

import pytest

from cibl_ray.run.stop import AGAIN, Stop, stop_signals
from cibl_ray.training import pauses
from cibl_ray.training.pauses import AllStopped, Pauses
from cibl_ray.world import World
from pipelines.common.errors import Interrupted


class Announced(Stop):
    """A machine goes at a moment of the test's clock, and that is known from another moment on."""

    def __init__(self, clock, known, goes):
        self.clock, self.known, self.goes, self.questions = clock, known, goes, 0

    def notice(self):
        self.questions += 1
        return self.goes - self.clock[0] if self.clock[0] >= self.known else None


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(pauses.time, "monotonic", lambda: now[0])
    return now


class Two(World):
    """Rank 0 of two workers; the other one answers the same."""

    def __init__(self):
        super().__init__()
        self.size = 2

    def all_gather(self, value):
        return [value, value]


@pytest.mark.parametrize("world", [World(), Two()])
def test_a_machine_that_is_taken_away_is_saved_for_at_once_and_shortly_before(clock, caplog, world):
    stop = Announced(clock, known=1010, goes=1100)
    asked = Pauses(world, None, stop)
    saves = []
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):  # steps of a tenth of a second
            clock[0] += 0.1
            asked.step()
            save, ended = asked.ask()
            assert not ended
            if save:
                saves.append(clock[0])
                asked.saved()
    assert len(saves) == 2
    assert 1010 <= saves[0] <= 1016  # within the time between two questions
    assert 1085 <= saves[1] <= 1087
    assert caplog.messages == [
        f"a machine of this run is taken away in {1100 - saves[0]:.0f} s: saving a checkpoint, and training on"
    ]
    assert stop.questions <= 20  # a question takes all workers' time


def test_a_machine_that_goes_soon_is_saved_for_once(clock):
    asked = Pauses(World(), None, Announced(clock, known=0, goes=1018))
    saves = 0
    for _ in range(300):
        clock[0] += 0.1
        saves += asked.ask()[0]
    assert saves == 1


def test_a_checkpoint_is_due_by_the_clock(clock):
    asked = Pauses(World(), 0.5, Stop())
    assert asked.ask() == (False, False)
    clock[0] += 30
    assert asked.ask() == (True, False)
    asked.saved()
    assert asked.ask() == (False, False)


def test_a_second_signal_does_not_cut_the_end_of_a_stopped_command():
    """torchrun sends SIGTERM to the other workers as soon as one has saved and ended; Slurm may send its signal twice."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    try:
        with pytest.raises(KeyboardInterrupt), stop_signals(exits=True) as stop:
            stop.polled = True
            signal.raise_signal(signal.SIGUSR1)
            assert stop.asked()
            stop.polled = False  # the run has saved, and ends
            signal.raise_signal(signal.SIGTERM)
            assert stop.status == AGAIN
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGTERM)  # its message is not yet out
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR1, before[1])


def test_the_first_signal_ends_a_run_that_does_not_look():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped, stop_signals():
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.status == AGAIN
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_worker_whose_peer_is_asked_to_stop_knows_it_too(monkeypatch):
    """It gets the peer's exit status, and a launcher's SIGTERM does not cut how it ends."""
    world = Two()
    monkeypatch.setattr(world, "all_gather", lambda mine: [mine, (False, AGAIN, 0, False)])
    with stop_signals() as stop:
        assert Pauses(world, None, stop).ask() == (False, True)
        signal.raise_signal(signal.SIGTERM)
    assert stop.asked()
    assert stop.status == AGAIN


@pytest.mark.parametrize("first", [True, False])
def test_an_evaluation_is_interrupted_on_all_workers_or_on_none(monkeypatch, first):
    """A signal that reaches one worker while it evaluates must not leave the others waiting for it."""
    world, gathered = Two(), []
    monkeypatch.setattr(world, "all_gather", lambda mine: gathered.append(mine) or [mine, None if first else AGAIN])

    def work():
        if first:
            signal.raise_signal(signal.SIGUSR1)
        pauses.raise_if_stopped()
        return "scores"

    with stop_signals() as stop:
        stop.polled = True
        pauses = Pauses(world, None, stop)
        with pytest.raises(AllStopped) as stopped:
            pauses.together(work)
        assert stopped.value.status == AGAIN
        assert gathered == [AGAIN if first else None]
        assert (stop.asked(), stop.status) == (True, AGAIN)
    monkeypatch.setattr(world, "all_gather", lambda mine: [mine, None])
    assert Pauses(world, None, Stop()).together(lambda: "scores") == "scores"
