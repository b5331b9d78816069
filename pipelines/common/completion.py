"""What a shell offers of a configuration where it completes a command: names, fields and values, by argcomplete."""

from __future__ import annotations

import argparse
import typing
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from pipelines.common.config_file import shipped_configs
from pipelines.common.fields import fields_at, known_keys, types_in

if TYPE_CHECKING:
    from pydantic import BaseModel


def offer_fields(parser: argparse.ArgumentParser, model: type[BaseModel], folder: str) -> None:
    """Add CONFIG and `--field value` of every field to a parser, for a shell to complete.

    A command that runs reads its fields without it.

    Args:
        parser: The command's.
        model: Whose fields they are.
        folder: Where the shipped configurations of the command's kind are, below `configs`.
    """
    from argcomplete.completers import ChoicesCompleter, FilesCompleter

    files = FilesCompleter(("yaml", "yml"))

    def configurations(prefix: str, **_: Any) -> list[str]:
        return [*shipped_configs(folder), *files(prefix)]

    _completed(parser.add_argument("config", nargs="?"), configurations)
    for key, known in known_keys(model).items():
        if known.in_list is not None:
            continue
        values = _values(model, key)
        completer = FilesCompleter() if known.is_path else ChoicesCompleter(dict.fromkeys(values, ""))
        with suppress(argparse.ArgumentError):  # an option of the command has this name
            _completed(parser.add_argument(f"--{key}", help=known.description.replace("%", "%%")), completer)


def _completed(action: argparse.Action, completer: Any) -> None:
    action.completer = completer  # type: ignore[attr-defined]  # where argcomplete looks


def _values(model: type[BaseModel], key: str) -> list[str]:
    """The values of a field that has few."""
    annotations = [field.annotation for field in fields_at(model, key)]
    names = [str(name) for annotation in annotations for name in _literals(annotation)]
    if any(bool in types_in(annotation) for annotation in annotations):
        names += ["true", "false"]
    return sorted(set(names))


def _literals(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    return [name for inner in typing.get_args(annotation) for name in _literals(inner)]
