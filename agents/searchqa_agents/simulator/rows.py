"""Searches with their documents, as lines of a JSON Lines file: what the simulator's making hands from one step to the next."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from searchqa_envs.errors import SearchQAError
from searchqa_retrievers.types import Passage

ROWS_FILE = "rows.jsonl"
Label = Literal["useful", "noisy"]
LABELS: tuple[Label, ...] = ("useful", "noisy")


class RowsError(SearchQAError, ValueError):
    """A file of searches cannot be read, or lacks what a step needs."""


@dataclass(frozen=True)
class SearchRow:
    """One search of an episode.

    Attributes
    ----------
    id
        Question, sample and turn: ``easy-train-0-17-5/0/1``.
    golden_answers
        Of the question; a simulator is told the first.
    turn
        Of the search in its episode, from 0.
    last
        Whether the episode searched no more after it.
    documents
        What the engine found, best first.
    answer, right
        The episode's answer, and whether it was right.
    supporting_titles
        Of the question; empty where the data set has none.
    note
        What is looked for with the query, ``Mako 's director 's``, where the question has a gold chain; else empty.
    stamp
        Hash of the stamp of the collection (its ``stamp.json``), 12 digits.
    labels
        Of each document, None for one that could not be judged; None before they are labelled.
    """

    id: str
    question_id: str
    question: str
    golden_answers: tuple[str, ...]
    query: str
    turn: int
    last: bool
    documents: tuple[Passage, ...]
    answer: str | None
    right: bool
    supporting_titles: tuple[str, ...] = ()
    note: str = ""
    stamp: str = ""
    labels: tuple[Label | None, ...] | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.documents):
            raise ValueError(
                f"row {self.id!r} has {len(self.documents)} documents and {len(self.labels)} labels; there must be one for each"
            )

    @property
    def golden_answer(self) -> str:
        """The first golden answer, which a judge and a simulator are told. Raises :class:`RowsError` where the question has none."""
        if not self.golden_answers:
            raise RowsError(f"row {self.id!r} has no golden answer, which a judge and a simulator are told. Leave the row out.")
        return self.golden_answers[0]

    def labelled(self, label: Label) -> list[Passage]:
        """The documents with this label, best first."""
        return [document for document, own in zip(self.documents, self.labels or (), strict=bool(self.labels)) if own == label]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = dict(vars(self))
        values["documents"] = [{"id": document.id, "title": document.title, "text": document.text} for document in self.documents]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SearchRow:
        """The row that :meth:`to_json` wrote. Raises ``ValueError``, ``KeyError`` or ``TypeError`` for anything else."""
        values = dict(values)
        values["documents"] = tuple(Passage(one["id"], one["title"], one["text"]) for one in values["documents"])
        values["golden_answers"] = tuple(values["golden_answers"])
        values["supporting_titles"] = tuple(values.get("supporting_titles", ()))
        if values.get("labels") is not None:
            values["labels"] = tuple(values["labels"])
            if not set(values["labels"]) <= {*LABELS, None}:
                raise ValueError(f"labels must be among {[*LABELS, None]}, got {values['labels']}")
        return cls(**values)


def row_lines(rows: Iterable[SearchRow]) -> str:
    """The rows as lines of JSON. Half a surrogate pair, which no encoding takes, becomes U+FFFD."""
    text = "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def rows_file(path: str | os.PathLike[str]) -> Path:
    """A file of rows, or the one in the folder of a run."""
    file = Path(path).expanduser()
    file = file / ROWS_FILE if file.is_dir() else file
    if not file.is_file():
        raise RowsError(f"There is no file {file}. Give rows=<folder of `searchqa simulator collect` or `label`>, or a file of such rows.")
    return file


def rows_sha256(path: str | os.PathLike[str]) -> str:
    """Hash of the bytes of a file of rows."""
    with rows_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def iterate_rows(path: str | os.PathLike[str]) -> Iterator[SearchRow]:
    """The rows of a file or of a run's folder, one by one. Raises :class:`RowsError` at a line that is none."""
    file = rows_file(path)
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield SearchRow.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise RowsError(f"{file}, line {number}: not a search with its documents ({error}). Make the file again.") from error


def labelled_rows(path: str | os.PathLike[str]) -> list[SearchRow]:
    """The rows of a file that were labelled. Raises :class:`RowsError` where one was not, or there is none."""
    rows = list(iterate_rows(path))
    bare = next((row for row in rows if row.labels is None), None)
    if bare is not None or not rows:
        wrong = "holds no row" if bare is None else f"has no labels at {bare.id}"
        raise RowsError(f"{rows_file(path)} {wrong}. Label what was collected first: searchqa simulator label rows={path}")
    return rows
