"""BM25 for corpora past memory: candidates from a tantivy index on disk, scored again as the index in memory scores them."""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import shutil
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from searchqa_retrievers.analysis import Analyzer
from searchqa_retrievers.bm25 import BM25Settings
from searchqa_retrievers.bm25_index import index_key, inverse_document_frequencies, progress_bar, term_weights
from searchqa_retrievers.checks import check_request
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.needs import Needs
from searchqa_retrievers.paths import cache_root
from searchqa_retrievers.stored_folder import DamagedIndexError, map_file, open_or_write, read_meta
from searchqa_retrievers.types import Hit, RetrieverError, SearchRequest, default_cache_key

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
LEAST_CANDIDATES = 32
MOST_TIED_CANDIDATES = 4096
"""Up to so many are taken where the scores of the last ones are equal."""

_HEAP_BYTES = 512_000_000
_BASE_BYTES = 200_000_000
_LONGEST_TERM = 200
_TIE = 1e-5
_FEW_TERMS = 16
_VERIFIED_BYTES = 1 << 30  # up to this size all checksums are compared at every opening (a second)
_CLOSE_K1 = (0.6, 2.0)
_FIELD = "terms"
_POSITION = "position"
_TERMS_FILE = "terms.bin"


class _Terms(NamedTuple):
    """The terms of all passages, each between two blanks of its own, so that ``bytes.count`` finds every one.

    ``blob`` holds passage after passage; passage i is ``blob[starts[i]:starts[i + 1]]`` (int64[N + 1]), has ``lengths[i]`` terms (uint32[N]) and the
    CRC-32 ``checksums[i]`` (uint32[N]).
    """

    file: Path
    blob: mmap.mmap | bytes
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.uint32]
    checksums: npt.NDArray[np.uint32]

    def of(self, position: int) -> bytes:
        terms = self.blob[self.starts[position] : self.starts[position + 1]]
        if zlib.crc32(terms) != self.checksums[position]:
            raise DamagedIndexError(
                f"the terms of passage {position} in {self.file} are damaged; delete that folder, and it is built again"
            )
        return terms


class _DiskIndex(NamedTuple):
    index: Any
    schema: Any
    searcher: Any
    terms: _Terms
    passages: int
    average_length: np.float64
    links: tempfile.TemporaryDirectory[str] | None
    """lives as long as the index, of which it is the way in where the index is read-only"""


class DiskBM25Retriever:
    """BM25 over a corpus of any size, of which only what a query touches is read from disk.

    Tantivy finds ``rescore_factor * top_k`` candidates (at least 32) by BM25 with its own constants and rounded lengths; they are scored
    again from their terms, which lie beside it. So a score is that of :class:`~searchqa_retrievers.bm25.BM25Retriever` bit for bit, whatever ``k1``, ``b`` and
    ``method``, and the order is the same, but a passage that tantivy ranks behind all candidates is missed. Where the last candidates
    have equal scores by tantivy, all those equal to them are taken, up to 4096. Text and queries go through this package's analyzer.

    The index lies below ``cache_dir``; it does not depend on ``k1``, ``b`` and ``method``. The object can be shared by threads, and
    pickled: it comes back by opening or building the index again.

    Parameters
    ----------
    corpus, k1, b, method, stopwords, stemmer, cache_dir, show_progress
        As for :class:`~searchqa_retrievers.bm25.BM25Retriever`.
    rescore_factor : int
        Candidates for each passage asked for.

    Raises
    ------
    RetrieverError
        A setting is out of its range, tantivy is missing, or the index cannot be written.
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
        *,
        rescore_factor: int = 8,
    ) -> None:
        if isinstance(rescore_factor, bool) or not isinstance(rescore_factor, int) or rescore_factor < 1:
            raise RetrieverError(f"rescore_factor must be a whole number of at least 1, got {rescore_factor!r}")
        self._settings = BM25Settings.checked(k1, b, method, stopwords, stemmer)
        self._tantivy = _require_tantivy()
        if not _CLOSE_K1[0] <= k1 <= _CLOSE_K1[1]:
            logger.warning(
                "k1 = %s is far from the 1.2 by which tantivy chooses candidates, so that the best passages may be missed; "
                "raise rescore_factor, or use backend='memory'",
                k1,
            )
        self.corpus = corpus
        self._rescore_factor = rescore_factor
        self._places = {"cache_dir": cache_dir, "show_progress": show_progress}
        analyzer = Analyzer(stopwords, stemmer)
        self._terms = analyzer.query_terms()
        root = cache_root() if cache_dir is None else Path(cache_dir).expanduser()
        parts = {"disk": FORMAT_VERSION, "tantivy": self._tantivy.__version__}
        key = index_key(corpus, {**parts, "stopwords": sorted(analyzer.stop_words), "stemmer": stemmer})
        self._index = _open_or_build(root / "bm25-disk" / key, corpus, analyzer, self._settings.analyzer(), show_progress)

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        """Answer all requests; queries of equal terms are searched once."""
        found: dict[tuple[tuple[str, ...], int], list[Hit]] = {}
        for request in requests:
            if request.top_k < 1 or request.filters:
                check_request(request, self.name)
            key = (self._terms(request.query), request.top_k)
            if key not in found:
                found[key] = self._search(*key)
        return [list(found[self._terms(request.query), request.top_k]) for request in requests]

    def cache_key(self, request: SearchRequest) -> Hashable:
        return default_cache_key(request)

    def stamp(self) -> dict[str, Any]:
        """The settings that a result depends on, for the record of a run."""
        return {
            "retriever": self.name,
            "backend": "disk",
            "rescore_factor": self._rescore_factor,
            "tantivy": self._tantivy.__version__,
            **self._settings.stamp(),
            "corpus_sha256": self.corpus.sha256,
            "passages": len(self.corpus),
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> DiskBM25Retriever:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = {**self._settings._asdict(), **self._places, "rescore_factor": self._rescore_factor}
        return _restore, (self.corpus, arguments)

    def __repr__(self) -> str:
        return f"DiskBM25Retriever({self.corpus!r}, k1={self._settings.k1}, b={self._settings.b})"

    def _search(self, asked: tuple[str, ...], top_k: int) -> list[Hit]:
        frequencies = {term: self._index.searcher.doc_freq(_FIELD, _written(term)) for term in dict.fromkeys(asked)}
        terms = [term for term in asked if frequencies[term]]
        if not terms:
            return []
        positions = self._candidates(Counter(terms), max(LEAST_CANDIDATES, self._rescore_factor * top_k))
        scores = self._exact_scores(terms, frequencies, positions)
        order = np.lexsort((positions, -scores))[:top_k]
        return [
            Hit(self.corpus[position], score)
            for position, score in zip(positions[order].tolist(), scores[order].tolist(), strict=True)
            if score > 0
        ]

    def _candidates(self, terms: Mapping[str, int], width: int) -> npt.NDArray[np.int64]:
        """Positions of the best passages by tantivy, and of all that equal the last of them.

        The query is made of terms, never parsed: no character of it has a meaning.
        """
        query, should = self._tantivy.Query, self._tantivy.Occur.Should
        clauses = []
        for term, count in terms.items():
            clause = query.term_query(self._index.schema, _FIELD, _written(term), index_option="freq")
            clauses.append((should, clause if count == 1 else query.boost_query(clause, float(count))))
        wanted = query.boolean_query(clauses)
        passages, most = self._index.passages, max(width, MOST_TIED_CANDIDATES)
        limit = width + 1  # one more shows whether the last is tied
        while True:
            hits = self._index.searcher.search(wanted, min(limit, passages), count=False).hits
            bound = hits[min(width, len(hits)) - 1][0] * (1 - _TIE)
            if len(hits) < limit or hits[-1][0] < bound or limit >= most:
                break
            limit = min(limit * 4, most)
        addresses = [address for score, address in hits if score >= bound]
        return np.array(self._index.searcher.fast_field_values(_POSITION, addresses), dtype=np.int64)

    def _exact_scores(self, terms: list[str], frequencies: Mapping[str, int], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """float32[C]: every operation, its type and its order are those of the index in memory, so every bit is the same."""
        distinct = {term: number for number, term in enumerate(dict.fromkeys(terms))}
        written = {_written(term): number for term, number in distinct.items()}
        patterns = [_marked(term) for term in distinct]
        counts = np.zeros((len(distinct), len(positions)), dtype=np.float32)
        for column, position in enumerate(positions.tolist()):
            found = self._index.terms.of(position)
            if len(patterns) <= _FEW_TERMS:
                counts[:, column] = [found.count(pattern) for pattern in patterns]
            else:  # by the words of the passage, so that a long query over many candidates costs no product of both
                for word, count in Counter(found.decode().split()).items():
                    number = written.get(word)
                    if number is not None:
                        counts[number, column] = count
        lengths = self._index.terms.lengths[positions].astype(np.int64)
        settings = self._settings
        idf = inverse_document_frequencies(
            np.array([frequencies[term] for term in distinct], dtype=np.int64), self._index.passages, settings.method
        )
        scores = np.zeros(len(positions), dtype=np.float32)
        values = np.zeros_like(counts)
        for number in range(len(distinct)):
            there = counts[number] > 0
            weights = term_weights(
                counts[number, there], lengths[there], self._index.average_length, settings.k1, settings.b, settings.method
            )
            values[number, there] = idf[number] * weights
        for term in terms:
            scores += values[distinct[term]]
        return scores


def _require_tantivy() -> Any:
    try:
        tantivy: Any = import_module("tantivy")
    except ModuleNotFoundError as error:
        raise RetrieverError("BM25 on disk needs tantivy; install it: pip install 'searchqa-gym[disk]'") from error
    if not hasattr(tantivy.Searcher, "fast_field_values"):
        raise RetrieverError(f"BM25 on disk needs tantivy 0.26 or later, but this is {tantivy.__version__}; pip install -U tantivy")
    return tantivy


def _written(term: str) -> str:
    """A term as the index has it: tantivy leaves out words of more than 65,530 bytes, so long ones are there as their hash."""
    return term if 0 < len(term) <= _LONGEST_TERM else "\x01" + hashlib.sha256(term.encode()).hexdigest()


def _marked(term: str) -> bytes:
    """A term as :class:`_Terms` has it."""
    return f" {_written(term)} ".encode()


def _open_or_build(folder: Path, corpus: Corpus, analyzer: Analyzer, described: Mapping[str, Any], show_progress: bool) -> _DiskIndex:
    def write(part: Path) -> dict[str, Any]:
        facts = _build(part, corpus, analyzer, show_progress)
        return {**facts, "corpus_sha256": corpus.sha256, "analyzer": described}

    try:
        return open_or_write(folder, write, _open, "BM25 index")
    except (OSError, NotImplementedError, DamagedIndexError) as error:  # filelock: NotImplementedError where the file system has no locks
        raise RetrieverError(
            f"the BM25 index cannot be written to {folder}: {error}; set SEARCHQA_CACHE to a writable folder with room"
        ) from error


def _build(folder: Path, corpus: Corpus, analyzer: Analyzer, show_progress: bool) -> dict[str, Any]:
    """One thread and one heap of a fixed size: tantivy writes a segment whenever it is full, and merges them as it goes."""
    tantivy = _require_tantivy()
    n = len(corpus)
    sample = [len(analyzer.terms(corpus.contents(index))) for index in range(0, n, max(1, n // 1000))]
    needs = estimate(n, sum(sample) / max(1, len(sample)))
    free = shutil.disk_usage(folder).free
    logger.info(
        "BM25 index of %d passages: about %.2f GB of disk in %s, %.2f GB of memory to build",
        n,
        needs.disk / 1e9,
        folder,
        needs.building / 1e9,
    )
    if needs.disk > free:
        raise RetrieverError(
            f"the BM25 index needs about {needs.disk / 1e9:.2f} GB in {folder.parent}, but {free / 1e9:.2f} GB are free; "
            "set SEARCHQA_CACHE to a folder with room"
        )
    (folder / "index").mkdir()
    writer = tantivy.Index(_schema(tantivy), path=str(folder / "index")).writer(heap_size=_HEAP_BYTES, num_threads=1)
    starts, lengths, checksums = array("q", [0]), array("I"), array("I")
    try:
        with progress_bar(n, show_progress) as advance, (folder / _TERMS_FILE).open("wb") as blob:
            for index in range(n):
                terms = analyzer.terms(corpus.contents(index))
                marked = b"".join(map(_marked, terms))
                starts.append(starts[-1] + blob.write(marked))
                lengths.append(len(terms))
                checksums.append(zlib.crc32(marked))
                document = tantivy.Document()
                document.add_text(_FIELD, " ".join(map(_written, terms)))
                document.add_unsigned(_POSITION, index)
                writer.add_document(document)
                if advance is not None:
                    advance()
        writer.commit()
        writer.wait_merging_threads()
    except ValueError as error:  # how tantivy says that its thread could not write
        raise OSError(f"tantivy: {error}") from error
    finally:
        del writer  # its threads would go on writing into a folder that is being deleted
    for name, values in (("starts", starts), ("lengths", lengths), ("checksums", checksums)):
        np.save(folder / f"{name}.npy", np.array(values, dtype=values.typecode))
    return {"passages": n, "terms": sum(lengths)}


def _schema(tantivy: Any) -> Any:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field(_FIELD, tokenizer_name="whitespace", index_option="freq")
    builder.add_unsigned_field(_POSITION, fast=True)
    return builder.build()


def _open(folder: Path) -> _DiskIndex:
    terms_file = folder / _TERMS_FILE
    large = terms_file.is_file() and terms_file.stat().st_size > _VERIFIED_BYTES
    meta = read_meta(folder, sizes_only=(_TERMS_FILE,) if large else ())
    tantivy = _require_tantivy()
    place, links = folder / "index", None
    if not os.access(place, os.W_OK):  # tantivy makes a lock beside the files that it opens
        links = tempfile.TemporaryDirectory(prefix="searchqa-bm25-")
        for file in place.iterdir():
            if not file.name.endswith(".lock"):
                (Path(links.name) / file.name).symlink_to(file.resolve())
        place = Path(links.name)
    try:
        index = tantivy.Index.open(str(place))
        index.config_reader(reload_policy="manual")  # else a thread watches the files, and makes locks among them
        searcher = index.searcher()
        if searcher.num_docs != meta["passages"]:
            raise DamagedIndexError(f"it has {searcher.num_docs} passages, not {meta['passages']}")
        arrays = (np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in ("starts", "lengths", "checksums"))
        terms = _Terms(terms_file, map_file(terms_file), *arrays)
        average = np.float64(meta["terms"]) / meta["passages"] if meta["passages"] else np.float64(0)
        return _DiskIndex(index, index.schema, searcher, terms, int(meta["passages"]), average, links)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedIndexError(f"{type(error).__name__}: {error}") from error


def estimate(passages: int, mean_terms: float) -> Needs:
    """Needs of the index on disk for passages of ``mean_terms`` terms (without stop words), apart from those of the corpus.

    Slopes are from ``tests/benchmarks/bench_disk.py``, with made-up passages of 64 terms, and rounded up: with 100,000 passages 70 MB of
    disk and a peak of 0.26 GB, with 1,000,000 640 MB and 1.1 GB (mapped pages of the corpus among them). Of a term, tantivy takes about
    2 bytes (twice that while segments are merged), and its place among the terms of the passage up to 10. What a build holds does not
    grow beyond the heap of tantivy's writer. While searching, all of it is memory-mapped: what is not used can be dropped.
    """
    terms = passages * mean_terms
    searched = int(1_000_000 + 3 * terms)
    beside = int(10 * terms + 16 * passages)
    return Needs(2 * searched + beside, searched + beside, int(_BASE_BYTES + min(1.6 * _HEAP_BYTES, 12 * terms)))


def _restore(corpus: Corpus, arguments: dict[str, Any]) -> DiskBM25Retriever:
    return DiskBM25Retriever(corpus, **arguments)
