"""The base of every part of a configuration, and the fields that a command line sets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from pipelines.common.config_file import refuse_repeated_keys
from pipelines.common.errors import UserError, shown
from pipelines.common.fields import Key, defaults_of, kinds_at, known_keys, nearest_key, types_in
from pipelines.common.validation import Model, validate, with_kinds


class Settings(BaseModel):
    """Base of every configuration part: unknown keys and infinite numbers are refused; a configuration never changes."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")  # of the whole part: a field that decides the kind can have no validator before
    @classmethod
    def _no_empty_path(cls, content: Any) -> Any:
        """Refuse an empty path, which would be the working folder."""
        for name, field in cls.model_fields.items() if isinstance(content, Mapping) else ():
            value = content.get(name)
            if isinstance(value, str) and not value.strip() and Path in types_in(field.annotation):
                raise PydanticCustomError("empty_path", "names no file or folder; is a shell variable unset?", {"field": name})
        return content


def parse_overrides(arguments: list[str], model: type[BaseModel]) -> list[tuple[str, Any]]:
    """The fields that a command line sets.

    Args:
        arguments: `--field value` or `--field=value`. A field is named by its dotted key (`--optimizer.lr`), or by its last
            part where that is unique (`--lr`). Values are read as YAML, paths and text as they are written.
        model: Whose fields they are.

    Returns:
        (dotted key, value) for each.

    Raises:
        UserError: A field is unknown, or a value is missing or not valid.
    """
    pairs = []
    queue = list(arguments)
    keys = known_keys(model)
    while queue:
        flag = queue.pop(0)
        if not flag.startswith("--"):
            is_folder = os.path.isdir(flag)  # noqa: PTH112  # Path.is_dir raises where a name is too long
            hint = f"; for the folder of your images: --data.source.path {flag}" if is_folder else ""
            raise UserError(f"{shown(flag)}: expected --field value{hint}")
        name, equals, text = flag[2:].partition("=")
        key = _full_key(name, model, keys)
        if not equals:
            if not queue:
                raise UserError(f"--{name}: a value is missing")
            text = queue.pop(0)
        known = keys.get(key)
        if known is not None and (known.is_path or known.is_text) and text != "null":
            value: Any = text if known.is_path else _text(name, text)
        else:
            value = _value(name, text)
        pairs.append((key, value))
    return pairs


def _text(name: str, text: str) -> Any:
    """The value of a field of text: as it is written, or what YAML's quotes hold. A column may be called 0, or yes."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return _yaml(name, text) if quoted else text or None


def _value(name: str, text: str) -> Any:
    """What `text` means in YAML, and as a number where people mean one."""
    value = _yaml(name, text)
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a word; people mean the number
        except ValueError:
            return text
    return value


def _yaml(name: str, text: str) -> Any:
    """What `text` means in YAML."""
    try:
        refuse_repeated_keys(Path(f"--{name}"), yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"--{name}: nested too deeply, or within itself") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: the 45th of a month
        raise UserError(f"--{name} {shown(text, quotes=False)}: not a valid value: {error}") from error


def _full_key(name: str, model: type[BaseModel], keys: dict[str, Key]) -> str:
    normal = name.replace("-", "_")
    if normal in keys and keys[normal].in_list is None:
        return normal
    tails = [key for key in sorted(keys) if f".{key}".endswith(f".{normal}")]
    free = [key for key in tails if keys[key].in_list is None]
    lists = sorted({known.in_list for key in tails if (known := keys[key]).in_list is not None})
    if len(free) == 1 and not lists:
        return free[0]
    if tails:
        ways = [f"--{key}" for key in free]
        ways += [f"in the list {key}, which is set as a whole (see --help {key})" for key in lists]
        raise UserError(f"--{name}: say which one: {' or '.join(ways)}" if len(ways) > 1 else f"--{name}: set it {ways[0]}")
    plain = ".".join(part for part in normal.split(".") if not part.isdecimal())
    if plain != normal and plain in keys and (within := keys[plain].in_list) is not None:
        raise UserError(f"--{name}: {within} is a list; set it as a whole: --{within} '[...]'")
    parent, _, leaf = normal.rpartition(".")
    parents = [key for key in sorted(keys) if parent and f".{key}".endswith(f".{parent}") and keys[key].in_list is None]
    if len(parents) == 1 and kinds_at(model, parents[0]):
        return f"{parents[0]}.{leaf}"  # what it could have been, `validate` says, which knows the kind
    close = nearest_key(normal, keys)
    hint = f"; did you mean --{close}?" if close else "; --help lists all fields"
    raise UserError(f"--{shown(name, quotes=False)}: unknown field{hint}")


def override(content: dict[str, Any], pairs: list[tuple[str, Any]], model: type[BaseModel]) -> dict[str, Any]:
    """`content` with every (dotted key, value) set. A part that `content` does not have starts from the model's default.

    Setting a part's `kind` to another one drops that part's other keys, setting a whole part all of them; what else `pairs`
    say of the part holds, before or after. Of two values of one key the last one counts.

    Raises:
        UserError: A key is within a list.
    """
    defaults = defaults_of(model)
    result: dict[str, Any] = with_kinds(_copy(content), defaults)  # the default's kind set again is no other one
    # A part before what is in it, and of that its kind first: `--loss.kappa 0.5 --loss '{kind: bcl}'` and
    # `--data.source.path X --data.source.kind folder` must mean the same in either order.
    for key, value in sorted(pairs, key=lambda pair: (pair[0].count("."), not pair[0].endswith(".kind"))):
        *parents, last = key.split(".")
        node: dict[str, Any] = result
        default: Any = defaults
        for depth, name in enumerate(parents):
            default = default.get(name) if isinstance(default, dict) else None
            child = node.setdefault(name, _copy(default))
            if isinstance(child, list):
                where = ".".join(parents[: depth + 1])
                raise UserError(f"--{key}: {where} is a list; set it as a whole: --{where} '[...]'")
            if not isinstance(child, dict):  # `backbone: resnet20` is short for {kind: resnet20}
                child = node[name] = {"kind": child} if isinstance(child, str) and last != "kind" else {}
            node = child
        if last == "kind" and node.get("kind") != value:
            node.clear()
        node[last] = with_kinds(value, default.get(last) if isinstance(default, dict) else None)
    return result


def _copy(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _copy(value) for key, value in content.items()}
    return [_copy(value) for value in content] if isinstance(content, list) else content


def build(model: type[Model], content: dict[str, Any], arguments: list[str], place: str) -> Model:
    """A validated configuration with absolute paths.

    Args:
        model: The model.
        content: What a file has, from `read_content`.
        arguments: The command line's `--field value`.
        place: The file, for errors.

    Raises:
        UserError: A field is unknown or has a value that it cannot have.
    """
    pairs = parse_overrides(arguments, model)
    return absolute(validate(model, override(content, pairs, model), place, [key for key, _ in pairs]))


def absolute(model: Model) -> Model:
    """`model` with every relative path made absolute: workers and later commands may run in another folder."""
    changes: dict[str, Any] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, Path):
            changes[name] = value.expanduser().absolute()
        elif isinstance(value, BaseModel):
            changes[name] = absolute(value)
    return model.model_copy(update=changes)
