"""A user's mistake, and how a command says it: one line, exit status 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """What the user gave cannot be used. The message names the value, the place and the fix, in one line."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what the user should know: what is kept and how to go on."""


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main` and exit: 0 on success, 2 on a user's mistake or a failing disk, 130 on Ctrl-C."""
    try:
        main()
    except UserError as error:
        sys.exit(_tell(str(error), 2))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("cibl_ray", "pipelines"):
            raise  # ours: not for the user to install
        extra = "cluster" if (error.name or "").partition(".")[0] in ("ray", "optuna") else "train"
        sys.exit(_tell(f"{error.name} is not installed; this command needs: pip install 'cibl-ray[{extra}]'", 2))
    except (OSError, MemoryError) as error:
        sys.exit(_tell(f"{type(error).__name__}: {error}", 2))
    except KeyboardInterrupt as error:
        sys.exit(_tell(str(error) or "interrupted", 130))
    sys.exit(0)


def _tell(message: str, status: int) -> int:
    print("error: " + " ".join(message.split()) if status == 2 else message, file=sys.stderr)
    return status
