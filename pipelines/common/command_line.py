"""The command line of a program with a configuration: CONFIG, options of its own, and `--field value` for every field."""

from __future__ import annotations

import argparse
import os
import pkgutil
import sys
from typing import Any

import yaml
from pydantic import BaseModel

from pipelines.common.completion import offer_fields
from pipelines.common.config_file import find_config, read_content, shipped_configs
from pipelines.common.errors import CommandParser
from pipelines.common.explain import explain
from pipelines.common.settings import override, parse_overrides


class ConfigParser(CommandParser):
    """An argument parser for `CONFIG [options] [--field value ...]`.

    `CONFIG --help` lists every field with its value in CONFIG, `--help PART` one part, `--print-config` the resolved
    configuration; without CONFIG, `--help` lists the options.
    """

    def __init__(self, model: str, folder: str = "", **options: Any) -> None:
        """Make the parser.

        Args:
            model: Where the configuration's model is, `package.module:Model`: imported for `--help` and completion alone.
            folder: Where the shipped configurations of this program's kind are, below `configs`; empty for runs.
            options: As argparse has them.
        """
        super().__init__(add_help=False, **options)
        self._model, self._folder = model, folder
        self.add_argument(
            "-h",
            "--help",
            nargs="?",
            const="",
            metavar="PART",
            help="list all fields of CONFIG with their values, or those of one part; without CONFIG, these options",
        )
        self.add_argument("--print-config", action="store_true", help="print the configuration with every field, and end")

    def split(self) -> tuple[str | None, argparse.Namespace, list[str]]:
        """The command line: CONFIG, or None; the parser's own options; the overrides, `--field value`."""
        if "_ARGCOMPLETE" in os.environ:
            offer_fields(self, pkgutil.resolve_name(self._model), self._folder)
            self.complete()
        name, *rest = sys.argv[1:] or [""]
        arguments, rest = self.parse_known_args([name, *rest] if name.startswith("-") else rest)
        if not name.startswith("-"):
            return name or None, arguments, rest
        position = 0
        while position < len(rest) and rest[position].startswith("--"):  # CONFIG may also stand behind options
            position += 1 if "=" in rest[position] else 2
        return (rest.pop(position) if position < len(rest) else None), arguments, rest

    def helped(self, name: str | None, default: str, arguments: argparse.Namespace, overrides: list[str]) -> bool:
        """Answer `--help`, if it is asked.

        Args:
            name: CONFIG, if there is one.
            default: The configuration whose values `--help PART` shows without CONFIG.
            arguments: From `split`.
            overrides: From `split`.

        Returns:
            Whether it was asked: the program is done.

        Raises:
            UserError: CONFIG cannot be read, or there is no such part.
        """
        if arguments.help is None:
            return False
        model: type[BaseModel] = pkgutil.resolve_name(self._model)
        if name is None and not arguments.help:
            print(self.format_help())
            print("parts of a configuration: " + ", ".join(model.model_fields))
            print("shipped configurations: " + ", ".join(shipped_configs(self._folder)))
            print(f"\n{self.prog} {default} --help lists every field, {self.prog} --help PART those of one part")
            return True
        path = find_config(name or default)
        content = override(read_content(path, model), parse_overrides(overrides, model), model)
        if not arguments.help:
            print(self.format_help())
        print(f"Fields, with the values of {path}:\n")
        print(explain(model, content, arguments.help))
        return True


def print_config(config: BaseModel) -> None:
    """Print a configuration as YAML that reads back as the same."""
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
