"""Postings with their BM25 scores computed ahead: built in memory, kept in the user's cache, opened memory-mapped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchqa_retrievers.analysis import ANALYZER_VERSION, Analyzer
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.needs import Needs
from searchqa_retrievers.stored_folder import DamagedIndexError as DamagedIndexError
from searchqa_retrievers.stored_folder import open_or_write, read_meta

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
METHODS = ("lucene", "robertson", "atire")
_CHUNK = 1 << 22
_ARRAYS = ("data", "indices", "indptr")
_PROGRESS_PASSAGES = 50_000
_BASE_BYTES = 200_000_000


@dataclass(frozen=True, slots=True)
class BM25Index:
    """A corpus as scored postings, in the layout of bm25s (compressed sparse columns, one column a term).

    The postings of term ``t`` are ``indices[indptr[t]:indptr[t + 1]]`` (int32, positions in the corpus, ascending) with the scores
    ``data[...]`` (float32, never negative). ``indptr`` is int64[V + 1]. All arrays are read-only.
    """

    data: npt.NDArray[np.float32]
    indices: npt.NDArray[np.int32]
    indptr: npt.NDArray[np.int64]
    vocabulary: dict[str, int]
    num_passages: int


def build_index(corpus: Corpus, analyzer: Analyzer, *, k1: float, b: float, method: str, show_progress: bool = False) -> BM25Index:
    """Score every (term, passage) pair; the scores are those of bm25s bit for bit (under NumPy 2, with ``dtype="float32"``).

    Formulas: Kamphuis et al., "Which BM25 Do You Mean?" (ECIR 2020), table 1, for ``lucene`` (accurate), ``robertson`` (never
    negative) and ``atire``. As in bm25s, the factor (k1 + 1) is left out of the first two.
    """
    n = len(corpus)
    with progress_bar(n, show_progress) as advance:
        analyzed = analyzer.analyze_corpus(map(corpus.contents, range(n)), advance)
    vocabulary, all_lengths = analyzed.terms, analyzed.lengths
    # Sorting (term, passage) pairs groups equal ones, whose count is the term frequency, and puts them into posting order at once.
    pairs = analyzed.flat.astype(np.int64)
    pairs *= max(n, 1)
    pairs += analyzed.documents
    del analyzed  # here and below: what is not held any more is most of the memory that a build would take
    pairs.sort()
    is_first = np.ones(len(pairs), dtype=bool)
    np.not_equal(pairs[1:], pairs[:-1], out=is_first[1:])
    starts = np.flatnonzero(is_first)
    del is_first
    frequencies = np.empty(len(starts), dtype=np.float32)
    terms, indices = np.empty(len(starts), dtype=np.int32), np.empty(len(starts), dtype=np.int32)
    for start in range(0, len(starts), _CHUNK):
        part = slice(start, start + _CHUNK)
        frequencies[part] = np.diff(starts[start : start + _CHUNK + 1], append=len(pairs))[: len(frequencies[part])]
        terms[part], indices[part] = np.divmod(pairs[starts[part]], max(n, 1))
    del pairs, starts
    indptr = np.searchsorted(terms, np.arange(len(vocabulary) + 1, dtype=np.int32))
    idf = inverse_document_frequencies(np.diff(indptr), n, method)
    data = np.empty(len(indices), dtype=np.float32)
    average_length = all_lengths.mean() if n else np.float64(0)
    for start in range(0, len(data), _CHUNK):
        part = slice(start, start + _CHUNK)
        lengths = all_lengths[indices[part]]
        data[part] = idf[terms[part]] * term_weights(frequencies[part], lengths, average_length, k1, b, method)
    for values in (data, indices, indptr):
        values.flags.writeable = False
    return BM25Index(data, indices, indptr, {term: number for number, term in enumerate(vocabulary)}, n)


def inverse_document_frequencies(document_frequencies: npt.NDArray[np.int64], n: int, method: str) -> npt.NDArray[np.float32]:
    """float32[V]; by ``math.log`` and not ``np.log``, whose last bit can differ."""
    values, inverse = np.unique(document_frequencies, return_inverse=True)
    if method == "lucene":
        scores = [math.log(1 + (n - df + 0.5) / (df + 0.5)) for df in values.tolist()]
    elif method == "robertson":
        scores = [math.log(max(1.0, (n - df + 0.5) / (df + 0.5))) for df in values.tolist()]
    else:
        scores = [math.log(n / df) for df in values.tolist()]
    return np.array(scores, dtype=np.float32)[inverse]


def term_weights(
    tf: npt.NDArray[np.float32], lengths: npt.NDArray[np.int64], average_length: np.float64, k1: float, b: float, method: str
) -> npt.NDArray[np.float64]:
    """float64[P]; the order of the operations is that of bm25s, so that every rounding is the same."""
    weight: npt.NDArray[np.float64]
    if method == "atire":
        weight = (tf * (k1 + 1)) / (tf + k1 * (1 - b + b * lengths / average_length))
    else:
        weight = tf / (k1 * ((1 - b) + b * lengths / average_length) + tf)
    return weight


def estimate(passages: int, mean_terms: float) -> Needs:
    """Needs of the index in memory for passages of ``mean_terms`` terms (without stop words), apart from those of the corpus.

    Slopes are from ``tests/benchmarks/bench_retrieval_sizes.py``, with made-up passages of 64 terms: with 100,000 passages 66 MB of disk
    and a peak of 0.49 GB, with 1,000,000 546 MB and 2.9 GB (the corpus in memory among them). While searching, the postings are
    memory-mapped and the vocabulary is in memory.
    """
    terms = passages * mean_terms
    disk = int(5_000_000 + 9 * terms)
    return Needs(disk, int(_BASE_BYTES + 13 * terms + 4 * passages), int(_BASE_BYTES + 40 * terms))


def index_key(corpus: Corpus, settings: dict[str, Any]) -> str:
    """Name of a stored index: a hash of everything that its content depends on."""
    import unicodedata

    import Stemmer

    parts = {
        "format": FORMAT_VERSION,
        "analyzer": ANALYZER_VERSION,
        "unicode": unicodedata.unidata_version,
        "pystemmer": Stemmer.version(),
        "byteorder": sys.byteorder,
        "corpus": corpus.sha256,
        **settings,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def open_or_build(folder: Path, build: Callable[[], BM25Index], facts: Mapping[str, Any] | None = None) -> BM25Index:
    """The index stored in ``folder``; where there is none, build and store it with ``facts`` about it, once among all processes that ask.

    A damaged index is built again, and where nothing can be stored (read-only or full disk) the index stays in memory; both are
    logged as warnings.
    """
    built: list[BM25Index] = []

    def write(part: Path) -> dict[str, Any]:
        index = build()
        built.append(index)
        for name in _ARRAYS:
            np.save(part / f"{name}.npy", getattr(index, name))
        (part / "terms.txt").write_bytes("\n".join(index.vocabulary).encode())
        return {**(facts or {}), "num_passages": index.num_passages}

    try:
        return open_or_write(folder, write, _load, "BM25 index")
    except (OSError, NotImplementedError, DamagedIndexError) as error:  # filelock: NotImplementedError where the file system has no locks
        logger.warning(
            "the BM25 index cannot be stored in %s (%s); it stays in memory and will be built again next time; "
            "set SEARCHQA_CACHE to a writable folder with room",
            folder,
            error,
        )
    return built[0] if built else build()


def _load(folder: Path) -> BM25Index:
    meta = read_meta(folder)
    try:
        # A plain view: np.memmap's own indexing is slower, and the mapping lives as long as the view.
        data, indices, indptr = (np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in _ARRAYS)
        blob = (folder / "terms.txt").read_bytes().decode()
        terms = blob.split("\n") if blob else []
        return BM25Index(data, indices, indptr, {term: number for number, term in enumerate(terms)}, int(meta["num_passages"]))
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise DamagedIndexError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def progress_bar(total: int, wanted: bool) -> Iterator[Callable[[], object] | None]:
    """A bar on stderr where a person looks at it and the wait is worth one, else None."""
    if not (wanted and total >= _PROGRESS_PASSAGES and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Indexing passages", total=total)
        yield lambda: bar.advance(task)
