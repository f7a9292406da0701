"""The built documentation opens from disk: its search finds pages, its pictures are there, and no page asks another host."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("index", "concepts", "environments/world", "notebooks/1_one_episode_by_hand", "api/algorithms", "source/tests/examples/ppo.py")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (pip install 'searchqa-gym[docs]')")
    folder = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    opened = browser.new_page()
    faults: list[str] = []
    opened.on("request", lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else faults.append(request.url))
    opened.on("requestfailed", lambda request: faults.append(request.url))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    yield opened
    opened.close()
    assert not faults


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_from_disk_with_its_pictures_and_asks_nobody(site: Path, page: Any, name: str) -> None:
    page.goto((site / f"{name}.html").as_uri())
    assert page.locator("h1").first.inner_text()
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


@pytest.mark.slow
def test_the_search_finds_a_page_from_disk(site: Path, page: Any) -> None:
    page.goto((site / "index.html").as_uri())
    page.locator("input.md-search__input").press_sequentially("curriculum")  # it listens to keys
    page.get_by_text("matching documents").wait_for(timeout=60_000)
    assert "simulated" in " ".join(page.locator(".md-search-result__item").all_inner_texts())
