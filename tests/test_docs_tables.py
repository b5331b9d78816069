"""Tables and numbers of the docs are those of the recorded lines."""

import re

import pytest

pytest.importorskip("matplotlib", reason="needs the extra train")
from scripts.docs_site import tables


def test_no_page_is_stale():
    assert [str(path.relative_to(tables.REPOSITORY)) for path in tables.stale_pages()] == []


def test_a_changed_cell_and_a_changed_number_are_found():
    readme = (tables.REPOSITORY / "README.md").read_text()
    changed = readme.replace("61.5 ± 0.8", "71.5 ± 0.8").replace("the loader is 9.5 times", "the loader is 19.5 times")
    assert changed != readme
    assert tables.requoted("README.md", tables.redrawn(changed)) == readme


def test_a_sentence_that_is_gone_is_found():
    with pytest.raises(ValueError, match="mend QUOTES"):
        tables.requoted("README.md", "nothing")


def test_a_table_of_results_leaves_out_lines_of_a_recipe_that_has_changed_since(monkeypatch):
    lines = tables.read("results/equal_cost-laptop.jsonl")
    changed = [line | {"seed": 1, "config": line["config"] | {"optimizer": {"lr": 7.0}}} for line in lines]
    failed = [line | {"seed": 2, "failed": "out of memory"} for line in lines]
    before = tables.equal_cost()
    for read in (lines + changed + failed, lines[:1]):
        tables._current.cache_clear()
        monkeypatch.setattr(tables, "read", lambda name, read=read: read)
        assert (tables.equal_cost() == before) == (len(read) > 1)
    tables._current.cache_clear()


def test_recorded_lines_have_a_command_and_hardware():
    lines = tables.read("results/measured.jsonl")
    assert len({line["table"] for line in lines}) == len(lines)
    for line in lines:
        assert line["command"].startswith("python -m ")
        assert line["hardware"]
        assert all(len(row) == len(line["columns"]) for row in line["rows"])
    docs = "".join(path.read_text() for path in (tables.REPOSITORY / "docs").rglob("*.md"))
    assert set(re.findall(r"<!-- table measured (\S+) -->", docs)) == {line["table"] for line in lines}


def test_every_loss_has_a_card():
    from typing import get_args

    from cibl_ray.losses.config import AnyLoss
    from pipelines.common.fields import kind_of

    parts = ["Formula", "What it needs", "When to use it", "Hyper-parameters by data set", "Source", "Measured effect"]
    for model in get_args(AnyLoss):
        text = (tables.REPOSITORY / "docs" / "reference" / "losses" / f"{kind_of(model)}.md").read_text()
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == parts
        assert all(section.strip() for section in re.split(r"^## .+$", text, flags=re.MULTILINE)[1:])
