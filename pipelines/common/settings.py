"""Configuration files: YAML read into typed models, overridden from the command line, with errors a person can act on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from pipelines.common.errors import UserError
from pipelines.common.fields import (
    Key,
    defaults_of,
    fields_at,
    is_collection,
    kind_of,
    kinds_at,
    known_keys,
    models_in,
    nearest,
    nearest_key,
    types_in,
)

Model = TypeVar("Model", bound=BaseModel)

# The shipped configurations: beside the packages in a checkout, within this one in a wheel.
_SHIPPED = (Path(__file__).resolve().parents[2] / "configs", Path(__file__).resolve().parents[1] / "configs")
_LONG = 200  # characters of a value that an error repeats


class Settings(BaseModel):
    """Base of every configuration part: unknown keys and infinite numbers are refused; a configuration never changes."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)


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
    if _is_file(path):
        return path
    for top in _SHIPPED:
        if _is_file(top / f"{name}.yaml"):
            return top / f"{name}.yaml"
    known = [*shipped_configs(), *shipped_configs("sweeps")]
    close = nearest(name, known)
    hint = f"did you mean {close}?" if close else "name a YAML file, or a shipped one, such as quickstart or folder"
    raise UserError(f"no configuration {_shown(name)}; {hint}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: It cannot be read, is not YAML or no mapping, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        _refuse_repeated_keys(path, yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
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
    shipped = any(path.resolve().is_relative_to(top) for top in _SHIPPED)
    return written_out(read_config(path), model, str(path), None if shipped else path.absolute().parent)


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
        written: dict[str, Any] = _written_out(content, [model], place, folder, "")
    except RecursionError as error:
        raise UserError(f"{place}: nested too deeply, or within itself") from error
    return written


def _written_out(content: Any, models: list[type[BaseModel]], place: str, folder: Path | None, prefix: str) -> Any:
    if isinstance(content, list):
        return [_written_out(item, models, place, folder, prefix) for item in content]
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
        if folder is not None and isinstance(value, str) and any(Path in types_in(field.annotation) for field in fields):
            value = _beside(value, folder)
        value = _written_out(value, inner, place, folder, f"{prefix}{name}.")
        result[name] = _joined(result[name], value, place, f"{prefix}{name}") if name in result else value
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
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # no home
        path = Path(text)
    return str(path if path.is_absolute() else folder / path)


def _refuse_repeated_keys(path: Path, node: yaml.Node | None) -> None:
    """Raise UserError for a key that stands twice in one mapping: YAML would keep the last one and drop the other silently."""
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


def parse_overrides(arguments: list[str], model: type[BaseModel]) -> list[tuple[str, Any]]:
    """The fields that a command line sets.

    Args:
        arguments: `--field value` or `--field=value`. A field is named by its dotted key (`--optimizer.lr`), or by its last
            part where that is unique (`--lr`). Values are read as YAML.
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
            raise UserError(f"{_shown(flag)}: expected --field value")
        name, equals, text = flag[2:].partition("=")
        key = _full_key(name, model, keys)
        if not equals:
            if not queue:
                raise UserError(f"--{name}: a value is missing")
            text = queue.pop(0)
        is_path = key in keys and keys[key].is_path and text != "null"
        pairs.append((key, text if is_path else _value(name, text)))
    return pairs


def _value(name: str, text: str) -> Any:
    """What `text` means in YAML."""
    try:
        _refuse_repeated_keys(Path(f"--{name}"), yaml.compose(text, Loader=yaml.SafeLoader))
        value = yaml.safe_load(text)
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"--{name}: nested too deeply, or within itself") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: the 45th of a month
        raise UserError(f"--{name} {_shown(text, quotes=False)}: not a valid value: {error}") from error
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a word; people mean the number
        except ValueError:
            return text
    return value


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
    raise UserError(f"--{_shown(name, quotes=False)}: unknown field{hint}")


def override(content: dict[str, Any], pairs: list[tuple[str, Any]], model: type[BaseModel]) -> dict[str, Any]:
    """`content` with every (dotted key, value) set. A part that `content` does not have starts from the model's default.

    Setting a part's `kind` to another one drops that part's other keys, setting a whole part all of them; what else `pairs`
    say of the part holds, before or after. Of two values of one key the last one counts.

    Raises:
        UserError: A key is within a list.
    """
    defaults = defaults_of(model)
    result: dict[str, Any] = _with_kinds(_copy(content), defaults)  # the default's kind set again is no other one
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
        node[last] = _with_kinds(value, default.get(last) if isinstance(default, dict) else None)
    return result


def _with_kinds(content: Any, default: Any) -> Any:
    """`content` with the default `kind` in each part that names none: `loss: {tail_skew: .2}` is the default loss."""
    if not isinstance(content, dict) or not isinstance(default, dict):
        return content
    filled = {key: _with_kinds(value, default.get(key)) for key, value in content.items()}
    return {"kind": default["kind"], **filled} if "kind" in default else filled


def _with_required_parts(content: Any, model: type[BaseModel]) -> Any:
    """`content` with an empty mapping for a required part that is not there: what is missing is a field of the part."""
    if not isinstance(content, dict):
        return content
    filled = dict(content)
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        if field.is_required() and len(inner) == 1 and kind_of(inner[0]) is None and not is_collection(field.annotation):
            filled[name] = _with_required_parts(filled.get(name, {}), inner[0])
    return filled


def _copy(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _copy(value) for key, value in content.items()}
    return [_copy(value) for value in content] if isinstance(content, list) else content


def validate(model: type[Model], content: Any, place: str, flags: Collection[str] = ()) -> Model:
    """`content` as a `model`.

    Args:
        model: The model.
        content: A mapping; where a part names no kind, its default one is meant.
        place: Where the content comes from, for errors.
        flags: The dotted keys that the command line set: an error in one of them names that as its place.

    Raises:
        UserError: The first problem in one line, which names the key and the nearest known one.
    """
    try:
        content = _with_required_parts(_with_kinds(content, defaults_of(model)), model)
        return model.model_validate(content)
    except RecursionError as error:
        raise UserError(f"{place}: nested too deeply, or within itself") from error
    except ValidationError as error:
        # A misspelt key first: what is missing may only be misspelt.
        problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
        key = _dotted(problems[0]["loc"], content)
        if key and any(f"{key}.".startswith(f"{flag}.") or f"{flag}.".startswith(f"{key}.") for flag in flags):
            place = "command line"
        others = sum(not _follows(problem, problems) for problem in problems) - 1
        more = f" (and {others} more)" if others else ""
        raise UserError(f"{place}: {_explained(problems[0], key, model, content)}{more}") from error


def _explained(problem: ErrorDetails, key: str, model: type[BaseModel], content: Any) -> str:
    """What a problem of pydantic's means to who wrote the configuration. key: where, without the names of kinds."""
    plain = ".".join(part for part in key.split(".") if not part.isdecimal())
    keys, kinds, value = known_keys(model), kinds_at(model, plain), problem["input"]
    parent, _, leaf = key.rpartition(".")
    plain_parent = plain.rpartition(".")[0]
    match problem["type"]:
        case "extra_forbidden":
            of_kinds = kinds_at(model, plain_parent) if plain_parent else {}
            having = [kind for kind, each in of_kinds.items() if leaf in each.model_fields]
            if having:
                return f"{key!r} belongs to another kind; set {parent}.kind: {' or '.join(having)}"
            chosen = of_kinds.get(str(_value_at(content, parent, "kind")))
            if chosen is not None:
                return f"unknown key {_shown(key)}{_nearest_field(parent, leaf, chosen)}"
            if (plain_parent and plain_parent in keys and keys[plain_parent].in_list is not None) or plain != key:
                names = [
                    name
                    for field in fields_at(model, plain_parent)
                    for each in models_in(field.annotation)
                    for name in each.model_fields
                ]
                close = nearest(leaf, names)
                return f"unknown key {_shown(key)}" + (
                    f"; did you mean {f'{parent}.{close}'!r}?" if close else f"; known: {', '.join(names)}"
                )
            close = nearest_key(plain, keys)
            hint = f"did you mean {close!r}?" if close else f"known: {', '.join(model.model_fields)}"
            return f"unknown key {_shown(key)}; {hint}"
        case "model_attributes_type" | "model_type" if kinds:
            if value not in [*kinds]:
                reason = f"expected {{kind: ...}}, one of {', '.join(kinds)}"
            elif key == plain:
                reason = f"write --{key}.kind {value}, in a file {leaf}: {{kind: {value}}}"
            else:  # in a list, which is set as a whole
                reason = f"write {{kind: {value}}}"
            return f"{key} = {_shown(value)}: {reason}"
        case "missing":
            choice = f"{{kind: ...}}, one of {', '.join(kinds)}" if kinds else ""
            meaning = (keys[plain].description if plain in keys else "") or choice
            return f"{key!r} is missing" + (f": {meaning}" if meaning else "")
        case "union_tag_not_found":
            return f"{key}.kind is missing: one of {', '.join(kinds)}"
        case "union_tag_invalid":
            return f"{key}.kind = {_shown(value['kind'])}: expected one of {', '.join(kinds)}"
        case "tuple_type":
            return f"{key} = {_shown(value)}: expected a list, [...]"
        case "model_attributes_type" | "model_type" | "dict_type":
            return f"{key} = {_shown(value)}: expected a mapping, {{field: value}}"
    reason = problem["msg"].removeprefix("Value error, ")
    # A whole part is not repeated: the reason names what in it is wrong.
    shown = "" if isinstance(value, dict) else f" = {_shown(value)}"
    return f"{key}{shown}: {reason}" if key else reason


def _value_at(content: Any, key: str, last: str) -> Any:
    for name in (*key.split("."), last):
        if isinstance(content, list):
            content = content[int(name)] if name.isdecimal() and int(name) < len(content) else None
        else:
            content = content.get(name) if isinstance(content, dict) else None
    return content


def _shown(value: Any, quotes: bool = True) -> str:
    """A value as an error repeats it: in one line, cut where it is long."""
    try:
        text = repr(value) if quotes else str(value)
    except ValueError:  # a whole number of thousands of digits
        text = "a very large number"
    except RecursionError:
        text = "..."
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


def _follows(problem: ErrorDetails, problems: list[ErrorDetails]) -> bool:
    """Whether it is of others' making: pydantic finds a list too short of which it could not read every item."""
    within = [other["loc"] for other in problems if other["loc"][: len(problem["loc"])] == problem["loc"]]
    return problem["type"] == "too_short" and len(within) > 1


def _dotted(location: tuple[int | str, ...], content: Any) -> str:
    """A pydantic location without the union tags that it puts between the keys."""
    parts, node = [], content
    for position, part in enumerate(location):
        if isinstance(node, dict):
            if part not in node and position < len(location) - 1 and node.get("kind") == part:
                continue
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int):
            node = node[part] if part < len(node) else None
        parts.append(str(part))
    return ".".join(parts)


def _nearest_field(parent: str, leaf: str, chosen: type[BaseModel]) -> str:
    """The field of the chosen kind that an unknown one is near to, else all of them."""
    fields = [name for name in chosen.model_fields if name != "kind"]
    close = nearest(leaf, fields)
    if close:
        return f"; did you mean {f'{parent}.{close}'!r}?"
    return f"; this kind has: {', '.join(fields)}" if fields else "; this kind has no fields"


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
