"""A real browser without a window, for the pages that the package writes."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def executable() -> str:
    """Where a browser is. Without one the tests are skipped, or fail where SEARCHQA_REQUIRE_BROWSER=1."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    absent = f"no browser is on the path: {', '.join(BROWSERS)}" if found is None else ""
    if importlib.util.find_spec("playwright") is None:
        absent = "playwright is not installed (pip install 'searchqa-gym[test]')"
    if absent and os.environ.get("SEARCHQA_REQUIRE_BROWSER") == "1":
        pytest.fail(absent)
    if absent or found is None:
        pytest.skip(absent)
    return found


@pytest.fixture(scope="module")  # not longer: while it lives, no other test of the process could run an event loop
def browser(executable: str) -> Iterator[Any]:
    """A browser for the tests of a file."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def window(browser: Any) -> Iterator[Any]:
    """What pages are opened in: quicker than a window for each."""
    context = browser.new_context()
    yield context
    context.close()


@pytest.fixture
def open_page(window: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the text of a page from disk. The test fails if the page writes an error, opens a dialogue, or asks for anything but itself."""
    pages, faults = [], []

    def opened(text: str, fragment: str = "", scheme: str = "light", width: int = 1300, height: int = 900) -> Any:
        file = tmp_path / f"page{len(pages)}.html"
        file.write_text(text, encoding="utf-8")
        page = window.new_page()
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=scheme)
        pages.append(page)
        page.set_default_timeout(10_000)
        page.on(
            "console", lambda message: faults.append(f"{message.type}: {message.text}") if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (faults.append(f"dialogue: {dialog.message}"), dialog.dismiss()))
        page.on(
            "request", lambda request: faults.append(f"request: {request.url[:200]}") if not request.url.startswith(file.as_uri()) else None
        )
        page.goto(file.as_uri() + fragment)
        page.wait_for_selector("html[data-ready]")
        return page

    yield opened
    for page in pages:
        page.close()
    assert faults == []
