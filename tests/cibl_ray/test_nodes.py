"""`--cluster --address`: nodes that are lost, come, or are busy, on a cluster that others have started."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from cibl_ray.cluster.environment import configure_ray_env
from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.run.log import read_metrics
from tests.clusters import LAST, ended, new, start, wait_for_epoch, wait_for_text
from tests.conftest import REPOSITORY

configure_ray_env(own=True)
os.environ.pop("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", None)  # a cluster that is joined watches for nodes that are taken away

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    # How soon the head node misses a node that was killed: by default after 15 seconds.
    with patch.dict(os.environ, {"RAY_health_check_period_ms": "500", "RAY_health_check_initial_delay_ms": "500"}):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def two_nodes(cluster):
    """A cluster of two nodes of one CPU on this machine: (cluster, second node)."""
    return cluster, next(iter(cluster.worker_nodes), None) or cluster.add_node(num_cpus=1)


@pytest.mark.slow  # a minute and a half: a node is lost and its processes are waited for
def test_an_elastic_run_goes_on_with_the_nodes_that_are_left(folder, two_nodes):
    cluster, second = two_nodes
    options = new(folder, "elastic", "--epochs", "16", "--address", cluster.address)
    process, log = start(folder, *options, workers="1-2")
    run = folder / "runs" / "elastic"
    wait_for_epoch(run, 2, process)
    wait_for_text("2 workers; from epoch 1", process, log)
    cluster.remove_node(second, allow_graceful=False)
    text = ended(process, log)
    assert "a worker was lost" in text
    assert "one process; from epoch" in text
    assert load_checkpoint(run / LAST).epoch == 16


@pytest.mark.slow
def test_an_elastic_run_grows_and_loses_nothing(folder, two_nodes):
    cluster, second = two_nodes
    cluster.remove_node(second)
    options = new(folder, "grows", "--epochs", "4000", "--address", cluster.address)
    process, log = start(folder, *options, workers="1-2")
    try:
        wait_for_text("one process; from epoch 1", process, log)
        cluster.add_node(num_cpus=1)
        wait_for_text("2 workers; from epoch", process, log)
        assert "a worker was lost" not in log.read_text()
    finally:
        process.send_signal(signal.SIGINT)
    ended(process, log, 130)
    epochs = [row["epoch"] for row in read_metrics(folder / "runs" / "grows")]
    assert epochs == [*range(1, len(epochs) + 1)]


@pytest.mark.slow
def test_a_node_that_is_taken_away_is_saved_for(folder, two_nodes):
    """As an autoscaler announces it for a spot machine, through Ray's head node."""
    cluster, second = two_nodes
    options = new(folder, "spot", "--epochs", "100000", "--checkpoint_every", "100000", "--address", cluster.address)
    process, log = start(folder, *options, workers="1-2")
    try:
        wait_for_text("2 workers; from epoch 1", process, log)
        wait_for_epoch(folder / "runs" / "spot", 2, process)
        ray = Path(sys.executable).with_name("ray")
        drained = ["drain-node", "--address", cluster.address, "--node-id", second.node_id, "--reason-message", "spot"]
        drained += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "25"]
        subprocess.run([ray, *drained], check=True)
        wait_for_text("a machine of this run is taken away in ", process, log)
        wait_for_text("one process; from epoch", process, log)
    finally:
        process.send_signal(signal.SIGINT)
        cluster.remove_node(second)
    text = ended(process, log, 130)
    assert re.search(r"\nlost: [\d,]+ images that were trained after that checkpoint\n", text)
    assert re.search(r"\nresuming in epoch \d+, after step \d+ of 6\n", text)


@pytest.mark.slow
def test_a_run_of_fixed_size_waits_for_a_node_and_says_so(folder, two_nodes):
    cluster, second = two_nodes
    process, log = start(folder, *new(folder, "fixed", "--epochs", "16", "--address", cluster.address))
    run = folder / "runs" / "fixed"
    wait_for_epoch(run, 2, process)
    cluster.remove_node(second, allow_graceful=False)
    wait_for_text("waiting for nodes: there is room for 1 of 2 workers", process, log)
    cluster.add_node(num_cpus=1)
    text = ended(process, log)
    assert text.count("2 workers; from epoch") == 2
    assert load_checkpoint(run / LAST).epoch == 16


HOLD = """
import ray, sys, time

ray.init(address=sys.argv[1], logging_level="ERROR")
holder = ray.remote(num_cpus=1)(type("Holder", (), {"held": lambda self: True})).remote()
ray.get(holder.held.remote())
print("held", flush=True)
time.sleep(600)
"""


def test_a_stop_does_not_wait_for_workers_that_have_no_place(monkeypatch):
    """They have nothing to save. Those that have begun are waited for."""
    from cibl_ray.cluster import launch

    asked = threading.Event()
    relay = SimpleNamespace(stop=SimpleNamespace(remote=asked.set))
    stop = SimpleNamespace(polled=False, asked=lambda: True)
    never, watch = threading.Event(), SimpleNamespace(relay=relay)
    monkeypatch.setattr(launch, "_SAVING", 1e6)
    with pytest.raises(KeyboardInterrupt):
        launch._fit_until_stopped(never.wait, watch, stop, lambda: True)
    assert asked.is_set()
    asked.clear()
    launch._fit_until_stopped(asked.wait, watch, stop, lambda: False)  # returns when they have saved
    monkeypatch.setattr(launch, "_ANSWER", 0.05)
    asked.clear()
    launch._fit_until_stopped(asked.wait, watch, stop, never.wait)  # the head node does not answer


def test_a_run_waits_for_others_work_and_says_so(folder, two_nodes):
    cluster, _ = two_nodes
    with subprocess.Popen([sys.executable, "-c", HOLD, cluster.address], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            process, log = start(folder, *new(folder, "in_line", "--epochs", "2", "--address", cluster.address))
            wait_for_text("waiting for room: other work has some of what 2 workers need (1 CPUs each)", process, log)
        finally:
            other.kill()
        ended(process, log)
    assert load_checkpoint(folder / "runs" / "in_line" / LAST).epoch == 2


CODE = """
import os, sys
from cibl_ray.cluster.environment import configure_ray_env
configure_ray_env(own=False)
import ray
from cibl_ray.cluster.launch import cluster
with cluster(sys.argv[1]):
    print(*ray.get(ray.remote(lambda: (__import__("cibl_ray").__file__, os.environ["MALLOC_ARENA_MAX"])).remote()))
"""


def test_the_drivers_code_reaches_the_nodes(two_nodes, tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, two_nodes[0].address], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, heaps = done.stdout.split()[-2:]
    assert Path(file) != REPOSITORY / "cibl_ray" / "__init__.py"  # a copy that the cluster was sent
    assert "runtime_resources" in file
    assert heaps == "1"
