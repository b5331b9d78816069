"""A benchmark is a command like any other: a user's mistake is one line, and exit status 2."""

import re

import pytest

from benchmarks import cifar_loader
from benchmarks.cibl_vs_ce import _cell
from pipelines.common.errors import UserError
from tests.commands import in_process
from tests.conftest import REPOSITORY

COMMANDS = [path for path in sorted((REPOSITORY / "benchmarks").rglob("*.py")) if '__name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_benchmark_tells_mistakes_as_commands_do(path):
    assert re.search(r"\n    run_command\(main(, .+)?\)\n\Z", path.read_text())


def test_a_folder_that_is_not_there(tmp_path):
    done = in_process(cifar_loader.main, "--images", tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: image folder ")
    assert "Traceback" not in done.stderr


def test_a_run_that_fails_is_named(tmp_path):
    with pytest.raises(UserError, match="first' has no result"):
        _cell(tmp_path / "first", ["--no_such_field", "1"])
