"""Configuration files: where they are, and what is in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from pipelines.common.errors import UserError, shown
from pipelines.common.fields import PathIfThere, models_in, nearest, of_kind, types_in

# The shipped configurations: beside the packages in a checkout, within this one in a wheel.
_SHIPPED = (Path(__file__).resolve().parents[2] / "configs", Path(__file__).resolve().parents[1] / "configs")


def shipped_configs(folder: str = "") -> list[str]:
    """The names of the shipped configurations: of runs, or of another kind in a folder of their own (`sweeps`)."""
    found = {file.relative_to(top).with_suffix("") for top in _SHIPPED if top.is_dir() for file in top.rglob("*.yaml")}
    others = ("cluster", "sweeps")  # those in `cluster` are for ray and kubectl
    return sorted(str(name) for name in found if (name.parts[0] == folder if folder else name.parts[0] not in others))


def find_config(name: str) -> Path:
    """The file that a command's CONFIG means.

    Args:
        name: A path, or the name of a shipped configuration.

    Raises:
        UserError: There is neither.
    """
    path = Path(name)
    if _is_there(path.is_file):
        return path
    for top in _SHIPPED:
        if _is_there((file := top / f"{name}.yaml").is_file):
            return file
    known = [*shipped_configs(), *shipped_configs("sweeps")]
    close = nearest(name, known)
    hint = f"did you mean {close}?" if close else "name a YAML file, or a shipped one, such as quickstart or folder"
    raise UserError(f"no configuration {shown(name)}; {hint}")


def _is_there(look: Callable[[], bool]) -> bool:
    try:
        return look()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: It cannot be read, is not YAML or no mapping, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        refuse_repeated_keys(path, yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: not UTF-8 text") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply, or within itself") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: the 45th of a month
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys to values, this is a {type(content).__name__}")
    return content


def read_content(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    """The mapping in a YAML file of a model's fields, dotted keys written out (`train.epochs: 3`).

    Relative paths in the file are relative to the file's folder. In the shipped configurations they stay as they are: those
    name data in the working folder.

    Raises:
        UserError: As `read_config`; also a key that is given dotted and nested.
    """
    return written_out(read_config(path), model, str(path), folder_of_paths(path))


def folder_of_paths(path: Path) -> Path | None:
    """The folder that relative paths in a configuration file are relative to; None for a shipped one: they stay."""
    return None if any(path.resolve().is_relative_to(top) for top in _SHIPPED) else path.absolute().parent


def written_out(content: Mapping[str, Any], model: type[BaseModel], place: str, folder: Path | None = None) -> dict[str, Any]:
    """`content` with the dotted keys of a model's parts as nested mappings.

    Args:
        content: What a file or a program gave.
        model: Whose fields the keys are.
        place: Where `content` comes from, for errors.
        folder: What relative paths are made absolute by; None: they stay.

    Raises:
        UserError: A key is given dotted and nested.
    """
    try:
        written: dict[str, Any] = _written_out(content, [model], place, "")
        return written if folder is None else _placed(written, [model], folder)
    except RecursionError as error:
        raise UserError(f"{place}: nested too deeply, or within itself") from error


def _written_out(content: Any, models: list[type[BaseModel]], place: str, prefix: str) -> Any:
    if isinstance(content, list):
        return [_written_out(item, models, place, prefix) for item in content]
    if not isinstance(content, Mapping) or not models:
        return content
    result: dict[str, Any] = {}
    for key, value in content.items():
        name, dot, rest = key.partition(".") if isinstance(key, str) else (key, "", "")
        fields = [model.model_fields[name] for model in models if name in model.model_fields]
        inner = [each for field in fields for each in models_in(field.annotation)]
        if dot and rest and inner:
            value = {rest: value}
        else:
            name = key
        value = _written_out(value, inner, place, f"{prefix}{name}.")
        result[name] = _joined(result[name], value, place, f"{prefix}{name}") if name in result else value
    return result


def _placed(content: Any, models: list[type[BaseModel]], folder: Path) -> Any:
    """`content`, written out, with relative paths below a folder. Fields of one name may be paths in some kinds only."""
    if isinstance(content, list):
        return [_placed(item, models, folder) for item in content]
    if not isinstance(content, Mapping) or not models:
        return content
    result: dict[str, Any] = {}
    for key, value in content.items():
        fields = [model.model_fields[key] for model in of_kind(models, content.get("kind")) if key in model.model_fields]
        if isinstance(value, str):
            beside = _beside(value, folder)
            is_path = any(Path in types_in(field.annotation) for field in fields)
            if is_path or (any(PathIfThere in field.metadata for field in fields) and _is_there(Path(beside).is_dir)):
                value = beside
        result[key] = _placed(value, [each for field in fields for each in models_in(field.annotation)], folder)
    return result


def _joined(one: Any, other: Any, place: str, key: str) -> Any:
    """Two mappings of one part as one."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        raise UserError(f"{place}: {key!r} is given twice, dotted and nested; remove one")
    return {
        **one,
        **{name: _joined(one[name], value, place, f"{key}.{name}") if name in one else value for name, value in other.items()},
    }


def _beside(text: str, folder: Path) -> str:
    if "://" in text or not text.strip():  # an empty path is refused later
        return text
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # no home
        path = Path(text)
    return str(path if path.is_absolute() else folder / path)


def refuse_repeated_keys(path: Path, node: yaml.Node | None) -> None:
    """Refuse a key that stands twice in one mapping: YAML would keep the last one and drop the other silently.

    Args:
        path: The file, for the message.
        node: What the YAML parser composed.

    Raises:
        UserError: A key stands twice; names both lines.
    """
    left: list[yaml.Node | None] = [node]
    seen: set[int] = set()
    while left:
        node = left.pop()
        if node is None or id(node) in seen:  # an alias leads to its anchor again
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                left.append(value)
                if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                    continue
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise UserError(
                        f"{path}:{line}: {key.value!r} stands twice, first in line {lines[key.value]}; join or remove one"
                    )
                lines[key.value] = line
