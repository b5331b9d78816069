"""How the text of the documentation is written."""

import itertools
import subprocess

import pytest

from tests.conftest import REPOSITORY

markdown_it = pytest.importorskip("markdown_it", reason="needs the extra dev")


def _wrapped(text: str) -> list[str]:
    """First lines of the paragraphs that take several lines; badges and pictures may."""
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text)
    return [
        token.content.splitlines()[0]
        for before, token in itertools.pairwise(tokens)
        if before.type == "paragraph_open"
        and any(child.type == "softbreak" for child in token.children)
        and any(child.type == "text" and child.content.strip() for child in token.children)
    ]


def test_a_paragraph_is_a_line():
    assert _wrapped("A line\nand another.\n\n- An entry\n  of two.\n\n[![a](b)](c)\n[![d](e)](f)\n\n| a |\n|---|\n| b |\n") == [
        "A line",
        "An entry",
    ]
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, text=True)
    pages = listed.stdout.splitlines() if listed.returncode == 0 else []
    pages = pages or [str(page.relative_to(REPOSITORY)) for page in REPOSITORY.glob("docs/**/*.md")]
    assert len(pages) > 20
    assert {page: found for page in pages if (found := _wrapped((REPOSITORY / page).read_text()))} == {}
