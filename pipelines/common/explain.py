"""What a configuration's fields mean, for `--help`: generated from the models, with the values of one configuration."""

from __future__ import annotations

import inspect
import shlex
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelines.common.errors import UserError
from pipelines.common.fields import as_plain, is_collection, kind_of, known_keys, models_in, nearest_key

_WIDTH = 100  # characters of a line
_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}


@dataclass
class _Block:
    """A part under a heading. lines: (dotted key, text) of each field."""

    key: str
    title: str
    lines: list[tuple[str, str]] = field(default_factory=list)


def explain(model: type[BaseModel], content: Mapping[str, Any], part: str = "") -> str:
    """All fields of a configuration: name, value, type, range and meaning, under a heading for each part.

    Args:
        model: The configuration's model.
        content: A configuration, which need not be complete or valid. Its values are shown, else the model's defaults.
        part: A part or field by its dotted name, or by the last part of it where that is unique; all where it is empty.

    Raises:
        UserError: There is no such part.
    """
    wanted = [""] if not part else _meant(part, model)
    texts = []
    for block in _part(model, content, "", summary_of(model)):
        lines = [text for key, text in block.lines if any(not one or f"{key}.".startswith(f"{one}.") for one in wanted)]
        if lines:
            texts.append("\n".join([*textwrap.wrap(block.title, _WIDTH, subsequent_indent="  "), *lines]))
    return "\n\n".join(texts)


def _meant(part: str, model: type[BaseModel]) -> list[str]:
    """The dotted keys that a name means: itself, else all that end with it."""
    keys, name = known_keys(model), part.lstrip("-").replace("-", "_")
    found = [name] if name in keys else [key for key in keys if key.endswith(f".{name}")]
    if not found:
        close = nearest_key(name, keys)
        hint = f"did you mean --help {close}?" if close else f"the parts are: {', '.join(model.model_fields)}"
        raise UserError(f"--help {part}: no such part or field; {hint}")
    return found


def _part(
    model: type[BaseModel], content: Any, key: str, title: str, in_list: bool = False, one_of: bool = False
) -> Iterator[_Block]:
    """The block of a part's own fields, then the blocks of the parts in it. one_of: `kind` chooses this model."""
    content = content if isinstance(content, Mapping) else {}
    block = _Block(key, title or "at the top")
    inner: list[Iterator[_Block]] = []
    for name, info in model.model_fields.items():
        models, where = models_in(info.annotation), f"{key}.{name}" if key else name
        default = as_plain(info.get_default()) if not info.is_required() and info.default_factory is None else None
        value = content.get(name, default)
        collection = is_collection(info.annotation)
        if (collection or not models) and not (one_of and name == "kind"):
            block.lines.append((where, _line(where, info, value, in_list)))
        if not models:
            continue
        chosen = None
        if isinstance(value, Mapping) and not collection:
            chosen = value.get("kind", default.get("kind") if isinstance(default, Mapping) else None)
        heading = f"{where}, each" if collection else where
        if len(models) == 1:
            summary = f": {summary_of(models[0])}" if summary_of(models[0]) else ""
            inner.append(_part(models[0], {} if collection else value, where, heading + summary, in_list or collection))
            continue
        choice = f"{where}.kind {chosen or 'KIND'}"
        kinds = [f"{kind_names(each)}: {summary_of(each)}" for each in models]
        line = (f"{where}.kind", _item(choice if in_list or collection else f"--{choice}", *kinds))
        inner.append(iter([_Block(where, heading + (f": {sentence(info.description)}" if info.description else ""), [line])]))
        for each in sorted(models, key=lambda one: kind_of(one) != chosen):
            own = value if kind_of(each) == chosen and not collection else {}
            inner.append(_part(each, own, where, f"{heading} of kind {kind_names(each)}", in_list or collection, True))
    yield block
    for blocks in inner:
        yield from blocks


def summary_of(model: type[BaseModel]) -> str:
    """The first paragraph of a model's own docstring."""
    return " ".join(inspect.cleandoc(model.__dict__.get("__doc__") or "").split("\n\n")[0].split())


def kind_names(model: type[BaseModel]) -> str:
    """The names by which `kind` chooses a model."""
    return ", ".join(typing.get_args(model.model_fields["kind"].annotation))


def _line(key: str, info: FieldInfo, value: Any, in_list: bool) -> str:
    """A field: as the command line sets it, then its type, range and meaning."""
    if info.is_required() and value is None:
        shown = key.rpartition(".")[2].upper()
    else:
        text = yaml.safe_dump(value, default_flow_style=True, width=1e9, sort_keys=False, allow_unicode=True)
        text = text.removesuffix("\n").removesuffix("\n...")
        shown = text if in_list else shlex.quote(text)
    kind = type_in_words(info.annotation) + range_in_words(info)
    needed = ", required" if info.is_required() else ""
    return _item(
        f"{key if in_list else f'--{key}'} {shown}", f"{kind[:1].upper()}{kind[1:]}{needed}. {sentence(info.description)}"
    )


def _item(name: str, *texts: str) -> str:
    """A name, and below it each text with its own indentation."""
    lines = [
        line
        for text in texts
        for line in textwrap.wrap(text, _WIDTH, initial_indent="      ", subsequent_indent="      " + "  " * (len(texts) > 1))
    ]
    return "\n".join([f"  {name}", *lines])


def sentence(text: str | None) -> str:
    """A description as a sentence: in one line, with a full stop."""
    text = " ".join((text or "").split())
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."


def type_in_words(annotation: Any) -> str:
    """A type in words: `float | None` is "number or null"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_in_words(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(str(argument) for argument in arguments)}"
    if origin is tuple:
        many = len(arguments) == 2 and arguments[1] is Ellipsis
        inner = [argument for argument in arguments if argument is not Ellipsis]
        names = {_PLURALS.get(argument, "items") for argument in inner}
        return f"list of {names.pop()}" if many else f"list of {len(inner)} {names.pop()}"
    if origin is dict:
        return "mapping"
    if arguments:  # a union
        plain = [argument for argument in arguments if argument is not NoneType]
        names_of = list(dict.fromkeys(type_in_words(argument) for argument in plain))
        return " or ".join([*names_of, "null"] if NoneType in arguments else names_of)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return _NAMES.get(annotation, "any value")


def range_in_words(info: FieldInfo) -> str:
    """The bounds of a field, ", 0 to 1" or ", more than 0"."""
    bounds = dict[str, Any]()
    for one in _metadata(info):
        bounds |= {
            name: getattr(one, name) for name in ("ge", "gt", "le", "lt", "min_length", "max_length") if hasattr(one, name)
        }
    texts = []
    if "ge" in bounds and "le" in bounds:
        texts.append(f"{_number(bounds.pop('ge'))} to {_number(bounds.pop('le'))}")
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    texts += [f"{word} {_number(bounds[name])}" for name, word in words.items() if name in bounds]
    low, high = bounds.get("min_length"), bounds.get("max_length")
    if low is not None or high is not None:
        texts.append(f"{low or 0} to {high} of them" if high is not None else f"{low} of them or more")
    return "".join(f", {text}" for text in texts)


def _metadata(info: FieldInfo) -> Iterator[Any]:
    """The constraints of a field, also those of a type that a union names: `Annotated[float, Field(ge=0)] | None`."""
    yield from info.metadata
    left = [info.annotation]
    while left:
        annotation = left.pop()
        if typing.get_origin(annotation) is typing.Annotated:
            for one in typing.get_args(annotation)[1:]:
                yield from one.metadata if isinstance(one, FieldInfo) else (one,)
        left += typing.get_args(annotation) if typing.get_origin(annotation) is not Literal else ()


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
