"""Search by the nearness of meaning: a sentence encoder and the vectors of all passages."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from searchqa_retrievers.checks import check_request
from searchqa_retrievers.composition import whole_number
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.dense_approximate import KINDS, ApproximateIndex, open_or_train
from searchqa_retrievers.dense_index import STORAGE, DenseIndex, index_folder, open_or_build
from searchqa_retrievers.faiss_file import open_faiss_file
from searchqa_retrievers.paths import cache_root
from searchqa_retrievers.types import Hit, Retriever, RetrieverError, SearchRequest, default_cache_key

if TYPE_CHECKING:
    from searchqa_retrievers.encoders import Encoder


class DenseRetriever:
    """The passages whose vectors have the greatest inner product with that of the query (FAISS).

    A score is the cosine, computed from the stored vectors in float64 and rounded to float32, with every kind of index; hits are
    ordered by score descending, then by passage id. With ``"flat"`` they are exactly the best, ``min(top_k, N)`` in number.
    FAISS and PyTorch take as many threads as ``OMP_NUM_THREADS`` says. The object can be shared by threads, and pickled: it comes back
    by opening the index again.

    Parameters
    ----------
    corpus : Corpus
        Its ``contents`` (title and text) are encoded.
    encoder : str or Encoder
        A name of ``ENCODER_PRESETS``, or an encoder.
    index : str
        ``"flat"``: exact, reads all vectors for each search. ``"hnsw"`` (graph), ``"ivf"`` (lists), ``"pq"`` (4-bit codes) and
        ``"ivf-pq"`` (both) find candidates quickly, need at least 1,000 passages, and can miss some of the best.
        ``dense_approximate.estimate`` tells what each takes.
    storage : str
        ``"float32"``, or ``"float16"`` for half the disk.
    cache_dir : path or None
        Folder for indexes. Default: ``$SEARCHQA_CACHE``, else the user's cache folder for ``searchqa``.
    rescore_factor : int
        ``rescore_factor * top_k`` candidates are scored exactly; at least 1, without effect on ``"flat"``.
    nprobe : int or None
        Lists read by ``"ivf"`` and ``"ivf-pq"``. Default: one in 16, at least 64.
    faiss_file, faiss_rows : path or None
        A published FAISS file and the corpus file whose lines are its rows, instead of encoding the corpus; see
        ``faiss_file.open_faiss_file``. A graph in it serves ``"hnsw"``; all kinds can be had over its vectors.
    query_entries : int
        Vectors of this many queries are kept in memory, the least recently used are forgotten first; at least 1.
    show_progress : bool
        A progress bar on stderr while passages are encoded in a terminal.

    Raises
    ------
    RetrieverError
        A setting is out of its range, FAISS is missing, or the index cannot be built or opened.
    """

    name = "dense"

    def __init__(
        self,
        corpus: Corpus,
        encoder: str | Encoder = "search-r1",
        index: str = "flat",
        storage: str = "float32",
        cache_dir: str | Path | None = None,
        rescore_factor: int = 32,
        nprobe: int | None = None,
        faiss_file: str | Path | None = None,
        faiss_rows: str | Path | None = None,
        query_entries: int = 10_000,
        show_progress: bool = True,
    ) -> None:
        _check(index, storage, cache_dir, rescore_factor, nprobe, faiss_file, faiss_rows, query_entries)
        _require_faiss()
        from searchqa_retrievers.encoders import Encoder

        if not isinstance(encoder, str | Encoder):
            raise RetrieverError(
                f"encoder of retriever 'dense' must be the name of a preset or an Encoder, got {encoder!r:.200}; "
                "for another model pass Encoder(EncoderSettings(model=...))"
            )
        self.corpus = corpus
        self.encoder = Encoder(encoder) if isinstance(encoder, str) else encoder
        self._arguments = (
            corpus,
            encoder,
            index,
            storage,
            cache_dir,
            rescore_factor,
            nprobe,
            faiss_file,
            faiss_rows,
            query_entries,
            show_progress,
        )
        self._settings: dict[str, Any] = {"index": index, "storage": storage}
        if index != "flat":
            self._settings |= {"rescore_factor": rescore_factor, "nprobe": nprobe}
        root = cache_root() if cache_dir is None else Path(cache_dir).expanduser()
        self._file = None
        places = None
        if faiss_file is None:
            folder = index_folder(root / "dense", corpus, self.encoder, storage)
            vectors = open_or_build(folder, corpus, self.encoder, storage, show_progress)
        else:
            self._file = open_faiss_file(faiss_file, str(faiss_rows), corpus, self.encoder)  # kept: the vectors are in it
            folder = root / "dense" / self._file.key
            vectors, places = self._file.vectors, self._file.places
            self._settings["faiss_file"] = self._file.key
        if index == "flat":
            self.index = DenseIndex(vectors, places)
        else:
            own_graph = self._file is not None and self._file.is_graph and index == "hnsw"
            candidates = self._file.index if self._file is not None and own_graph else open_or_train(folder, index, vectors, show_progress)
            self.index = ApproximateIndex(vectors, candidates, rescore_factor, nprobe, places)
        self._query_entries = query_entries
        self._queries: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        """Answer all requests; equal queries are encoded and searched once."""
        for request in requests:
            check_request(request, self.name)
        if not requests:
            return []
        vectors = self._encode(list(dict.fromkeys(request.query for request in requests)))
        # One search for each top_k: on it depends how many candidates an approximate index takes, and so what it misses.
        ranked: dict[tuple[str, int], tuple[list[int], list[float]]] = {}
        for top_k in {request.top_k for request in requests}:
            queries = list(dict.fromkeys(request.query for request in requests if request.top_k == top_k))
            found = self.index.search(np.stack([vectors[query] for query in queries]), top_k)
            ranked.update(((query, top_k), hits) for query, hits in zip(queries, found, strict=True))
        answers = []
        for request in requests:
            positions, scores = ranked[request.query, request.top_k]
            answers.append([Hit(self.corpus[i], score) for i, score in zip(positions, scores, strict=True)])
        return answers

    def cache_key(self, request: SearchRequest) -> Hashable:
        return default_cache_key(request)

    def stamp(self) -> dict[str, Any]:
        """The settings that a result depends on, for the record of a run."""
        return {
            "retriever": self.name,
            "encoder": self.encoder.stamp(),
            **self._settings,
            "corpus_sha256": self.corpus.sha256,
            "passages": len(self.corpus),
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseRetriever:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return DenseRetriever, self._arguments

    def __repr__(self) -> str:
        return f"DenseRetriever({self.corpus!r}, {self.encoder!r}, index={self._settings['index']!r})"

    def _encode(self, queries: list[str]) -> dict[str, npt.NDArray[np.float32]]:
        """The vector [D] of each of some distinct queries."""
        with self._lock:
            known = {query: self._queries[query] for query in queries if query in self._queries}
        missing = [query for query in queries if query not in known]
        known.update(zip(missing, self.encoder.encode_queries(missing), strict=True))
        with self._lock:
            for query in queries:
                self._queries[query] = known[query]
                self._queries.move_to_end(query)
            while len(self._queries) > self._query_entries:
                self._queries.popitem(last=False)
        return known


def make(
    corpus: Callable[[], Corpus],
    encoder: str | Mapping[str, str | int] = "search-r1",
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    index: str = "flat",
    storage: str = "float32",
    cache_dir: str | None = None,
    rescore_factor: int = 32,
    nprobe: int | None = None,
    faiss_file: str | None = None,
    faiss_rows: str | None = None,
    query_entries: int = 10_000,
    show_progress: bool = True,
) -> Retriever:
    """The retriever ``"dense"`` of a configuration; ``encoder`` may be a mapping with the fields of ``EncoderSettings``."""
    from searchqa_retrievers.encoders import Encoder, encoder_settings

    # All that can be wrong without the corpus and the weights is said before they are read, which can take minutes.
    _check(index, storage, cache_dir, rescore_factor, nprobe, faiss_file, faiss_rows, query_entries)
    settings = encoder_settings(encoder)
    _require_faiss()
    passages = corpus()
    return DenseRetriever(
        passages,
        Encoder(settings, model, device, dtype),
        index=index,
        storage=storage,
        cache_dir=cache_dir,
        rescore_factor=rescore_factor,
        nprobe=nprobe,
        faiss_file=faiss_file,
        faiss_rows=faiss_rows,
        query_entries=query_entries,
        show_progress=show_progress,
    )


def _check(
    index: str,
    storage: str,
    cache_dir: str | Path | None,
    rescore_factor: int,
    nprobe: int | None,
    faiss_file: str | Path | None,
    faiss_rows: str | Path | None,
    query_entries: int,
) -> None:
    if storage not in STORAGE:
        raise RetrieverError(f"storage must be one of {', '.join(STORAGE)}, got {storage!r}")
    if index != "flat" and index not in KINDS:
        raise RetrieverError(f"index must be one of flat, {', '.join(KINDS)}, got {index!r}")
    whole_number("rescore_factor of retriever 'dense'", rescore_factor)
    whole_number("query_entries of retriever 'dense'", query_entries)
    if nprobe is not None:
        whole_number("nprobe of retriever 'dense'", nprobe)
    for name, path in (("cache_dir", cache_dir), ("faiss_file", faiss_file), ("faiss_rows", faiss_rows)):
        if path is not None and not isinstance(path, str | os.PathLike):
            raise RetrieverError(f"{name} of retriever 'dense' must be a path, got {path!r:.200}")
    if (faiss_file is None) != (faiss_rows is None):
        raise RetrieverError(f"faiss_file and faiss_rows must be given together, got {faiss_file!r} and {faiss_rows!r}")
    if faiss_file is not None and storage != "float32":
        raise RetrieverError(f"storage must be 'float32' with faiss_file, which is used as it is, got {storage!r}")


def _require_faiss() -> None:
    try:
        import faiss  # noqa: F401 - the question is whether it is there
    except ImportError as error:
        raise RetrieverError("dense search needs FAISS: pip install 'searchqa-gym[cpu]' (or [gpu], not both)") from error
