"""BM25 search with exact, reproducible results."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from searchqa_retrievers.analysis import ANALYZER_VERSION, Analyzer
from searchqa_retrievers.bm25_index import METHODS, BM25Index, build_index, index_key, open_or_build
from searchqa_retrievers.checks import check_request
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.paths import cache_root
from searchqa_retrievers.types import Hit, Passage, RetrieverError, SearchRequest, default_cache_key

BM25_PRESETS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "bm25s": MappingProxyType({"k1": 1.5, "b": 0.75}),
        "search-r1": MappingProxyType({"k1": 0.9, "b": 0.4}),
    }
)
"""``bm25s``: the defaults of that library; ``search-r1``: the defaults of Anserini's Lucene, which Search-R1's BM25 server uses."""

SMALL_CORPUS = 5_000
"""Up to this many passages an index is built in memory at every start (milliseconds), leaves no files and compiles nothing."""

# Up to this many hits are quicker found one after another than by sorting.
_FEW = 10
_DENSE_SHARE = 8


class BM25Settings(NamedTuple):
    """What a score depends on, besides the corpus."""

    k1: float
    b: float
    method: str
    stopwords: str | tuple[str, ...] | None
    stemmer: str | None

    @classmethod
    def checked(cls, k1: float, b: float, method: str, stopwords: str | Sequence[str] | None, stemmer: str | None) -> BM25Settings:
        """Raise :class:`RetrieverError` for a setting that is out of its range."""
        if not _is_number(k1) or not 0 <= k1 < float("inf"):
            raise RetrieverError(f"k1 must be a finite number of at least 0, got {k1!r}")
        if not _is_number(b) or not 0 <= b <= 1:
            raise RetrieverError(f"b must be between 0 and 1, got {b!r}")
        if method not in METHODS:
            raise RetrieverError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if not (
            stopwords is None
            or isinstance(stopwords, str)
            or (isinstance(stopwords, Sequence) and all(isinstance(word, str) for word in stopwords))
        ):
            raise RetrieverError(f"stopwords must be the name of a language, a list of words or None, got {stopwords!r:.200}")
        if not (stemmer is None or isinstance(stemmer, str)):
            raise RetrieverError(f"stemmer must be the name of an algorithm of PyStemmer or None, got {stemmer!r:.200}")
        words = stopwords if stopwords is None or isinstance(stopwords, str) else tuple(stopwords)
        return cls(float(k1), float(b), method, words, stemmer)

    def analyzer(self) -> dict[str, Any]:
        return {"version": ANALYZER_VERSION, "stopwords": self.stopwords, "stemmer": self.stemmer}

    def stamp(self) -> dict[str, Any]:
        return {"k1": self.k1, "b": self.b, "method": self.method, "analyzer": self.analyzer()}


class BM25Retriever:
    """BM25 over the ``contents`` (title and text) of a corpus, as bm25s computes it, with a fixed order among equal scores.

    Scores are those of bm25s 0.3.16 bit for bit (float32, terms added in the order of the query, repeated terms counted each time).
    Hits are ordered by score descending, then by passage id. Passages with score 0 are never returned, so there can be fewer than
    ``top_k``, and none for a query without a known term. Of an extremely long query only the first 16,384 characters count.

    An index of more than :data:`SMALL_CORPUS` passages is kept, memory-mapped, below ``cache_dir``; its name is a hash of the corpus
    and all settings. The object can be shared by threads, and pickled: it comes back by opening or building the index again.

    Parameters
    ----------
    corpus : Corpus
    k1, b : float
        Saturation of term frequency (at least 0) and weight of passage length (0 to 1).
    method : str
        ``"lucene"``, ``"robertson"`` or ``"atire"``.
    stopwords : str, sequence of str or None
        ``"en"``: the 33 words of Lucene; another language known to bm25s; a list; or None.
    stemmer : str or None
        An algorithm of PyStemmer, or None.
    cache_dir : path or None
        Folder for indexes. Default: ``$SEARCHQA_CACHE``, else the user's cache folder for ``searchqa``.
    show_progress : bool
        A progress bar on stderr while a large index is built in a terminal.

    Raises
    ------
    RetrieverError
        A setting is out of its range.
    """

    name = "bm25"

    def __init__(
        self,
        corpus: Corpus,
        k1: float = 1.5,
        b: float = 0.75,
        method: str = "lucene",
        stopwords: str | Sequence[str] | None = "en",
        stemmer: str | None = "english",
        cache_dir: str | Path | None = None,
        show_progress: bool = True,
    ) -> None:
        self._settings = BM25Settings.checked(k1, b, method, stopwords, stemmer)
        self.corpus = corpus
        self._places = {"cache_dir": cache_dir, "show_progress": show_progress}
        analyzer = Analyzer(stopwords, stemmer)
        scoring: dict[str, Any] = {"k1": float(k1), "b": float(b), "method": method}

        def build() -> BM25Index:
            return build_index(corpus, analyzer, **scoring, show_progress=show_progress)

        self._small = len(corpus) <= SMALL_CORPUS
        if self._small:
            self.index = build()
        else:
            root = cache_root() if cache_dir is None else Path(cache_dir).expanduser()
            key = index_key(corpus, {**scoring, "stopwords": sorted(analyzer.stop_words), "stemmer": stemmer})
            self.index = open_or_build(root / "bm25" / key, build, {**self._settings.stamp(), "corpus_sha256": corpus.sha256})
        self._terms = analyzer.query_terms()
        self._postings: dict[int, tuple[npt.NDArray[np.int32] | None, npt.NDArray[np.float32]]] = {}
        self._buffers = threading.local()

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        """Answer all requests; queries of equal terms are searched once."""
        if not requests:
            return []
        slots: dict[tuple[str, ...], int] = {}
        top_k = 0
        for request in requests:
            if request.top_k < 1 or request.filters:
                check_request(request, self.name)
            slots.setdefault(self._terms(request.query), len(slots))
            top_k = max(top_k, request.top_k)
        top_k = min(top_k, len(self.corpus))
        number_of = self.index.vocabulary.get
        analyzed = [[number_of(term, -1) for term in terms] for terms in slots]
        rank = self._rank_small if self._small else self._rank_large
        # A result for a smaller top_k is the beginning of that for a larger one, since the order is total.
        ranked = rank(analyzed, top_k)
        answers = []
        ids, titles, texts = self.corpus.ids, self.corpus.titles, self.corpus.texts
        for request in requests:
            documents, scores = ranked[slots[self._terms(request.query)]]
            k = request.top_k
            answers.append([Hit(Passage(ids[i], titles[i], texts[i]), score) for i, score in zip(documents[:k], scores[:k], strict=True)])
        return answers

    def cache_key(self, request: SearchRequest) -> Hashable:
        return default_cache_key(request)

    def stamp(self) -> dict[str, Any]:
        """The settings that a result depends on, for the record of a run."""
        return {
            "retriever": self.name,
            "backend": "memory",
            **self._settings.stamp(),
            "corpus_sha256": self.corpus.sha256,
            "passages": len(self.corpus),
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> BM25Retriever:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.corpus, {**self._settings._asdict(), **self._places})

    def __repr__(self) -> str:
        return f"BM25Retriever({self.corpus!r}, k1={self._settings.k1}, b={self._settings.b})"

    def _rank_small(self, queries: list[list[int]], top_k: int) -> list[tuple[list[int], list[float]]]:
        """The best passages (positions, scores) of each query, by NumPy alone."""
        postings = self._postings
        ranked = []
        for terms in queries:
            scores = np.zeros(self.index.num_passages, dtype=np.float32)
            for term in terms:
                if term >= 0:
                    where, values = postings.get(term) or self._unpack(term)
                    if where is None:
                        scores += values
                    else:
                        scores[where] += values  # a passage is at most once among the postings of a term
            ranked.append(_take_best(scores, top_k) if top_k <= _FEW else _sort_best(scores, top_k))
        return ranked

    def _unpack(self, term: int) -> tuple[npt.NDArray[np.int32] | None, npt.NDArray[np.float32]]:
        """Positions and scores of a term's postings; for a frequent term, None and the scores of all passages: adding 0 changes no bit."""
        index = self.index
        start, end = index.indptr[term : term + 2].tolist()
        where: npt.NDArray[np.int32] | None = index.indices[start:end]
        values = index.data[start:end]
        if (end - start) * _DENSE_SHARE >= index.num_passages:
            dense = np.zeros(index.num_passages, dtype=np.float32)
            dense[where] = values
            where, values = None, dense
        self._postings[term] = where, values
        return where, values

    def _rank_large(self, queries: list[list[int]], top_k: int) -> list[tuple[list[int], list[float]]]:
        """The same by compiled code."""
        from searchqa_retrievers.bm25_kernel import compiled_search

        flat = array("i")
        ends = array("q", [0])
        for terms in queries:
            flat.extend(terms)
            ends.append(len(flat))
        scores, block_best = self._scratch()
        out_scores = np.empty((len(queries), top_k), dtype=np.float32)
        out_documents = np.empty((len(queries), top_k), dtype=np.int32)
        out_counts = np.empty(len(queries), dtype=np.int64)
        compiled_search()(
            self.index.data,
            self.index.indices,
            self.index.indptr,
            np.array(flat, dtype=np.int32),
            np.array(ends, dtype=np.int64),
            scores,
            block_best,
            out_scores,
            out_documents,
            out_counts,
        )
        counts, documents, values = out_counts.tolist(), out_documents.tolist(), out_scores.tolist()
        return [(row[:count], value[:count]) for count, row, value in zip(counts, documents, values, strict=True)]

    def _scratch(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """This thread's accumulator (all zero between searches) and block maxima."""
        scratch: tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]] | None = getattr(self._buffers, "scratch", None)
        if scratch is None:
            from searchqa_retrievers.bm25_kernel import BLOCK

            blocks = -(-self.index.num_passages // BLOCK)
            scratch = self._buffers.scratch = (np.zeros(blocks * BLOCK, dtype=np.float32), np.empty(blocks, dtype=np.int32))
        return scratch


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _take_best(scores: npt.NDArray[np.float32], top_k: int) -> tuple[list[int], list[float]]:
    """Positions and values of the greatest positive scores, the lower position first among equals; clears them in ``scores``."""
    positions: list[int] = []
    values: list[float] = []
    for _ in range(top_k):
        best = int(scores.argmax())  # the first among equals
        value = float(scores[best])
        if value <= 0:
            break
        positions.append(best)
        values.append(value)
        scores[best] = 0
    return positions, values


def _sort_best(scores: npt.NDArray[np.float32], top_k: int) -> tuple[list[int], list[float]]:
    """The same for a greater ``top_k``."""
    found = np.flatnonzero(scores)
    values = scores[found]
    if len(found) > top_k:
        kept = values >= np.partition(values, len(values) - top_k)[len(values) - top_k]
        found, values = found[kept], values[kept]
    order = np.argsort(-values, kind="stable")[:top_k]
    return found[order].tolist(), values[order].tolist()


def _restore(corpus: Corpus, arguments: dict[str, Any]) -> BM25Retriever:
    return BM25Retriever(corpus, **arguments)
