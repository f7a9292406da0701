"""What an evaluation leaves to read: ``summary.json``, ``scores.png``, ``report.html``, and the table in the terminal."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchqa_agents.eval_statistics import Group, Summary, by_set, mean_over_sets, summarise_rows
from searchqa_agents.evaluate import TOLD_THE_ANSWER
from searchqa_agents.results import JUDGEMENTS_FILE, PARQUET_FILE, SCORES_FILE, joined_stamp, read_results
from searchqa_agents.runs import SUMMARY_FILE, RunFolder, RunFolderError, read_searches, replace_file
from searchqa_agents.table import METRIC_GROUPS, METRIC_TITLES, SET_TITLES, amount, in_parts, is_heading, show, stamp_line

if TYPE_CHECKING:
    from rich.console import Console

    from searchqa_agents.trajectory import Trajectory

logger = logging.getLogger(__name__)

PICTURE_FILE = "scores.png"
JUDGE_FILE = "judge.json"
"""What judged the answers of a folder; `searchqa eval judge` writes it beside its verdicts."""
MEAN = "mean"
"""The column of the mean over sets."""
DRAWN = ("em", "f1", "cover_em", "judge")
"""Measures that the picture shows, where there are; what a judge says only once all answers are judged."""
WITH_INTERVAL = ("em", "f1", "judge")
"""Measures whose interval has a row of its own in the table of several sets."""
BY_GROUP = {"hops": "exact match by hops", "type": "exact match by type"}
"""Headings of the rows by group, in the table of several sets."""
IN_WIDE_TERMINALS = ("play", "cost per episode", *BY_GROUP.values())
"""Groups of rows of the table of several sets that a terminal shows only if it has room for all columns: the rest is read more often."""
MOST_GROUPS = 6
"""So many columns of groups are shown beside the mean; of more, only those by hops."""
MOST_TYPES = 6
"""Of a set with more types of questions, none has a row in the table of several sets."""
MOST_TURNS = 6
"""So many turns have a row for the titles found by then."""
ELSEWHERE = (
    "Exact match is the EM of Search-R1 and SQuAD; substring match is what ZeroSearch's code prints as EM; cover match is R1-Searcher's ACC_R. What each "
    "would be under the other system's normaliser is in summary.json."
)
_LATENCY = {
    "mean": "seconds, share of batch",
    "mean_model": "of these, model",
    "mean_search": "of these, search",
    "mean_environment": "of these, environment",
    "p50_wall": "seconds to its end, p50",
    "p99_wall": "seconds to its end, p99",
}

Row = Mapping[str, Any]


def finish(
    folder: RunFolder,
    name: str,
    rows: Sequence[Row],
    times: Sequence[Row],
    stamps: Mapping[str, Mapping[str, Any]],
    trajectories: Mapping[str, Sequence[Trajectory]],
    searches: Mapping[str, Mapping[str, float]],
    console: Console,
) -> dict[str, Any]:
    """Write the summary, the picture and the page of a finished evaluation, and print its table.

    Parameters
    ----------
    folder
        The run's, in which results, stamp and trajectories are written already.
    rows, times
        Of scores and of times.
    stamps
        Set -> flat stamp.
    trajectories
        Set -> those that the page shows.
    searches
        As :func:`~searchqa_agents.runs.read_searches` gives them.

    Returns
    -------
    dict
        What ``summary.json`` holds: ``kind`` ("eval"), ``name``, ``columns`` and ``rows`` (the table), ``search``, and what :func:`summarise` gives.
    """
    from searchqa_agents.report import write_page

    summary = summarise(name, _with_judgements(folder.path, rows), times, searches)
    summary |= _judge(folder.path, summary)
    folder.write_json(SUMMARY_FILE, summary)
    _draw(folder.path, summary)
    several = len(trajectories) > 1
    page = write_page(folder.path, {name if several else "eval": own for name, own in trajectories.items()})
    print_table(console, summary, joined_stamp(stamps))
    console.print(f"Page: {page}", markup=False, highlight=False, soft_wrap=True)
    return summary


def is_evaluation(folder: Path) -> bool:
    """Whether a folder holds results of ``searchqa eval`` from which its summary and page can be made again."""
    return any((folder / name).is_file() for name in (SCORES_FILE, PARQUET_FILE))


def refresh(folder: Path) -> dict[str, Any]:
    """Make summary, picture and page of a finished evaluation again from its results, as after judging. Returns the summary.

    Raises
    ------
    RunFolderError
        If the results cannot be read.
    """
    from searchqa_agents.report import write_page

    results = read_results(folder)
    file = folder / SUMMARY_FILE
    name = json.loads(file.read_text(encoding="utf-8"))["name"] if file.is_file() else results.name
    summary = summarise(name, results.rows, results.times, read_searches(folder))
    summary |= _judge(folder, summary)
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    replace_file(file, lambda partial: partial.write_text(text, encoding="utf-8"))
    _draw(folder, summary)
    write_page(folder)
    return summary


def _with_judgements(folder: Path, rows: Sequence[Row]) -> Sequence[Row]:
    """Rows as the folder holds them, where answers were judged before the evaluation was gone on with."""
    if not (folder / JUDGEMENTS_FILE).is_file():
        return rows
    try:
        return read_results(folder).rows
    except RunFolderError as error:  # the evaluation itself is whole
        logger.warning("The table is without the judge's verdicts: %s", error)
        return rows


def _judge(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """``judged_by``: what is known of the judge, where answers are judged."""
    file = folder / JUDGE_FILE
    return {"judged_by": json.loads(file.read_text(encoding="utf-8"))} if "judged" in summary and file.is_file() else {}


# -- summary -----------------------------------------------------------------------------------------------------------------------------------


def summarise(name: str, rows: Sequence[Row], times: Sequence[Row], searches: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The content of ``summary.json``, as plain values.

    Of one set: ``metrics`` (with ``questions, episodes, backend_errors``), ``intervals``, ``groups`` (with the same keys as ``metrics``) and
    ``group_intervals``, ``defined``, ``pass_at``, ``majority`` and their intervals, ``title_recall_by_turn``, ``latency``. Of several, the same of the mean
    over sets, each counting alike; and ``sets``: name -> the same of the set.

    Where answers are judged, ``judged`` of the whole and of each set says how many ``answers``, ``of`` how many; ``group_judged`` the same of each group.
    While any answer is not, there is no mean of ``judge`` over sets.
    """
    sets = {one: _plain(summarise_rows(own, _of(times, one))) | _judged(own, rows) for one, own in by_set(rows).items()}
    whole = next(iter(sets.values()))
    if len(sets) > 1:
        whole = {**_plain(mean_over_sets(rows, times)), **_judged(rows, rows), "sets": sets}
        if partly_judged(whole):
            for part in ("metrics", "intervals", "defined"):
                whole[part].pop("judge", None)
    columns, table = _table_of_one(whole) if len(sets) == 1 else _table_of_several(whole)
    return {
        "kind": "eval",
        "name": name,
        "columns": columns,
        "rows": table,
        **whole,
        "search": {key: dict(own) for key, own in searches.items()},
    }


def _judged(own: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """How many answers of a set are judged, and of each of its groups; nothing where none of all ``rows`` is."""
    if not any("judge" in row["metrics"] for row in rows):
        return {}

    def count(some: Sequence[Row]) -> dict[str, int]:
        return {"answers": sum("judge" in row["metrics"] for row in some), "of": len(some)}

    members: dict[str, list[Row]] = {}
    for row in own:
        for key, value in row["groups"].items():
            members.setdefault(f"{key}={value}", []).append(row)
    return {"judged": count(own), "group_judged": {name: count(some) for name, some in members.items()}}


def partly_judged(part: Mapping[str, Any]) -> bool:
    """Whether some answers are judged and some are not, of a summary or a part of it that says how many."""
    judged = part.get("judged")
    return judged is not None and judged["answers"] < judged["of"]


def _of(times: Sequence[Row], name: str) -> list[Row]:
    return [row for row in times if row["set"] == name]


def _plain(summary: Summary) -> dict[str, Any]:
    return {
        "metrics": _counted(summary.metrics, summary.counts["questions"], summary.counts["episodes"]),
        "intervals": {name: list(interval) for name, interval in summary.intervals.items()},
        "groups": {name: _counted(group.metrics, group.questions, group.episodes) for name, group in summary.groups.items()},
        "group_intervals": {name: _intervals(group) for name, group in summary.groups.items()},
        "samples": summary.counts["samples"],
        "defined": dict(summary.defined),
        "pass_at": {name: {str(k): value for k, value in own.items()} for name, own in summary.pass_at.items()},
        "pass_at_intervals": {name: {str(k): list(value) for k, value in own.items()} for name, own in summary.pass_at_intervals.items()},
        "majority": dict(summary.majority),
        "majority_intervals": {name: list(interval) for name, interval in summary.majority_intervals.items()},
        "title_recall_by_turn": list(summary.title_recall_by_turn),
        "latency": dict(summary.latency),
    }


def _counted(metrics: Mapping[str, float], questions: int, episodes: int) -> dict[str, float]:
    """No episode that lost its search back end is among the rows: it was played again."""
    return {**metrics, "questions": float(questions), "episodes": float(episodes), "backend_errors": 0.0}


def _intervals(group: Group) -> dict[str, list[float]]:
    return {name: list(interval) for name, interval in group.intervals.items()}


# -- table -------------------------------------------------------------------------------------------------------------------------------------


def _table_of_one(whole: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Mean, interval and groups; measures that the set does not define are left out."""
    groups = _shown_groups(whole["groups"])
    columns = ["", "mean", "95% interval", *(group.replace("=", " ") for group in groups)]
    judged = whole.get("group_judged", {})
    parts = [whole, *({"metrics": whole["groups"][group], "judged": judged.get(group)} for group in groups)]
    rows = [
        [title, values[0], _range(interval), *values[1:]]
        for title, values, interval in _lines(parts, lambda own: whole.get(own[0], {}).get(own[1]))
    ]
    return columns, _without_empty_headings(rows)


def _table_of_several(whole: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A column for each set, and the mean over sets."""
    sets = whole["sets"]
    columns = ["", *(SET_TITLES.get(name, name) for name in sets), MEAN]
    parts = [*sets.values(), whole]
    rows = []
    for title, values, _ in _lines(parts, lambda own: None):
        rows.append([title, *values])
        name = next((name for name in WITH_INTERVAL if METRIC_TITLES[name] == title), None)
        if name is not None:
            rows.append(["  95% interval", *(_short_range(part["intervals"].get(name)) for part in parts)])
    for key, heading in BY_GROUP.items():
        rows.append([heading, *("" for _ in parts)])
        rows += _rows_by_group(key, list(sets.values()))
    return columns, _without_empty_headings(rows)


def _rows_by_group(key: str, sets: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each value of ``key`` that questions have: the exact match of each set's questions with it. Sets differ in it, so there is no mean.

    MuSiQue's types are its hops, and have no row of their own.
    """
    own = [{name: group["em"] for name, group in part["groups"].items() if name.startswith(f"{key}=")} for part in sets]
    if key == "type":
        own = [groups if len(groups) <= MOST_TYPES and not any(re.search("=[0-9]hop", name) for name in groups) else {} for groups in own]
    names = sorted({name for groups in own for name in groups})
    return [[name.replace("=", " "), *(amount(groups.get(name)) for groups in own), amount(None)] for name in names]


def _lines(parts: Sequence[Mapping[str, Any]], interval_of: Any) -> list[tuple[str, list[str], Any]]:
    """All rows: title, the value of each part, and the first part's interval; headings have empty values."""
    lines: list[tuple[str, list[str], Any]] = []
    empty = [""] * len(parts)

    def add(title: str, values: Sequence[float | None], interval: Any = None, of_judged: bool = False) -> None:
        if any(value is not None for value in values):
            cells = [amount(value) for value in values]
            if of_judged:
                cells = [f"{cell}{_coverage(part)}" for cell, part in zip(cells, parts, strict=True)]
            lines.append((title, cells, interval))

    lines.append(("questions", [f"{int(part['metrics']['questions']):,}" for part in parts], None))
    if any(part["metrics"]["episodes"] != part["metrics"]["questions"] for part in parts):
        lines.append(("episodes", [f"{int(part['metrics']['episodes']):,}" for part in parts], None))
    for group, titles in METRIC_GROUPS.items():
        lines.append((group, empty, None))
        for name, title in titles.items():
            add(title, [part["metrics"].get(name) for part in parts], interval_of(("intervals", name)), name == "judge")
            if name in ("em", "judge"):
                for k in [k for k in parts[0].get("pass_at", {}).get(name, {}) if k != "1"]:
                    values = [part.get("pass_at", {}).get(name, {}).get(k) for part in parts]
                    add(f"{title}, any of {k} (pass@{k})", values, (interval_of(("pass_at_intervals", name)) or {}).get(k))
                add(
                    f"{title}, majority of {parts[0].get('samples')}",
                    [part.get("majority", {}).get(name) for part in parts],
                    interval_of(("majority_intervals", name)),
                )
        if group == "search":
            for turn in _turns(parts):
                add(f"titles found by turn {turn + 1}, share", [_by_turn(part, turn) for part in parts])
    latency = parts[0].get("latency", {}) or parts[-1].get("latency", {})
    for name, title in _LATENCY.items():
        if name in latency:
            add(title, [part.get("latency", {}).get(name) for part in parts])
    return lines


def _coverage(part: Mapping[str, Any]) -> str:
    """Behind a mean over some answers: of how many."""
    return f" ({part['judged']['answers']:,} of {part['judged']['of']:,})" if partly_judged(part) else ""


def _turns(parts: Sequence[Mapping[str, Any]]) -> list[int]:
    """The turns that have a row: the first few and the last, where any part has several."""
    last = max((len(part.get("title_recall_by_turn", ())) for part in parts), default=0)
    turns = list(range(last)) if last > 1 else []
    return turns if len(turns) <= MOST_TURNS else [*turns[: MOST_TURNS - 1], turns[-1]]


def _by_turn(part: Mapping[str, Any], turn: int) -> float | None:
    """Up to and with a turn; what was found by the last turn that was played stays found."""
    found: Sequence[float] = part.get("title_recall_by_turn", ())
    return found[min(turn, len(found) - 1)] if found else None


def _shown_groups(groups: Mapping[str, Any]) -> list[str]:
    keys = {key: [name for name in groups if name.startswith(f"{key}=")] for key in ("hops", "type")}
    several = {key: names for key, names in keys.items() if len(names) > 1}
    shown = [name for names in several.values() for name in names]
    return shown if len(shown) <= MOST_GROUPS else next(iter(several.values()))[:MOST_GROUPS]


def _without_empty_headings(rows: Sequence[list[str]]) -> list[list[str]]:
    return [
        row
        for row, following in zip(rows, [*rows[1:], None], strict=True)
        if not is_heading(row) or (following is not None and not is_heading(following))
    ]


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{amount(interval[0])} to {amount(interval[1])}"


def _short_range(interval: Sequence[float] | None) -> str:
    """Without the digits that a narrow terminal has no room for: ``.13–.43``."""
    return "" if interval is None else "–".join(f"{value:.2f}".removeprefix("0") for value in interval)


def print_table(console: Console, summary: Mapping[str, Any], stamp: Mapping[str, Any]) -> None:
    """The table, in parts where the terminal is narrow; beneath it the stamp, what searching cost, and what a reader has to know.

    A table that comes in parts is without the rows of :data:`IN_WIDE_TERMINALS`, and says where these are.

    ``stamp`` is the content of ``stamp.json``: of several sets what they have in common, and each set's under ``sets``.
    """
    from searchqa_agents.report import search_line

    columns, rows = summary["columns"], summary["rows"]
    parts = in_parts(console.width, columns, rows)
    left_out = ""
    if len(parts) > 1 and "sets" in summary:
        rows = _without_groups(rows, IN_WIDE_TERMINALS)
        parts = in_parts(console.width, columns, rows)
        left_out = f"\nBy hops and type, play, tokens and seconds: in {SUMMARY_FILE} and report.html, and here where the terminal has room for all columns."
    for place, part in enumerate(parts):
        own = [[row[i] for i in part] for row in rows]
        known = [row for row in own if is_heading(row) or set(row[1:]) - {"", "–"}]
        caption = told_stamp(stamp) + left_out if place == len(parts) - 1 else ""
        show(console, summary["name"], [columns[i] for i in part], _without_empty_headings(known), caption)
    for line in lines_beneath(summary, stamp):
        console.print(line, style=None if line == ELSEWHERE else "bold", markup=False, highlight=False, soft_wrap=line != ELSEWHERE)
    console.print(search_line(summary["search"].get("total", {})), markup=False, highlight=False, soft_wrap=True)


def lines_beneath(summary: Mapping[str, Any], stamp: Mapping[str, Any]) -> list[str]:
    """What a reader has to know, under the table in terminals and pages: whose EM is which, who judged how much, and a search engine that was told."""
    lines = [ELSEWHERE, *judged_lines(summary)] if summary.get("kind") == "eval" else []
    told = any(own.get("told_the_answer") for own in (stamp, *stamp.get("sets", {}).values()))
    return [TOLD_THE_ANSWER, *lines] if told else lines


def _without_groups(rows: Sequence[list[str]], left_out: Sequence[str]) -> list[list[str]]:
    kept, group = [], ""
    for row in rows:
        group = row[0] if is_heading(row) else group
        if group not in left_out:
            kept.append(row)
    return kept


def told_stamp(stamp: Mapping[str, Any]) -> str:
    """The stamp as people read it: of several sets what they have in common, then data, split and passages of each."""
    sets = stamp.get("sets")
    if not sets:
        return stamp_line(stamp)
    retrievers = {name: stamp_line({"retriever": own.get("retriever")}) for name, own in sets.items()}
    alike = len(set(retrievers.values())) == 1
    common = {**stamp, "retriever": next(iter(sets.values())).get("retriever")} if alike else stamp
    each = []
    for own in sets.values():
        parts = {key: own.get(key) for key in ("dataset", "split", "revision", "corpus_sha256")}
        each.append(stamp_line(parts | ({} if alike else {"retriever": own.get("retriever")})))
    return "\n".join([stamp_line({key: value for key, value in common.items() if key not in ("dataset", "split")}), *each])


def judged_lines(summary: Mapping[str, Any]) -> list[str]:
    """Who judged, and what to say where only some answers are judged."""
    parts = summary.get("sets", {summary["name"]: summary})
    judge = summary.get("judged_by", {})
    lines = [f"Judged by {judge.get('model')}."] if judge.get("model") else []
    return lines + [
        f"{SET_TITLES.get(name, name)}: {part['judged']['answers']:,} of {part['judged']['of']:,} answers are judged."
        for name, part in parts.items()
        if partly_judged(part)
    ]


# -- picture -----------------------------------------------------------------------------------------------------------------------------------


def _draw(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Draw ``scores.png``: rows are sets and their mean, or all questions of one set and its groups."""
    from searchqa_agents.plots import scores

    if "sets" in summary:
        parts = {SET_TITLES.get(name, name): (part["metrics"], part["intervals"]) for name, part in summary["sets"].items()}
        parts["mean over sets"] = (summary["metrics"], summary["intervals"])
        found = {SET_TITLES.get(name, name): part["title_recall_by_turn"] for name, part in summary["sets"].items()}
        emphasised = "mean over sets"
    else:
        emphasised = "all questions"
        parts = {emphasised: (summary["metrics"], summary["intervals"])}
        parts |= {
            name.replace("=", " "): (summary["groups"][name], summary["group_intervals"][name]) for name in _shown_groups(summary["groups"])
        }
        found = {emphasised: summary["title_recall_by_turn"]}
    drawn = [name for name in DRAWN if name != "judge" or not partly_judged(summary)]
    results = {
        row: {METRIC_TITLES[name]: (metrics[name], tuple(intervals[name])) for name in drawn if name in metrics}
        for row, (metrics, intervals) in parts.items()
    }
    picture = scores(results, found, summary["name"], emphasised)
    file = folder / PICTURE_FILE
    replace_file(file, lambda partial: partial.write_bytes(picture))
    return file
