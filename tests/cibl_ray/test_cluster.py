"""`--cluster`: the run that workers, drivers, nodes and disks fail under. Everything here is killed for real."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import save as to_bytes

from cibl_ray import train
from cibl_ray.cluster.environment import configure_ray_env
from cibl_ray.cluster.shared_folder import mark_beside, same_folder
from cibl_ray.config import load_config
from cibl_ray.run.checkpoint import load_checkpoint
from cibl_ray.run.folder import lock_folder
from cibl_ray.run.log import read_metrics
from pipelines.common.errors import UserError
from tests.clusters import EPOCHS, LAST, ended, new, start, wait_for_epoch
from tests.commands import in_process
from tests.conftest import processes_below

configure_ray_env(own=True)

import ray.train  # noqa: E402
from ray.exceptions import GetTimeoutError, RayActorError, RuntimeEnvSetupError  # noqa: E402

from cibl_ray.cluster import cut_off, session  # noqa: E402
from cibl_ray.cluster.failures import LostError, explain  # noqa: E402
from cibl_ray.cluster.meeting import interface_of, largest_group  # noqa: E402
from cibl_ray.cluster.options import Options, fitting_cpus, parse_workers, places  # noqa: E402
from cibl_ray.cluster.session import cluster, why  # noqa: E402

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


def workers_of(process):
    return [child for child, command in processes_below(process.pid) if "RayTrainWorker" in command]


def weights(run):
    checkpoint = load_checkpoint(run / LAST)
    assert checkpoint.epoch == EPOCHS
    return checkpoint.weights


def same(run, other, running=True):
    """Whether the weights are equal to the bit. running: the running statistics, too; else to rounding."""
    mine, theirs = weights(run), weights(other)
    return all(
        torch.equal(tensor, theirs[name])
        if running or "running" not in name
        else torch.allclose(tensor, theirs[name], rtol=1e-4, atol=1e-6)
        for name, tensor in mine.items()
    )


@pytest.fixture(scope="module")
def undisturbed(folder):
    text = ended(*start(folder, *new(folder, "undisturbed"), notebook=True))
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


@pytest.mark.slow  # four runs, a minute and a half
def test_fine_tuning_in_two_workers_is_that_of_one(folder):
    """Adapters, and all of a pretrained network: to the bit what one process trains in two micro-batches.

    One batch of 62 adds up in another order than two of 31, and seven steps of an untrained network make a hundredth of that.
    `test_world.py` compares the whole batch, in float64.
    """
    pytest.importorskip("peft")
    weights = folder / "resnet20.safetensors"
    torch.manual_seed(0)
    backbone = load_config("quickstart", []).network.backbone.build()[0]
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # statistics as of a trained network, from one batch
    with torch.no_grad():
        backbone.train()(torch.randn(64, 3, 16, 16))
    weights.write_bytes(to_bytes({name: value.contiguous() for name, value in backbone.state_dict().items()}))
    options = ["--epochs", "1", "--warmup_epochs", "0", "--precision", "fp32", "--loss.kind", "balanced_softmax"]
    options += ["--network.backbone", f"{{kind: resnet20, weights: {weights}}}", "--head_start", "trained"]
    options += ["--optimizer", "{kind: sgd, lr: 0.01}", "--val_fraction", "0"]
    tuned = {
        "partial": ["--tune", "partial", "--train.partial", "{kind: adapters, rank: 2}"],
        "full": ["--tune", "full", "--optimizer.layer_decay", "0.75"],
    }
    running = {
        name: start(folder, *new(folder, f"two-{name}", *options, *more, "--cpus-per-worker", "1"))
        for name, more in tuned.items()
    }
    for name, more in tuned.items():
        one = folder / "runs" / f"one-{name}"
        torch.set_num_threads(1)  # as each worker has
        done = in_process(train.main, *new(folder, one.name, *options, *more, "--accumulate", "2"))
        assert done.returncode == 0, done.stderr
        assert "2 workers" in ended(*running[name])
        mine, theirs = (load_checkpoint(run / LAST) for run in (one, folder / "runs" / f"two-{name}"))
        assert (mine.workers, theirs.workers) == (1, 2)
        trained = {key for key in mine.weights if ("lora_B" if name == "partial" else "conv1.weight") in key}
        assert trained
        begin = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
        assert all((mine.weights[key] - begin.get(key, 0)).abs().max() > 1e-4 for key in trained)
        for key, value in mine.weights.items():
            assert torch.equal(value, theirs.weights[key]), key


def test_a_killed_worker_is_replaced_and_nothing_changes(folder, undisturbed):
    process, log = start(folder, *new(folder, "killed"))
    run = folder / "runs" / "killed"
    wait_for_epoch(run, 2, process)
    workers_of(process)[-1].kill()
    text = ended(process, log)
    assert re.search(r"a worker was lost \(rank [01]: ", text)  # ranks do not follow the order of processes
    assert re.search(r"resuming in epoch \d, after step 0 of 6$", text, re.MULTILINE)
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
    assert "resuming from the one before" in text
    assert same(run, undisturbed[0])


@pytest.fixture(scope="module")
def stopped_by_ctrl_c(folder):
    """A run that is looked at while it trains, and stopped: its folder, its output, and what was seen."""
    run = folder / "runs" / "stopped-2"
    process, log = start(folder, *new(folder, run.name, "--epochs", "500", "--checkpoint_every", "500"))
    seen = {"listening": set(), "workers": 0, "address": "", "token": ""}
    try:
        wait_for_epoch(run, 2, process)
        for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                ports = [found.laddr.ip for found in child.net_connections("inet") if found.status == psutil.CONN_LISTEN]
                seen["listening"] |= set(ports)
                seen["workers"] += "RayTrainWorker" in child.name() and bool(ports)
                if found := [part for part in child.cmdline() if part.startswith("--gcs-address=")]:
                    seen |= {"address": found[0].partition("=")[2], "token": child.environ()["RAY_AUTH_TOKEN"]}
        health = [Path(sys.executable).with_name("ray"), "health-check", "--address", seen["address"]]
        for name, token in (("owner", seen["token"]), ("stranger", "0" * 64)):
            asked = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
            seen[name] = subprocess.run(health, env=asked, capture_output=True, text=True, timeout=120)
    finally:
        process.send_signal(signal.SIGINT)
    return run, ended(process, log, 130), seen


def test_a_cluster_of_its_own_listens_on_loopback_alone_and_asks_for_its_token(stopped_by_ctrl_c):
    _, _, seen = stopped_by_ctrl_c
    assert seen["workers"] == 2  # they talk to each other by sockets
    assert seen["listening"] <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert seen["owner"].returncode == 0, seen["owner"].stderr
    assert seen["stranger"].returncode != 0
    assert "InvalidAuthToken" in seen["stranger"].stderr


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
    assert "cannot be written; name another place: --runs FOLDER" in error
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


def saved_when_stopped(run, text):
    """Whether a stopped run has saved where its log ends, and says how to resume."""
    assert f"resume with: python -m cibl_ray.train --resume {run} --cluster --workers 2" in text
    assert "Traceback" not in text
    assert "(raylet)" not in text
    return load_checkpoint(run / LAST).epoch == read_metrics(run)[-1]["epoch"] >= 2


def test_a_run_stopped_by_ctrl_c_saves_first_and_leaves_no_process(stopped_by_ctrl_c):
    run, text, _ = stopped_by_ctrl_c
    assert saved_when_stopped(run, text)


def test_a_terminated_run_saves_first_and_leaves_no_process(folder):
    run = folder / "runs" / "stopped-15"
    process, log = start(folder, *new(folder, run.name, "--epochs", "500", "--checkpoint_every", "500"))
    wait_for_epoch(run, 2, process)
    process.terminate()
    assert saved_when_stopped(run, ended(process, log, 75))


def test_an_error_in_one_rank_ends_all_and_is_named(folder):
    """One image is damaged, which one of the two workers reads."""
    from cibl_ray.config import load_config
    from pipelines.prepare.beton import Beton
    from pipelines.prepare.build import ensure_prepared

    place = ["--prepared", str(folder / "damaged"), "--store", "{square: 16, mode: jpeg}"]
    config = load_config("quickstart", place)
    ensure_prepared(config.data, config.seed)
    path = next((folder / "damaged").glob("*/train.beton"))
    offset = int(Beton(path).starts[5])
    with path.open("r+b") as file:
        file.seek(offset)
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


def refused(*arguments):
    """The message of a command that ends with a user's mistake before it starts Ray."""
    done = in_process(train.main, *arguments)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_mistakes_are_reported_in_a_line(folder):
    assert "error: --workers 0: give a number" in refused("quickstart", "--cluster", "--workers", "0")
    for cpus in ("0", "-1"):
        assert f"error: --cpus-per-worker {cpus}: give at least 1, or" in refused(
            "quickstart", "--cluster", "--cpus-per-worker", cpus
        )
    assert "error: --max-failures -1: give at least 0" in refused("quickstart", "--cluster", "--max-failures", "-1")
    uneven = refused(*new(folder, "uneven"), "--cluster", "--workers", "2-3", "--accumulate", "2", "--batch_size", "64")
    assert "parts among 3 workers, which --workers 2-3 may have; change one of them" in uneven
    assert "there is room for" in ended(*start(folder, *new(folder, "many"), workers="400"), 2)
    missing = refused(*new(folder, "nowhere"), "--cluster", "--workers", "2", "--address", "127.0.0.1:9")
    assert "error: --address 127.0.0.1:9: " in missing


def test_a_cluster_that_cannot_be_joined_or_started_is_told_in_a_line(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match="--address auto: RAY_ADDRESS=127.0.0.1:9: .*refused"), cluster("auto"):
        pass
    with pytest.raises(UserError, match=r"--address \[::1\]:9: "), cluster("[::1]:9"):
        pass
    with pytest.raises(UserError, match="--address head: .* give the head node's HOST:PORT"), cluster("head"):
        pass
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + 100 * "x")
    with pytest.raises(UserError, match="cannot exceed 107 bytes.*RAY_TMPDIR=/tmp/NAME"), cluster(None):
        pass
    shutil.rmtree("/tmp/" + 100 * "x")
    versions = RuntimeError(
        "Version mismatch: The cluster was started with:\n    Ray: 2.58.1\n    Python: 3.11.7\nThis process ..."
    )
    assert why(versions, "a:1").startswith("the cluster has another Ray or Python than this process: ")
    assert "\n" not in why(versions, "a:1")
    assert "RAY_AUTH_TOKEN" in why(ConnectionError("Failed to connect"), "a:1")


@pytest.mark.parametrize("error", [TimeoutError(), RuntimeError("No node info found matching attributes: '' when trying")])
def test_a_cluster_that_this_machine_is_no_node_of_is_told_from_one_that_is_away(monkeypatch, error):
    monkeypatch.setattr(session, "_within", lambda seconds, act: error)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        told = f"--address {address}: it answers, but did not take this process in within 60 s; run the command on one of the "
        with pytest.raises(UserError, match=re.escape(told)), cluster(address):
            pass


def test_errors_of_rays_own_are_a_line():
    lost = explain(ray.train.WorkerGroupError("lost", {1: RayActorError()}), failures=3)
    assert isinstance(lost, LostError)
    assert str(lost).startswith("workers were lost 4 times, at last rank 1 (The actor ")
    mine = UserError("rank 0: no image")
    assert explain(ray.train.ControllerError(mine), failures=3) is mine
    other = explain(ray.train.ControllerError(RuntimeError("no place\nfor a group")), failures=3)
    assert isinstance(other, UserError)
    assert str(other) == "Ray Train could not run the workers: RuntimeError: no place"
    full = RuntimeEnvSetupError(
        "[Node 10.0.0.2] Traceback (most recent call last):\n  File\nOSError: [Errno 28] No space left\n"
    )
    told = explain(ray.train.ControllerError(full), failures=3)
    assert isinstance(told, UserError)
    assert str(told).startswith("node 10.0.0.2 could not unpack this installation's code: OSError: [Errno 28] No space left; ")


def test_a_process_that_is_cut_off_from_the_driver_ends(monkeypatch):
    """Not one whose driver answers, nor one that has done its work."""
    ended, asked, answering = threading.Event(), threading.Semaphore(0), [True]

    def get(question, timeout):
        asked.release()
        if not answering[0]:
            raise GetTimeoutError(question)

    monkeypatch.setattr(cut_off, "_CUT_OFF", 0.08)
    monkeypatch.setattr(cut_off.os, "_exit", lambda status: ended.set())
    monkeypatch.setattr(cut_off.ray, "get", get)
    relay = SimpleNamespace(stop_asked=SimpleNamespace(remote=lambda: "question"))
    with cut_off.end_when_cut_off(relay):
        assert all(asked.acquire(timeout=60) for _ in range(20))
    assert not ended.is_set()
    answering[0] = False
    with cut_off.end_when_cut_off(relay):
        assert ended.wait(60)


def test_a_run_that_waits_for_another_process_says_so(tmp_path, caplog):
    second = lock_folder(tmp_path, "training", 0.3)
    with lock_folder(tmp_path, "training", 0), pytest.raises(UserError, match="wait for it, or end it"), second:
        pass
    assert f"another process is training in '{tmp_path}': waiting up to 0 s for its end" in caplog.text


def test_the_interface_of_an_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("::1") in ("lo", None)  # None: without IPv6
    assert interface_of("192.0.2.1") is None  # of documentation, nobody's


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ([], [0, 1, 2, 3]),
        ([(0, 1), (0, 2), (0, 3)], [1, 2, 3]),  # rank 0 is the lonely one
        ([(2, 0)], [0, 1, 3]),  # one direction is enough
        ([(0, 2), (0, 3), (1, 2), (1, 3)], [0, 1]),  # two halves
        ([(a, b) for a in range(4) for b in range(4) if a < b], [0]),
    ],
)
def test_the_workers_that_reach_each_other(cut, expected):
    assert largest_group([{b for b in range(4) if (a, b) not in cut} for a in range(4)]) == expected


def test_a_path_as_storage_is_a_uri_in_what_is_advised(folder, tmp_path):
    """As a path, `--resume` would train within the copy."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").touch()
    told = refused(*new(folder, "a"), "--cluster", "--workers", "2", "--storage", tmp_path)
    assert f"resume it with --resume {tmp_path.as_uri()}/a, or" in told


def test_a_copy_in_a_store_is_what_a_run_goes_on_from(folder, undisturbed):
    """The store is a file:// URI here; the local folder, as on a node that is gone, is removed."""
    store = (folder / "store").as_uri()
    process, log = start(folder, *new(folder, "stored"), "--storage", store)
    wait_for_epoch(folder / "store" / "stored", 3, process)
    process.send_signal(signal.SIGINT)
    text = ended(process, log, 130)
    assert f"--resume {store}/stored --cluster" in text
    shutil.rmtree(folder / "runs" / "stored")
    again = refused(*new(folder, "stored"), "--cluster", "--workers", "2", "--storage", store)
    assert "already has a run" in again
    process, log = start(folder, "--resume", f"{store}/stored", cwd=folder)
    ended(process, log)
    assert same(folder / "store" / "stored", undisturbed[0], running=False)  # it was stopped within an epoch
    assert same(folder / "runs" / "stored", undisturbed[0], running=False)  # it was stopped within an epoch
    assert (folder / "store" / "stored" / "result.json").exists()
    assert not [*(folder / "store").rglob("*.part")]


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
    assert options.resume_command(Path("runs/a")).endswith("--resume runs/a --cluster --workers 2-8 --address head:6379")
    assert Options((2, 2), None, None, 3).resume_command(Path("a")).endswith("--resume a --cluster --workers 2")
    command = Options((2, 2), None, 4, 100, "s3://bucket/?region=x").resume_command(Path("runs/a"))
    assert command.endswith("--resume 's3://bucket/a?region=x' --cluster --workers 2 --cpus-per-worker 4 --max-failures 100")
