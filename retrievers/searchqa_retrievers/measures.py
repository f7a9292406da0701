"""How quick a retriever is, and how much of what questions need it finds."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from searchqa_retrievers.analysis import Analyzer
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.types import Hit, Retriever, RetrieverError, SearchRequest


class Asked(NamedTuple):
    """A query and the passages that answer it together: their ids, else their titles; none where that is not known."""

    query: str
    ids: tuple[str, ...] = ()
    titles: tuple[str, ...] = ()


class Speed(NamedTuple):
    """Of calls with so many requests each."""

    batch: int
    rate: float
    """requests a second"""
    p50: float
    """seconds of a call"""
    p99: float


class Recall(NamedTuple):
    """Means over questions whose supporting passages are known."""

    top_k: int
    share: float
    """of the supporting passages that are among the first ``top_k``"""
    all_found: float
    """share of the questions of which all are"""
    questions: int


def read_asked(file: str | Path) -> list[Asked]:
    """Questions of a ``questions.jsonl`` (or ``.gz``), with ``supporting_ids`` and ``supporting_titles`` of their metadata.

    Raises
    ------
    RetrieverError
        The file cannot be read, or a line has no question.
    """
    file = Path(file)
    asked = []
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = json.loads(line)
                    query = row.get("question")
                    if not isinstance(query, str):
                        raise RetrieverError(f"{file}, line {number}: a question needs a field 'question' of text, got {query!r:.80}")
                    metadata = row.get("metadata") or {}
                    ids, titles = (tuple(dict.fromkeys(metadata.get(f"supporting_{field}") or ())) for field in ("ids", "titles"))
                    asked.append(Asked(query, ids, titles))
    except (OSError, EOFError, zlib.error, ValueError, AttributeError, TypeError) as error:
        raise RetrieverError(
            f"cannot read the questions of {file}: {type(error).__name__}: {error}; give a .jsonl or .jsonl.gz file"
        ) from error
    if not asked:
        raise RetrieverError(f"{file} has no questions")
    return asked


def sampled_queries(corpus: Corpus, count: int, seed: int = 0) -> list[Asked]:
    """Queries of 3 to 8 different words of a passage drawn at random, without English stop words; the same for the same seed."""
    generator = np.random.default_rng(seed)
    analyzer = Analyzer("en", None)
    asked: list[Asked] = []
    for _ in range(20 * count):
        if len(asked) == count or not len(corpus):
            break
        words = list(dict.fromkeys(analyzer.terms(corpus.contents(int(generator.integers(len(corpus)))))))
        size = min(len(words), int(generator.integers(3, 9)))
        if size:
            asked.append(Asked(" ".join(generator.choice(words, size=size, replace=False).tolist())))
    if not asked:
        raise RetrieverError("the corpus has no words to make queries of; give questions of your own")
    return asked


def speed(retriever: Retriever, queries: Sequence[str], top_k: int, batch: int, advance: Callable[[int], object] | None = None) -> Speed:
    """Ask all queries in calls of ``batch``; what was asked before may make it quicker (memory of the system, caches)."""
    seconds = []
    for start in range(0, len(queries), batch):
        requests = [SearchRequest(query, top_k) for query in queries[start : start + batch]]
        begun = time.perf_counter()
        retriever.search(requests)
        seconds.append(time.perf_counter() - begun)
        if advance is not None:
            advance(len(requests))
    p50, p99 = np.quantile(seconds, [0.5, 0.99], method="higher").tolist()
    return Speed(batch, len(queries) / sum(seconds), p50, p99)


def recall(asked: Iterable[Asked], answers: Iterable[Sequence[Hit]], cutoffs: Sequence[int] = (3, 5, 10)) -> list[Recall]:
    """Recall at each cutoff; questions without known passages are left out, and without any of them the list is empty."""
    ranks: list[list[int | None]] = []
    for question, hits in zip(asked, answers, strict=True):
        wanted = question.ids or question.titles
        if wanted:
            found = [hit.passage.id if question.ids else hit.passage.title for hit in hits]
            ranks.append([found.index(one) if one in found else None for one in wanted])
    if not ranks:
        return []
    results = []
    for top_k in cutoffs:
        shares = [sum(rank is not None and rank < top_k for rank in row) / len(row) for row in ranks]
        results.append(Recall(top_k, sum(shares) / len(shares), sum(share == 1 for share in shares) / len(shares), len(shares)))
    return results
