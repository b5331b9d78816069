"""What a configuration says, as a typed model, or one line that says what is wrong and how to mend it."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipelines.common.errors import UserError, shown
from pipelines.common.fields import (
    defaults_of,
    fields_at,
    is_collection,
    kind_of,
    kinds_at,
    known_keys,
    models_in,
    nearest,
    nearest_key,
)

Model = TypeVar("Model", bound=BaseModel)


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
        content = _with_required_parts(with_kinds(content, defaults_of(model)), model)
        return model.model_validate(content)
    except RecursionError as error:
        raise UserError(f"{place}: nested too deeply, or within itself") from error
    except ValidationError as error:
        # A misspelt key first: what is missing may only be misspelt.
        problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
        within = (problems[0]["ctx"]["field"],) if problems[0]["type"] == "empty_path" else ()
        key = _dotted((*problems[0]["loc"], *within), content)
        explained = _explained(problems[0], key, model, content)
        # What concerns several parts has no key: its text names the fields.
        named = [flag for flag in flags if re.search(rf"\b{re.escape(flag)}\b", explained)] if not key else []
        if named or (key and any(f"{key}.".startswith(f"{flag}.") or f"{flag}.".startswith(f"{key}.") for flag in flags)):
            place = "command line"
        others = sum(not _follows(problem, problems) for problem in problems) - 1
        more = f" (and {others} more)" if others else ""
        raise UserError(f"{place}: {explained}{more}") from error


def with_kinds(content: Any, default: Any) -> Any:
    """`content` with the default `kind` in each part that names none: `loss: {tail_skew: .2}` is the default loss.

    Args:
        content: A mapping, or a part's value.
        default: The model's default for it.
    """
    if not isinstance(content, dict) or not isinstance(default, dict):
        return content
    filled = {key: with_kinds(value, default.get(key)) for key, value in content.items()}
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
                return f"unknown key {shown(key)}{_nearest_field(parent, leaf, chosen)}"
            if (plain_parent and plain_parent in keys and keys[plain_parent].in_list is not None) or plain != key:
                names = [
                    name
                    for field in fields_at(model, plain_parent)
                    for each in models_in(field.annotation)
                    for name in each.model_fields
                ]
                close = nearest(leaf, names)
                return f"unknown key {shown(key)}" + (
                    f"; did you mean {f'{parent}.{close}'!r}?" if close else f"; known: {', '.join(names)}"
                )
            close = nearest_key(plain, keys)
            hint = f"did you mean {close!r}?" if close else f"known: {', '.join(model.model_fields)}"
            return f"unknown key {shown(key)}; {hint}"
        case "model_attributes_type" | "model_type" if kinds:
            if value not in [*kinds]:
                reason = f"expected {{kind: ...}}, one of {', '.join(kinds)}"
            elif key == plain:
                reason = f"write --{key}.kind {value}, in a file {leaf}: {{kind: {value}}}"
            else:  # in a list, which is set as a whole
                reason = f"write {{kind: {value}}}"
            return f"{key} = {shown(value)}: {reason}"
        case "missing":
            choice = f"{{kind: ...}}, one of {', '.join(kinds)}" if kinds else ""
            meaning = (keys[plain].description if plain in keys else "") or choice
            return f"{key!r} is missing" + (f": {meaning}" if meaning else "")
        case "union_tag_not_found":
            return f"{key}.kind is missing: one of {', '.join(kinds)}"
        case "union_tag_invalid":
            return f"{key}.kind = {shown(value['kind'])}: expected one of {', '.join(kinds)}"
        case "empty_path":
            return f"{key} = {shown(value[leaf])}: {problem['msg']}"
        case "tuple_type":
            return f"{key} = {shown(value)}: expected a list, [...]"
        case "model_attributes_type" | "model_type" | "dict_type":
            return f"{key} = {shown(value)}: expected a mapping, {{field: value}}"
    reason = problem["msg"].removeprefix("Value error, ")
    # A whole part is not repeated: the reason names what in it is wrong.
    repeated = "" if isinstance(value, dict) else f" = {shown(value)}"
    return f"{key}{repeated}: {reason}" if key else reason


def _value_at(content: Any, key: str, last: str) -> Any:
    for name in (*key.split("."), last):
        if isinstance(content, list):
            content = content[int(name)] if name.isdecimal() and int(name) < len(content) else None
        else:
            content = content.get(name) if isinstance(content, dict) else None
    return content


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
