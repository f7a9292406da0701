"""Several sets or files as one: unique question ids, the origin kept, passages once."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from searchqa_envs.datasets.download import file_sums, write_record
from searchqa_envs.datasets.formats import passage_id
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.questions import Question
from searchqa_retrievers.types import Passage

_ID_FIELDS = ("supporting_ids", "answer_ids")


@dataclass(frozen=True, slots=True)
class Part:
    """What goes into a merge: a label that becomes part of the ids, its questions, and its passages."""

    label: str
    questions: Sequence[Question]
    passages: Iterable[Passage] = ()


@dataclass(slots=True)
class Merged:
    """Counts of a merge: rows by label, passages read, and what was dropped as equal or nearly so."""

    rows: dict[str, int] = field(default_factory=dict)
    passages: int = 0
    equal: int = 0
    nearly_equal: int = 0


class PassageUnion:
    """Passages of several corpora, each content once.

    A passage is known by the hash of its title and text, so that corpora whose ids are mere numbers do not collide. With
    ``near_duplicates``, passages whose lower-cased titles are equal and whose texts have the same lower-cased letters and digits count as one;
    the first stays.
    """

    def __init__(self, near_duplicates: bool = False) -> None:
        self.near_duplicates = near_duplicates
        self.passages: dict[str, Passage] = {}
        self.equal = 0
        self.nearly_equal = 0
        self._by_letters: dict[tuple[str, str], str] = {}

    def add(self, passage: Passage) -> str:
        """Take a passage in, and return the id under which its content is now known."""
        identifier = passage_id(passage.title, passage.text)
        if identifier in self.passages:
            self.equal += 1
            return identifier
        if self.near_duplicates:
            letters = "".join(filter(str.isalnum, passage.text.lower()))
            first = self._by_letters.setdefault((passage.title.lower(), letters), identifier)
            if first != identifier:
                self.nearly_equal += 1
                return first
        self.passages[identifier] = Passage(identifier, passage.title, passage.text)
        return identifier


def merge(parts: Sequence[Part], out: Path, *, near_duplicates: bool = False) -> Merged:
    """Write ``questions.jsonl.gz``, ``corpus.jsonl.gz`` (where there are passages) and ``searchqa-data.json`` to the folder ``out``.

    Ids become ``<label>/<id>``; metadata tells ``origin`` and ``origin_id``. Ids of gold passages follow the passages.
    Equal input gives equal bytes.
    """
    labels = [part.label for part in parts]
    if len(set(labels)) != len(labels):
        raise ConfigurationError(f"the parts of a merge must have different labels, got {', '.join(labels)}. Name one as <label>=<path>.")
    if out.exists() and any(out.iterdir()):
        raise ConfigurationError(f"the folder of a merge must be empty or not there yet, and {out} has files. Choose another.")
    out.mkdir(parents=True, exist_ok=True)
    union = PassageUnion(near_duplicates)
    merged = Merged()
    with _gzip_lines(out / "questions.jsonl.gz") as file:
        for part in parts:
            ids: dict[str, str] = {}
            for passage in part.passages:
                ids[passage.id] = union.add(passage)
                merged.passages += 1
            for question in part.questions:
                file.write(_line(_question_row(part.label, question, ids)))
            merged.rows[part.label] = len(part.questions)
    merged.equal, merged.nearly_equal = union.equal, union.nearly_equal
    written = ["questions.jsonl.gz"]
    if union.passages:
        with _gzip_lines(out / "corpus.jsonl.gz") as file:
            for passage in union.passages.values():
                contents = f'"{passage.title}"\n{passage.text}'
                file.write(_line({"id": passage.id, "title": passage.title, "contents": contents}))
        written.append("corpus.jsonl.gz")
    entries = {name: {"sha256": file_sums(out / name)[0], "size": (out / name).stat().st_size} for name in written}
    write_record(out, {"merged_from": labels, "files": entries})
    return merged


def question_row(question: Question) -> dict[str, Any]:
    """A question as a row of ``questions.jsonl``."""
    return {
        "id": question.id,
        "question": question.question,
        "golden_answers": list(question.golden_answers),
        "metadata": dict(question.metadata),
    }


def _question_row(label: str, question: Question, ids: dict[str, str]) -> dict[str, Any]:
    row = question_row(question)
    row["id"] = f"{label}/{question.id}"
    metadata = row["metadata"]
    metadata |= {"origin": label, "origin_id": question.id}
    for name in _ID_FIELDS:
        if name in metadata:
            metadata[name] = list(dict.fromkeys(ids.get(identifier, identifier) for identifier in metadata[name]))
    return row


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


@contextmanager
def _gzip_lines(path: Path) -> Iterator[IO[str]]:
    """A gzip text file whose bytes do not depend on the time or its name."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as zipped,
        io.TextIOWrapper(zipped, "utf-8", newline="\n") as text,
    ):
        yield text
