"""The model of docs/explanation/scaling.md, and what `benchmarks.scale` says where it cannot run."""

import os
import re

import pytest

from benchmarks import scale
from tests.commands import in_process
from tests.conftest import REPOSITORY


def test_a_step_by_the_model():
    """100 MB of gradients and 1 MB of embeddings, a step of 1.5 s of which a third is forward, 0.1 s of handling."""
    model = scale.Model(compute=1.5, forward=0.5, handling=0.1, gradients=100e6, embeddings=1e6, last=2e6)
    assert model.after(100e6) == pytest.approx(1.5 + 0.1 + 1.01)
    assert model.within(100e6) == pytest.approx(1.5 + 0.1 + 0.03)  # the worker is the slower one
    assert model.within(10e6) == pytest.approx(0.5 + 0.1 + 10.1)  # the network is


def test_the_table_of_gpus_is_the_models():
    rows = re.findall(
        r"^\| (\d+) \| [\d,]+ \| \d+ \| [\d.]+ \| (\d+) % \| (\d+) % \| (.+) \| (.+) \|$",
        (REPOSITORY / "docs/explanation/scaling.md").read_text(),
        re.MULTILINE,
    )
    assert [int(row[0]) for row in rows] == [8, 64, 256]
    for gpus, *cells in rows:
        found = scale.efficiencies(int(gpus))
        expected = [f"{100 * found[name]:.0f}" for name in ("fast, after", "fast, within", "slow, after", "slow, within")]
        assert [cell.removesuffix(" %") for cell in cells] == (
            expected if gpus != "8" else [*expected[:2], "(one node)", "(one node)"]
        )


def test_without_root_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = in_process(scale.main, "--quick")
    assert done.returncode == 2
    assert done.stderr == (
        "error: benchmarks.scale makes two network namespaces: run it as root on Linux, with iproute2 installed\n"
    )
