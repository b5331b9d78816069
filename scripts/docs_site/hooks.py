"""MkDocs hooks: pages that the code or the repository writes, and links to files outside docs/."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from scripts.docs_site import reference

log = logging.getLogger("mkdocs.hooks")  # a warning fails a strict build

REPOSITORY = Path(__file__).resolve().parents[2]
# Files of the repository that are pages of the site, too.
PAGES = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
}
# Search shows what was measured and tried, and the whole list of messages, after everything else.
BOOSTS = {"results/": 0.05, "lab-notes/": 0.05, "project/": 0.1, "reference/messages": 0.3}
_LINK = re.compile(r"(\]\()([^()\s#]+)((?:#[^()\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are written elsewhere, and the files of the repository that pages link to."""
    for source, target in PAGES.items():
        text = _fenced_apart((REPOSITORY / source).read_text(), partial(_moved, source=source, target=target))
        files.append(File.generated(config, target, content=text))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text = notebook_page(json.loads(file.content_string), PurePosixPath(file.src_uri).name)
        path = _page_of(file.src_uri)
        files.append(File.generated(config, path, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    for path, text in reference.pages().items():
        files.append(File.generated(config, path, content=text))
    for module in reference.API:
        for problem in reference.undocumented(module):
            log.warning("%s", problem)
    for page in list(files.documentation_pages()):
        for path in sorted(_outside(page.content_string, page.src_uri)):
            if files.get_file_from_path(f"repository/{path}") is None:
                source = REPOSITORY / path
                if not source.is_file():
                    log.warning("%s links to %s, which is no file of the repository", page.src_uri, path)
                    continue
                files.append(File.generated(config, f"repository/{path}", abs_src_path=str(source)))
    return files


def _page_of(notebook: str) -> str:
    """The page of a notebook: NAME-notebook.md, because NAME.md may be there, too."""
    return f"{notebook.removesuffix('.ipynb').removesuffix('-notebook')}-notebook.md"


def notebook_page(notebook: dict[str, Any], name: str) -> str:
    """A notebook as a page: its texts, its code, and what the code shows.

    Args:
        notebook: The content of the file, nbformat 4.
        name: The file's name, for the link to it.
    """
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![What the code above draws](data:image/png;base64,{''.join(data['image/png']).strip()})")
                continue
            text = "".join(output.get("text") or data.get("text/plain") or [])
            if text.strip():
                parts.append(f"```text\n{text.rstrip()}\n```")
    parts.insert(1, f'<a href="../{name}" download>Download this notebook</a>')
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside docs/ at their copies in the site."""
    here = PurePosixPath(page.file.src_uri).parent
    for start, boost in BOOSTS.items():
        if page.file.src_uri.startswith(start):
            page.meta.setdefault("search", {"boost": boost})

    def fix(match: re.Match[str]) -> str:
        path = _repository_path(match[2], page.file.src_uri)
        if path is None and match[2].endswith(".ipynb"):
            return f"{match[1]}{_page_of(match[2])}{match[3]}"
        if path is None:
            return match[0]
        return f"{match[1]}{os.path.relpath(PAGES.get(path, f'repository/{path}'), here)}{match[3]}"

    return _fenced_apart(markdown, lambda part: _LINK.sub(fix, part))


def _fenced_apart(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` applied to all but fenced blocks of code."""
    parts = re.split(r"(^```.*?^```[^\n]*$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def _moved(text: str, source: str, target: str) -> str:
    """The text of a file of the repository as a page of the site: links point at pages."""

    def fix(match: re.Match[str]) -> str:
        if "://" in match[2]:
            return match[0]
        path = os.path.normpath(PurePosixPath(source).parent / match[2])
        inside = path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path, f"../{path}")
        return f"{match[1]}{os.path.relpath(inside, PurePosixPath(target).parent)}{match[3]}"

    return _LINK.sub(fix, text)


def _repository_path(link: str, page: str) -> str | None:
    """The path in the repository of a link of a page that leads out of docs/, or None."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    path = os.path.normpath(PurePosixPath("docs", page).parent / link)
    return None if path.startswith("docs/") else path


def _outside(text: str, page: str) -> set[str]:
    """The files outside docs/ that a page links to, but those that are pages of the site."""
    found: set[str] = set()

    def note(part: str) -> str:
        found.update(path for link in _LINK.findall(part) if (path := _repository_path(link[1], page)) and path not in PAGES)
        return part

    _fenced_apart(text, note)
    return found
