"""The wheel installs alone and runs from any folder; the README's and the Makefile's commands exist."""

import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cibl_ray
from cibl_ray import train
from tests.conftest import REPOSITORY

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, REPOSITORY], check=True, cwd=folder
    )
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """The wheel, unpacked by pip into an empty folder. Its dependencies are those of this environment."""
    folder = wheel.parent / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", folder, wheel], check=True, cwd=wheel.parent)
    return folder


def repository_files(*folders: str) -> set[str]:
    """What git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name for name in listed if (REPOSITORY / name).exists()}


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    packages = repository_files("cibl_ray", "pipelines", "serve")
    configs = {f"pipelines/{name}" for name in repository_files("configs")}
    assert {"cibl_ray/train.py", "cibl_ray/py.typed", "serve/page/static/index.html"} <= packages
    assert {"pipelines/configs/quickstart.yaml", "pipelines/configs/recipes/bcl_cifar100_lt.yaml"} <= configs
    about = f"cibl_ray-{cibl_ray.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert "Name: cibl-ray" in archive.read(f"{about}/METADATA").decode()
    # onnxruntime-web, where `make web` has fetched it.
    names = {name for name in names if not name.startswith("serve/page/static/ort/")}
    assert {name for name in names if not name.startswith(f"{about}/")} == packages | configs
    assert {name.removeprefix(f"{about}/") for name in names if name.startswith(f"{about}/")} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE",
    }  # fmt: skip


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
    """The package's own, in its metadata too; no other file of the build names one."""
    code = "import cibl_ray, importlib.metadata; print(cibl_ray.__version__, importlib.metadata.version('cibl-ray'))"
    done = python(installed, "-c", code, cwd=installed)
    assert done.stdout.split() == [cibl_ray.__version__] * 2
    assert not re.search(r"^version = ", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)


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
