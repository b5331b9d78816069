"""The examples of the docs: a loss, a backbone and a head are added to a copy of the code as they stand, and trained."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from cibl_ray.losses.config import AnyLoss
from tests.conftest import REPOSITORY

# What is trained with each addition, all with the small backbone that is added.
FLAGS = {
    "Add a loss": ["--loss", "{kind: focal, focusing: 1.5}"],
    "Add a backbone": ["--loss.kind", "cross_entropy"],
    "Add a head": ["--loss.kind", "cross_entropy", "--head", "{kind: unit_weights}"],
}
TRAIN = """
import json, sys
from pathlib import Path
from cibl_ray.config import load_config
from cibl_ray.hardware import resolve
from cibl_ray.training.trainer import Trainer
from pipelines.prepare.build import ensure_prepared

folder, flags = sys.argv[1], json.loads(sys.argv[2])
options = ["--prepared", folder, "--loader.kind", "torch", "--device", "cpu", "--precision", "fp32", "--train.epochs", "3",
           "--warmup_epochs", "0", "--lr", "0.02", "--backbone", "two_layers"]
results = {}
for title, more in flags.items():
    config = load_config("quickstart", [*options, *more])
    trainer = Trainer(resolve(config), ensure_prepared(config.data, 0), Path(folder))
    losses = [trainer.train_epoch()["train"]["loss"] for _ in range(3)]
    results[title] = {"losses": losses, "parameters": sum(p.numel() for p in trainer.network.parameters())}
print(json.dumps(results))
"""


def blocks(title: str) -> list[tuple[str, str, str]]:
    """Language, file and content of the code blocks below a heading that name a file."""
    path = REPOSITORY / ("docs/how-to/add-a-loss.md" if title == "Add a loss" else "CONTRIBUTING.md")
    (section,) = re.findall(rf"^##? {title}\n(.*?)^## ", path.read_text(), re.MULTILINE | re.DOTALL)
    found = re.findall(r"^```(python|diff)\n# (\S+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert [language for language, _, _ in found] == ["python", "diff"]
    return found


def follow(title: str, copy: Path) -> None:
    """Do what a section says: write its file, and put the lines with a plus below the lines above them."""
    for language, name, content in blocks(title):
        if language == "python":
            assert not (copy / name).exists()
            (copy / name).write_text(content)
            continue
        lines = (copy / name).read_text().splitlines()
        at = -1
        for line in content.splitlines():
            if line.startswith("+"):
                lines.insert(at := at + 1, line[1:])
            else:
                at = lines.index(line[1:].rstrip(), at + 1)
        (copy / name).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The code with all three additions."""
    folder = tmp_path_factory.mktemp("copy")
    for package in ("cibl_ray", "pipelines", "configs"):
        shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for title in FLAGS:
        follow(title, folder)
    return folder


@pytest.fixture(scope="module")
def trained(copy):
    command = [sys.executable, "-c", TRAIN, str(copy), json.dumps(FLAGS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("title", FLAGS)
def test_what_contributing_adds_trains(title, trained):
    losses = trained[title]["losses"]
    assert losses[-1] < losses[0]
    # Two convolutions with their biases, and the head's weights, with a bias where it has one.
    bias = 0 if title == "Add a head" else 10
    assert trained[title]["parameters"] == (3 * 16 * 9 + 16) + (16 * 32 * 9 + 32) + 10 * 32 + bias


def test_the_added_code_keeps_the_house_rules(copy):
    files = [str(copy / name) for title in FLAGS for _, name, _ in blocks(title)]
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--config", str(REPOSITORY / "pyproject.toml"), *files]
        done = subprocess.run(command, capture_output=True, text=True, cwd=copy)
        assert done.returncode == 0, done.stdout


def test_nothing_asks_which_loss_it_is():
    """A loss's class stands in its own file, the union and the modules; its kind is compared with nothing."""
    names = {kind.__name__ for kind in get_args(AnyLoss)}
    kinds = {kind.model_fields["kind"].annotation.__args__[0] for kind in get_args(AnyLoss)}
    for path in [*(REPOSITORY / "cibl_ray").rglob("*.py"), *(REPOSITORY / "pipelines").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            asked = set()
            if isinstance(node, ast.MatchClass) or (isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"):
                asked = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} & names
            elif isinstance(node, ast.Compare) and ".kind" in ast.unparse(node):
                asked = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)} & kinds
            assert not asked, f"{path}:{node.lineno} asks which loss it is: {ast.unparse(node)}"
