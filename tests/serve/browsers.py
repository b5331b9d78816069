"""A real Chromium for tests (Debian's), driven by Playwright. Where one of them is missing, the test skips with one line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Tab:
    """One page in a context of its own.

    Attributes:
        page: Playwright's page.
        problems: What the page has reported: exceptions, errors on the console, requests to another host.
    """

    def __init__(self, context: Any) -> None:
        self.context = context
        self.page = context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        context.on("request", lambda request: self.requests.append(request.url))

    def hosts(self) -> set[str]:
        """Host and port of every request."""
        return {url.split("/")[2] for url in self.requests if url.startswith("http")}


# A GPU in software, so that WebGPU is there on every machine.
SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")


@pytest.fixture(scope="session")
def playwright() -> Iterator[Any]:
    """Playwright, where it and a Chromium are installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    if executable() is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with sync_api.sync_playwright() as running:
        yield running


def executable() -> str | None:
    """The path of Chromium."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="session")
def chromium(playwright: Any) -> Iterator[Any]:
    """A running Chromium."""
    browser = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Tab]:
    """A fresh page of a desktop's size."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    yield Tab(context)
    context.close()
