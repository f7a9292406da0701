"""``searchqa report compare``: finished evaluations and published rows beside each other, refused where their stamps do not agree in what matters."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from searchqa_agents.comparable import GROUPS, OF_SEARCHING, WHERE_ABSENT, Difference, notes, refusals, without_search
from searchqa_agents.eval_report import JUDGE_FILE, told_stamp
from searchqa_agents.eval_statistics import (
    DifferentQuestionsError,
    Paired,
    by_set,
    mean_over_sets,
    paired,
    sign_flip_p_value,
    summarise_rows,
)
from searchqa_agents.published_results import PREFIX, PublishedRow, published_row
from searchqa_agents.results import joined_stamp, read_results
from searchqa_agents.runs import SUMMARY_FILE, RunFolderError
from searchqa_agents.table import METRIC_TITLES, SET_TITLES, in_parts, legible, markdown, number, show
from searchqa_envs.errors import SearchQAError

MEAN = "mean over sets"
DIFFERS = "≠"
"""Marks a row whose stamp does not agree with the first one's."""


class NotComparableError(SearchQAError):
    """Numbers were asked for side by side whose stamps differ in what matters."""


@dataclass(frozen=True)
class Side:
    """One of the things compared.

    Attributes
    ----------
    name
        As the table calls it.
    stamps
        Set -> flat stamp, with ``metrics``: the names of what it has.
    rows
        Set -> rows of scores; empty for a published row.
    published
        The published row, if it is one.
    """

    name: str
    stamps: dict[str, dict[str, Any]]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    published: PublishedRow | None = None

    def metrics(self, sets: Sequence[str]) -> list[str]:
        """What it has in all of these sets."""
        return [metric for metric in self.stamps[sets[0]]["metrics"] if all(metric in self.stamps[name]["metrics"] for name in sets)]


class Cell(NamedTuple):
    """A number of a side, and how it differs from that of the first side; None for what is not known or does not apply.

    ``judged`` says of how many of the side's ``answers`` the number is, where only some are judged.
    """

    metric: str
    value: float | None
    interval: tuple[float, float] | None = None
    questions: int | None = None
    difference: float | None = None
    paired: Paired | None = None
    judged: int | None = None
    answers: int | None = None


class Found(NamedTuple):
    """In what a side does not agree with another, mostly the first: a difference, and the sets in which it has its values and in which others."""

    first: str
    side: str
    difference: Difference
    sets: tuple[str, ...]
    elsewhere: tuple[str, ...]


Table = dict[str, dict[str, Cell]]
"""Set, or :data:`MEAN`, -> name of the side -> number."""


def main(line: Sequence[str]) -> int:
    """Run ``searchqa report compare <line>``."""
    from rich.console import Console

    from searchqa_agents.cli import UsageError

    try:
        arguments = _parser().parse_args(line)
    except SystemExit as stop:  # argparse has already said why
        return stop.code if isinstance(stop.code, int) else 2
    if len(arguments.sides) < 2:
        raise UsageError("report compare needs two or more: `searchqa report compare A B`. `searchqa report A` shows one.")
    sides = read_sides(arguments.sides)
    sets = common_sets(sides)
    metrics = _metrics(sides, sets, _listed(arguments.metric))
    if "judge" not in {metric for own in metrics.values() for metric in own}:
        sides = _without_judge(sides)
    against, noted = _found(sides, sets, refusals), _found(sides, sets, notes)
    allowed = _listed(arguments.allow)
    check_allowed(sides, against, allowed)
    check_comparable(against, allowed)
    common = bool(against) or bool({"questions", "data", "all"} & set(allowed))
    try:
        tables = {title: _table(sides, sets, own, common) for title, own in metrics.items()}
    except DifferentQuestionsError as error:
        raise NotComparableError(f"{error} `--allow questions` compares on those.") from error
    console = legible(Console())
    if arguments.json:
        text = json.dumps(_as_json(sides, sets, against, noted, tables), indent=1, ensure_ascii=not console.encoding.startswith("utf"))
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return 0
    for title, table in tables.items():
        differing = _differing(sides, against, table)
        columns, rows = table_rows(title, table, {one.side for one in against})
        if arguments.markdown:
            rows += [[line, *[""] * (len(columns) - 1)] for line in differing]
            console.print(f"{markdown(columns, rows)}\n", markup=False, highlight=False, soft_wrap=True)
            continue
        for part in in_parts(console.width, columns, rows):
            own = [[row[i] for i in part] for row in rows]
            show(console, _title(title, against, table), [columns[i] for i in part], own, "\n".join(differing))
    beneath = _beneath(sides, sets, noted)
    console.print(("\n\n" if arguments.markdown else "\n").join(beneath), markup=False, highlight=False, soft_wrap=arguments.markdown)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="searchqa report compare",
        description="Evaluations beside each other: per set and the mean over sets, with paired differences from the first. Refused (exit code 1) where "
        "they were not measured alike: other questions, passages, search engine, top-k, sampling plan. What else differs, such as the agent, is told.",
        epilog="Examples: searchqa report compare runs/a runs/b | searchqa report compare runs/a/scores.jsonl runs/b/results.parquet --metric em,cover_em | "
        f"searchqa report compare {PREFIX}search-r1/qwen2.5-7b/rag {PREFIX}search-r1/qwen2.5-7b/ircot | searchqa report compare runs/a "
        f"{PREFIX}zerosearch/qwen2.5-7b/rag --allow all. Of a folder called compare, write ./compare.",
    )
    parser.add_argument(
        "sides", nargs="+", metavar="A", help=f"folder of an evaluation, its scores.jsonl or results.parquet, or {PREFIX}NAME"
    )
    parser.add_argument(
        "--allow",
        metavar="KEY,KEY",
        help="compare although these differ, such as top_k,retriever, or questions, or all; the table then says so",
    )
    parser.add_argument(
        "--metric", metavar="NAME,NAME", help="default: em and f1, judge where there is one; beside published rows, what these have"
    )
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--json", action="store_true", help="one object with all numbers, differences and notes")
    return parser


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


# -- what is compared ------------------------------------------------------------------------------------------------------------------------


def read_sides(words: Sequence[str]) -> list[Side]:
    """Each of the things that a line names. Raises ``RunFolderError`` or ``UnknownPublishedRowError`` for what is not one."""
    sides = [_read_published(word) if word.startswith(PREFIX) else _read_run(word) for word in words]
    names = [side.name for side in sides]
    unique = [name if names.count(name) == 1 else word for name, word in zip(names, words, strict=True)]
    if len(set(unique)) < len(unique):
        twice = next(name for name in unique if unique.count(name) > 1)
        raise RunFolderError(f"{twice} is named twice: compare it with another.")
    return [Side(name, side.stamps, side.rows, side.published) for name, side in zip(unique, sides, strict=True)]


def _read_published(word: str) -> Side:
    row = published_row(word)
    return Side(row.name, row.stamps, {}, row)


def _read_run(word: str) -> Side:
    path = Path(word)
    summary = path / SUMMARY_FILE
    if summary.is_file() and json.loads(summary.read_text(encoding="utf-8")).get("kind") == "train":
        raise RunFolderError(
            f"{path} is the folder of a training run; `searchqa report {path} ...` compares those. This compares evaluations."
        )
    results = read_results(path)
    rows = by_set(results.rows)
    judge = (path if path.is_dir() else path.parent) / JUDGE_FILE
    stamps = {}
    for name, own in rows.items():
        stamps[name] = {**results.stamps[name], "metrics": list(dict.fromkeys(metric for row in own for metric in row["metrics"]))}
        if "judge" in stamps[name]["metrics"] and judge.is_file():
            stamps[name]["judge"] = json.loads(judge.read_text(encoding="utf-8"))
        if "judge" in stamps[name]["metrics"]:
            stamps[name] |= _judged(own)
    return Side(results.name, stamps, rows)


def _judged(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """``judged``: which answers are, where not all are; of two runs on the same questions, equal for the same answers."""
    keys = sorted((row["id"], row["sample"]) for row in rows if "judge" in row["metrics"])
    if len(keys) == len(rows):
        return {}
    return {"judged": f"{len(keys)} of {len(rows)} answers (hash {hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:6]})"}


def _without_judge(sides: Sequence[Side]) -> list[Side]:
    """Who judged, and how much, matters to no other measure."""
    of_judge = ("judge", "judged")
    return [
        replace(side, stamps={name: {key: part for key, part in own.items() if key not in of_judge} for name, own in side.stamps.items()})
        for side in sides
    ]


def common_sets(sides: Sequence[Side]) -> list[str]:
    """The sets that all have, in the order of the first. Raises ``NotComparableError`` where there is none."""
    sets = [name for name in sides[0].stamps if all(name in side.stamps for side in sides)]
    if not sets:
        own = "; ".join(f"{side.name} has {', '.join(side.stamps)}" for side in sides)
        raise NotComparableError(
            f"There is no set that all have, and so nothing to compare: {own}. Evaluate on a common one with `searchqa eval sets=...`."
        )
    return sets


def _metrics(sides: Sequence[Side], sets: Sequence[str], asked: Sequence[str]) -> dict[str, list[str]]:
    """Title of each table -> the metric of each side. There is one in common, unless that was allowed to differ: then each side has its first."""
    from searchqa_agents.cli import UsageError

    common = [metric for metric in sides[0].metrics(sets) if all(metric in side.metrics(sets) for side in sides)]
    missing = [metric for metric in asked if metric not in common]
    if missing:
        own = "; ".join(f"{side.name}: {', '.join(side.metrics(sets))}" for side in sides)
        raise UsageError(f"--metric must be what all have in all sets; got {missing[0]!r}. There are: {own}.")
    if not common:
        own_first = [side.metrics(sets)[0] for side in sides]
        return {" | ".join(dict.fromkeys(own_first)): own_first}
    usual = [metric for metric in ("em", "f1", "judge") if metric in common]
    chosen = asked or (common if any(side.published for side in sides) else usual or common[:1])
    return {metric: [metric] * len(sides) for metric in chosen}


# -- whether they may be -----------------------------------------------------------------------------------------------------------------------


def _found(
    sides: Sequence[Side], sets: Sequence[str], compare: Callable[[Mapping[str, Any], Mapping[str, Any]], list[Difference]]
) -> list[Found]:
    """The differences of each side from the first, each once: where sets have other values for one key, those of the first set.

    Where the first searches nothing, those that search are compared in this with one another.
    """
    first = sides[0]
    found = [one for side in sides[1:] for one in _found_between(first, side, sets, compare)]
    if all(without_search(first.stamps[name]) for name in sets):
        searching, *others = [side for side in sides if not any(without_search(side.stamps[name]) for name in sets)] or [first]
        for side in others:
            between = _found_between(searching, side, sets, compare)
            found += [one for one in between if one.difference.key.partition(".")[0] in OF_SEARCHING]
    return found


def _found_between(
    first: Side, side: Side, sets: Sequence[str], compare: Callable[[Mapping[str, Any], Mapping[str, Any]], list[Difference]]
) -> list[Found]:
    found = []
    by_key: dict[str, dict[str, Difference]] = {}
    for name in sets:
        for one in compare(first.stamps[name], side.stamps[name]):
            by_key.setdefault(one.key, {})[name] = one
    for own in by_key.values():
        shown = next(iter(own.values()))
        alike = tuple(name for name, one in own.items() if one == shown)
        whole = len(alike) == len(sets)
        found.append(Found(first.name, side.name, shown, () if whole else alike, tuple(name for name in own if name not in alike)))
    return found


def check_allowed(sides: Sequence[Side], against: Sequence[Found], allowed: Sequence[str]) -> None:
    """Raise ``UsageError`` that names what is near for a key that is no part of any stamp."""
    from searchqa_agents.cli import UsageError

    known = {"all", "corpus", "metric", *GROUPS, *WHERE_ABSENT, *(one.difference.key for one in against)}
    known |= {path for side in sides for stamp in side.stamps.values() for path in _paths(stamp)}
    for key in allowed:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=2, cutoff=0.6)
            differing = ", ".join(dict.fromkeys(one.difference.key for one in against)) or "nothing"
            hint = f" Nearest to it: {', '.join(near)}." if near else ""
            raise UsageError(f"--allow {key} names no part of these stamps.{hint} What differs is: {differing}.")


def _paths(stamp: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """All keys of a stamp, those within others as ``retriever.k1``."""
    for key, part in stamp.items():
        yield f"{above}{key}"
        if isinstance(part, Mapping):
            yield from _paths(part, f"{above}{key}.")


def check_comparable(against: Sequence[Found], allowed: Sequence[str]) -> None:
    """Raise ``NotComparableError`` that lists what was not allowed to differ, with both values and the ways out."""
    refused = [one for one in against if not one.difference.allowed(allowed)]
    if not refused:
        return
    of_use = [key for key in allowed if any(one.difference.allowed([key]) for one in against)]
    keys = ",".join(dict.fromkeys([*of_use, *(one.difference.key for one in refused)]))
    firsts = "; ".join(dict.fromkeys(one.first for one in refused))
    others = "; ".join(dict.fromkeys(one.side for one in refused))
    lines = "\n".join(f"  {_told(one, others)}" for one in refused)
    raise NotComparableError(
        f"{firsts} and {others} were not measured alike, so their numbers are not comparable:\n{lines}\n"
        f"Measure them with the same settings, or see them side by side all the same with --allow {keys} (or --allow all): the table then says what differs."
    )


def _told(one: Found, only: str = "") -> str:
    """In words; with the side's name, unless it is the ``only`` one."""
    where = f" [{', '.join(SET_TITLES.get(name, name) for name in one.sets)}]" if one.sets else ""
    others = f", and other values in {', '.join(SET_TITLES.get(name, name) for name in one.elsewhere)}" if one.elsewhere else ""
    return f"{one.difference.told('' if one.side == only else one.side)}{where}{others}"


# -- numbers -----------------------------------------------------------------------------------------------------------------------------------


def _table(sides: Sequence[Side], sets: Sequence[str], metrics: Sequence[str], common: bool) -> Table:
    """All numbers of one table, without a mean over sets while answers are judged in part.

    ``common``: the sides were allowed to differ, so that pairs are of the questions that both have.
    """
    table: Table = {}
    for name in sets:
        cells = [_value(side, name, metric) for side, metric in zip(sides, metrics, strict=True)]
        if any(cell.value is not None for cell in cells):
            table[name] = _beside(sides, cells, [name], common)
    if len(sets) > 1 and not any(cell.judged is not None for cells in table.values() for cell in cells.values()):
        table[MEAN] = _beside(sides, [_mean(side, sets, metric) for side, metric in zip(sides, metrics, strict=True)], sets, common)
    return table


def _value(side: Side, name: str, metric: str) -> Cell:
    if side.published is not None:
        return Cell(metric, side.published.values.get(metric, {}).get(name), questions=side.stamps[name].get("questions_played"))
    rows = side.rows[name]
    summary = summarise_rows(_only(rows, metric), group_by=())
    cell = Cell(metric, summary.metrics[metric], summary.intervals[metric], summary.defined[metric])
    judged = sum("judge" in row["metrics"] for row in rows)
    return cell._replace(judged=judged, answers=len(rows)) if metric == "judge" and judged < len(rows) else cell


def _mean(side: Side, sets: Sequence[str], metric: str) -> Cell:
    """Over all sets that are compared; None where a set is without a number."""
    if side.published is None:
        summary = mean_over_sets([row for name in sets for row in _only(side.rows[name], metric)])
        return Cell(metric, summary.metrics[metric], summary.intervals[metric], summary.defined[metric])
    own, counts = side.published.values.get(metric, {}), [side.stamps[name].get("questions_played") for name in sets]
    questions = None if None in counts else sum(count for count in counts if count is not None)
    if all(name in own for name in sets):
        return Cell(metric, math.fsum(own[name] for name in sets) / len(sets), questions=questions)
    return Cell(metric, side.published.average(metric) if set(side.published.columns) == set(sets) else None, questions=questions)


def _only(rows: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Rows with one metric: others need not be drawn again a thousand times."""
    return [{**row, "metrics": {metric: row["metrics"][metric]} if metric in row["metrics"] else {}} for row in rows]


def _beside(sides: Sequence[Side], cells: Sequence[Cell], sets: Sequence[str], common: bool) -> dict[str, Cell]:
    """The cells by name, those behind the first with their difference from it."""
    first, beside = cells[0], {sides[0].name: cells[0]}
    for side, cell in zip(sides[1:], cells[1:], strict=True):
        pair = None
        if side.rows and sides[0].rows and cell.metric == first.metric:
            pair = paired_over(sides[0].rows, side.rows, sets, cell.metric, common)
        if pair is not None:
            beside[side.name] = cell._replace(difference=pair.difference, paired=pair)
        elif cell.value is not None and first.value is not None and cell.metric == first.metric:
            beside[side.name] = cell._replace(difference=cell.value - first.value)
        else:
            beside[side.name] = cell
    return beside


def paired_over(
    first: Mapping[str, Sequence[Mapping[str, Any]]],
    other: Mapping[str, Sequence[Mapping[str, Any]]],
    sets: Sequence[str],
    metric: str,
    common: bool = False,
) -> Paired | None:
    """How two runs differ, as the mean over sets of the sets' mean differences; None where a set has no question in common.

    Its interval draws the questions of each set again by themselves, and a question of a small set has so much more weight in the test.

    Parameters
    ----------
    first, other
        Set -> rows of scores.
    common
        Take the questions that both have, instead of refusing where they have different ones.

    Raises
    ------
    DifferentQuestionsError
        Unless ``common``, where the runs have different questions.
    """
    import numpy as np

    each: list[Paired] = []
    differences: list[list[float]] = []
    for name in sets:
        values = [_by_question(rows[name], metric) for rows in (first, other)]
        own = [values[1][key] - value for key, value in values[0].items() if key in values[1]]
        if common and not own:
            return None
        each.append(paired(first[name], other[name], metric, common=common))
        differences.append(own)
    if len(sets) == 1:
        return each[0]
    rows = [
        {"set": name, "id": str(i), "sample": 0, "metrics": {metric: value}}
        for name, own in zip(sets, differences, strict=True)
        for i, value in enumerate(own)
    ]
    weighted = np.array([value / len(own) for own in differences for value in own])
    over = mean_over_sets(rows)
    return Paired(
        metric=metric,
        questions=sum(one.questions for one in each),
        first=math.fsum(one.first for one in each) / len(each),
        second=math.fsum(one.second for one in each) / len(each),
        difference=over.metrics[metric],
        interval=over.intervals[metric],
        p_value=sign_flip_p_value(weighted),
        better=sum(one.better for one in each),
        worse=sum(one.worse for one in each),
        equal=sum(one.equal for one in each),
    )


def _by_question(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[tuple[Any, ...], float]:
    """Each question's mean over its samples; without questions that do not define the metric. What a question is, is as in ``paired``."""
    values: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if metric in row["metrics"]:
            values.setdefault((row["id"], row["question"], tuple(row["golden_answers"])), []).append(row["metrics"][metric])
    return {key: math.fsum(own) / len(own) for key, own in values.items()}


# -- table -------------------------------------------------------------------------------------------------------------------------------------


def table_rows(title: str, table: Table, marked: set[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a heading for each set, and a row for each side; those of ``marked`` sides bear :data:`DIFFERS`."""
    columns = ["", title, "95% interval", "difference", "95% interval of it", "p", "better", "worse", "questions"]
    rows: list[list[str]] = []
    several = len({cell.metric for cells in table.values() for cell in cells.values()}) > 1
    for name, cells in table.items():
        rows.append([SET_TITLES.get(name, name), *[""] * (len(columns) - 1)])
        for side, cell in cells.items():
            pair = cell.paired
            called = f"{side} ({cell.metric})" if several else side
            rows.append(
                [
                    f"{called} {DIFFERS}" if side in marked else called,
                    number(cell.value),
                    _range(cell.interval),
                    "" if side == next(iter(cells)) else _signed(cell.difference),
                    "" if side == next(iter(cells)) else _range(pair.interval if pair else None, signed=True),
                    "" if side == next(iter(cells)) else _p(pair.p_value if pair else None),
                    *(["", ""] if pair is None else [str(pair.better), str(pair.worse)]),
                    "–" if cell.questions is None else f"{cell.questions:,}" if cell.judged is None else _coverage(cell),
                ]
            )
    return columns, rows


def _range(interval: tuple[float, float] | None, signed: bool = False) -> str:
    if interval is None:
        return "–"
    low, high = (_signed(value) if signed else number(value) for value in interval)
    return f"{low} to {high}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 3) + 0.0:+.3f}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _coverage(cell: Cell) -> str:
    return f"{cell.judged:,} of {cell.answers:,} answers"


def _title(title: str, against: Sequence[Found], table: Table) -> str:
    named = " | ".join(METRIC_TITLES.get(metric, metric) for metric in title.split(" | "))
    if not against:
        own = [cell for cells in table.values() for cell in cells.values()]
        if any(cell.paired is not None for cell in own):
            return f"{named}; differences are from the first, question by question"
        return f"{named}; differences are from the first" if any(cell.difference is not None for cell in own) else named
    return f"{named}; NOT MEASURED ALIKE in {', '.join(dict.fromkeys(one.difference.key for one in against))}"


def _differing(sides: Sequence[Side], against: Sequence[Found], table: Table) -> list[str]:
    """What was not measured alike and allowed: part of the table."""
    lines = [f"{DIFFERS} {_told(one, _only_other(sides))}" for one in against]
    for set_name, cells in table.items():
        for name, cell in cells.items():
            if cell.judged is not None:
                where = f" [{SET_TITLES.get(set_name, set_name)}]" if len(table) > 1 else ""
                lines.append(f"{DIFFERS} {name}: only {_coverage(cell)} are judged{where}")
            asked = cell.questions
            if cell.judged is not None:
                asked = len({row["id"] for side in sides if side.name == name for row in side.rows[set_name]})
            if cell.paired is not None and asked is not None and cell.paired.questions < asked:
                lines.append(f"{DIFFERS} {name}: some differences are of the questions in common, {cell.paired.questions:,} of {asked:,}")
    return list(dict.fromkeys(lines))


def _only_other(sides: Sequence[Side]) -> str:
    return sides[1].name if len(sides) == 2 else ""


def _beneath(sides: Sequence[Side], sets: Sequence[str], noted: Sequence[Found]) -> list[str]:
    """The lines under a table: what is left out, what is only noted, and what is known of published rows."""
    first, lines = sides[0], list[str]()
    left_out = {side.name: [name for name in side.stamps if name not in sets] for side in sides}
    lines += [
        f"{name} has other sets too, which are left out: {', '.join(SET_TITLES.get(one, one) for one in own)}."
        for name, own in left_out.items()
        if own
    ]
    if noted:
        lines.append(f"Noted: {'; '.join(dict.fromkeys(_told(one, _only_other(sides)) for one in noted))}.")
    if first.rows:
        lines.append(f"{first.name}: {told_stamp(joined_stamp({name: first.stamps[name] for name in sets}))}")
    for side in sides:
        if side.published is not None:
            lines.append(
                f"{side.name}: {side.published.source}. {' '.join(f'{note[0].upper()}{note[1:]}.' for note in side.published.notes)}".strip()
            )
    return list(dict.fromkeys(lines))


def _as_json(
    sides: Sequence[Side], sets: Sequence[str], against: Sequence[Found], noted: Sequence[Found], tables: Mapping[str, Table]
) -> dict[str, Any]:
    def listed(found: Sequence[Found]) -> list[dict[str, Any]]:
        return [{"of": one.side, **asdict(one.difference), "sets": list(one.sets or sets)} for one in found]

    def cell_of(cell: Cell) -> dict[str, Any]:
        return {**cell._asdict(), "paired": None if cell.paired is None else cell.paired._asdict()}

    return {
        "first": sides[0].name,
        "sides": {
            side.name: {"stamps": {name: side.stamps[name] for name in sets}}
            | ({} if side.published is None else {"source": side.published.source, "notes": list(side.published.notes)})
            for side in sides
        },
        "sets": list(sets),
        "differs": listed(against),
        "noted": listed(noted),
        "tables": {
            title: {name: {side: cell_of(cell) for side, cell in cells.items()} for name, cells in table.items()}
            for title, table in tables.items()
        },
    }
