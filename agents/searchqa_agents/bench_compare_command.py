"""``searchqa bench compare``: algorithms of yours beside the leaderboard, as table, sentences, pictures and one page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from searchqa_agents.bench.alike import Unlike, check_alike, check_allowed, unlike
from searchqa_agents.bench.results import Entry
from searchqa_agents.bench.sides import DEFAULT_SUITE, SEEDS, Sides, read_sides
from searchqa_agents.bench.statistics import RESAMPLES
from searchqa_agents.bench.table import Comparison, as_json, columns, compared, in_words, markdown_table, notes, one_line, text_rows
from searchqa_agents.comparable import shown
from searchqa_agents.runs import replace_file
from searchqa_agents.table import in_parts, legible, show

BASELINE = "grpo"
PAGE_FILE = "report.html"
DIFFERS = "≠"


def main(line: Sequence[str]) -> int:
    """Run ``searchqa bench compare <line>``."""
    from rich.console import Console

    from searchqa_agents.cli import UsageError

    try:
        arguments = _parser().parse_args(line)
    except SystemExit as stop:  # argparse has already said why
        return stop.code if isinstance(stop.code, int) else 2
    if arguments.markdown and arguments.json:
        raise UsageError("Give --markdown or --json, not both.")
    sides = read_sides(arguments.sides, arguments.suite, arguments.runs)
    baseline = sides.called(arguments.baseline or BASELINE)
    if baseline is None and arguments.baseline:
        raise UsageError(f"--baseline must be one of {', '.join(sides.entries)}; got {arguments.baseline!r}.")
    allowed = [part.strip() for part in (arguments.allow or "").split(",") if part.strip()]
    ordered = _first(sides.entries, baseline)
    against, noted = unlike(ordered)
    check_allowed(against, ordered, allowed)
    check_alike(against, allowed)
    comparison = compared(sides.entries, tasks=sides.tasks, seeds=SEEDS, mine=sides.mine, baseline=baseline, resamples=RESAMPLES)
    sentences = [" ".join(in_words(comparison, name)) for name in sides.mine]
    beneath = [
        *(f"{DIFFERS} Not measured alike: {one.told()}." for one in against),
        *sides.left_out,
        *notes(comparison),
        *told_notes(noted),
    ]
    if baseline is None:
        beneath.append(f"There is no {BASELINE} here to take differences from; --baseline names another.")
    beneath = [one_line(text) for text in beneath]  # with values of other people's stamps
    files = []
    if arguments.out or not (arguments.markdown or arguments.json):
        folder = Path(arguments.out or Path(arguments.runs or Path("runs") / "bench" / sides.suite) / "comparison")
        files = write_report(folder, comparison, sides, sentences, beneath)
    console = legible(Console())
    if arguments.json:
        found = _as_json(comparison, sides, sentences, beneath, against)
        console.print(json.dumps(found, indent=1, allow_nan=False), markup=False, highlight=False, soft_wrap=True)
        return 0
    chosen = columns(comparison)
    if arguments.markdown:
        text = "\n\n".join([markdown_table(comparison, chosen), *sentences, *beneath])
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return 0
    rows = text_rows(comparison, chosen)
    titles = [column.title for column in chosen]
    for part in in_parts(console.width, titles, rows):
        show(console, _title(sides, against), [titles[i] for i in part], [[row[i] for i in part] for row in rows])
    console.print("\n\n".join(sentences), markup=False, highlight=False)
    for text in beneath:
        console.print(text, markup=False, highlight=False)
    for title, file in files:
        console.print(f"{title}: {file}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="searchqa bench compare",
        description="Puts algorithms of yours beside the leaderboard of their suite: a table with 95% intervals, where each stands in words, pictures, and one "
        "page that needs nothing from outside itself. Refused (exit code 1) where results were not measured alike: suite, versions of tasks, budgets, "
        "references, environment, questions.",
        epilog="Examples: searchqa bench compare mine | searchqa bench compare mine other --baseline ppo | searchqa bench compare runs/bench/world-v1/mine | "
        "searchqa bench compare mine.json --markdown. docs/benchmark.md defines every number.",
    )
    parser.add_argument(
        "sides",
        nargs="+",
        metavar="MINE",
        help="an algorithm's name under the folder of --runs or on the leaderboard, a folder of runs, or a results file",
    )
    parser.add_argument("--suite", metavar="NAME", help=f"default: that of the first file or folder, else {DEFAULT_SUITE}")
    parser.add_argument("--runs", metavar="FOLDER", help="where names are looked for; default: runs/bench/SUITE")
    parser.add_argument("--baseline", metavar="NAME", help=f"differences are from it; default: {BASELINE}, where there is one")
    parser.add_argument(
        "--allow", metavar="KEY,KEY", help="compare although these differ, such as budget, task_version, or all; the table then says so"
    )
    parser.add_argument("--markdown", action="store_true", help="the table in Markdown, and the sentences; writes files only with --out")
    parser.add_argument("--json", action="store_true", help="one object with all numbers; writes files only with --out")
    parser.add_argument("--out", metavar="FOLDER", help="where pictures and report.html go; default: comparison, in the folder of --runs")
    return parser


def _first(entries: dict[str, Entry], name: str | None) -> dict[str, Entry]:
    """With one entry before the others: what they are compared with."""
    return entries if name is None else {name: entries[name], **entries}


def told_notes(noted: Sequence[Unlike]) -> list[str]:
    """One line for each part of a stamp that differs without mattering, with its values."""
    values: dict[str, dict[str, list[str]]] = {}
    for one in noted:
        own = values.setdefault(one.difference.key, {})
        own.setdefault(shown(one.difference.a), []).append(one.first)
        own.setdefault(shown(one.difference.b), []).append(one.name)
    lines = []
    for key, own in values.items():
        told = [f"{value} ({', '.join(dict.fromkeys(names))})" for value, names in own.items()]
        lines.append(f"Noted: {key}: {'; '.join(told)}.")
    return lines


def _title(sides: Sides, against: Sequence[Unlike]) -> str:
    if not against:
        return f"{sides.suite}: final scores, 95% intervals"
    return f"{sides.suite}; NOT MEASURED ALIKE in {', '.join(dict.fromkeys(one.difference.key for one in against))}"


def _as_json(
    comparison: Comparison, sides: Sides, sentences: Sequence[str], beneath: Sequence[str], against: Sequence[Unlike]
) -> dict[str, Any]:
    differs = [
        {
            "of": one.name,
            "from": one.first,
            "key": one.difference.key,
            "a": one.difference.a,
            "b": one.difference.b,
            "tasks": list(one.tasks),
        }
        for one in against
    ]
    return {"suite": sides.suite, **as_json(comparison), "differs": differs, "sentences": list(sentences), "notes": list(beneath)}


# -- files -----------------------------------------------------------------------------------------------------------------------------------


def write_report(
    folder: Path, comparison: Comparison, sides: Sides, sentences: Sequence[str], beneath: Sequence[str]
) -> list[tuple[str, Path]]:
    """Write the pictures and the page; gives what they are called, with their places."""
    from searchqa_agents.bench.page import PageRow, build_page, entry_of
    from searchqa_agents.bench.pictures import pictures

    folder.mkdir(parents=True, exist_ok=True)
    drawn = pictures(comparison)
    for picture in drawn:
        _write_bytes(folder / picture.file, picture.png)
    chosen = columns(comparison)
    page = build_page(
        title=f"{', '.join(sides.mine)} on {sides.suite}" if sides.mine else f"Leaderboard of {sides.suite}",
        subtitle=f"{len(comparison.standings)} algorithms, {len(comparison.tasks)} tasks: {', '.join(comparison.tasks)}",
        sentences=sentences,
        columns=chosen,
        rows=[PageRow([column.cell(one) for column in chosen], one.mine) for one in comparison.standings],
        notes=beneath,
        pictures=drawn,
        entries=[entry_of(one) for one in comparison.standings],
    )
    file = folder / PAGE_FILE
    _write_bytes(file, page.encode())
    return [*((picture.title, folder / picture.file) for picture in drawn), ("Page", file)]


def _write_bytes(file: Path, content: bytes) -> None:
    replace_file(file, lambda partial: partial.write_bytes(content))
