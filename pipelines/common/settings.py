"""Configuration files: YAML read into typed models, overridden from the command line, with errors a person can act on."""

from __future__ import annotations

import argparse
import difflib
import sys
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from pipelines.common.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


class Settings(BaseModel):
    """Base of every configuration part: unknown keys and infinite numbers are refused; a configuration never changes."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)


def split_command_line(parser: argparse.ArgumentParser) -> tuple[str | None, argparse.Namespace, list[str]]:
    """(CONFIG or None, the parser's own options, the overrides). CONFIG, where there is one, comes first."""
    arguments = sys.argv[1:]
    config = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    return config, *parser.parse_known_args(arguments)


def find_config(name: str) -> Path:
    """The file meant by a command's CONFIG: a path, or the name of a configuration shipped with the project."""
    path = Path(name)
    if path.is_file():
        return path
    folders = _shipped_folders()
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    found = {file.relative_to(folder).with_suffix("") for folder in folders for file in folder.rglob("*.yaml")}
    known = sorted(str(name) for name in found if name.parts[0] != "cluster")  # those are for ray and kubectl
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(f"no configuration {name!r}: neither a file nor one of the shipped ones ({', '.join(known)}){hint}")


def _shipped_folders() -> list[Path]:
    top = Path(__file__).resolve().parents[2]
    return [folder for folder in (top / "configs", top / "cibl_ray" / "configs") if folder.is_dir()]


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        _refuse_repeated_keys(path, yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys to values, this is a {type(content).__name__}")
    return content


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
    """`--field value` or `--field=value` pairs as (dotted key, value); values are read as YAML.

    A field is named by its dotted key (`--optimizer.lr`), or by its last part where that is unique (`--lr`).
    """
    pairs = []
    queue = list(arguments)
    while queue:
        flag = queue.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"{flag!r}: expected --field value")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not queue:
                raise UserError(f"--{key}: a value is missing")
            text = queue.pop(0)
        full = _full_key(key, model)
        is_path = known_keys(model).get(full, False) and text != "null"
        pairs.append((full, text if is_path else _value(key, text)))
    return pairs


def _value(key: str, text: str) -> Any:
    """What `text` means in YAML."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: the 45th of a month
        raise UserError(f"--{key} {text}: not a valid value: {error}") from error
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a word; people mean the number
        except ValueError:
            return text
    return value


def _full_key(key: str, model: type[BaseModel]) -> str:
    keys = sorted(known_keys(model))
    normal = key.replace("-", "_")
    if normal in keys:
        return normal
    tails = [known for known in keys if known.endswith("." + normal)]
    if len(tails) == 1:
        return tails[0]
    if tails:
        raise UserError(f"--{key}: say which one: {', '.join('--' + tail for tail in tails)}")
    plain = ".".join(part for part in normal.split(".") if not part.isdecimal())
    if plain != normal and plain in keys:
        return plain  # within a list, of which `override` says how it is set
    parent, _, leaf = normal.rpartition(".")
    parents = [known for known in keys if parent and f".{known}".endswith(f".{parent}")]
    if len(parents) == 1 and _kinds(model, parents[0]):
        return f"{parents[0]}.{leaf}"  # what it could have been, `validate` says, which knows the kind
    raise UserError(f"--{key}: unknown field{_nearest(normal, keys)}")


def override(content: dict[str, Any], pairs: list[tuple[str, Any]], model: type[BaseModel]) -> dict[str, Any]:
    """`content` with every (dotted key, value) set. A part that `content` does not have starts from the model's default.

    Setting a part's `kind` to another one drops that part's other keys, setting a whole part all of them; what else `pairs`
    say of the part holds, before or after. Of two values of one key the last one counts.
    """
    defaults = _defaults(model)
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
            if not isinstance(child, dict):
                child = node[name] = {}
            node = child
        if last == "kind" and node.get("kind") != value:
            node.clear()
        node[last] = _with_kinds(value, default.get(last) if isinstance(default, dict) else None)
    return result


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    return model().model_dump(mode="json")


def _with_kinds(content: Any, default: Any) -> Any:
    """`content` with the default `kind` in each part that names none: `loss: {tail_skew: .2}` is the default loss."""
    if not isinstance(content, dict) or not isinstance(default, dict):
        return content
    filled = {key: _with_kinds(value, default.get(key)) for key, value in content.items()}
    return {"kind": default["kind"], **filled} if "kind" in default else filled


def _copy(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _copy(value) for key, value in content.items()}
    return [_copy(value) for value in content] if isinstance(content, list) else content


def validate(model: type[Model], content: Any, place: str) -> Model:
    """`content` as a `model`; the first problem becomes a one-line UserError that names the key and the nearest known one."""
    content = _with_kinds(content, _defaults(model))
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        first = problems[0]
        key = _dotted(first["loc"], content)
        plain = ".".join(part for part in key.split(".") if not part.isdigit())
        kinds = _kinds(model, plain)
        if first["type"] == "extra_forbidden":
            parent, _, leaf = plain.rpartition(".")
            chosen = _kinds(model, parent).get(str(first["loc"][-2])) if parent else None
            if plain in known_keys(model):
                message = f"{key!r} belongs to another kind; set {key.rpartition('.')[0]}.kind to the one that has it"
            elif chosen is not None:
                message = f"unknown key {key!r}{_nearest_field(parent, leaf, chosen)}"
            else:
                message = f"unknown key {key!r}{_nearest(plain, sorted(known_keys(model)))}"
        elif first["type"] == "model_attributes_type" and kinds:
            value = first["input"]
            if value not in [*kinds]:
                reason = f"expected {{kind: ...}}, one of {', '.join(kinds)}"
            elif key == plain:
                reason = f"write --{key}.kind {value}, in a file {key.rpartition('.')[2]}: {{kind: {value}}}"
            else:  # in a list, which is set as a whole
                reason = f"write {{kind: {value}}}"
            message = f"{key} = {value!r}: {reason}"
        elif first["type"] == "missing":
            message = f"{key!r} is missing"
        elif first["type"] == "union_tag_invalid":
            message = f"{key}.kind = {first['input']['kind']!r}: expected one of {', '.join(kinds)}"
        elif first["type"] == "tuple_type":
            message = f"{key} = {first['input']!r}: expected a list, [...]"
        else:
            reason = first["msg"].removeprefix("Value error, ")
            # A whole part is not repeated: the reason names what in it is wrong.
            value = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
            message = f"{key}{value}: {reason}" if key else reason
        others = sum(not _follows(problem, problems) for problem in problems) - 1
        more = f" (and {others} more)" if others else ""
        raise UserError(f"{place}: {message}{more}") from error


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


def _nearest(key: str, keys: list[str]) -> str:
    leaves = {known.rsplit(".", 1)[-1]: known for known in keys}
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not close:
        close = [leaves[leaf] for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(leaves), n=1, cutoff=0.6)]
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted({k.split('.')[0] for k in keys}))}"


def _nearest_field(parent: str, leaf: str, chosen: type[BaseModel]) -> str:
    """As `_nearest`, among the fields of the kind that a part is of."""
    fields = [name for name in chosen.model_fields if name != "kind"]
    close = difflib.get_close_matches(leaf, fields, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {f'{parent}.{close[0]}'!r}?"
    return f"; this kind has: {', '.join(fields)}" if fields else "; this kind has no fields"


def _kinds(model: type[BaseModel], key: str) -> dict[str, type[BaseModel]]:
    """What may stand at a dotted key: the models that have a `kind`, by that."""
    models = [model]
    for name in key.split("."):
        fields = [outer.model_fields[name] for outer in models if name in outer.model_fields]
        models = [inner for field in fields for inner in _types_in(field.annotation) if issubclass(inner, BaseModel)]
    return {typing.get_args(each.model_fields["kind"].annotation)[0]: each for each in models if "kind" in each.model_fields}


def known_keys(model: type[BaseModel], prefix: str = "") -> dict[str, bool]:
    """The dotted name of every field of `model` and of the models in it (unions and lists too), and whether it is a path."""
    keys: dict[str, bool] = {}
    for name, field in model.model_fields.items():
        types = _types_in(field.annotation)
        keys[prefix + name] = Path in types
        for inner in types:
            if issubclass(inner, BaseModel):
                keys |= known_keys(inner, f"{prefix}{name}.")
    return keys


def _types_in(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return [annotation]
    return [inner for argument in typing.get_args(annotation) for inner in _types_in(argument)]


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
