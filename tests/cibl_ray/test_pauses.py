"""When a run saves and stops: by the clock, on request, and when a machine is about to be taken away."""

import logging

import pytest

from cibl_ray.run.stop import Stop
from cibl_ray.training import pauses
from cibl_ray.training.pauses import Pauses
from cibl_ray.world import World


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
