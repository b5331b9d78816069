"""Two hosts on one machine: network namespaces joined by a veth pair, each with a Ray node, a temporary folder and a home.

What one host does not share with the other is a file system that is mounted for it alone.
"""

import contextlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY

TOKEN = "f" * 64
HEAD = "10.77.0.1:6379"
_NUMBER = itertools.count()
# Ports that an administrator would open for Ray; what workers agree on among themselves is beyond them.
RAY_PORTS = ["--node-manager-port", "6380", "--object-manager-port", "6381", "--dashboard-agent-grpc-port", "6382"]
RAY_PORTS += ["--dashboard-agent-listen-port", "6383", "--metrics-export-port", "6384", "--runtime-env-agent-port", "6385"]
RAY_PORTS += ["--min-worker-port", "10002", "--max-worker-port", "10200"]


def why_not() -> str | None:
    """Why this machine has no such hosts; None where it has."""
    if os.geteuid() != 0:
        return "two hosts need root"
    for tool in ("ip", "tc", "iptables"):
        if shutil.which(tool) is None:
            return f"two hosts need {tool}: apt-get install iproute2 iptables"
    probe = subprocess.run(["ip", "netns", "add", "cibl-probe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", "cibl-probe"], capture_output=True)
    return None if probe.returncode == 0 else f"this kernel has no network namespaces: {probe.stderr.strip()}"


class Host:
    """One of the two hosts.

    Attributes:
        own: Folders, by their paths, that this host has for itself, with the size of each, as tmpfs takes it.
    """

    def __init__(self, name: str, address: str, folder: Path, own: dict[Path, str]) -> None:
        self.name, self.address, self.folder, self.own = name, address, folder, own
        (folder / "home").mkdir(parents=True)
        self.ray_folder = Path("/tmp") / f"r{name}"  # Ray's sockets need a short path
        self.started: list[subprocess.Popen] = []

    def command(self, *words: object) -> list[str]:
        """The command line that runs `words` on this host."""
        mounts = [f"mount -t tmpfs -o size={size} none {shlex.quote(str(path))}" for path, size in self.own.items()]
        line = " && ".join([*mounts, f"exec {shlex.join(map(str, words))}"])
        return ["ip", "netns", "exec", self.name, "sh", "-c", line]

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of this host's processes."""
        cleared = {
            key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "CIBL_RAY", "GLOO_", "NCCL_"))
        }
        return {
            **cleared, "HOME": str(self.folder / "home"), "RAY_TMPDIR": str(self.ray_folder), "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "PYTHONPATH": str(REPOSITORY),
            "RAY_health_check_period_ms": "1000", "RAY_health_check_initial_delay_ms": "1000", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", **more,
        }  # fmt: skip

    def start(self, log: Path, *words: object, **more: str) -> subprocess.Popen:
        """Start a process on this host, with its output in `log`."""
        with log.open("w") as output:
            process = subprocess.Popen(
                self.command(*words), env=self.environment(**more), stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY
            )
        self.started.append(process)
        return process

    def start_ray(self, head: bool, cpus: int = 1) -> None:
        """Start this host's Ray node, and wait until it is there."""
        role = ["--head", "--port", "6379", "--include-dashboard=false"] if head else ["--address", HEAD]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--node-ip-address", self.address]
        log = self.folder / "ray.log"
        self.start(log, *ray, "--num-cpus", cpus, "--block", "--disable-usage-stats", *RAY_PORTS)
        for _ in range(1200):
            if "Ray runtime started" in (text := log.read_text()):
                return
            assert self.started[-1].poll() is None, text
            time.sleep(0.1)
        raise AssertionError(log.read_text())

    def processes(self) -> list[psutil.Process]:
        """All processes of this host."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        found = []
        for pid in listed:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def kill(self) -> None:
        """End every process of this host at once, as a power cut does."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        for process in self.started:
            process.wait(30)
        self.started.clear()

    def run(self, *words: str) -> None:
        """Run a command in this host's network."""
        subprocess.run(["ip", "netns", "exec", self.name, *words], check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts(folder: Path, own: dict[Path, str] | None = None):
    """Yield (A, B): A has the head node, B a worker node, one core each. `own`: folders of B's own, with their sizes."""
    number = f"{os.getpid() % 10000}{next(_NUMBER)}"
    names = f"ca{number}", f"cb{number}"
    hosts = [
        Host(name, f"10.77.0.{1 + i}", folder / f"host{'AB'[i]}", (own or {}) if i else {}) for i, name in enumerate(names)
    ]
    try:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host.name], check=True)
        pair = [f"v{name}" for name in names]
        subprocess.run(["ip", "link", "add", pair[0], "type", "veth", "peer", "name", pair[1]], check=True)
        for host, link, other in zip(hosts, pair, reversed(hosts), strict=True):
            subprocess.run(["ip", "link", "set", link, "netns", host.name, "name", "link0"], check=True)
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "link0")
            for name in ("lo", "link0"):
                host.run("ip", "link", "set", name, "up")
            host.run("ip", "route", "add", "default", "via", other.address)  # Ray finds its address by a route
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            subprocess.run(["ip", "netns", "delete", host.name], check=False)
            shutil.rmtree(host.ray_folder, ignore_errors=True)


@pytest.fixture(scope="session")
def root_with_namespaces() -> None:
    """Skip where the machine cannot have two hosts."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
