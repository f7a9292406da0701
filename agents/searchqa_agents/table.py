"""Results as rows for tables in terminals, pages and files."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

METRIC_GROUPS = {
    "answers": {
        "em": "exact match",
        "f1": "F1",
        "sub_em": "substring match",
        "cover_em": "cover match",
        "judge": "judged right",
        "answered": "answered",
    },
    "search": {
        "title_recall_all": "supporting titles found, all",
        "title_recall_any": "supporting titles found, any",
        "title_recall_mean": "supporting titles found, share",
        "searches": "searches per question",
    },
    "play": {
        "reward": "reward",
        "turns": "turns per question",
        "invalid_turns": "invalid turns per question",
        "invalid_rate": "invalid turns, share",
        "forged": "episodes with forged tags",
    },
    "cost per episode": {
        "tokens": "tokens sampled",
        "model_calls": "model calls",
        "failed_calls": "of these, without a reply",
        "prompt_tokens": "tokens read by the model",
        "generated_tokens": "tokens written by the model",
    },
}
"""Title of each measure, by what it is about, in the order of tables. All other measures are in the files of results only."""

METRIC_TITLES = {name: title for titles in METRIC_GROUPS.values() for name, title in titles.items()}

SET_TITLES = {
    "nq": "NQ",
    "triviaqa": "TriviaQA",
    "popqa": "PopQA",
    "hotpotqa": "HotpotQA",
    "2wikimultihopqa": "2Wiki",
    "musique": "MuSiQue",
    "bamboogle": "Bamboogle",
}
"""Short titles of the published sets, in their usual order."""


def number(value: float | None) -> str:
    """Three digits behind the point; a dash for what is not known."""
    return "–" if value is None else f"{value:.3f}"


def amount(value: float | None) -> str:
    """As :func:`number`; of large numbers, such as of tokens, only what matters."""
    return number(value) if value is None or abs(value) < 100 else f"{value:,.1f}"


def is_heading(row: Sequence[str]) -> bool:
    """Whether a row only names the group of rows beneath it: all cells but the first are empty."""
    return len(row) > 1 and bool(row[0]) and not any(row[1:])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [[f"**{row[0]}**", *row[1:]] if is_heading(row) else row for row in rows]
    lines = [columns, ["---", *("---:" for _ in columns[1:])], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def stamp_line(stamp: Mapping[str, Any]) -> str:
    """The part of a stamp that a reader of a table wants to see."""
    retriever = stamp.get("retriever")
    name = retriever.get("retriever", retriever.get("name")) if isinstance(retriever, Mapping) else retriever
    reward = stamp.get("reward")
    parts = {
        "data": "/".join(str(stamp[key]) for key in ("dataset", "split") if stamp.get(key) is not None),
        "measured on": stamp.get("measured_on"),
        "measured with": " ".join(f"{key} {_name(value)}" for key, value in (stamp.get("measured_with") or {}).items()),
        "revision": stamp.get("revision"),
        "corpus": str(stamp.get("corpus_sha256") or "")[:12],
        "retriever": name,
        "top_k": stamp.get("top_k"),
        "dialect": stamp.get("dialect"),
        "reward": reward.get("name") if isinstance(reward, Mapping) else reward,
        "max_turns": stamp.get("max_turns"),
        "seed": stamp.get("seed"),
        "version": stamp.get("searchqa_gym"),
        "commit": _short_commit(stamp),
    }
    return ", ".join(f"{key} {value}" for key, value in parts.items() if value not in (None, ""))


def _name(value: Any) -> Any:
    return value.get("name", value) if isinstance(value, Mapping) else value


def _short_commit(stamp: Mapping[str, Any]) -> str:
    commit, changes, _ = str(stamp.get("commit") or "").partition("+")
    return f"{commit[:12]} with changes" if changes else commit[:12]


def in_parts(width: int, columns: Sequence[str], rows: Sequence[Sequence[str]], always: Sequence[int] = (0,)) -> list[list[int]]:
    """Which columns of a table to show together, so that no part is wider than ``width`` characters; the columns ``always`` are in every part."""
    widths = [3 + max(len(row[i]) for row in (columns, *rows) if i == 0 or not is_heading(row)) for i in range(len(columns))]
    free = width - 1 - sum(widths[i] for i in always)
    parts: list[list[int]] = [[]]
    for i in [i for i in range(len(columns)) if i not in always]:
        if parts[-1] and sum(widths[j] for j in parts[-1]) + widths[i] > free:
            parts.append([])
        parts[-1].append(i)
    return [sorted({*always, *part}) for part in parts]


def legible(console: Console) -> Console:
    """The console, which from now on writes what its encoding lacks as something alike, where it would else fail."""
    reconfigure = getattr(console.file, "reconfigure", None)
    if reconfigure is not None and not console.encoding.startswith("utf") and getattr(console.file, "errors", "") == "strict":
        codecs.register_error("searchqa.alike", _alike)
        reconfigure(errors="searchqa.alike")
    return console


def _alike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    alike = {"–": "-", "≠": "#", "·": "-", "…": "~"}
    return "".join(alike.get(one, "?") for one in error.object[error.start : error.end]), error.end


def show(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print a table: the first column to the left, numbers to the right; a row that only has a first cell is the heading of those beneath it."""
    from rich.table import Table
    from rich.text import Text

    legible(console)
    table = Table(title=Text(title), title_justify="left", caption=Text(caption), caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if i else "left")
    for row in rows:
        if is_heading(row):
            table.add_section()
        table.add_row(*map(Text, row), style="bold" if is_heading(row) else None)
    console.print(table)
