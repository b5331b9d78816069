"""The ways onto real clusters, as far as they can be checked without one; `ray job submit` for real."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from cibl_ray.config import load_config
from cibl_ray.run.checkpoint import load_checkpoint
from tests.conftest import REPOSITORY

FILES = REPOSITORY / "configs" / "cluster"


def assert_trains(command, root):
    """The command's configuration is one, and all that it reads and writes lies below `root`."""
    assert command[:3] == ["python", "-m", "cibl_ray.train"]
    assert "--cluster --address auto" in " ".join(command)
    options = [*command[4:]]
    options.remove("--cluster")
    for name in ("--address", "--workers", "--name", "--max-failures", "--storage"):
        if name in options:
            at = options.index(name)
            del options[at : at + 2]
    config = load_config(command[3], options)
    source = config.data.source
    places = [source.root, source.train, source.val, source.test, config.data.prepared]
    assert all(str(place).startswith(root) for place in places), places


def test_ray_up_file_keeps_rays_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    content = prepare_config(yaml.safe_load((FILES / "ray_up.yaml").read_text()))
    validate_config(content)
    assert content["available_node_types"][content["head_node_type"]]["max_workers"] == 0
    assert any("requirements.lock" in command for command in content["setup_commands"])
    # The workers write to the store: Ray gives an instance profile of its own to the head alone.
    workers = content["available_node_types"]["gpu"]["node_config"]
    assert workers["IamInstanceProfile"]["Arn"].startswith("arn:aws:iam::ACCOUNT:instance-profile/")
    assert {kind["node_config"]["ImageId"] for kind in content["available_node_types"].values()} == {"AMI"}
    lines = [line.lstrip("# ").rstrip("\\ ") for line in (FILES / "ray_up.yaml").read_text().splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith("python -m"))
    assert_trains(" ".join(lines[first : first + 3]).split(), "/data/")


def test_rayjob_manifest_has_what_kuberay_asks_for():
    content = yaml.safe_load((FILES / "kuberay_rayjob.yaml").read_text())
    assert (content["apiVersion"], content["kind"]) == ("ray.io/v1", "RayJob")
    cluster = content["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == "2.60.0"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["image"] == "IMAGE"
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert_trains(content["spec"]["entrypoint"].split(), "/shared/")


def test_slurm_script_is_a_script():
    path = FILES / "slurm.sh"
    subprocess.run(["bash", "-n", path], check=True)
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert all(line.startswith("#SBATCH ") for line in lines[1:10])
    assert "#SBATCH --requeue" in lines


PROGRAMS = {
    "scontrol": '[ "$1" = show ] && printf "n1\\nn2\\n" || echo "$@" >> requeued',
    "srun": 'while [[ $1 = -* ]]; do [ "$1" = -w ] && shift; shift; done; "$@"',
    "hostname": "echo 10.0.0.1",
    "ray": 'if [ "$1" = status ]; then [ -e started ]; else echo "$RAY_TMPDIR $@" >> started; fi',
    "python": """
        if [ "$1" = -c ]; then echo secret; exit; fi
        echo "$RAY_AUTH_TOKEN $@" > trained
        trap 'exit 75' TERM
        touch training
        for _ in $(seq 600); do sleep 0.1; done
    """,
}


def test_slurm_script_stops_in_order_and_is_queued_again(tmp_path):
    """With programs in the place of Slurm's, Ray's and Python: what each is called with."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").touch()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8"}
    environment = os.environ | job | {"PATH": f"{programs}:{os.environ['PATH']}"}
    script = ["bash", FILES / "slurm.sh", "imagenet_lt", "--name", "a"]
    for restarts in ("0", "1"):
        for name in ("started", "trained", "training", "requeued"):
            (tmp_path / name).unlink(missing_ok=True)
        process = subprocess.Popen(script, cwd=tmp_path, env=environment | {"SLURM_RESTART_COUNT": restarts})
        while not (tmp_path / "training").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM if restarts == "0" else signal.SIGUSR1)
        assert process.wait(timeout=60) == 75
        assert (tmp_path / "requeued").read_text() == "requeue 123\n"
        more = "" if restarts == "0" else " --resume runs/a"
        cluster = "--cluster --address 10.0.0.1:20900 --workers 1-2"
        assert (tmp_path / "trained").read_text() == f"secret -m cibl_ray.train imagenet_lt --name a{more} {cluster}\n"
        head, other = (tmp_path / "started").read_text().splitlines()
        assert head.startswith("/tmp/ray-123 start --block --num-cpus=8 --num-gpus=0 ")
        assert "--port=20900" in head.split()
        assert "--address=10.0.0.1:20900" in other.split()
        for line in (head, other):
            assert {"--min-worker-port=20910", "--max-worker-port=21199"} <= {*line.split()}
        (tmp_path / "runs" / "a").mkdir(parents=True, exist_ok=True)
    done = subprocess.run(script[:3], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "slurm.sh: give the run a --name\n")


@pytest.mark.slow  # a minute: a cluster, a job and its supervisor start
@pytest.mark.timeout(280)
def test_ray_job_submit(tmp_path):
    """A cluster with a dashboard on loopback, a job that trains in it, and its run folder."""
    ray = Path(sys.executable).parent / "ray"
    environment = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": str(tmp_path), "PATH": f"{ray.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    environment.pop("RAY_API_SERVER_ADDRESS", None)  # of the clusters that tests start; it would win over --address
    short = tempfile.mkdtemp()  # Ray's sockets want a short path
    started = subprocess.Popen(
        [ray, "start", "--head", "--block", "--num-cpus", "2", "--port", "26379", "--dashboard-host", "127.0.0.1",
         "--dashboard-port", "28265", "--disable-usage-stats", "--temp-dir", short],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        command = [
            "python", "-m", "cibl_ray.train", "quickstart", "--cluster", "--address", "auto", "--workers", "2", "--name", "job",
            "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "62", "--loader.kind", "torch",
            "--runs", tmp_path / "runs", "--prepared", tmp_path / "prepared",
        ]  # fmt: skip
        submit = [ray, "job", "submit", "--address", "http://127.0.0.1:28265", "--", *map(str, command)]
        for _ in range(20):
            done = subprocess.run(submit, env=environment, capture_output=True, text=True, cwd=REPOSITORY)
            if not any(early in done.stderr + done.stdout for early in ("Failed to connect", "No available agent")):
                break
            time.sleep(1)
        assert done.returncode == 0, done.stdout + done.stderr
        assert load_checkpoint(tmp_path / "runs" / "job" / "checkpoints" / "last.safetensors").epoch == 1
    finally:
        started.terminate()
        started.wait(timeout=60)
        shutil.rmtree(short, ignore_errors=True)
