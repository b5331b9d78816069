"""The reference pages that the code writes: configuration, commands, HTTP and the Python API."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from cibl_ray.config import RunConfig
from cibl_ray.tuning.config import SweepConfig
from pipelines.common.command_line import ConfigParser
from pipelines.common.errors import CommandParser
from pipelines.common.explain import kind_names, range_in_words, sentence, summary_of, type_in_words
from pipelines.common.fields import as_plain, is_collection, kind_of, models_in
from serve.openapi import openapi
from serve.settings import ServiceConfig

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGURATION = "reference/configuration"
# Values for fields whose type and range alone give no sensible one.
EXAMPLES: dict[str, Any] = {
    "access_log": "logs",
    "bound.metric": "head",
    "bundles": ["runs/first/bundle"],
    "cors": ["https://example.org"],
    "data.mean": [0.5, 0.5, 0.5],
    "data.published": "s3://bucket/prepared",
    "data.std": [0.25, 0.25, 0.25],
    "data.window": [0, 4095],
    "data.views.augment": [{"kind": "grayscale", "probability": 0.2}],
    "data.views.augment.sigma": [0.1, 1.0],
    "data.views.cut.ratio": [0.9, 1.1],
    "data.views.cut.scale": [0.5, 1.0],
    "loss.classifier_views": [0, 1],
    "more_precisions": ["int8"],
    "data.source.expect": {"train": 115846, "val": 20000, "test": 50000},
    "formats": ["JPEG", "PNG", "WEBP", "GIF"],
    "keys_file": "keys.txt",
    "loss.beta": 0.999,
    "loss.momentum": 0.99,
    "loss.temperature": 0.2,
    "optimizer.momentum": 0.8,
    "network.backbone.name": "vit_small_patch16_224",
    "network.backbone.path": "my_package.my_model",
    "network.backbone.weights": "hf-hub:OWNER/NAME",
    "optimizer.betas": [0.9, 0.98],
    "path_prefix": "/models",
    "schedule.milestones": [0.6, 0.8],
    "search": {"optimizer.lr": {"kind": "log_uniform", "low": 0.01, "high": 1}},
    "search.values": [0, 0.05, 0.5],
    "set": {"train.epochs": 20},
    "tls_certificate": "certificate.pem",
    "tls_key": "key.pem",
    "train.average": 0.999,
    "trusted_proxies": ["10.0.0.0/8"],
}


def pages() -> dict[str, str]:
    """Every generated page: its path below docs/, and its Markdown."""
    return {
        **configuration_pages(),
        "reference/commands.md": commands_page(),
        "reference/http.md": http_page(),
        "reference/api.md": api_page(),
        "reference/messages.md": messages_page(),
    }


# Configuration


def configuration_pages() -> dict[str, str]:
    """A page for each part of a run's configuration, for sweeps and for a service, and an overview."""
    found = {}
    rows = []
    for name, info in RunConfig.model_fields.items():
        models = models_in(info.annotation)
        if not models:
            continue
        title = f"`{name}`"
        meaning = sentence(info.description) or summary_of(models[0])
        if len(models) > 1:
            meaning = f"One of {len(models)} kinds: {', '.join(kind_names(each) for each in models)}."
        rows.append(f"| [{title}]({name}.md) | {meaning} |")
        lines = [f"# The part {title}", "", meaning, "", *_part(name, info, 2)]
        found[f"{CONFIGURATION}/{name}.md"] = "\n".join(lines) + "\n"
    top = [
        line for name, info in RunConfig.model_fields.items() if not models_in(info.annotation) for line in _field(name, info)
    ]
    overview = Path(__file__).with_name("configuration.md").read_text()
    for name, lines in (("PARTS", rows), ("TOP", top)):
        overview = overview.replace(f"{name}\n", "\n".join(lines) + "\n")
    found[f"{CONFIGURATION}/README.md"] = overview
    found[f"{CONFIGURATION}/sweep.md"] = _whole(
        SweepConfig,
        "Sweep files",
        "What a sweep file may say. `python -m cibl_ray.tune SWEEP --FIELD VALUE` sets a field, too.",
    )
    found[f"{CONFIGURATION}/service.md"] = _whole(
        ServiceConfig,
        "Service settings",
        "The `args` of an application in the file of `serve deploy`. `python -m serve` has a flag for nearly every one: "
        "[commands](../commands.md#python-m-serve).",
    )
    return found


def _whole(model: type[BaseModel], title: str, text: str) -> str:
    """One page for a model."""
    return "\n".join([f"# {title}", "", text, "", *_fields(model, "", 2)]) + "\n"


def _fields(model: type[BaseModel], key: str, level: int, kind: str = "") -> Iterator[str]:
    """A model's own fields, then the parts in it."""
    for name, info in model.model_fields.items():
        if (not models_in(info.annotation) or is_collection(info.annotation)) and not (kind and name == "kind"):
            yield from _field(f"{key}.{name}" if key else name, info, kind)
    for name, info in model.model_fields.items():
        if models_in(info.annotation):
            where = f"{key}.{name}" if key else name
            each = ", each" if is_collection(info.annotation) else ""
            yield from ["#" * level + f" `{where}`{each} {{: #{_anchor(where, kind)}-part }}", ""]
            text = sentence(info.description)
            if text and not is_collection(info.annotation):
                yield from [text, ""]
            yield from _part(where, info, level + 1)


def _part(key: str, info: FieldInfo, level: int) -> Iterator[str]:
    """The fields of a part: of its one model, or of each kind."""
    models = models_in(info.annotation)
    if len(models) == 1:
        if summary_of(models[0]):
            yield from [summary_of(models[0]), ""]
        yield from _fields(models[0], key, level)
        return
    for model in models:
        name = kind_of(model) or ""
        yield from ["#" * min(level, 5) + f" Kind `{kind_names(model)}` {{: #{_anchor(key)}-kind-{name} }}", ""]
        yield from [summary_of(model), ""]
        yield from _fields(model, key, level + 1, name)


def _field(key: str, info: FieldInfo, kind: str = "") -> list[str]:
    """One field: a heading, its meaning, and a line of type, range, default and example."""
    facts = [type_in_words(info.annotation) + range_in_words(info)]
    facts.append("required" if info.is_required() else f"default `{_yaml(_default(info))}`")
    value = example(key, info)
    if value is not None:
        facts.append(f"example `{key}: {_yaml(value)}`")
    return [
        f'###### <code>{key}</code> {{: #{_anchor(key, kind)} .field data-toc-label="{key}" }}',
        "",
        f"{sentence(info.description)}",
        f'<span class="facts">{" · ".join(facts)}</span>',
        "",
    ]


def _anchor(key: str, kind: str = "") -> str:
    return f"{key}.{kind}" if kind else key


def _default(info: FieldInfo) -> Any:
    if info.is_required() or info.default_factory is not None:
        return None
    return as_plain(info.get_default())


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1e9, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def example(key: str, info: FieldInfo) -> Any:
    """A value that a field can have and that is not its default; None where there is no sensible one.

    Args:
        key: The field's dotted name.
        info: The field.
    """
    types = _plain_types(info.annotation)
    default = _default(info)
    if EXAMPLES.get(key, default) != default and _takes(info, EXAMPLES[key]):
        return EXAMPLES[key]
    for annotation in types:
        choices = [each for each in typing.get_args(annotation) if each != default] if _is_literal(annotation) else []
        if choices:
            return choices[0]
        if annotation is bool:
            return not default
        if annotation in (int, float):
            return _other_number(annotation, default, _bounds(info))
        if annotation is Path:
            return "FOLDER" if key.endswith(("path", "root", "runs", "prepared")) else "FILE"
        if annotation is str:
            return "NAME"
    return None


def _takes(info: FieldInfo, value: Any) -> bool:
    """Whether a field can have a value: fields of several kinds may share a name."""
    try:
        TypeAdapter(typing.Annotated[info.annotation, *(info.metadata or [None])]).validate_python(value)
    except ValidationError:
        return False
    return True


def _is_literal(annotation: Any) -> bool:
    return typing.get_origin(annotation) is Literal


def _plain_types(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _plain_types(typing.get_args(annotation)[0])
    if origin in (tuple, list, dict):
        return []
    if origin is not None and not _is_literal(annotation):
        return [inner for each in typing.get_args(annotation) for inner in _plain_types(each)]
    return [annotation]


def _bounds(info: FieldInfo) -> dict[str, float]:
    """ge, gt, le and lt of a field, where it has them."""
    metadata = list(info.metadata)
    for each in typing.get_args(info.annotation):
        metadata += [one for extra in typing.get_args(each)[1:] for one in getattr(extra, "metadata", [])]
    return {name: getattr(one, name) for one in metadata for name in ("ge", "gt", "le", "lt") if hasattr(one, name)}


def _other_number(kind: type, default: Any, bounds: Mapping[str, float]) -> float:
    low = bounds.get("ge", bounds.get("gt", 0))
    high = bounds.get("le", bounds.get("lt"))
    default = default if isinstance(default, int | float) else None  # a number, or a word such as 'auto'
    for value in (default * 2 if default else None, default / 2 if default else None, 1, 0.5, low + 1, low):
        if value is None or value == default or kind(value) != value:
            continue
        if value < low or (value == low and "gt" in bounds) or (high is not None and value >= high):
            continue
        return kind(value)
    raise ValueError(f"no example between {low} and {high}")


# Commands


class _MadeError(Exception):
    """Carries a command's parser out of its `main`."""

    def __init__(self, parser: CommandParser) -> None:
        super().__init__()
        self.parser = parser


def command_modules() -> list[str]:
    """The modules that are commands, the most used first."""
    found = set()
    for package in ("cibl_ray", "pipelines", "serve"):
        for path in (REPOSITORY / package).rglob("*.py"):
            found.update(re.findall(r'prog="python -m ([\w.]+)"', path.read_text()))
    order = [f"cibl_ray.{name}" for name in ("train", "predict", "evaluate", "tune", "export")]
    order += ["serve", "serve.web", "serve.edge", "pipelines.prepare", "pipelines.preview", "pipelines.doctor"]
    return sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))


def command_help(module: str) -> str:
    """What `python -m MODULE --help` prints of the command's own options.

    Args:
        module: The command's module.
    """

    def stop(self: CommandParser, *_: Any) -> None:
        raise _MadeError(self)

    path = REPOSITORY / module.replace(".", "/")
    main = importlib.import_module(f"{module}.__main__" if path.is_dir() else module).main
    environment = {"COLUMNS": "100", "HOME": "/home/you"}
    with (
        patch.dict(os.environ, environment),
        patch.object(CommandParser, "parse_args", stop),
        patch.object(ConfigParser, "split", stop),
        patch.object(sys, "argv", ["command"]),
    ):
        try:
            main()
        except _MadeError as made:
            return made.parser.format_help().replace(str(Path.home()), "~").replace(os.environ["HOME"], "~")
    raise ValueError(f"{module} made no parser")


def commands_page() -> str:
    """Every command with its options."""
    lines = [
        "# Commands",
        "",
        "Each command is a module: `python -m MODULE`. `--help` prints what stands here. Where a command takes a "
        "configuration, every [field](configuration/README.md) is an option, too.",
        "",
        "| command | |",
        "|---|---|",
    ]
    sections = []
    for module in command_modules():
        path = REPOSITORY / module.replace(".", "/")
        text = command_help(module)
        summary = _first_line(module, path)
        lines.append(f"| [`python -m {module}`](#{_command_anchor(module)}) | {summary} |")
        sections += ["", f"## python -m {module} {{: #{_command_anchor(module)} }}", "", "```text", text.rstrip(), "```"]
    completion = [
        "",
        "## Completion in a shell",
        "",
        "Bash and zsh complete commands, options, fields, and the values of fields that have few, once "
        "[argcomplete](https://kislyuk.github.io/argcomplete/) is switched on (`pip install argcomplete`, if its command is "
        "missing; then open a new shell):",
        "",
        "```bash",
        "activate-global-python-argcomplete --user",
        "python -m cibl_ray.train quickstart --loss.<Tab>",
        "```",
    ]
    return "\n".join([*lines, *sections, *completion, ""])


def _command_anchor(module: str) -> str:
    return f"python-m-{module.replace('.', '-')}"


def _first_line(module: str, path: Path) -> str:
    """What a command does, of its module's docstring."""
    doc = importlib.import_module(f"{module}.__main__" if path.is_dir() else module).__doc__ or ""
    text = re.split(r"(?<=[.:])\s", doc.split("\n\n")[0].partition(": ")[2])[0]
    return sentence(text[:1].upper() + text[1:])


# HTTP


def http_page() -> str:
    """The routes of the service, from its OpenAPI description."""
    document = openapi(ServiceConfig(bundles=(Path("BUNDLE"),)))
    lines = [
        "# HTTP",
        "",
        "The routes of `python -m serve BUNDLE`, from the OpenAPI description that the service has at `/openapi.json`. "
        "`/docs` shows it as a page. How to run a service: [serve a model](../how-to/serve.md). Its limits and their flags: "
        "[service settings](configuration/service.md).",
        "",
        "Every error is JSON with `error`, `code` and `request_id`. With API keys, send `x-api-key: KEY` or "
        "`Authorization: Bearer KEY`.",
        "",
        "| route | |",
        "|---|---|",
    ]
    sections: list[str] = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            title = f"{method.upper()} {path}"
            anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
            lines.append(f"| [`{title}`](#{anchor}) | {operation['summary']} |")
            sections += ["", f"## {title} {{: #{anchor} }}", "", sentence(operation["summary"]), *_operation(operation)]
    return "\n".join([*lines, *sections, ""])


def _operation(operation: Mapping[str, Any]) -> Iterator[str]:
    parameters = operation.get("parameters", [])
    if parameters:
        yield from ["", "| parameter | in | type | default | |", "|---|---|---|---|---|"]
        for each in parameters:
            schema = each["schema"]
            default = schema.get("default", "–")
            yield f"| `{each['name']}` | {each['in']} | {_schema(schema)} | {str(default).lower()} | {each['description']} |"
    if body := operation.get("requestBody"):
        yield from ["", "| body | |", "|---|---|"]
        yield from (f"| `{kind}` | {_schema(content['schema'])} |" for kind, content in body["content"].items())
    yield from ["", "| answer | content |", "|---|---|"]
    for status, response in operation["responses"].items():
        kinds = ", ".join(f"`{kind}`: {_schema(each['schema'])}" for kind, each in response.get("content", {}).items())
        yield f"| {status}: {response['description']} | {kinds or '–'} |"


def _schema(schema: Mapping[str, Any]) -> str:
    """A schema in words."""
    if "$ref" in schema:
        return "an object with `error`, `code`, `request_id`"
    if "oneOf" in schema:
        return "; or ".join(_schema(each) for each in schema["oneOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "object":
        names = [f"`{name}`" for name in schema.get("properties", {})]
        return f"an object with {', '.join(names)}" if names else "an object"
    if schema.get("type") == "array":
        return f"a list of: {_schema(schema['items'])}"
    kind = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}[schema["type"]]
    if schema.get("format") == "binary":
        kind = schema.get("description", "bytes")
    if schema.get("contentEncoding") == "base64":
        kind = "base64"
    if "minimum" in schema:
        kind += f", {schema['minimum']} to {schema['maximum']}" if "maximum" in schema else f", at least {schema['minimum']}"
    return kind


# Messages

AREAS = {
    "Command line and configuration": ("pipelines/common", "pipelines/config.py", "cibl_ray/config.py", "cibl_ray/train.py"),
    "Images and preparing": ("pipelines",),
    "Networks and losses": ("cibl_ray/networks", "cibl_ray/losses", "cibl_ray/features"),
    "Sweeps": ("cibl_ray/tuning", "cibl_ray/tune.py"),
    "Clusters": ("cibl_ray/cluster", "cibl_ray/world.py"),
    "Exporting": ("cibl_ray/exporting", "cibl_ray/bundle", "cibl_ray/export.py"),
    "Training, runs and evaluation": ("cibl_ray",),
    "Serving, the page and the edge": ("serve",),
}


def messages() -> dict[str, list[str]]:
    """The text of every mistake that the code reports, by area; what is filled in is an ellipsis."""
    found: dict[str, list[str]] = {area: [] for area in AREAS}
    seen = set()
    for area, places in AREAS.items():
        paths = [path for place in places for path in sorted((REPOSITORY / place).rglob("*.py"))]
        paths += [REPOSITORY / place for place in places if place.endswith(".py")]
        for path in paths:
            if path in seen:
                continue
            seen.add(path)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                    text = _message(node.exc.args[0]) if node.exc.args else ""
                    if node.exc.func.id in ("UserError", "ValueError") and len(text.replace("…", "").strip()) > 20:
                        found[area].append(text)
    return {area: sorted(set(texts), key=lambda text: text.lstrip("… ").lower()) for area, texts in found.items()}


def _message(node: ast.expr) -> str:
    """A message's text, with an ellipsis for each value."""
    match node:
        case ast.Constant(value=str(text)):
            return " ".join(text.split())
        case ast.JoinedStr(values=values):
            parts = [each.value if isinstance(each, ast.Constant) else "…" for each in values]
            return re.sub(r"'…'|…+", "…", " ".join("".join(map(str, parts)).split()))
        case _:
            return ""


def messages_page() -> str:
    """Every message, with the fix that it names."""
    lines = [
        "# Messages",
        "",
        "Every mistake that the code reports, in the words of the message; … stands for a value. A message names the cause, "
        "and after the semicolon the fix. Those that people meet most are explained in "
        "[troubleshooting](../how-to/troubleshooting.md).",
    ]
    for area, texts in messages().items():
        lines += ["", f"## {area}", "", "| message | fix |", "|---|---|"]
        for text in texts:
            cause, _, fix = text.rpartition("; ") if "; " in text else (text, "", "")
            lines.append(f"| {_literal(cause)} | {_literal(fix)} |")
    return "\n".join([*lines, ""])


def _literal(text: str) -> str:
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", text)


# The Python API

API = {
    "cibl_ray": ("Train, evaluate, predict, export", "A tutorial: [the Python API](../tutorials/python-notebook.md)."),
    "cibl_ray.losses": (
        "Losses as torch modules",
        "How to use them: [a loss in your own loop](../how-to/loss-in-your-loop.md). What each does: "
        "[losses](losses/README.md).",
    ),
    "serve.edge": ("The edge in a program", "How to use it: [edge devices](../how-to/serve.md#the-edge)."),
}


def api_page() -> str:
    """Every public name, for mkdocstrings."""
    lines = ["# Python API", "", "Everything that is public. Other modules may move between releases."]
    for module, (title, text) in API.items():
        lines += ["", f"## {title}", "", f"`import {module}`. {text}"]
        for name in importlib.import_module(module).__all__:
            lines += ["", f"::: {module}.{name}", "    options:", "      heading_level: 3"]
    return "\n".join([*lines, ""])


@functools.cache
def _sources(search_path: Path) -> Any:
    """A reader of this project's code and of packages in `search_path`, which does not import them."""
    import griffe

    loader = griffe.GriffeLoader(search_paths=[search_path, REPOSITORY])
    for package in ("pipelines", "cibl_ray", "serve"):
        loader.load(package)
    return loader


def undocumented(module: str, search_path: Path = REPOSITORY) -> list[str]:
    """The public names of a module that lack a docstring, and the parameters that their docstrings do not name.

    Args:
        module: A module with `__all__`.
        search_path: The folder that holds its package.
    """
    loader = _sources(search_path)
    loader.load(module.partition(".")[0])
    loader.resolve_aliases(external=False)
    package = loader.modules_collection[module]
    found = []
    for name in typing.cast("list[str]", package.exports or []):
        thing = package[str(name)]
        thing = thing.final_target if thing.is_alias else thing
        found += _undocumented(thing, f"{module}.{name}")
        if thing.is_class:
            for member, inner in thing.members.items():
                if not member.startswith("_") and not inner.is_alias and (inner.is_function or "property" in inner.labels):
                    found += _undocumented(inner, f"{module}.{name}.{member}")
    return found


def _undocumented(thing: Any, name: str) -> list[str]:
    if not thing.has_docstring:
        return [f"{name} has no docstring"]
    if not thing.is_function:
        return []
    sections = thing.docstring.parse("google", warnings=False)
    named = {each.name.lstrip("*") for section in sections if section.kind.value == "parameters" for each in section.value}
    given = {parameter.name for parameter in thing.parameters} - {"self", "cls"}
    return [f"{name}: the docstring does not name {each!r}" for each in sorted(given - named)]
