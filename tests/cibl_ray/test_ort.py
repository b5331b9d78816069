"""onnxruntime must not report to its vendor: nothing imports it but the module that turns its telemetry off first."""

import ast
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

RUN = """
import sys, time
from pathlib import Path
import numpy as np
from cibl_ray.bundle.runtime import Runtime
runtime = Runtime(Path(sys.argv[1]), "cpu")
size = runtime.size
print(runtime(np.zeros((1, size, size, 3), np.uint8))[0].shape)
time.sleep(1)
"""


def test_a_model_that_answers_leaves_no_file_in_the_home_folder(bundle, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "ORT_"))}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(bundle / "model.onnx")],
        cwd=REPOSITORY,
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "(1, 10)\n", done.stderr
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("given", ["0", "1"])
def test_a_user_may_decide_otherwise(given):
    program = "import cibl_ray.bundle.ort, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": given}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == given


def test_one_module_imports_onnxruntime():
    importing = set()
    for package in ("cibl_ray", "pipelines", "serve", "benchmarks", "tests"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import) and any(alias.name.startswith("onnxruntime") for alias in node.names):
                    importing.add(str(path.relative_to(REPOSITORY)))
    assert importing == {"cibl_ray/bundle/ort.py"}
