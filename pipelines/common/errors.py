"""A user's mistake, and how a command reports it: one line, exit status 2, no traceback."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_VALUE = 200  # characters of a value that an error repeats
_FIXES = {
    errno.ENOENT: "check the name",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.ENOSPC: "free some of the disk, or name another place",
    errno.EDQUOT: "free some of the disk, or name another place",
}  # of errors of the disk
# Of one file: it is not there, may not be read, or is no file that can be.
_IN_THE_FILE = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EACCES, errno.EPERM
}  # fmt: skip
_LONG = 500  # characters shown of an unexpected error's message, or of arguments that argparse refuses


class UserError(ValueError):
    """A value that the user gave cannot be used. The message names the value, the place and the fix, in one line."""


class Interrupted(KeyboardInterrupt):
    """A command was stopped.

    Args:
        message: What is kept, and how to resume.
        status: The command's exit status.
    """

    def __init__(self, message: str = "", status: int = 130) -> None:
        super().__init__(message)
        self.status = status


class CommandParser(argparse.ArgumentParser):
    """An argument parser that reports mistakes as a `UserError`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.register("type", Path, _path)

    def complete(self) -> None:
        """Answer a shell that asks how the line goes on, and exit; in other runs nothing."""
        if "_ARGCOMPLETE" in os.environ:
            import argcomplete

            argcomplete.autocomplete(self)

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        """Parse the command line, or answer a shell that asks how it goes on."""
        self.complete()
        return super().parse_args(*arguments, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse what is known. `--name=--` is refused: Python 3.11's argparse makes an empty list of it."""
        for argument in args if args is not None else sys.argv[1:]:
            if argument.startswith("--") and argument.endswith("=--"):
                self.error(f"{argument}: '--' is no value; give another, or leave the option out")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise a UserError where argparse would print the usage and exit."""
        raise UserError(f"{_cut(message)}; see {self.prog} --help")


def run_command(main: Callable[[], None], needs: str = "") -> NoReturn:
    """Run a command's `main` and exit.

    No exception ends in a traceback. An unexpected one is one line, and its traceback is kept in a file.

    Args:
        main: The command.
        needs: What to pip install if one of its packages is missing, such as "'my-package[extra]'".

    Raises:
        SystemExit: Always. 0: success; 2: a user's mistake, a missing package or a failing disk; 130: Ctrl-C; the status of an
            `Interrupted`: a scheduler's signal; 1: anything else.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a λ on a Latin-1 terminal must not fail
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(_tell(f"error: {error}", 2))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or _present(package):
            sys.exit(_unexpected(error))
        install = f"; this command needs: pip install {needs}" if needs else ""
        sys.exit(_tell(f"error: {error.name} is not installed{install}", 2))
    except BrokenPipeError:  # `... | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.exit(_tell(f"error: {_of_file(error)}", 2))
    except MemoryError as error:
        sys.exit(_tell(f"error: {type(error).__name__}: {error}", 2))
    except KeyboardInterrupt as error:
        sys.exit(_tell(str(error) or "interrupted", getattr(error, "status", 130)))
    except Exception as error:
        sys.exit(_unexpected(error))
    sys.exit(0)


def in_the_file(error: OSError) -> bool:
    """Whether an error is of one file, and others can be read. One without a number is a library's word on the file's content.

    All else is of the machine: its open files, its memory, a disk, or a server of files. A later try may succeed.
    """
    return not error.errno or error.errno in _IN_THE_FILE


def _of_file(error: OSError) -> str:
    """What an error of the disk means to the user: the file, what is wrong, and what to do."""
    if not isinstance(error.filename, str):
        return f"{type(error).__name__}: {error}"
    name = error.filename.removesuffix(".part")  # what a file is called until it is whole
    return f"{shown(name)} cannot be used: {error.strerror}; {_FIXES.get(error.errno or 0, 'name another place')}"


def _present(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _path(text: str) -> Path:
    """The value of an option with `type=Path`: not an empty one, which would be the working folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names no file or folder; is a shell variable unset?")
    return Path(text)


def _cut(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


def _tell(message: str, status: int) -> int:
    print(" ".join(message.split()) if message.startswith("error: ") else message, file=sys.stderr)
    return status


def _unexpected(error: Exception) -> int:
    """Keep the traceback of an unexpected error in a file, and print its name."""
    text = "".join(traceback.format_exception(error))
    message = _cut(" ".join(f"{type(error).__name__}: {error}".split()))
    try:
        handle, name = tempfile.mkstemp(prefix=f"{Path(sys.argv[0]).stem}-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{' '.join(sys.argv)}\nPython {sys.version}\n\n{text}")
    except OSError:  # nowhere to keep it
        return _tell(f"error: unexpected {message}; the full trace could not be kept: no temporary folder can be written", 1)
    return _tell(f"error: unexpected {message}; the full trace is in {name}, please report it", 1)


def shown(value: Any, quotes: bool = True) -> str:
    """A value as an error repeats it: in one line, cut where it is long.

    Args:
        value: Any value.
        quotes: Whether text stands in quotes.
    """
    try:
        text = repr(value) if quotes else str(value)
    except ValueError:  # a whole number of thousands of digits
        text = "a very large number"
    except RecursionError:
        text = "..."
    text = re.sub(r"(://)[^/@\s]*@", r"\1...@", re.sub(r"(://[^?\s]*\?)[^\s'\"]*", r"\1...", text))  # keys in addresses
    return text if len(text) <= _VALUE else f"{text[:_VALUE]}..."
