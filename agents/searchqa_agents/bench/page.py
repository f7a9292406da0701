"""The page of a comparison: one HTML file that needs nothing from outside itself and reads without JavaScript, which only sorts its table.

Labels and plugins are other people's text: all of it is escaped, and the content security policy lets no script run but the page's own, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

from searchqa_agents.bench.pictures import Picture
from searchqa_agents.bench.results import common_part
from searchqa_agents.bench.table import Column, Standing, TableCell
from searchqa_agents.table import stamp_line


class PageRow(NamedTuple):
    """A row of the table; ``mine`` rows stand out."""

    cells: Sequence[TableCell]
    mine: bool = False


class PageEntry(NamedTuple):
    """Where the numbers of one algorithm come from: what to tell in lines, its command, and what else is known, as JSON."""

    name: str
    lines: Sequence[str]
    command: str
    details: Mapping[str, Any]


def entry_of(standing: Standing) -> PageEntry:
    """Where the numbers of a standing come from."""
    entry, runs = standing.entry, standing.entry.runs
    tasks = {run.task: {"version": run.task_version, "budget": run.budget, "references": dict(run.references)} for run in runs}
    versions = [f"{name} (version {own['version']})" for name, own in tasks.items()]
    tried = entry.stamp.get("configurations_tried")
    lines = [
        f"Algorithm {entry.algorithm}: {standing.runs} runs, seeds {', '.join(map(str, entry.seeds))}, tasks {', '.join(versions)}.",
        f"Configurations that were tried before this one: {'not told' if tried is None else tried}.",
        stamp_line(entry.stamp),
    ]
    details = {"settings": common_part([run.settings for run in runs]) if runs else {}, "tasks": tasks, "stamp": dict(entry.stamp)}
    return PageEntry(standing.name, [line for line in lines if line], entry.command, details)


def build_page(
    *,
    title: str,
    subtitle: str,
    sentences: Sequence[str],
    columns: Sequence[Column],
    rows: Sequence[PageRow],
    notes: Sequence[str],
    pictures: Sequence[Picture],
    entries: Sequence[PageEntry],
) -> str:
    """The page, as text.

    Parameters
    ----------
    sentences
        Where an algorithm stands, in words; above the table.
    notes
        What a reader of the table must know; beneath it.
    entries
        Commands and stamps, at the end.
    """
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="soft">{escape(subtitle)}</div>',
        *(f"<p>{escape(sentence)}</p>" for sentence in sentences),
        f'<div class="scroll">{_table(columns, rows)}</div>',
        '<div class="notes">',
        *(f"<p>{escape(note)}</p>" for note in notes),
        "</div>",
        *(_figure(picture) for picture in pictures),
        *(["<h2>What the columns are</h2>", _meanings(columns)] if any(column.explained for column in columns) else []),
        "<h2>Where the numbers come from</h2>",
        *(_entry(entry) for entry in entries),
    ]
    template = files("searchqa_agents.bench").joinpath("page.html").read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    head, rest = template.replace("__SCRIPT_HASH__", f"sha256-{digest}").split("__TITLE__")
    middle, end = rest.split("__BODY__")
    page = head + escape(title) + middle + "\n".join(body) + end
    return page.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair in somebody's label cannot be written


_MINE = ' class="mine"'


def _table(columns: Sequence[Column], rows: Sequence[PageRow]) -> str:
    heads = "".join(
        f'<th scope="col" data-first="{"ascending" if column.small_first else "descending"}" title="{escape(column.explained)}">'
        f'<button type="button">{escape(column.title)}</button></th>'
        for column in columns
    )
    lines = "\n".join(f"<tr{_MINE if row.mine else ''}>{''.join(map(_cell, row.cells))}</tr>" for row in rows)
    return f'<table class="sortable"><thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table>'


def _cell(cell: TableCell) -> str:
    value = "" if cell.value is None else f' data-value="{escape(str(cell.value))}"'
    beneath = f"<small>{escape(cell.beneath)}</small>" if cell.beneath else ""
    return f"<td{value}>{escape(cell.text)}{beneath}</td>"


def _figure(picture: Picture) -> str:
    source = base64.b64encode(picture.png).decode("ascii")
    return (
        f"<h2>{escape(picture.title)}</h2>\n<figure>"
        f'<img src="data:image/png;base64,{source}" alt="{escape(picture.title)}"><figcaption>{escape(picture.caption)}</figcaption></figure>'
    )


def _meanings(columns: Sequence[Column]) -> str:
    lines = "".join(f"<p><b>{escape(column.title)}</b>: {escape(column.explained)}</p>" for column in columns if column.explained)
    return f'<div class="notes">{lines}</div>'


def _entry(entry: PageEntry) -> str:
    details = json.dumps(entry.details, indent=2, ensure_ascii=False, default=str)
    lines = "".join(f"<p>{escape(line)}</p>" for line in entry.lines)
    return (
        f"<article><h3>{escape(entry.name)}</h3>{lines}<pre>{escape(entry.command)}</pre>"
        f"<details><summary>Settings and stamp</summary><pre>{escape(details)}</pre></details></article>"
    )
