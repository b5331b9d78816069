"""The reference pages that the code writes: no field, option, route or public name is missing."""

import ast
import re
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, TypeAdapter

from cibl_ray.config import RunConfig
from cibl_ray.tuning.config import SweepConfig
from pipelines.common.config_file import shipped_configs
from pipelines.common.fields import is_collection, kind_of, known_keys, models_in
from serve.openapi import openapi
from serve.settings import ServiceConfig

pytest.importorskip("griffe", reason="needs the extra docs")
from scripts.docs_site import reference


def fields(model: type[BaseModel], key: str = "", kind: str = ""):
    for name, info in model.model_fields.items():
        where = f"{key}.{name}" if key else name
        if (not models_in(info.annotation) or is_collection(info.annotation)) and not (kind and name == "kind"):
            yield where, info, kind
        for inner in models_in(info.annotation):
            yield from fields(inner, where, (kind_of(inner) or "") if len(models_in(info.annotation)) > 1 else "")


MODELS = {"run": RunConfig, "sweep": SweepConfig, "service": ServiceConfig}


@pytest.mark.parametrize("name", MODELS)
def test_every_field_has_its_meaning_type_default_and_example(name):
    text = "".join(page for path, page in reference.configuration_pages().items() if (name == "run") != (f"/{name}.md" in path))
    found = list(fields(MODELS[name]))
    assert {where for where, _, _ in found} <= set(known_keys(MODELS[name]))
    for where, _, kind in found:
        entry = text.partition(f"{{: #{reference._anchor(where, kind)} .field")[2].partition("######")[0]
        assert entry, where
        lines = entry.splitlines()
        assert lines[2].endswith("."), where
        assert "<span" in lines[3], where
        assert ("default `" in lines[3]) != ("· required" in lines[3]), where


def test_every_shipped_configuration_is_named():
    page = reference.configuration_pages()["reference/configuration/README.md"]
    assert [name for name in shipped_configs() if f"`{name}`" not in page and not name.startswith("recipes/")] == []


@pytest.mark.parametrize("name", MODELS)
def test_examples_are_values_that_the_fields_take(name):
    with_example = 0
    for where, info, _ in fields(MODELS[name]):
        value = reference.example(where, info)
        if value is None:
            continue
        with_example += 1
        TypeAdapter(Annotated[info.annotation, *(info.metadata or [None])]).validate_python(value)
        assert value != reference._default(info), where
    assert with_example > 0.8 * len(list(fields(MODELS[name])))


def test_every_command_is_there_with_its_options():
    text = reference.commands_page()
    assert set(reference.command_modules()) == {
        *(f"cibl_ray.{name}" for name in ("train", "evaluate", "predict", "tune", "export")),
        *("serve", "serve.web", "serve.edge", "serve.page.ort", "pipelines.prepare", "pipelines.preview", "pipelines.doctor"),
    }
    for option in ("--tail-shift", "--cluster", "--max-connections-per-address", "--no-webgpu", "--check"):
        assert option in text
    assert str(Path.home()) not in text.replace("~", "")


def test_every_route_is_there():
    text = reference.http_page()
    for path, methods in openapi(ServiceConfig(bundles=(Path("B"),)))["paths"].items():
        for method in methods:
            assert f"## {method.upper()} {path} " in text


def test_public_names_are_documented():
    assert [problem for module in reference.API for problem in reference.undocumented(module)] == []
    assert "::: cibl_ray.losses.CIBLLoss" in reference.api_page()


def test_an_undocumented_name_is_found(tmp_path):
    (tmp_path / "bare.py").write_text(
        '"""A module."""\n\n__all__ = ["Thing", "f", "g"]\n\n\n'
        "def f():\n    return 1\n\n\n"
        'def g(first, second):\n    """Add.\n\n    Args:\n        first: One.\n    """\n\n\n'
        'class Thing:\n    """A thing."""\n\n    def run(self):\n        return 1\n'
    )
    assert reference.undocumented("bare", tmp_path) == [
        "bare.Thing.run has no docstring",
        "bare.f has no docstring",
        "bare.g: the docstring does not name 'second'",
    ]


def test_messages_of_troubleshooting_are_in_the_code():
    """The words between the values of each message."""
    folders = (reference.REPOSITORY / name for name in ("cibl_ray", "pipelines", "serve"))
    nodes = [node for folder in folders for path in folder.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    texts = [reference._message(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]
    known = "\n".join([*texts, (reference.REPOSITORY / "scripts" / "setup.sh").read_text()])
    page = (reference.REPOSITORY / "docs" / "how-to" / "troubleshooting.md").read_text()
    rows = [row for row in re.findall(r"^\| (.+?) \|", page, re.MULTILINE) if row not in ("message", "---")]
    assert len(rows) > 25
    for row in rows:
        for words in re.split("…|, and ", row):
            assert len(words.strip()) < 6 or words.strip() in known, row


def test_messages_name_the_fix():
    found = reference.messages()
    assert all(len(texts) > 5 for texts in found.values())
    assert (
        "run folder … already exists; …choose another name (--name, in Python name=)" in found["Training, runs and evaluation"]
    )
    assert reference.messages_page().count("\n| ") > 200
