"""Training over two hosts that are two, and what is lost, cut, full or wrong between them: `make test-hosts`."""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.run.log import read_metrics
from cibl_ray.tuning.folder import read_trials
from tests.clusters import LAST, new, wait_for_epoch, wait_for_text
from tests.conftest import REPOSITORY
from tests.hosts.two_hosts import HEAD, OPENED, object_store, two_hosts

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900), pytest.mark.usefixtures("root_with_namespaces")]
_AT_MOST = float(os.environ.get("CIBL_RAY_HOSTS_PATIENCE", "400"))  # seconds for a command to end, on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "prepared").mkdir()
    yield folder
    shutil.rmtree(folder / "runs", ignore_errors=True)


@pytest.fixture(scope="module")
def pair(folder):
    with two_hosts(folder, {folder / "prepared": "200m"}) as (a, b):
        a.start_ray(head=True)
        yield a, b


@pytest.fixture
def hosts(pair):
    """(A, B), each with a Ray node; B has its own folder of prepared data. A test that loses B kills it at its end."""
    a, b = pair
    if not b.started:
        b.start_ray(head=False)
    yield a, b
    for host in pair:
        host.mend()
    for process in a.started[1:]:  # of a test that failed
        process.kill()
        process.wait()
    del a.started[1:]


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


def test_a_link_that_is_slow_and_cut_for_20_seconds_changes_no_number(folder, hosts):
    """Each host prepares its own data."""
    a, b = hosts
    text = end(*train(a, folder, "both", "--epochs", "8"))
    assert "2 workers; from epoch 1" in text
    process, log = train(a, folder, "slow", "--epochs", "8")
    for epoch, rate in ((1, "1gbit"), (2, "100mbit")):
        wait_for_epoch(folder / "runs" / "slow", epoch, process)
        for host in hosts:
            host.slow(rate)
    wait_for_epoch(folder / "runs" / "slow", 3, process)
    b.cut()
    time.sleep(20)
    b.mend()
    text = end(process, log)
    assert "a worker was lost" not in text
    assert losses(folder, "both") == losses(folder, "slow")
    assert load_checkpoint(folder / "runs" / "slow" / LAST).epoch == 8


@pytest.mark.parametrize("lost", ["killed", "cut"])
def test_an_elastic_run_goes_on_without_a_host_that_is_lost(folder, hosts, lost):
    a, b = hosts
    b.seen_by_ray_train()
    process, log = train(a, folder, lost, "--epochs", "12", workers="1-2")
    wait_for_epoch(folder / "runs" / lost, 2, process)
    b.kill() if lost == "killed" else b.cut()
    try:
        text = end(process, log)
    finally:
        b.kill()
    assert "a worker was lost" in text
    assert re.search(r"resuming in epoch \d+, after step \d of \d", text)
    assert "one process; from epoch" in text
    assert load_checkpoint(folder / "runs" / lost / LAST).epoch == 12


def test_a_run_of_fixed_size_waits_for_a_host_whose_link_is_cut_and_says_so(folder, hosts):
    a, b = hosts
    process, log = train(a, folder, "fixed", "--epochs", "12")
    wait_for_epoch(folder / "runs" / "fixed", 2, process)
    b.cut()
    wait_for_text("waiting for nodes: there is room for 1 of 2 workers", process, log)
    b.kill()
    b.mend()
    b.start_ray(head=False)
    text = end(process, log)
    assert text.count("a worker was lost") == 1
    assert text.count("2 workers; from epoch") == 2
    assert load_checkpoint(folder / "runs" / "fixed" / LAST).epoch == 12


@pytest.mark.parametrize("full", ["prepared", "ray"])
def test_a_full_disk_on_one_host(folder, hosts, full):
    """Where B prepares its data, and where Ray unpacks the code: one line, status 2, which names the place."""
    a, b = hosts
    place = folder / "prepared" if full == "prepared" else a.ray_folder
    b.kill()
    b.start_ray(head=False)  # all that it had is gone
    b.fill(place)
    try:
        text = end(*train(a, folder, f"full_{full}"), status=2)
    finally:
        b.kill()
    says = {
        "prepared": rf"error: rank \d: the disk of '{place}.*' has 0.00 GB free, and the train split needs",
        "ray": r"error: node 10.77.0.2 could not unpack this installation's code: .*No space left on device; it needs",
    }
    assert re.match(says[full], text.splitlines()[-1]), text
    assert not (folder / "runs" / f"full_{full}" / "checkpoints").exists()


def test_a_firewall_that_drops_the_workers_ports(folder, hosts):
    for host in hosts:
        host.run("iptables", "-A", "INPUT", "-i", "link0", "-m", "state", "--state", "ESTABLISHED", "-j", "ACCEPT")
        host.run("iptables", "-A", "INPUT", "-i", "link0", "-p", "tcp", "-m", "multiport", "--dports", OPENED, "-j", "ACCEPT")
        host.run("iptables", "-A", "INPUT", "-i", "link0", "-p", "tcp", "-j", "DROP")
    text = end(*train(hosts[0], folder, "firewall", "--epochs", "2"), status=2)
    reason = r"10.77.0.\d \(link0\) cannot reach rank \d at 10.77.0.\d:\d+: timed out; open the ports"
    assert re.search(rf"rank \d: {reason}", text)
    assert not (folder / "runs" / "firewall" / "checkpoints").exists()
    hosts[1].seen_by_ray_train()
    text = end(*train(hosts[0], folder, "behind", "--epochs", "2", workers="1-2"))
    assert re.search(rf"training without rank 1: {reason}", text)
    assert "one process; from epoch 1" in text
    assert load_checkpoint(folder / "runs" / "behind" / LAST).epoch == 2


def test_a_wrong_token(folder, hosts):
    text = end(*train(hosts[0], folder, "token", RAY_AUTH_TOKEN="0" * 64), status=2)
    assert "does it ask for another token?" in text.splitlines()[-1]


@pytest.mark.parametrize("days", [1, -1])
def test_clocks_a_day_apart(folder, hosts, days):
    """Every Python process of B sees another time of day."""
    a, b = hosts
    wrong = {"PYTHONPATH": f"{REPOSITORY}/tests/hosts/clock:{REPOSITORY}", "CLOCK_SHIFT": str(86400 * days)}
    b.kill()
    b.start_ray(head=False, **wrong)
    name = f"clocks{days}"
    try:
        clock = folder / "clock.log"
        assert b.start(clock, sys.executable, "-c", "import time; print(time.time())", **wrong).wait() == 0
        assert float(clock.read_text()) - time.time() == pytest.approx(86400 * days, abs=60)
        text = end(*train(a, folder, name, "--epochs", "2"))
    finally:
        b.kill()
    assert "2 workers; from epoch 1" in text
    assert load_checkpoint(folder / "runs" / name / LAST).epoch == 2


MANIFEST = """
import sys
from pyarrow import fs
store, place = fs.FileSystem.from_uri(sys.argv[1])
print(store.open_input_stream(f"{place}/stored/manifest.json").read().decode())
"""


def test_an_object_store_that_answers_500_for_a_while(folder, hosts):
    a, _ = hosts
    with object_store(a, folder) as (uri, failing):
        process, log = train(a, folder, "stored", "--epochs", "10", "--storage", uri)
        wait_for_epoch(folder / "runs" / "stored", 2, process)
        failing.touch()
        wait_for_text("upload 1 of 5 failed: ", process, log)
        failing.unlink()
        text = end(process, log)
        assert "not up to date" not in text
        found = folder / "manifest.json"
        assert a.start(found, sys.executable, "-c", MANIFEST, uri).wait() == 0, found.read_text()
        last = folder / "runs" / "stored" / LAST
        kept = json.loads(found.read_text())["files"]
        assert kept[str(LAST)]["sha256"] == hashlib.sha256(last.read_bytes()).hexdigest()
        assert load_checkpoint(last).epoch == 10
        failing.touch()
        text = end(*train(a, folder, "refused", "--storage", uri), status=2)
        assert re.match(r"error: storage 's3://bucket/runs/refused.*' cannot be reached: .*500", text.splitlines()[-1])


def test_a_sweep_goes_on_without_a_host_that_is_killed(folder, hosts):
    """The trial that was lost is trained again, from its last checkpoint."""
    a, b = hosts
    settings = {"train.epochs": 16, "schedule.warmup_epochs": 0, "train.batch_size": 62, "loader.kind": "torch"}
    content = {
        "base": "quickstart", "set": settings | {"data.prepared": str(folder / "prepared")}, "trials": 2, "asha": None,
        "search": {"loss.tail_skew": {"kind": "log_uniform", "low": 0.005, "high": 5}},
    }  # fmt: skip
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    log = folder / "sweep.log"
    words = [folder / "sweep.yaml", "--sweeps", folder, "--name", "sweep", "--address", HEAD]
    process = a.start(log, sys.executable, "-m", "cibl_ray.tune", *words)
    while sum(bool(read_metrics(path)) for path in (folder / "sweep" / "trials").glob("*/")) < 2:
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    b.kill()
    end(process, log)
    trials = read_trials(folder / "sweep")
    assert [(trial.state, trial.epochs) for trial in trials] == [("completed", 16)] * 2
    for trial in trials:
        assert [row["epoch"] for row in read_metrics(folder / "sweep" / "trials" / trial.name)] == [*range(1, 17)]


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
        source = f"{{kind: folder, path: {image_folder}}}"
        more = ["--data.source", source, "--data.profile", "{kind: none}", "--batch_size", "4"]
        text = end(*train(a, tmp_path, "lonely", *more), status=2)
    assert says in text.splitlines()[-1], text
    assert not (tmp_path / "runs" / "lonely" / "checkpoints").exists()


CLIENT = """
import json, sys, threading, time, urllib.error, urllib.request

def ask(client):
    while True:
        begun = time.time()
        request = urllib.request.Request("http://127.0.0.1:8000/v1/predict", open(sys.argv[1], "rb").read())
        request.add_header("Content-Type", "image/png")
        try:
            with urllib.request.urlopen(request, timeout=90) as answer:
                status = answer.status
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError as error:
            status = str(error)
        print(json.dumps([client, begun, time.time(), status]) + chr(10), end="", flush=True)
        time.sleep(0.05)

for client in range(4):
    threading.Thread(target=ask, args=[client]).start()
"""


@pytest.mark.parametrize("lost_by", ["killed", "cut off"])
def test_a_service_on_both_hosts_answers_without_one(tmp_path, earlier, lost_by):
    """Requests that the lost host had are asked again or fail; the others are answered. Each host has room for one replica.

    A's proxy asks both replicas alike; by default it prefers its own host's.
    """
    serve = Path(sys.executable).with_name("serve")
    config = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
    config["applications"][0]["args"] = {
        "bundles": [str(earlier / "bundle")], "threads": 1, "replicas": 2, "access_log": str(tmp_path / "access"),
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    Image.new("L", (8, 8), 128).save(tmp_path / "grey.png")
    with two_hosts(tmp_path) as (a, b):
        a.start_ray(head=True, dashboard=True, RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING="0")
        b.start_ray(head=False)
        log, answers = tmp_path / "serve.log", tmp_path / "answers.log"
        end(a.start(log, serve, "deploy", "-a", "http://127.0.0.1:8265", tmp_path / "config.yaml"), log)
        begun = time.monotonic()
        while "RUNNING: 2" not in end(a.start(log, serve, "status", "-a", "http://127.0.0.1:8265"), log):
            assert time.monotonic() - begun < _AT_MOST, log.read_text()
        client = a.start(answers, sys.executable, "-c", CLIENT, tmp_path / "grey.png")

        def requests():
            return [json.loads(line) for line in answers.read_text().splitlines(keepends=True) if line.endswith("\n")]

        def by_replica():
            """Requests answered by each replica, by the process of it."""
            files = (tmp_path / "access").glob("*.jsonl")
            return {int(path.stem.rpartition("-")[2]): path.read_text().count("\n") for path in files}

        while len(requests()) < 100:
            assert client.poll() is None, answers.read_text()
            time.sleep(0.2)
        assert {status for *_, status in requests()} == {200}
        with_b = sum(by_replica().get(process.pid, 0) for process in b.processes())
        with_all = sum(by_replica().values())
        assert with_b > with_all / 5, by_replica()
        lost = time.time()
        if lost_by == "killed":
            b.kill()
        else:
            b.cut()
        begun = time.monotonic()
        answered = dict.fromkeys(range(4), 0)
        while min(answered.values()) < 50:  # requests of each client in a row, since its last that failed
            assert time.monotonic() - begun < _AT_MOST, answered
            time.sleep(0.2)
            answered = dict.fromkeys(range(4), 0)
            for number, start, _, status in requests():
                answered[number] = answered[number] + 1 if status == 200 and start >= lost else 0
        after = [(end - start, status) for _, start, end, status in requests() if end >= lost]
        failed = [status for _, status in after if status != 200]
        longest = max(seconds for seconds, _ in after)
        print(f"B had answered {with_b} of {with_all} requests before it was {lost_by}")
        print(f"of {len(after)} requests {len(failed)} failed, with {sorted({*failed})}; the longest took {longest:.1f} s")
        assert {*failed} <= {500, 503}
        assert longest < 75  # requests that B has when it is cut off are asked again when Ray misses it, after a minute here
