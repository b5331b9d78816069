"""Training over two hosts that are two, and what is lost, cut, full or wrong between them: `make test-hosts`."""

import os
import re
import shutil
import sys
import time

import pytest

from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.run.log import read_metrics
from tests.clusters import LAST, new, wait_for_epoch
from tests.hosts.two_hosts import HEAD, two_hosts

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900), pytest.mark.usefixtures("root_with_namespaces")]
_AT_MOST = float(os.environ.get("CIBL_RAY_HOSTS_PATIENCE", "240"))  # seconds for a command to end, on a busy machine


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prepared").mkdir()
    yield tmp_path
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


@pytest.fixture
def hosts(folder):
    """(A, B); B has its own folder of prepared data."""
    with two_hosts(folder, {folder / "prepared": "200m"}) as (a, b):
        a.start_ray(head=True)
        b.start_ray(head=False)
        yield a, b


def train(host, folder, name, *more, workers="2", **environment):
    """The command on a host: (process, log)."""
    log = folder / f"{name}.log"
    words = new(folder, name, "--backbone", "resnet20", "--address", HEAD, *more)
    command = [sys.executable, "-m", "cibl_ray.train", *words, "--cluster", "--workers", workers]
    return host.start(log, *command, **environment), log


def end(process, log, status=0):
    """The output of a command that has ended as it should."""
    begun = time.monotonic()
    while process.poll() is None:
        assert time.monotonic() - begun < _AT_MOST, log.read_text()
        time.sleep(0.2)
    text = log.read_text()
    assert process.returncode == status, text
    assert "Traceback" not in text, text
    return text


def losses(folder, name):
    return [row["train"]["loss"] for row in read_metrics(folder / "runs" / name)]


def test_training_over_both_hosts_also_slowly(folder, hosts):
    """Each host prepares its own data. The slow link changes no number."""
    a, b = hosts
    text = end(*train(a, folder, "both", "--epochs", "2"))
    assert "2 workers; from epoch 1" in text
    b.run("tc", "qdisc", "add", "dev", "link0", "root", "tbf", "rate", "100mbit", "burst", "32kbit", "latency", "400ms")
    end(*train(a, folder, "slow", "--epochs", "2"))
    assert losses(folder, "both") == losses(folder, "slow")
    assert load_checkpoint(folder / "runs" / "slow" / LAST).epoch == 2


def test_an_elastic_run_goes_on_without_a_host_that_is_killed(folder, hosts):
    a, b = hosts
    process, log = train(a, folder, "killed", "--epochs", "8", workers="1-2")
    wait_for_epoch(folder / "runs" / "killed", 2, process)
    b.kill()
    text = end(process, log)
    assert "a worker was lost" in text
    assert re.search(r"resuming in epoch \d, after step \d of \d", text)
    assert "one process; from epoch" in text
    assert load_checkpoint(folder / "runs" / "killed" / LAST).epoch == 8


def test_a_firewall_that_drops_the_workers_ports(folder, hosts):
    opened = "6379:6385,10002:10200"
    for host in hosts:
        host.run("iptables", "-A", "INPUT", "-i", "link0", "-m", "state", "--state", "ESTABLISHED", "-j", "ACCEPT")
        host.run("iptables", "-A", "INPUT", "-i", "link0", "-p", "tcp", "-m", "multiport", "--dports", opened, "-j", "ACCEPT")
        host.run("iptables", "-A", "INPUT", "-i", "link0", "-p", "tcp", "-j", "DROP")
    text = end(*train(hosts[0], folder, "firewall", "--epochs", "2"), status=2)
    assert re.search(r"rank \d: 10.77.0.\d \(link0\) cannot reach rank \d at 10.77.0.\d:\d+: timed out; open the ports", text)
    assert not (folder / "runs" / "firewall" / "checkpoints").exists()


def test_a_wrong_token(folder, hosts):
    text = end(*train(hosts[0], folder, "token", RAY_AUTH_TOKEN="0" * 64), status=2)
    assert "does it ask for another token?" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("runs", "does not see"),
        ("images", "has 0 class folders"),  # the rank that B has, whichever that is
    ],
)
def test_what_only_one_host_has(tmp_path, image_folder, what, says):
    """A shared folder that is not shared, images that only A has: one line, status 2."""
    for name in ("runs", "prepared"):
        (tmp_path / name).mkdir()
    place = {"runs": tmp_path / "runs", "images": image_folder}[what]
    with two_hosts(tmp_path, {tmp_path / "prepared": "200m", place: "10m"}) as (a, b):
        a.start_ray(head=True)
        b.start_ray(head=False)
        more = ["--data.source", f"{{kind: folder, path: {image_folder}}}", "--batch_size", "4"]
        text = end(*train(a, tmp_path, "lonely", *more), status=2)
    assert says in text.splitlines()[-1], text
    assert not (tmp_path / "runs" / "lonely" / "checkpoints").exists()
