"""Precision and compilation are decided by timing the run's own network, where the run is long enough."""

import json

import pytest
import torch

from cibl_ray.config import load_config
from cibl_ray.hardware import resolve
from cibl_ray.training import arithmetic
from cibl_ray.training.arithmetic import Arithmetic, candidates, decide, fastest, time_steps
from pipelines.common.errors import UserError

EAGER32, EAGER16 = Arithmetic("fp32", False), Arithmetic("bf16", False)
COMPILED32, COMPILED16 = Arithmetic("fp32", True), Arithmetic("bf16", True)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with bf16 whose steps take what `seconds` says; a name in `broken` cannot be compiled."""

    class Machine:
        def __init__(self):
            self.seconds = {EAGER32: 1.0, EAGER16: 0.5, COMPILED32: 0.9, COMPILED16: 0.4}
            self.broken, self.large, self.timed = set(), set(), []
            self.cache = tmp_path / "cache" / "arithmetic.json"

        def decide(self, *flags, batches=100, epochs=100):
            asked = load_config("quickstart", ["--epochs", str(epochs), "--device", "cpu", *flags])
            self.timed.clear()
            return decide(resolve(asked), asked.train, batches, 10, cache=self.cache).train

    found = Machine()

    def timer(config, classes, workers):
        def seconds(choice):
            if choice in found.large:
                raise arithmetic._NoMemoryError
            if choice in found.broken:
                raise UserError("this network cannot be compiled here (no compiler)")
            found.timed.append(choice)
            return found.seconds[choice]

        return seconds

    monkeypatch.setattr(arithmetic, "_Timer", timer)
    monkeypatch.setattr(arithmetic, "has_bf16", lambda device: True)
    monkeypatch.setattr("cibl_ray.hardware.has_bf16", lambda device: True)
    return found


AUTO = ("--train.compile", "auto")


def test_a_long_run_takes_what_is_fastest(machine, caplog):
    chosen = machine.decide(*AUTO)
    assert (chosen.precision, chosen.compile) == ("bf16", True)
    assert machine.timed[0] == EAGER16  # what it would have taken
    assert sorted(map(str, machine.timed)) == ["bf16", "bf16, compiled", "fp32", "fp32, compiled"]
    machine.seconds = {EAGER32: 0.5, EAGER16: 1.0, COMPILED32: 0.6, COMPILED16: 0.9}
    machine.cache.unlink()
    chosen = machine.decide(*AUTO)
    assert (chosen.precision, chosen.compile) == ("fp32", False)


def test_what_was_measured_is_kept_for_this_network_and_batch(machine):
    first = machine.decide(*AUTO)
    assert machine.decide(*AUTO) == first
    assert machine.timed == []
    machine.decide(*AUTO, "--train.batch_size", "32")
    assert len(machine.timed) == 4
    assert len(json.loads(machine.cache.read_text())) == 2
    machine.cache.write_text("{")
    assert machine.decide(*AUTO) == first


def test_what_is_compared_is_timed_in_one_go(machine):
    machine.decide()  # a run that leaves the compiler out, on a machine that was busy
    assert machine.timed == [EAGER16, EAGER32]
    machine.seconds = {choice: value / 2 for choice, value in machine.seconds.items()}
    assert machine.decide(*AUTO).compile is True
    assert {*machine.timed} == {EAGER16, EAGER32, COMPILED16, COMPILED32}
    (rates,) = json.loads(machine.cache.read_text()).values()
    assert rates == {str(choice): value for choice, value in machine.seconds.items()}


def test_a_short_run_is_not_timed(machine):
    chosen = machine.decide(*AUTO, batches=10, epochs=20)
    assert (chosen.precision, chosen.compile, machine.timed) == ("bf16", False, [])
    machine.seconds = {choice: value / 100 for choice, value in machine.seconds.items()}
    assert machine.decide(*AUTO).compile is False  # 10,000 steps of 5 ms: less than ten minutes
    assert machine.timed == [EAGER16]


def test_a_short_run_takes_the_faster_of_what_an_earlier_one_measured(machine, caplog):
    machine.seconds = {EAGER32: 0.5, EAGER16: 1.0, COMPILED32: 0.1, COMPILED16: 0.9}
    assert machine.decide(*AUTO).compile is True
    caplog.clear()
    with caplog.at_level("INFO"):
        chosen = machine.decide(*AUTO, batches=10, epochs=20)
    assert (chosen.precision, chosen.compile, machine.timed) == ("fp32", False, [])
    (told,) = [record.message for record in caplog.records if "auto" in record.message]
    assert "fp32, of bf16 64 img/s, fp32 128 img/s" in told  # what was compared, and no more


def test_compiling_is_for_half_an_hour_and_more(machine):
    machine.seconds = {choice: value / 5 for choice, value in machine.seconds.items()}
    assert machine.decide(*AUTO).compile is False  # 17 minutes
    assert machine.timed == [EAGER16, EAGER32]


def test_only_what_is_auto_is_decided(machine):
    assert machine.decide("--precision", "fp32").precision == "fp32"
    assert machine.timed == []
    assert machine.decide("--precision", "fp32", *AUTO).compile is True
    assert machine.timed == [EAGER32, COMPILED32]
    assert machine.decide().compile is False
    assert machine.decide(*AUTO, "--accumulate", "2").compile is False
    assert machine.decide(*AUTO, "--batch_norm", "sync").compile is False
    with pytest.raises(UserError, match="train.batch_norm 'sync' does not go with train.compile"):
        load_config("quickstart", ["--train.compile", "true", "--batch_norm", "sync"])


def test_what_cannot_be_compiled_is_tried_once(machine, caplog):
    machine.broken = {COMPILED32, COMPILED16}
    assert machine.decide(*AUTO).compile is False
    assert "cannot be compiled here" in caplog.text
    caplog.clear()
    assert machine.decide(*AUTO).compile is False
    assert (machine.timed, caplog.text) == ([], "")


def test_a_network_that_cannot_be_compiled_runs_eager(machine, caplog):
    machine.broken = {COMPILED16, COMPILED32}
    chosen = machine.decide(*AUTO)
    assert (chosen.precision, chosen.compile) == ("bf16", False)
    assert "cannot be compiled here (no compiler)" in caplog.text


def test_compiling_must_gain_some_percent():
    assert fastest({EAGER16: 1.0, COMPILED16: 0.98}) == EAGER16
    assert fastest({EAGER16: 1.0, COMPILED16: 0.96}) == COMPILED16
    asked = load_config("quickstart", [*AUTO]).train
    assert candidates(asked, "cpu", EAGER32)[0] == EAGER32
    assert resolve(load_config("quickstart", [*AUTO])).train.compile is False  # where nothing is timed


@pytest.mark.parametrize("loss", ["{kind: cibl}", "{kind: hybrid_sc}", "{kind: paco, queue: 64}", "{kind: proco}"])
def test_real_steps_are_timed(loss):
    flags = ["--loss", loss, "--backbone", "resnet20", "--batch_size", "8", "--device", "cpu"]
    found = time_steps(resolve(load_config("quickstart", flags)), 10, [EAGER32])
    assert 0 < found[EAGER32] < 60


def test_what_does_not_fit_into_memory_is_not_chosen(machine):
    machine.large = {COMPILED16, EAGER32}
    chosen = machine.decide(*AUTO)
    assert (chosen.precision, chosen.compile) == ("bf16", False)  # and not the slower compiled fp32
    machine.large = {EAGER16}  # what the run would take: it says itself what to change
    machine.cache.unlink()
    chosen = machine.decide(*AUTO)
    assert (chosen.precision, chosen.compile) == ("bf16", False)
    assert machine.timed == []


def test_a_step_is_timed_with_a_workers_part_of_the_batch(monkeypatch):
    config = resolve(load_config("quickstart", ["--device", "cpu", "--batch_size", "48", "--accumulate", "2"]))
    parts = []

    def full(*given):
        parts.append(given[-1])
        raise torch.OutOfMemoryError

    monkeypatch.setattr(arithmetic, "Objective", full)
    for workers in (1, 3):
        with pytest.raises(arithmetic._NoMemoryError):
            arithmetic._Timer(config, 10, workers)(EAGER32)
    assert parts == [24, 8]
