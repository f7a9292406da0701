"""The page of a comparison of algorithms in a real browser: it opens from disk without a fault, and a click on a title sorts its table."""

from __future__ import annotations

from typing import Any

import pytest

from searchqa_agents.bench.page import PageEntry, PageRow, build_page
from searchqa_agents.bench.pictures import Picture, looks, profiles
from searchqa_agents.bench.table import Column, TableCell

ROWS = {"beta": (0.5, None), "<b>alpha</b>": (0.75, 9000.0), "gamma": (0.25, 700.0)}


@pytest.fixture(scope="module")
def text() -> str:
    """Three algorithms with a score and tokens, of which one has none."""
    columns = [
        Column("algorithm", "", lambda one: TableCell(""), small_first=True),
        Column("score", "Higher is better.", lambda one: TableCell("")),
        Column("tokens", "Lower is better.", lambda one: TableCell(""), small_first=True),
    ]
    rows = [
        PageRow(
            [
                TableCell(name, value=name),
                TableCell(f"{score:.2f}", "0.1 to 0.9", score),
                TableCell("never" if tokens is None else f"{tokens:,.0f}", value=tokens),
            ],
            mine=name == "beta",
        )
        for name, (score, tokens) in ROWS.items()
    ]
    picture = Picture("profiles.png", "Profiles", "What they are.", profiles({}, looks([], [], None)))
    entry = PageEntry("beta", ["From beta."], "searchqa bench algorithm=beta", {"stamp": {"note": "</pre><script>alert(1)</script>"}})
    return build_page(
        title="beta on hand-v1",
        subtitle="3 algorithms",
        sentences=["beta is number 2 of 3."],
        columns=columns,
        rows=rows,
        notes=["A note."],
        pictures=[picture],
        entries=[entry],
    )


def names(page: Any) -> list[str]:
    found: list[str] = page.eval_on_selector_all("tbody tr", "rows => rows.map((row) => row.cells[0].textContent)")
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_with_table_picture_and_origin(text: str, scheme: str, open_page: Any) -> None:
    page = open_page(text, scheme=scheme)
    assert names(page) == ["beta", "<b>alpha</b>", "gamma"]
    assert page.eval_on_selector("img", "image => image.naturalWidth") > 100
    assert page.locator("tr.mine").count() == 1
    assert "</pre><script>alert(1)</script>" in page.locator("details pre").text_content()


def test_a_click_on_a_title_sorts_best_first_and_another_turns_it_round(text: str, open_page: Any) -> None:
    page = open_page(text)
    score, tokens, name = (page.get_by_role("button", name=title, exact=True) for title in ("score", "tokens", "algorithm"))
    score.click()
    assert names(page) == ["<b>alpha</b>", "beta", "gamma"]
    score.click()
    assert names(page) == ["gamma", "beta", "<b>alpha</b>"]
    tokens.click()
    assert names(page) == ["gamma", "<b>alpha</b>", "beta"]
    tokens.click()
    assert names(page) == ["<b>alpha</b>", "gamma", "beta"], "what never got there stays last"
    name.click()
    assert page.locator("th[aria-sort]").count() == 1
    assert names(page) == ["<b>alpha</b>", "beta", "gamma"]
