"""A user's mistake, and how a command says it: one line, exit status 2, no traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class UserError(ValueError):
    """What the user gave cannot be used. The message names the value, the place and the fix, in one line."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what the user should know: what is kept and how to go on."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like all others."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run_command(main: Callable[[], None], needs: str | None = None) -> NoReturn:
    """Run a command's `main` and exit: 0 on success, 2 on a user's mistake or a failing disk, 130 on Ctrl-C.

    needs: what to install for it; None: the extra `train`, or `cluster` where Ray or Optuna is missing.
    """
    try:
        main()
    except UserError as error:
        sys.exit(_tell(str(error), 2))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("cibl_ray", "pipelines", "serve"):
            raise  # ours: not for the user to install
        extra = "cluster" if (error.name or "").partition(".")[0] in ("ray", "optuna") else "train"
        needs = needs or f"'cibl-ray[{extra}]'"
        sys.exit(_tell(f"{error.name} is not installed; this command needs: pip install {needs}", 2))
    except (OSError, MemoryError) as error:
        sys.exit(_tell(f"{type(error).__name__}: {error}", 2))
    except KeyboardInterrupt as error:
        sys.exit(_tell(str(error) or "interrupted", 130))
    sys.exit(0)


def _tell(message: str, status: int) -> int:
    print("error: " + " ".join(message.split()) if status == 2 else message, file=sys.stderr)
    return status
