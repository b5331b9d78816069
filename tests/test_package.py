"""The wheel installs alone and runs from any folder; the README's and the Makefile's commands exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cibl_ray import train
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, unpacked by pip into an empty folder. Its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, REPOSITORY], check=True, cwd=folder
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, cwd=folder)
    return folder / "site"


def python(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True)


def test_wheel_imports_from_its_own_folder(installed, tmp_path):
    done = python(
        installed,
        "-c",
        "import cibl_ray, pipelines, serve; print(cibl_ray.__file__, pipelines.__file__, serve.__file__)",
        cwd=tmp_path,
    )
    assert all(file.startswith(str(installed)) for file in done.stdout.split()), done.stderr
    assert len(done.stdout.split()) == 3


def test_wheel_carries_the_page_and_types(installed):
    """A machine without Node serves the page; npm, where it is, fetches what the lock file pins."""
    page = REPOSITORY / "serve" / "page"
    own = [
        path for path in page.rglob("*") if path.suffix in (".html", ".css", ".js", ".svg", ".json") and "ort" not in path.parts
    ]
    assert {"index.html", "page.js", "sw.js", "package-lock.json"} <= {path.name for path in own}
    for path in own:
        assert (installed / path.relative_to(REPOSITORY)).read_bytes() == path.read_bytes()
    assert all((installed / package / "py.typed").exists() for package in ("cibl_ray", "pipelines", "serve"))


def test_wheel_trains_from_any_folder(installed, tmp_path):
    flags = ["quickstart", "--name", "first", "--epochs", "1", "--warmup_epochs", "0", "--loader.kind", "torch"]
    done = python(installed, "-m", "cibl_ray.train", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "first" / "result.json").exists()
    assert (tmp_path / "prepared").is_dir()


def test_version_is_one(installed):
    version = re.search(r'^version = "(.+)"', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    done = python(installed, "-c", "import cibl_ray; print(cibl_ray.__version__)", cwd=installed)
    assert done.stdout.strip() == version[1]


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("command", [c for c in readme_commands() if " -m " in c])
def test_readme_commands_name_real_modules_and_fields(command, monkeypatch, capsys):
    words = shlex.split(command)
    module = words[words.index("-m") + 1]
    path = REPOSITORY / module.replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()
    if module == "cibl_ray.train" and "--resume" not in words:
        monkeypatch.setattr(sys, "argv", [*words[words.index(module) :], "--print-config"])
        train.main()
        assert "loss:" in capsys.readouterr().out


def test_readme_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = {word for command in readme_commands() for word in command.split()[1:2] if command.startswith("make ")}
    assert {"quickstart", "test"} <= named <= targets


def test_lock_names_no_index():
    lock = (REPOSITORY / "requirements.lock").read_text()
    assert "://" not in lock
    assert "--index" not in lock
    assert all(re.match(r"[A-Za-z0-9_.\[\],-]+==\S+", line) for line in lock.splitlines() if line)


def test_continuous_integration_runs_the_test_command():
    assert "make test" in (REPOSITORY / ".ci" / "run").read_text().splitlines()
