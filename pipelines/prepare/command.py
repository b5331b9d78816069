"""The configuration and the command line that prepare, preview and doctor share."""

from __future__ import annotations

import argparse

from pydantic import Field

from pipelines.common.command_line import ConfigParser, print_config
from pipelines.common.config_file import find_config, read_content
from pipelines.common.errors import UserError
from pipelines.common.fields import nearest
from pipelines.common.settings import Settings, build
from pipelines.config import DataConfig


class PrepareConfig(Settings):
    """The part of a run's configuration that preparing reads."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="decides the subset and the order of the images on disk")
    data: DataConfig


def load_data(name: str, overrides: list[str]) -> PrepareConfig:
    """The data of a run's configuration.

    Args:
        name: A path, or the name of a shipped configuration. Its other parts are not read.
        overrides: The command line's `--field value`.

    Raises:
        UserError: The file cannot be read, or a value is invalid.
    """
    path = find_config(name)
    content = read_content(path, PrepareConfig)
    others = [key for key in content if key not in PrepareConfig.model_fields]
    misspelt = "" if "data" in content else nearest("data", [key for key in others if isinstance(key, str)])
    if misspelt:
        raise UserError(f"{path}: unknown key {misspelt!r}; did you mean 'data'?")
    return build(PrepareConfig, {key: content[key] for key in content if key not in others}, overrides, str(path))


def from_command_line(parser: ConfigParser, example: str = "quickstart") -> tuple[PrepareConfig, argparse.Namespace] | None:
    """What the command line of prepare, preview or doctor asks for.

    Args:
        parser: With the command's own options.
        example: What to write behind the command, for the message.

    Returns:
        The data, and the command's own options; None where `--help` or `--print-config` has been answered.

    Raises:
        UserError: No configuration is named, it cannot be read, or a value is invalid.
    """
    name, arguments, overrides = parser.split()
    if parser.helped(name, "quickstart", arguments, overrides):
        return None
    if name is None:
        raise UserError(f"name a configuration first: {parser.prog} {example}")
    config = load_data(name, overrides)
    if arguments.print_config:
        print_config(config)
        return None
    return config, arguments
