"""The documentation: the site builds strictly, asks no other host, and no link of the repository is broken."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.serve.browsers import Tab

pytest.importorskip("mkdocs", reason="needs the extra docs")


def build(folder: Path, config: Path = REPOSITORY / "mkdocs.yml") -> subprocess.CompletedProcess:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", config, "--site-dir", folder]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


class Loaded(HTMLParser):
    """What a browser loads with a page: scripts, styles, pictures and frames, but no links to click."""

    def __init__(self):
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "video") and values.get("src"):
            self.urls.append(values["src"])
        if tag == "link" and values.get("href") and values.get("rel") != "canonical":
            self.urls.append(values["href"])


def test_no_page_asks_another_host(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert loaded.urls
        assert [url for url in loaded.urls if re.match(r"(https?:)?//", url)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text()), style


@pytest.mark.parametrize(
    "broken",
    [
        {
            "[a page](gone.md)": "'gone.md'",
            "[a heading](#gone)": "'#gone'",
            "[a file of the repository](../configs/gone.yaml)": "links to configs/gone.yaml",
        },
        pytest.param({"::: cibl_ray.gone": "cibl_ray.gone"}, marks=pytest.mark.slow),
    ],
)
def test_what_is_broken_fails_the_build(broken, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Title\n\n" + "\n\n".join(broken))
    (tmp_path / "scripts").symlink_to(REPOSITORY / "scripts")
    (tmp_path / "mkdocs.yml").write_text(f"INHERIT: {REPOSITORY / 'mkdocs.yml'}\nnav:\n  - index.md\n")
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    for said in broken.values():
        assert said in done.stderr


LINK = re.compile(r"\]\(([^()\s#]+)(?:#[^()\s]*)?\)")


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_of_the_repository_lead_to_files(path):
    text = re.sub(r"^```.*?^```", "", (REPOSITORY / path).read_text(), flags=re.MULTILINE | re.DOTALL)
    # `../../actions/` leads from a file of the repository to its workflows, on the host alone.
    links = [link for link in LINK.findall(text) if "://" not in link and not link.startswith("../../actions/")]
    broken = [link for link in links if not (REPOSITORY / link).exists()]
    assert broken == []


@pytest.fixture
def address(site):
    handler = functools.partial(QuietHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.browser
def test_search_leads_where_it_should(address, chromium):
    """In a browser, which asks no other host."""
    tab = Tab(chromium.new_context())
    for words, page in {
        "class weights": "reference/losses/",
        "oversampling": "reference/losses/",
        "tail shift": "explanation/evaluation/",
    }.items():
        tab.page.goto(f"{address}/")
        tab.page.fill(".md-search__input", words)
        tab.page.wait_for_function(
            "page => [...new Set([...document.querySelectorAll('.md-search-result__link')].map(a => a.href.split(/[?#]/)[0]))]"
            ".slice(0, 3).some(place => place.includes(page))",  # of the first three pages, each with its sections
            arg=page,
        )
    assert tab.hosts() == {address.removeprefix("http://")}
    assert tab.problems == []


@pytest.mark.browser
@pytest.mark.parametrize("page", ["", "reference/losses/", "reference/configuration/loss/", "reference/messages/"])
def test_pages_fit_a_phone(address, chromium, page):
    tab = Tab(chromium.new_context(viewport={"width": 390, "height": 844}))
    tab.page.goto(f"{address}/{page}")
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
