"""Postings with their BM25 scores computed ahead: built in memory, kept in the user's cache, opened memory-mapped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchqa_retrievers.analysis import ANALYZER_VERSION, Analyzer
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.types import RetrieverError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
METHODS = ("lucene", "robertson", "atire")
_CHUNK = 1 << 22
_ARRAYS = ("data", "indices", "indptr")
_PROGRESS_PASSAGES = 50_000


class DamagedIndexError(RetrieverError):
    """The files of a stored index are not what was written; the index must be built again."""


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
    with _progress(n, show_progress) as advance:
        analyzed = analyzer.analyze_corpus(map(corpus.contents, range(n)), advance)
    num_terms = len(analyzed.terms)
    # Sorting (term, passage) pairs groups equal ones, whose count is the term frequency, and puts them into posting order at once.
    pairs = analyzed.flat.astype(np.int64)
    pairs *= max(n, 1)
    pairs += analyzed.documents
    pairs.sort()
    starts = np.flatnonzero(np.diff(pairs, prepend=-1))
    frequencies = np.diff(starts, append=len(pairs)).astype(np.float32)
    terms, indices = np.divmod(pairs[starts], max(n, 1))
    indices = indices.astype(np.int32)
    document_frequencies = np.bincount(terms, minlength=num_terms)
    indptr = np.zeros(num_terms + 1, dtype=np.int64)
    np.cumsum(document_frequencies, out=indptr[1:])
    idf = _idf(document_frequencies, n, method)
    data = np.empty(len(indices), dtype=np.float32)
    average_length = analyzed.lengths.mean() if n else np.float64(0)
    for start in range(0, len(data), _CHUNK):
        part = slice(start, start + _CHUNK)
        lengths = analyzed.lengths[indices[part]]
        data[part] = idf[terms[part]] * _term_weight(frequencies[part], lengths, average_length, k1, b, method)
    for values in (data, indices, indptr):
        values.flags.writeable = False
    return BM25Index(data, indices, indptr, {term: number for number, term in enumerate(analyzed.terms)}, n)


def _idf(document_frequencies: npt.NDArray[np.int64], n: int, method: str) -> npt.NDArray[np.float32]:
    """float32[V]; by ``math.log`` and not ``np.log``, whose last bit can differ."""
    values, inverse = np.unique(document_frequencies, return_inverse=True)
    if method == "lucene":
        scores = [math.log(1 + (n - df + 0.5) / (df + 0.5)) for df in values.tolist()]
    elif method == "robertson":
        scores = [math.log(max(1.0, (n - df + 0.5) / (df + 0.5))) for df in values.tolist()]
    else:
        scores = [math.log(n / df) for df in values.tolist()]
    return np.array(scores, dtype=np.float32)[inverse]


def _term_weight(
    tf: npt.NDArray[np.float32], lengths: npt.NDArray[np.int64], average_length: np.float64, k1: float, b: float, method: str
) -> npt.NDArray[np.float64]:
    """float64[P]; the order of the operations is that of bm25s, so that every rounding is the same."""
    weight: npt.NDArray[np.float64]
    if method == "atire":
        weight = (tf * (k1 + 1)) / (tf + k1 * (1 - b + b * lengths / average_length))
    else:
        weight = tf / (k1 * ((1 - b) + b * lengths / average_length) + tf)
    return weight


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


def open_or_build(folder: Path, build: Callable[[], BM25Index]) -> BM25Index:
    """The index stored in ``folder``; where there is none, build and store it, once among all processes that ask.

    A damaged index is built again, and where nothing can be stored (read-only or full disk) the index stays in memory; both are
    logged as warnings. The folder appears only when it is complete: it is written elsewhere and renamed.
    """
    import filelock

    built: BM25Index | None = None
    try:
        if folder.is_dir():
            with contextlib.suppress(DamagedIndexError):
                return _load(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(folder.name + ".lock")):
            if folder.is_dir():  # another process may have built it while this one waited
                try:
                    return _load(folder)
                except DamagedIndexError as error:
                    logger.warning("the stored BM25 index %s is damaged (%s); building it again", folder, error)
                    shutil.rmtree(folder)
            for leftover in folder.parent.glob(f"{folder.name}.part-*"):  # of a build that was killed
                shutil.rmtree(leftover)
            built = build()
            _store(built, folder)
            return _load(folder)
    except (OSError, NotImplementedError, DamagedIndexError) as error:  # filelock: NotImplementedError where the file system has no locks
        logger.warning(
            "the BM25 index cannot be stored in %s (%s); it stays in memory and will be built again next time; "
            "set SEARCHQA_CACHE to a writable folder with room",
            folder,
            error,
        )
    return build() if built is None else built


def _store(index: BM25Index, folder: Path) -> None:
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        for name in _ARRAYS:
            np.save(part / f"{name}.npy", getattr(index, name))
        (part / "terms.txt").write_bytes("\n".join(index.vocabulary).encode())
        checksums = {file.name: _checksum(file) for file in part.iterdir()}
        meta = {"num_passages": index.num_passages, "num_terms": len(index.vocabulary), "checksums": checksums}
        (part / "meta.json").write_text(json.dumps(meta, indent=1))
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _load(folder: Path) -> BM25Index:
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        for name in (*(f"{array}.npy" for array in _ARRAYS), "terms.txt"):
            if _checksum(folder / name) != meta["checksums"][name]:
                raise DamagedIndexError(f"{name} has a wrong checksum")
        # A plain view: np.memmap's own indexing is slower, and the mapping lives as long as the view.
        data, indices, indptr = (np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in _ARRAYS)
        blob = (folder / "terms.txt").read_bytes().decode()
        terms = blob.split("\n") if blob else []
        return BM25Index(data, indices, indptr, {term: number for number, term in enumerate(terms)}, int(meta["num_passages"]))
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise DamagedIndexError(f"{type(error).__name__}: {error}") from error


def _checksum(file: Path) -> int:
    """CRC-32 of a file; without it a flipped bit in ``indices`` would make the search write outside its memory."""
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


@contextlib.contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[], object] | None]:
    """A bar on stderr where a person looks at it and the wait is worth one, else None."""
    if not (wanted and total >= _PROGRESS_PASSAGES and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Indexing passages", total=total)
        yield lambda: bar.advance(task)
