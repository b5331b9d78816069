"""A command within the tests' own process: what a new process would say and return, without its seconds of imports."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from pipelines.common.errors import run_command
from tests.conftest import REPOSITORY


def in_process(main: Callable[[], None], *arguments: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Run a command's `main` as `run_command` does.

    Args:
        main: The command's entry point.
        arguments: Of its command line.
        cwd: The working folder.

    Returns:
        Exit status, standard output and standard error, as `subprocess.run` returns them. What the command logs goes to
        pytest. The environment variables that it sets, such as Ray's, are gone afterwards.
    """
    words = [main.__module__, *map(str, arguments)]
    out, errors, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = words
    status: str | int | None = 0
    try:
        with (
            patch.dict(os.environ),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
            contextlib.chdir(cwd),
        ):
            run_command(main)
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(words, int(status or 0), out.getvalue(), errors.getvalue())
