"""The digest of the code does not depend on where the packages lie."""

import os
import shutil
import subprocess
import sys

from cibl_ray.run.fingerprint import code_digest
from tests.conftest import REPOSITORY

PRINT = "from cibl_ray.run.fingerprint import code_digest; print(code_digest())"


def test_each_package_in_a_folder_of_its_own(tmp_path):
    """As Ray unpacks them on the nodes of a cluster. A change in either is another digest."""
    for package in ("cibl_ray", "pipelines"):
        shutil.copytree(
            REPOSITORY / package, tmp_path / f"of {package}" / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    there = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder) for folder in tmp_path.iterdir())}

    def digest():
        done = subprocess.run(
            [sys.executable, "-c", PRINT], env=there, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert digest() == code_digest()
    with (tmp_path / "of pipelines" / "pipelines" / "jpeg.py").open("a") as file:
        file.write("# changed\n")
    assert digest() != code_digest()
