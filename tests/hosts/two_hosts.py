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
# Ports that an administrator would open for Ray; what workers agree on among themselves is beyond them. A node that comes back
# has others, as nodes have by default: Ray 2.60 would ask it on the connection that was cut, and lose count of its CPUs.
RAY_PORTS = ["--node-manager-port", "--object-manager-port", "--dashboard-agent-grpc-port"]
RAY_PORTS += ["--dashboard-agent-listen-port", "--metrics-export-port", "--runtime-env-agent-port"]
WORKER_PORTS = ["--min-worker-port", "10002", "--max-worker-port", "10200"]
OPENED = "6379:6700,10002:10200"


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


# Ray says that a node runs before the head node knows it, and the head node knows a node that was killed for some seconds.
_JOINED = """
import ray, sys, time
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
seen = 0
while seen < 4:
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == sys.argv[2]]
    seen = seen + 1 if len(nodes) == 1 else 0
    time.sleep(1)
"""


class Host:
    """One of the two hosts.

    Attributes:
        own: Folders, by their paths, that this host has for itself, with the size of each, as tmpfs takes it.
        head: The host of the head node; None: this one.
    """

    def __init__(self, name: str, address: str, folder: Path, own: dict[Path, str], head: "Host | None" = None) -> None:
        self.name, self.address, self.folder, self.own, self.head = name, address, folder, own, head
        (folder / "home").mkdir(parents=True)
        self.ray_folder = Path("/tmp") / f"r{name}"  # Ray's sockets need a short path
        self.started: list[subprocess.Popen] = []
        self.joined = time.monotonic()
        self._port = itertools.count(6380)

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
            # A host is missed after 30 to 60 seconds, killed or cut off, and 20 seconds without a link are none.
            "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "30", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", **more,
        }  # fmt: skip

    def start(self, log: Path, *words: object, **more: str) -> subprocess.Popen:
        """Start a process on this host, with its output in `log`."""
        with log.open("w") as output:
            process = subprocess.Popen(
                self.command(*words), env=self.environment(**more), stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY
            )
        self.started.append(process)
        return process

    def start_ray(self, head: bool, dashboard: bool = False, **more: str) -> None:
        """Start this host's Ray node, with one CPU, and wait until it is there. `more`: of its environment."""
        role = ["--head", "--port", "6379", f"--include-dashboard={str(dashboard).lower()}"] if head else ["--address", HEAD]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--node-ip-address", self.address]
        log = self.folder / "ray.log"
        for _ in range(5):  # Ray gives a node 30 seconds, which a busy machine exceeds now and then
            ports = itertools.chain.from_iterable((name, next(self._port)) for name in RAY_PORTS)
            process = self.start(log, *ray, "--num-cpus", 1, "--block", "--disable-usage-stats", *ports, *WORKER_PORTS, **more)
            while process.poll() is None and "Ray runtime started" not in log.read_text():
                time.sleep(0.1)
            if process.poll() is None:
                break
            self.kill()
        else:
            raise AssertionError(log.read_text())
        if self.head is not None:
            joined = self.head.command(sys.executable, "-c", _JOINED, HEAD, self.address)
            subprocess.run(joined, env=self.head.environment(), check=True, timeout=240, capture_output=True)
            self.joined = time.monotonic()

    def seen_by_ray_train(self) -> None:
        """Wait until Ray Train has seen this node: it looks every 20 s, and an elastic run begins with what it knows."""
        time.sleep(max(0, self.joined + 25 - time.monotonic()))

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

    def fill(self, path: Path) -> None:
        """Fill the file system at a path, as this host's Ray node sees it."""
        inside = ["nsenter", "-t", str(self.processes()[0].pid), "-m", "dd", "if=/dev/zero", f"of={path}/filled", "bs=4k"]
        done = subprocess.run(inside, capture_output=True, text=True)
        assert "No space left" in done.stderr, done.stderr

    def cut(self) -> None:
        """Cut this host's link: what is sent gets lost, and nobody says so."""
        self.run("iptables", "-I", "INPUT", "-i", "link0", "-j", "DROP")
        self.run("iptables", "-I", "OUTPUT", "-o", "link0", "-j", "DROP")

    def slow(self, rate: str) -> None:
        """Limit what this host sends, as in '100mbit'."""
        self.run("tc", "qdisc", "replace", "dev", "link0", "root", "tbf", "rate", rate, "burst", "256kbit", "latency", "400ms")

    def mend(self) -> None:
        """Make the link whole and fast again, and open all ports."""
        self.run("iptables", "-F")
        subprocess.run(["ip", "netns", "exec", self.name, "tc", "qdisc", "delete", "dev", "link0", "root"], capture_output=True)


@contextlib.contextmanager
def two_hosts(folder: Path, own: dict[Path, str] | None = None):
    """Yield (A, B): A has the head node, B a worker node, one core each. `own`: folders of B's own, with their sizes."""
    number = f"{os.getpid() % 10000}{next(_NUMBER)}"
    names = f"ca{number}", f"cb{number}"
    a = Host(names[0], "10.77.0.1", folder / "hostA", {})
    a.ray_folder.mkdir()
    # Ray's files lie under the head node's path on every node.
    b = Host(names[1], "10.77.0.2", folder / "hostB", {a.ray_folder: "100m"} | (own or {}), a)
    hosts = [a, b]
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


@contextlib.contextmanager
def object_store(beside: Host, folder: Path):
    """moto's S3 server in a third network namespace, which is joined to a host's.

    Yields:
        The URI of a place in it, and a file: as long as that exists, every request is answered with 500.
    """
    name, failing, log = f"cs{beside.name[2:]}", folder / "failing", folder / "store.log"
    inside = ["ip", "netns", "exec", name]
    server = None
    try:
        subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(["ip", "link", "add", f"v{name}", "type", "veth", "peer", "name", f"w{name}"], check=True)
        for link, place, new, address in ((f"v{name}", beside.name, "link1", 1), (f"w{name}", name, "link1", 2)):
            subprocess.run(["ip", "link", "set", link, "netns", place, "name", new], check=True)
            within = ["ip", "netns", "exec", place, "ip"]
            subprocess.run([*within, "address", "add", f"10.78.0.{address}/24", "dev", new], check=True)
            subprocess.run([*within, "link", "set", new, "up"], check=True)
        subprocess.run([*inside, "ip", "route", "add", "default", "via", "10.78.0.1"], check=True)
        beside.run("sysctl", "-w", "net.ipv4.ip_forward=1")
        with log.open("w") as output:
            serve = [sys.executable, "-m", "tests.hosts.store", "10.78.0.2", "5055", str(failing)]
            server = subprocess.Popen([*inside, *serve], stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY)
        while "serving" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        more = "endpoint_override=10.78.0.2:5055&scheme=http&region=us-east-1&allow_bucket_creation=true"
        yield f"s3://bucket/runs?{more}", failing
    finally:
        if server is not None:
            server.kill()
            server.wait()
        subprocess.run(["ip", "netns", "delete", name], check=False)


@pytest.fixture(scope="session")
def root_with_namespaces() -> None:
    """Skip where the machine cannot have two hosts."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
