"""The fields of a configuration model: their dotted names, their defaults, and the nearest one to a misspelt name."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Key:
    """What is known of a dotted name.

    Attributes:
        is_path: The value is a path, in one kind of the part at least.
        is_text: The value is text in every kind, or null.
        in_list: The list or mapping around the field (`data.views`), which is set as a whole; else None.
        description: What the field means.
    """

    is_path: bool
    is_text: bool
    in_list: str | None
    description: str


class PathIfThere:
    """Marks a field of text (`Annotated[str, PathIfThere]`) that is a path where a folder of that name is there."""


def known_keys(model: type[BaseModel], prefix: str = "", in_list: str | None = None) -> dict[str, Key]:
    """The dotted names of all fields of `model` and of the models within it, of every kind and in lists too."""
    keys: dict[str, Key] = {}
    for name, field in model.model_fields.items():
        key = prefix + name
        types, collection = {*types_in(field.annotation)}, is_collection(field.annotation)
        is_text = not collection and types - {NoneType} == {str}
        keys[key] = Key(Path in types, is_text, in_list, field.description or "")
        within = in_list or (key if collection else None)
        for inner in models_in(field.annotation):
            for other, known in known_keys(inner, f"{key}.", within).items():
                same = keys.get(other, known)  # of another kind
                keys[other] = replace(known, is_path=known.is_path or same.is_path, is_text=known.is_text and same.is_text)
    return keys


def types_in(annotation: Any) -> list[type]:
    """The plain types that an annotation names: of `tuple[int, ...] | None` int and None's type."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return [annotation]
    return [inner for argument in typing.get_args(annotation) for inner in types_in(argument)]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation names: one for a part, several for a part with kinds."""
    return [inner for inner in types_in(annotation) if issubclass(inner, BaseModel)]


def is_collection(annotation: Any) -> bool:
    """Whether values are lists or mappings with names of the user's: tuple[int, ...], dict[str, float], or these or None."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    return origin in (tuple, list, dict) or any(is_collection(argument) for argument in arguments)


def kind_of(model: type[BaseModel]) -> str | None:
    """The `kind` of a model, or None."""
    field = model.model_fields.get("kind")
    names = typing.get_args(field.annotation) if field is not None else ()
    return str(names[0]) if names else None


def of_kind(models: list[type[BaseModel]], kind: object) -> list[type[BaseModel]]:
    """Those of a part's models that have a kind; all where none has it."""
    return [
        model
        for model in models
        if "kind" in model.model_fields and kind in typing.get_args(model.model_fields["kind"].annotation)
    ] or models


def fields_at(model: type[BaseModel], key: str) -> list[FieldInfo]:
    """The fields at a dotted name, one for each kind that has it."""
    models, fields = [model], list[FieldInfo]()
    for name in key.split("."):
        fields = [outer.model_fields[name] for outer in models if name in outer.model_fields]
        models = [inner for field in fields for inner in models_in(field.annotation)]
    return fields


def kinds_at(model: type[BaseModel], key: str) -> dict[str, type[BaseModel]]:
    """The models that a dotted name accepts, by their `kind`."""
    found = [inner for field in fields_at(model, key) for inner in models_in(field.annotation)]
    return {
        kind: each
        for each in found
        if "kind" in each.model_fields
        for kind in typing.get_args(each.model_fields["kind"].annotation)
    }


def defaults_of(model: type[BaseModel]) -> dict[str, Any]:
    """The values of all fields that have a default. A part that is required has the defaults of its own fields."""
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if field.is_required():
            inner = models_in(field.annotation)
            if len(inner) == 1 and kind_of(inner[0]) is None and not is_collection(field.annotation):
                values[name] = defaults_of(inner[0])
        elif field.default_factory is None:
            values[name] = as_plain(field.default)
    return values


def as_plain(value: Any) -> Any:
    """A default as YAML and JSON have it: models are mappings, tuples lists, paths text."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate that a misspelt name is nearest to, if one is near."""
    return next(iter(difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)), None)


def nearest_key(name: str, keys: Mapping[str, Key]) -> str | None:
    """The dotted name that is meant by an unknown one: of similar spelling, or described by the same words.

    `learning_rate` is near to no field's name; the description of `optimizer.lr` has both words. Fields within lists are left
    out: they cannot be set by their names.
    """
    settable = {key: known for key, known in keys.items() if known.in_list is None}
    # A part is rarely meant: of two fields of one name the one that is no part's comes first.
    leaves = {key.rpartition(".")[2]: key for key in sorted(settable, key=lambda key: -key.count("."))}
    leaf = name.rpartition(".")[2]
    close = nearest(name, settable, 0.8) or leaves.get(nearest(leaf, leaves, 0.8) or "")
    if close is not None:
        return close
    words = [word for word in re.split(r"[\W_]+", leaf.lower()) if word]
    for key, known in settable.items():
        if words and set(words) <= set(re.split(r"[\W_]+", known.description.lower())):
            return key
    return nearest(name, settable) or leaves.get(nearest(leaf, leaves) or "")
