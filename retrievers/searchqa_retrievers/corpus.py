"""Passages in columns, ordered by id."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from searchqa_retrievers.types import CorpusError, Passage

logger = logging.getLogger(__name__)


class Corpus:
    """An immutable set of passages, sorted by id as strings, so that the order of positions is the order of ids.

    Make one with :meth:`from_jsonl` or :meth:`from_passages`.

    Attributes
    ----------
    ids, titles, texts : list of str
        The columns, all of the same length; treat them as read-only.
    """

    def __init__(self, ids: list[str], titles: list[str], texts: list[str]) -> None:
        if not len(ids) == len(titles) == len(texts):
            raise CorpusError(f"columns must have one length, but there are {len(ids)} ids, {len(titles)} titles, {len(texts)} texts")
        if any(left >= right for left, right in pairwise(ids)):
            raise CorpusError("ids must be unique and ascending; Corpus.from_passages sorts them and drops repeated passages")
        self.ids = ids
        self.titles = titles
        self.texts = texts

    @classmethod
    def from_passages(cls, passages: Iterable[Passage | tuple[str, str, str]]) -> Corpus:
        """A corpus of ``(id, title, text)`` passages in any order.

        A passage given twice is kept once. Raises :class:`CorpusError` when two different passages share an id.
        """
        rows: dict[str, Passage] = {}
        for number, row in enumerate(passages):
            passage = Passage(*row)
            if not (isinstance(passage.id, str) and isinstance(passage.title, str) and isinstance(passage.text, str)):
                raise CorpusError(f"passage {number}: id, title and text must be strings, got {passage!r:.200}")
            _add(rows, passage, f"passage {number}")
        return cls._from_rows(rows)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Corpus:
        r"""Read a ``.jsonl`` or ``.jsonl.gz`` file with one passage a line.

        A row has ``id`` (string or integer) and either ``contents``, which is ``"Title"\ntext`` with the title in double quotes, or
        ``text`` with an optional ``title``. Where both forms are present, ``title`` and ``text`` count. Contents of a single line are
        a text without title. Blank lines are passed over.

        Raises
        ------
        CorpusError
            The file cannot be read, or a row is malformed; the message names file, line (from 1) and field.
        """
        path = Path(path)
        rows: dict[str, Passage] = {}
        try:
            with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        where = f"{path}, line {number}"
                        _add(rows, _parse_row(line, where), where)
        except (OSError, EOFError, zlib.error) as error:
            raise CorpusError(f"cannot read the corpus {path}: {error}; give an existing .jsonl or .jsonl.gz file") from error
        return cls._from_rows(rows)

    @classmethod
    def _from_rows(cls, rows: dict[str, Passage]) -> Corpus:
        ordered = [rows[id_] for id_ in sorted(rows)]
        return cls([p.id for p in ordered], [p.title for p in ordered], [p.text for p in ordered])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Passage:
        return Passage(self.ids[index], self.titles[index], self.texts[index])

    def __iter__(self) -> Iterator[Passage]:
        return map(Passage, self.ids, self.titles, self.texts)

    def __contains__(self, id_: object) -> bool:
        return id_ in self._positions

    def __repr__(self) -> str:
        return f"Corpus({len(self)} passages)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Corpus:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self.ids, self.titles, self.texts)

    def by_id(self, id_: str) -> Passage:
        """The passage with this id; :class:`CorpusError` where there is none."""
        index = self._positions.get(id_)
        if index is None:
            raise CorpusError(f"no passage has the id {id_!r} among the {len(self)} of this corpus")
        return self[index]

    def contents(self, index: int) -> str:
        r"""``"title"\ntext``: what is indexed, and the form in which corpora are published."""
        return f'"{self.titles[index]}"\n{self.texts[index]}'

    @cached_property
    def sha256(self) -> str:
        """Hash of all ids, titles and texts; it does not depend on the order or the format of the file they came from."""
        digest = hashlib.sha256()
        for column in (self.ids, self.titles, self.texts):
            digest.update(np.fromiter(map(len, column), dtype="<i8", count=len(column)).tobytes())
            digest.update("".join(column).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {id_: index for index, id_ in enumerate(self.ids)}


def _add(rows: dict[str, Passage], passage: Passage, where: str) -> None:
    known = rows.setdefault(passage.id, passage)
    if known is passage:
        return
    if known != passage:
        raise CorpusError(
            f"{where}, field 'id': {passage.id!r} already names a different passage, titled {known.title!r}; ids must be unique"
        )
    logger.debug("%s: passage %r is there twice with equal content; kept once", where, passage.id)


def _parse_row(line: bytes, where: str) -> Passage:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CorpusError(f"{where}: not a JSON object: {error}") from error
    if not isinstance(row, dict):
        raise CorpusError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    id_ = row.get("id")
    if isinstance(id_, bool) or not isinstance(id_, str | int) or id_ == "":
        raise CorpusError(f"{where}, field 'id': must be a non-empty string or an integer, got {id_!r}")
    title, text, contents = (_text_field(row, field, where) for field in ("title", "text", "contents"))
    if text is None:
        if contents is None:
            raise CorpusError(f"{where}, field 'contents': missing; a row needs 'contents', or 'text' with an optional 'title'")
        head, newline, tail = contents.partition("\n")
        text = tail if newline else contents
        if title is None and newline:
            title = head[1:-1] if len(head) >= 2 and head[0] == head[-1] == '"' else head
    elif title is None and contents is not None and "\n" in contents:
        head = contents.partition("\n")[0]
        title = head[1:-1] if len(head) >= 2 and head[0] == head[-1] == '"' else head
    return Passage(str(id_), title or "", text)


def _text_field(row: dict[str, Any], field: str, where: str) -> str | None:
    value = row.get(field)
    if value is not None and not isinstance(value, str):
        raise CorpusError(f"{where}, field {field!r}: must be a string, got {value!r:.80}")
    return value
