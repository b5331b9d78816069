"""The commands of README and the tutorials run as they stand, with small stand-in data, and say what the page shows."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from serve.page.ort import installed
from tests.conftest import REPOSITORY

TUTORIALS = REPOSITORY / "docs" / "tutorials"
PAGES = ["README.md", *(f"docs/tutorials/{name}.md" for name in ("digits", "photographs", "serve", "sweep"))]
# What a page's commands find, so that they take seconds: the same configurations, shorter.
SHORT = {
    "quickstart": {
        "data": {"source": {"kind": "digits"}, "size": 16, "val_fraction": 0.1, "profile": {"kind": "exp", "imbalance": 20}}
        | {"store": {"square": 16}, "views": [{"cut": {"kind": "crop", "padding": 1}}] * 2},
        "network": {"backbone": "resnet20"},
        "loss": {"kind": "cibl"},
        "loader": {"kind": "torch"},
        "train": {"epochs": 1, "batch_size": 64},
        "schedule": {"kind": "cosine", "warmup_epochs": 0},
    },
    "sweeps/tail_skew": {"base": "quickstart", "trials": 2, "asha": None},
}
EXTRAS = {"pip install": "installs", "make ": "has a test of its own, or takes the whole machine"}


def blocks(page: str) -> list[tuple[str, str]]:
    """(commands, output that the page shows below them) of each block."""
    text = (REPOSITORY / page).read_text()
    found = re.findall(r"^```bash\n(.*?)^```\n(?:(?!^```|^#).*\n)*?(?:^```text\n(.*?)^```)?", text, re.MULTILINE | re.DOTALL)
    return [(commands.replace("\\\n", " "), output) for commands, output in found]


def masked(text: str) -> str:
    """A line without what differs between machines: numbers, and how wide they are."""
    return re.sub(r"[\d,.]*\d", "#", " ".join(text.split()))


@pytest.fixture
def folder(tmp_path, photo_folder) -> Path:
    """A working folder: short configurations, photographs, an environment that has this project."""
    for name, content in SHORT.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    shutil.copytree(photo_folder, tmp_path / "data" / "photos")
    shutil.copytree(photo_folder / "test", tmp_path / "NEW_PHOTOS")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    more = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), "HOME": str(folder)}
    return {**os.environ, **more, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def serve(command: str, folder: Path) -> subprocess.Popen:
    """Start a server, and wait until it answers."""
    port = 8080 if "8080" in command else 8000
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            pytest.skip(f"port {port} is taken on this machine")
    started = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=folder, env=environment(folder), start_new_session=True, stderr=subprocess.PIPE
    )
    for _ in range(600):
        assert started.poll() is None, started.stderr.read().decode()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return started
    raise AssertionError(f"{command} does not answer")


def stop(servers: list[subprocess.Popen]) -> None:
    for server in servers:
        server.send_signal(signal.SIGTERM)
    while servers:
        server = servers.pop()
        server.wait(30)
        server.stderr.close()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs(page, folder):
    found = blocks(page)
    assert found
    if page.endswith("sweep.md"):
        (folder / "photos").write_text((REPOSITORY / "configs" / "photos.yaml").read_text())
    servers, ran = [], 0
    try:
        for commands, output in found:
            said = ""
            for line in commands.splitlines():
                command = re.sub(r"\s+# .*", "", line).strip()
                if not command or command.startswith("source ") or any(command.startswith(start) for start in EXTRAS):
                    continue
                if command.startswith("python -m serve.web") and installed() is None:
                    continue
                if re.match(r"python -m (serve( --simple)? |http\.server)", command):
                    if "http.server" in command and not (folder / "site").exists():
                        continue
                    stop(servers)  # a page's next server may want the same port
                    servers.append(serve(command, folder))
                    ran += 1
                    continue
                command = command.replace("--trials 30", "--trials 4")
                done = subprocess.run(
                    ["bash", "-c", command], cwd=folder, env=environment(folder), capture_output=True, text=True
                )
                assert done.returncode == 0, f"{command}\n{done.stderr}"
                said += done.stdout + done.stderr
                ran += 1
            if said and output and "photograph" not in page and page != "README.md":
                lines = {masked(line) for line in said.splitlines()}
                missing = [line for line in output.splitlines() if line.strip() and masked(line) not in lines]
                assert missing == [], said
        assert ran >= 2
    finally:
        stop(servers)


def test_every_command_names_a_module_of_this_project():
    """Fast: a misspelt module or page fails without the slow test."""
    for page in [*PAGES, *(str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "docs").rglob("*.md")))]:
        for commands, _ in blocks(page):
            for module in re.findall(r"python -m ((?:cibl_ray|pipelines|serve|benchmarks)[\w.]*)", commands):
                path = REPOSITORY / module.replace(".", "/")
                assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page}: {module}"
