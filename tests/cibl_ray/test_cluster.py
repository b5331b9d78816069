"""`--cluster`: the run that workers, drivers, nodes and disks fail under. Everything here is killed for real."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from cibl_ray.checkpoint import load_checkpoint
from cibl_ray.ray_start import settle
from cibl_ray.runlog import read_metrics
from cibl_ray.shared_folder import mark_beside, same_folder
from cibl_ray.storage import Mirror, join, split
from pipelines.errors import UserError
from tests.conftest import REPOSITORY

settle(own=True)

from cibl_ray.cluster import Options, fitting_cpus, parse_workers, places  # noqa: E402

EPOCHS = 8
OPTIONS = ["--epochs", EPOCHS, "--warmup_epochs", "1", "--batch_size", "62", "--loader.kind", "torch"]
LAST = Path("checkpoints") / "last.safetensors"

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


def start(folder, *arguments, workers="2", cwd=REPOSITORY):
    """The command, with its output in a file: (process, file)."""
    log = folder / f"{time.time_ns()}.log"
    command = [sys.executable, "-m", "cibl_ray.train", *arguments, "--cluster", "--workers", workers]
    with log.open("w") as output:
        process = subprocess.Popen([*map(str, command)], stdout=output, stderr=subprocess.STDOUT, cwd=cwd)
    return process, log


def new(folder, name, *more):
    return ["quickstart", "--name", name, "--runs", folder / "runs", "--prepared", folder / "prepared", *OPTIONS, *more]


def ended(process, log, status=0):
    """The output of a command that has ended, as it should; none of its processes is left."""
    below, begun = set(), time.monotonic()
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            below |= {*psutil.Process(process.pid).children(recursive=True)}
        assert time.monotonic() - begun < 240, log.read_text()
        time.sleep(0.2)
    assert process.returncode == status, log.read_text()
    assert not psutil.wait_procs(below, timeout=30)[1]
    return log.read_text()


def wait_for_epoch(run, epoch, process):
    while not any(row["epoch"] >= epoch for row in read_metrics(run)):
        assert process.poll() is None
        time.sleep(0.02)


def wait_for_text(text, process, log):
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)


def workers_of(process):
    return [child for child in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in child.name()]


def wakes(process, seconds):
    """How often the process's main thread went to sleep in that time."""
    status = Path(f"/proc/{process.pid}/task/{process.pid}/status")

    def count():
        return int(status.read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    before = count()
    time.sleep(seconds)
    return count() - before


def needless_of(process):
    """Processes of Ray's that a cluster for one run does without."""
    below = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            below.append(" ".join(child.cmdline()))
    assert any("raylet" in command for command in below)
    needless = ("TrainController", "SynchronizationActor", "monitor.py", "dashboard.py")
    return [command for command in below if any(part in command for part in needless)]


def weights(run):
    checkpoint = load_checkpoint(run / LAST)
    assert checkpoint.epoch == EPOCHS
    return checkpoint.weights


def same(run, other):
    mine, theirs = weights(run), weights(other)
    return all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.fixture(scope="module")
def undisturbed(folder):
    text = ended(*start(folder, *new(folder, "undisturbed")))
    return folder / "runs" / "undisturbed", text


def test_a_run_in_two_workers(undisturbed):
    run, text = undisturbed
    assert "2 workers" in text
    assert f"epoch {EPOCHS}/{EPOCHS}" in text
    assert "communication" in text
    result = json.loads((run / "result.json").read_text())
    assert result["workers"] == 2
    assert result["last"]["scores"]["samples"] == 445  # an odd number: each test image once
    assert set(result["time"]) == {"step", "data_wait", "communication", "evaluation", "checkpoint"}
    assert (run / "accuracy_by_class.png").exists()
    assert len(read_metrics(run)) == EPOCHS


def test_a_killed_worker_is_replaced_and_nothing_changes(folder, undisturbed):
    process, log = start(folder, *new(folder, "killed"))
    run = folder / "runs" / "killed"
    wait_for_epoch(run, 2, process)
    assert not needless_of(process)
    workers_of(process)[-1].kill()
    text = ended(process, log)
    assert "a worker was lost (rank 1: " in text
    assert "going on from the last checkpoint" in text
    assert same(run, undisturbed[0])
    assert [row["epoch"] for row in read_metrics(run)] == [*range(1, EPOCHS + 1)]


def test_a_killed_driver_and_a_checkpoint_cut_short(folder, undisturbed):
    process, _ = start(folder, *new(folder, "driver"))
    run = folder / "runs" / "driver"
    wait_for_epoch(run, 3, process)
    workers = workers_of(process)
    process.kill()
    process.wait()
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=60)[1]  # Ray's own agents take a minute more
    whole = (run / LAST).read_bytes()
    (run / LAST).write_bytes(whole[: len(whole) // 2])
    text = ended(*start(folder, "--resume", run))
    assert "is cut short or damaged" in text
    assert "going on from the one before" in text
    assert same(run, undisturbed[0])


PROBE = """
import ray, sys
ray.init(address=sys.argv[1], logging_level="CRITICAL")
print("joined", ray.nodes())
"""


def test_a_cluster_of_its_own_listens_on_loopback_alone_and_asks_for_its_token(folder):
    process, log = start(folder, *new(folder, "ports", "--epochs", "500"))
    try:
        wait_for_epoch(folder / "runs" / "ports", 1, process)
        below = psutil.Process(process.pid).children(recursive=True)
        listening, workers, address = set(), 0, ""
        for child in [psutil.Process(process.pid), *below]:
            with contextlib.suppress(psutil.NoSuchProcess):
                ports = [found.laddr.ip for found in child.net_connections("inet") if found.status == psutil.CONN_LISTEN]
                listening |= set(ports)
                workers += "RayTrainWorker" in child.name() and bool(ports)
                address = next((part for part in child.cmdline() if part.startswith("--gcs-address=")), address)
        assert workers == 2  # they talk to each other by sockets
        assert max(wakes(worker, seconds=2) for worker in workers_of(process)) < 100  # Ray's own signal checks: 200
        assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        probe = [sys.executable, "-c", PROBE, address.partition("=")[2]]
        stranger = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        done = subprocess.run(probe, env=stranger, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        assert "joined" not in done.stdout
        assert "nauthenticated" in done.stderr or "token" in done.stderr, done.stderr
    finally:
        process.send_signal(signal.SIGINT)
        ended(process, log, 130)


DOZE = """
import threading, time
from cibl_ray.ray_doze import Doze, main_thread_dozes

def rounds():  # of a loop like Ray's, while another thread trains
    ended, count = threading.Event(), 0
    def train():
        with main_thread_dozes():
            time.sleep(2)
        ended.set()
    threading.Thread(target=train).start()
    while not ended.is_set():
        time.sleep(0.01)
        count += 1
    return count

before = rounds()
Doze().after_init_train_context()
print(before, rounds(), rounds())
"""


def test_a_workers_main_thread_dozes_while_it_trains():
    done = subprocess.run([sys.executable, "-c", DOZE], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 0, done.stderr
    before, *dozing = map(int, done.stdout.split())
    assert before > 2 * max(dozing)
    assert max(dozing) <= 2 / 0.25 + 4


def test_a_read_only_folder_is_told(folder, tmp_path):
    place = tmp_path / "read_only"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("only root may mount a read-only folder, and root may write to any other")
    try:
        text = ended(*start(folder, *new(folder, "read_only"), "--runs", place / "runs"), 2)
    finally:
        subprocess.run(["umount", place], check=True)
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "Read-only file system" in error
    assert str(place) in error
    assert "Traceback" not in text


def test_stopped_before_anything_was_trained(folder):
    process, log = start(folder, *new(folder, "early"))
    while not workers_of(process):  # they are there, and have yet to import what they need
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text = ended(process, log, 130)
    assert "--resume" not in text
    assert not (folder / "runs" / "early").exists()


def test_a_node_that_does_not_see_the_run_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not see .* as the driver does; give --runs a folder that all nodes share"):
        same_folder(tmp_path / "runs" / "a", str(tmp_path / "elsewhere.mark"))
    with mark_beside(tmp_path / "runs" / "a", None) as mark:
        same_folder(tmp_path / "runs" / "a", mark)
        for killed in (f"a.{16 * '0'}.mark", f"a.5.{16 * '0'}.mark"):
            (Path(mark).parent / killed).touch()
        with mark_beside(tmp_path / "runs" / "a", None):  # the same run begun again: the first goes on
            same_folder(tmp_path / "runs" / "a", mark)
        assert sorted(path.name for path in Path(mark).parent.iterdir()) == sorted([Path(mark).name, f"a.5.{16 * '0'}.mark"])
    assert not Path(mark).exists()
    with mark_beside(tmp_path / "runs" / "a", "s3://bucket") as mark:
        same_folder(tmp_path / "runs" / "a", mark)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_a_checkpoint_and_leaves_no_process(folder, number):
    process, log = start(folder, *new(folder, f"stopped-{number}", "--epochs", "500"))
    run = folder / "runs" / f"stopped-{number}"
    wait_for_epoch(run, 2, process)
    process.send_signal(number)
    text = ended(process, log, 130)
    assert f"--resume {run} --cluster --workers 2" in text
    assert "Traceback" not in text
    assert load_checkpoint(run / LAST).epoch >= 1


def test_an_error_in_one_rank_ends_all_and_is_named(folder):
    """One image is damaged, which one of the two workers reads."""
    from cibl_ray.config import load_config
    from pipelines.beton import Beton
    from pipelines.prepare import ensure_prepared

    place = ["--prepared", str(folder / "damaged"), "--store", "{square: 16, mode: jpeg}"]
    config = load_config("quickstart", place)
    ensure_prepared(config.data, config.seed)
    path = next((folder / "damaged").glob("*/train.beton"))
    record = Beton(path).records["f0"][5]
    with path.open("r+b") as file:
        file.seek(int(record["data_ptr"]))
        file.write(b"\0" * 64)
    text = ended(*start(folder, *new(folder, "damaged"), *place, "--epochs", "1"), 2)
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: rank ")
    assert "is damaged" in error
    assert "Traceback" not in text


def test_a_full_disk_ends_the_run_and_keeps_what_was_there(folder, undisturbed):
    run = folder / "runs" / "full"
    shutil.copytree(undisturbed[0], run)
    before = (run / LAST).read_bytes()
    (run / LAST).with_name("last.safetensors.part").symlink_to("/dev/full")
    text = ended(*start(folder, "--resume", run, "--epochs", EPOCHS + 1), 2)
    assert "error: rank 0: OSError: [Errno 28] No space left on device" in text
    assert (run / LAST).read_bytes() == before


def test_mistakes_are_told_in_a_line(folder):
    assert "error: --workers 0: give a number" in ended(*start(folder, "quickstart", workers="0"), 2)
    assert "there is room for" in ended(*start(folder, *new(folder, "many"), workers="400"), 2)
    missing = start(folder, *new(folder, "nowhere"), "--address", "127.0.0.1:9")
    assert "error: --address 127.0.0.1:9: " in ended(*missing, 2)


def test_a_copy_in_a_store_is_what_a_run_goes_on_from(folder, undisturbed):
    """The store is a file:// URI here; the local folder, as on a node that is gone, is removed."""
    store = (folder / "store").as_uri()
    process, log = start(folder, *new(folder, "stored"), "--storage", store)
    wait_for_epoch(folder / "store" / "stored", 3, process)
    process.send_signal(signal.SIGINT)
    text = ended(process, log, 130)
    assert f"--resume {store}/stored --cluster" in text
    shutil.rmtree(folder / "runs" / "stored")
    assert "already has a run" in ended(*start(folder, *new(folder, "stored"), "--storage", store), 2)
    process, log = start(folder, "--resume", f"{store}/stored", cwd=folder)
    ended(process, log)
    assert same(folder / "store" / "stored", undisturbed[0])
    assert same(folder / "runs" / "stored", undisturbed[0])
    assert (folder / "store" / "stored" / "result.json").exists()
    assert not [*(folder / "store").rglob("*.part")]


def test_a_stores_run_never_replaces_another(tmp_path):
    store = f"{tmp_path.as_uri()}/store"
    assert join("s3://bucket/runs/?region=x", "a") == "s3://bucket/runs/a?region=x"
    assert split("s3://bucket/runs/a?region=x") == ("s3://bucket/runs?region=x", "a")
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.yaml").write_text("mine")
    mirror = Mirror(folder, join(store, "a"))
    with pytest.raises(UserError, match="holds another run"):
        mirror.claim(resume=False)  # a new run, on a node that has an older one of the name
    mirror.claim(resume=True)  # a run that goes on, and has a copy from now on
    mirror.upload()
    assert mirror.exists()
    other = tmp_path / "other" / "a"
    other.mkdir(parents=True)
    (other / "config.yaml").write_text("another")
    with pytest.raises(UserError, match="holds another run"):
        Mirror(other, join(store, "a")).claim(resume=True)
    assert (other / "config.yaml").read_text() == "another"
    with pytest.raises(UserError, match="cannot be reached"):
        Mirror(folder, "nothing://here")


@pytest.fixture
def two_nodes():
    """A cluster of two nodes of one CPU on this machine: (cluster, second node)."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    yield cluster, second
    cluster.shutdown()


@pytest.mark.timeout(600)
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
@pytest.mark.timeout(600)
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


@pytest.mark.timeout(600)
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


@pytest.mark.timeout(600)
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
from cibl_ray.ray_start import settle
settle(own=False)
import ray
from cibl_ray.cluster import cluster
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


@pytest.mark.parametrize(("text", "expected"), [("4", (4, 4)), ("2-8", (2, 8))])
def test_workers(text, expected):
    assert parse_workers(text) == expected


@pytest.mark.parametrize("text", ["0", "x", "3-2", "-1", "2-"])
def test_workers_that_are_none(text):
    if text == "2-":
        assert parse_workers(text) == (2, 2)
        return
    with pytest.raises(UserError, match="give a number of workers"):
        parse_workers(text)


def test_cpus_that_fit():
    nodes = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 64.0}]
    assert places(nodes, 4, gpus=True) == 4 + 2
    assert fitting_cpus(nodes, (8, 8), gpus=True) == 2  # four GPUs on a node of eight CPUs
    assert fitting_cpus(nodes, (2, 8), gpus=True) == 2  # as many as there is room for
    assert fitting_cpus(nodes, (2, 2), gpus=False) == 32
    assert fitting_cpus(nodes, (500, 500), gpus=False) == 1


def test_the_way_to_go_on_names_the_cluster():
    options = Options((2, 8), "head:6379", None, 3)
    assert options.again(Path("runs/a")).endswith("--resume runs/a --cluster --workers 2-8 --address head:6379")
    assert Options((2, 2), None, None, 3).again(Path("a")).endswith("--resume a --cluster --workers 2")
    command = Options((2, 2), None, 4, 100, "s3://bucket/?region=x").again(Path("runs/a"))
    assert command.endswith("--resume 's3://bucket/a?region=x' --cluster --workers 2 --cpus-per-worker 4 --max-failures 100")
