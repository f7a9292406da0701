"""Passages in columns, ordered by id."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from searchqa_retrievers.corpus_formats import Row, read_passages
from searchqa_retrievers.types import CorpusError, Passage

logger = logging.getLogger(__name__)


class Corpus:
    """An immutable set of passages, sorted by id as strings, so that the order of positions is the order of ids.

    Make one with :meth:`from_jsonl` or :meth:`from_passages`, or with :func:`~searchqa_retrievers.stored_corpus.open_corpus`, which
    leaves a large one on disk.

    Attributes
    ----------
    ids, titles, texts : sequence of str
        The columns, all of the same length; treat them as read-only.
    """

    def __init__(self, ids: Sequence[str], titles: Sequence[str], texts: Sequence[str]) -> None:
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
        return Corpus.from_rows(_checked(passages))

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Corpus:
        r"""Read a ``.jsonl`` or ``.jsonl.gz`` file with one passage a line.

        A row has ``id`` (string or integer) and either ``contents``, which is ``"Title"\ntext`` with the title in double quotes, or
        ``text`` with an optional ``title``. Where both forms are present, ``title`` and ``text`` count. Contents of a single line are
        a text without title. Blank lines are passed over. For other formats and for corpora past memory there is
        :func:`~searchqa_retrievers.stored_corpus.open_corpus`.

        Raises
        ------
        CorpusError
            The file cannot be read, or a row is malformed; the message names file, line (from 1) and field.
        """
        return Corpus.from_rows(read_passages(path, "jsonl"))

    @classmethod
    def from_rows(cls, rows: Iterable[Row]) -> Corpus:
        """A corpus of passages with the places that they were read from, which only the messages of errors name."""
        passages: dict[str, Passage] = {}
        for where, passage in rows:
            known = passages.setdefault(passage.id, passage)
            if known is not passage:
                check_repetition(known, passage, where)
        ordered = [passages[id_] for id_ in sorted(passages)]
        return Corpus([p.id for p in ordered], [p.title for p in ordered], [p.text for p in ordered])

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


def check_repetition(known: Passage, passage: Passage, where: str) -> None:
    """Raise :class:`CorpusError` unless a passage is what its id already names."""
    if known != passage:
        raise CorpusError(
            f"{where}, field 'id': {passage.id!r} already names a different passage, titled {known.title!r}; ids must be unique"
        )
    logger.debug("%s: passage %r is there twice with equal content; kept once", where, passage.id)


def _checked(passages: Iterable[Passage | tuple[str, str, str]]) -> Iterator[Row]:
    for number, row in enumerate(passages):
        passage = Passage(*row)
        if not (isinstance(passage.id, str) and isinstance(passage.title, str) and isinstance(passage.text, str)):
            raise CorpusError(f"passage {number}: id, title and text must be strings, got {passage!r:.200}")
        yield Row(f"passage {number}", passage)
