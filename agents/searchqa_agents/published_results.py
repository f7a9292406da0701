"""The published tables of Search-R1, R1-Searcher and ZeroSearch, and independent figures: rows with stamps of their own.

The numbers and what is known of how they were measured lie in ``published_results.json``, as facts with their source. A metric has the name of what
the released code computes, not the one in print: ZeroSearch prints "EM" for what is :func:`searchqa_envs.metrics.sub_em`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from searchqa_agents.comparable import without_search
from searchqa_agents.table import SET_TITLES, legible, markdown, number, show
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.console import Console

PREFIX = "published:"
"""Begins the name of a published row where a run's folder could stand."""


@dataclass(frozen=True)
class PublishedRow:
    """A row of a published table.

    Attributes
    ----------
    name
        Table and method: ``search-r1/qwen2.5-7b/ircot``.
    title, source
        Of the table; where its numbers come from.
    values
        Metric -> set -> value, from 0 to 1.
    printed_average
        Metric -> the average over the table's sets as it is printed, where it is.
    columns
        The sets of the table, in its order.
    stamps
        Set -> what is known of how its number was measured, with keys as in the stamps of runs. ``corpus``, ``retriever`` and ``described_questions``
        are in words. What is not known is an absent key. A row without retrieval has ``none`` as retriever and corpus, and no ``top_k``.
    notes
        Of the row, then of its table.
    """

    name: str
    system: str
    model: str
    method: str
    title: str
    source: str
    values: dict[str, dict[str, float]]
    printed_average: dict[str, float]
    columns: tuple[str, ...]
    stamps: dict[str, dict[str, Any]]
    notes: tuple[str, ...]

    @property
    def table(self) -> str:
        """Its name without the method."""
        return self.name.rpartition("/")[0]

    def average(self, metric: str) -> float | None:
        """The mean over all sets of the table; as printed where the sets are not told one by one; None where neither is known."""
        own = self.values.get(metric, {})
        if len(own) == len(self.columns):
            return math.fsum(own.values()) / len(own)
        return self.printed_average.get(metric)


class UnknownPublishedRowError(ConfigurationError):
    """No published row has this name."""


@cache
def published_rows() -> dict[str, PublishedRow]:
    """All rows by name, in the order of the tables."""
    data = json.loads(files("searchqa_agents").joinpath("published_results.json").read_text(encoding="utf-8"))
    rows = [_row(table, row, data["sources"]) for table in data["tables"] for row in table["rows"]]
    return {row.name: row for row in rows}


def published_row(name: str) -> PublishedRow:
    """The row of a name such as ``published:search-r1/qwen2.5-7b/ircot``; raises ``UnknownPublishedRowError`` that names those nearest to it."""
    rows = published_rows()
    wanted = name.removeprefix(PREFIX).lower()
    if wanted in rows:
        return rows[wanted]
    close = difflib.get_close_matches(wanted, rows, n=3, cutoff=0.5)
    hint = f" Nearest to it: {', '.join(f'{PREFIX}{one}' for one in close)}." if close else ""
    raise UnknownPublishedRowError(f"There is no published row {name!r}.{hint} `searchqa report published` lists all.")


def _row(table: Mapping[str, Any], row: Mapping[str, Any], sources: Mapping[str, str]) -> PublishedRow:
    columns, scale = tuple(table["columns"]), 100 if table.get("unit") == "percent" else 1
    values, average = row.get("values", {}), row.get("average", {})
    by_metric = values if isinstance(values, Mapping) else {table["metric"]: values}
    averages = average if isinstance(average, Mapping) else {table["metric"]: average}
    shares = {
        metric: {name: value / scale for name, value in zip(columns, own, strict=True) if value is not None}
        for metric, own in by_metric.items()
    }
    return PublishedRow(
        name=f"{table['table']}/{row['name']}",
        system=table["system"],
        model=row.get("model", table["model"]),
        method=row["method"],
        title=table["title"],
        source=sources[table["source"]],
        values=shares,
        printed_average={metric: value / scale for metric, value in averages.items()},
        columns=columns,
        stamps={name: _stamp(table, row, name, [*shares, *(metric for metric in averages if metric not in shares)]) for name in columns},
        notes=(*row.get("notes", ()), *table.get("notes", ())),
    )


def _stamp(table: Mapping[str, Any], row: Mapping[str, Any], name: str, metrics: Sequence[str]) -> dict[str, Any]:
    def said(key: str) -> Any:
        """By the row, else by its table; each in one word for all sets, or set by set."""
        own, whole = row.get(key), table.get(key)
        for value in (own, whole):
            found = value.get(name) if isinstance(value, Mapping) else value
            if found is not None:
                return found
        return None

    stamp = {
        "dataset": name,
        "split": said("split"),
        "questions_played": said("questions"),
        "described_questions": said("described_questions"),
        "corpus": said("corpus"),
        "retriever": said("retriever"),
        "top_k": said("top_k"),
        "judge": said("judge"),
        "metrics": list(metrics),
        "printed_as": table.get("printed_as"),
        "model": row.get("model", table["model"]),
        "method": row["method"],
    }
    if stamp["retriever"] == "none":  # what the table searched is not this row's
        stamp |= {"corpus": "none", "top_k": None}
    return {key: value for key, value in stamp.items() if value is not None}


# -- searchqa report published --------------------------------------------------------------------------------------------------------------


def main(line: Sequence[str]) -> int:
    """Run ``searchqa report published <line>``."""
    from rich.console import Console

    try:
        arguments = _parser().parse_args(line)
    except SystemExit as stop:  # argparse has already said why
        return stop.code if isinstance(stop.code, int) else 2
    rows = _chosen({"system": arguments.system, "model": arguments.model})
    console = legible(Console())
    if arguments.json:
        text = json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=not console.encoding.startswith("utf"))
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return 0
    for table in dict.fromkeys(row.table for row in rows):
        _print_table(console, [row for row in rows if row.table == table], arguments.markdown)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="searchqa report published",
        description="The published tables of Search-R1, R1-Searcher and ZeroSearch, and independent figures, each with how it was measured and its source.",
        epilog=f"A row stands beside runs by its table and name: searchqa report compare {PREFIX}search-r1/qwen2.5-7b/ircot runs/mine",
    )
    parser.add_argument("--system", help="the first part of the tables' names, such as zerosearch")
    parser.add_argument("--model", help="the second part, such as qwen2.5-7b")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--json", action="store_true", help="one list of rows with values, stamps, source and notes")
    return parser


def _chosen(asked: Mapping[str, str | None]) -> list[PublishedRow]:
    from searchqa_agents.cli import UsageError

    rows = list(published_rows().values())
    for place, (key, wanted) in enumerate(asked.items()):
        if wanted is None:
            continue
        known = list(dict.fromkeys(row.table.split("/")[place] for row in rows))
        if wanted.lower() not in known:
            raise UsageError(f"There is no published table with the {key} {wanted!r}; there are: {', '.join(known)}.")
        rows = [row for row in rows if row.table.split("/")[place] == wanted.lower()]
    return rows


def _print_table(console: Console, rows: Sequence[PublishedRow], as_markdown: bool) -> None:
    """A table in print: a row for each method, and for each metric where there are several."""
    first = rows[0]
    metrics = list(dict.fromkeys(metric for row in rows for metric in next(iter(row.stamps.values()))["metrics"]))
    several = len(metrics) > 1
    columns = [first.table, *(["metric"] if several else []), *(SET_TITLES[name] for name in first.columns), "mean"]
    cells = [
        [row.name.rpartition("/")[2], *([metric] if several else [])]
        + [number(row.values.get(metric, {}).get(name)) for name in first.columns]
        + [number(row.average(metric))]
        for row in rows
        for metric in metrics
        if metric in row.values or metric in row.printed_average
    ]
    printed = next(iter(first.stamps.values())).get("printed_as", {})
    told = [
        f"{', '.join(f'{metric} (printed as {printed[metric]})' if metric in printed else metric for metric in metrics)}. {_how(rows)}",
        f"Source: {first.source}.",
        *_notes(rows),
    ]
    if as_markdown:
        text = "\n\n".join([f"**{first.title}**", markdown(columns, cells), *told])
        console.print(f"{text}\n", markup=False, highlight=False, soft_wrap=True)
    else:
        show(console, first.title, columns, cells, "\n".join(told))


def _how(rows: Sequence[PublishedRow]) -> str:
    """How the rows of a table were measured, where they have that in common."""
    parts = []
    for key, title in (("described_questions", "questions"), ("corpus", "corpus"), ("retriever", "retriever"), ("top_k", "top-k")):
        stamps = [
            stamp
            for row in rows
            for stamp in row.stamps.values()
            if key in ("described_questions", "retriever") or not without_search(stamp)
        ]
        values = list(dict.fromkeys(stamp.get(key) for stamp in stamps))
        known = [str(value) for value in values if value is not None]
        rest = " (of some rows not known)" if known and None in values else ""
        parts.append(f"{title}: {' | '.join(known) or 'not known'}{rest}")
    splits = {name: stamp.get("split") for row in rows for name, stamp in row.stamps.items()}
    by_split = {split: [SET_TITLES[name] for name, own in splits.items() if own == split] for split in dict.fromkeys(splits.values())}
    parts += [f"split {split or 'not known'}: {', '.join(names)}" for split, names in by_split.items()]
    return f"{'; '.join(parts)}."


def _notes(rows: Sequence[PublishedRow]) -> list[str]:
    """Each note once, with the rows that it is of where it is not of all."""
    told = []
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        own = [row.name.rpartition("/")[2] for row in rows if note in row.notes]
        told.append(f"{', '.join(own)}: {note}." if len(own) < len(rows) else f"{note[0].upper()}{note[1:]}.")
    return told
