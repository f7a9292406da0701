"""Dense search in a Milvus collection: embedded (milvus-lite), one server, or a cluster, by its URI."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from searchqa_retrievers.checks import check_request
from searchqa_retrievers.composition import whole_number
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.types import Hit, Retriever, RetrieverError, RetrieverUnavailable, SearchRequest, default_cache_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from searchqa_retrievers.encoders import Encoder

logger = logging.getLogger(__name__)

INDEXES = ("FLAT", "HNSW", "IVF_FLAT", "IVF_SQ8", "IVF_PQ", "DISKANN", "AUTOINDEX")
EMBEDDED_INDEXES = ("FLAT", "HNSW", "IVF_FLAT", "IVF_SQ8", "AUTOINDEX")
"""Those that milvus-lite has; for the others it would read all vectors and not say so."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_FORMAT = 1
_RECORD = "searchqa.record"
_BATCH = 512
_MOST_RESULTS = 16_384  # Milvus gives no more for one query
_BYTES_A_CALL = 16 << 20  # replies above 64 MB are refused by its client
_MARGIN = 16
_TIE = 1e-5
_WHOLE = frozenset({"M", "efConstruction", "nlist", "m", "nbits", "ef", "nprobe", "search_list"})
_AT_LEAST_LIMIT = ("ef", "search_list")  # servers refuse a search for more results than these
_NOT_FOUND, _NOT_LOADED = 100, 101
_LOST_CODES = frozenset({2, 4, 8})  # not available, too many requests, rate limit
_OPENING = threading.Lock()


class MilvusCollectionError(RetrieverError):
    """The collection holds something else than this corpus and encoder would put into it."""


class MilvusRetriever:
    """The passages whose vectors have the greatest inner product with that of the query, in a collection of Milvus.

    The collection has a row for each passage: its position in the corpus, which is sorted by id, and its vector. It is made and filled
    where there is none; a build that was broken off goes on where it stopped. A property of the collection records corpus, encoder and
    index, and a retriever that differs refuses it. No search is made before all rows are there.

    The server gives positions and vectors, and the texts are those of ``corpus``. A score is the cosine, computed here in float64 and
    rounded to float32, so that neither the server's arithmetic nor the batch changes it; hits are ordered by score descending, then by
    passage id. With ``"FLAT"`` they are exactly the best. More than 16,384 passages (``max_top_k``) are more than Milvus gives for a query.

    The object can be shared by threads, and pickled: it comes back by connecting again.

    Parameters
    ----------
    corpus : Corpus
        Its ``contents`` (title and text) are encoded.
    encoder : Encoder
    uri : str
        ``"./index.db"`` for a folder of the embedded engine, which one process at a time can open; else ``"http://host:19530"``. A token
        is read from ``$MILVUS_TOKEN``.
    collection : str
    index : str
        One of :data:`INDEXES`, as Milvus calls them. The embedded engine has :data:`EMBEDDED_INDEXES`; some hosted ones do not have all.
    index_params, search_params : mapping or None
        What Milvus takes for that index: ``{"M": 16, "efConstruction": 200}`` and ``{"ef": 64}`` for HNSW, ``{"nlist": 1024}`` and
        ``{"nprobe": 32}`` for IVF. ``ef`` and ``search_list`` are raised to the number of candidates of a search, below which servers
        refuse it.
    rescore_factor : int
        ``rescore_factor * top_k`` candidates of an approximate index are scored exactly; at least 1, without effect on ``"FLAT"``.
    timeout : float
        Seconds for one search, and for each call while the collection is filled.
    show_progress : bool
        A progress bar on stderr while passages are encoded in a terminal.

    Raises
    ------
    MilvusCollectionError
        The collection is there with other contents, or is dropped or changed while it is in use.
    RetrieverUnavailable
        The server cannot be reached, does not answer in time, or the connection is lost, at any time.
    RetrieverError
        A setting is out of its range, pymilvus or milvus-lite is missing, the corpus is empty, or Milvus refuses a call, such as one with
        parameters that it does not take (a search is tried at the beginning) or a wrong token; in searching: ``top_k`` above 16,384.
    """

    name = "milvus"
    max_top_k = _MOST_RESULTS

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder,
        uri: str,
        collection: str = "searchqa",
        index: str = "FLAT",
        index_params: Mapping[str, Any] | None = None,
        search_params: Mapping[str, Any] | None = None,
        rescore_factor: int = 4,
        timeout: float = 30.0,
        show_progress: bool = True,
    ) -> None:
        if not isinstance(uri, str) or not uri:
            raise RetrieverError(f"retriever 'milvus' needs uri, './index.db' for the embedded engine or 'http://host:19530', got {uri!r}")
        if not all(callable(getattr(encoder, method, None)) for method in ("encode_queries", "encode_passages")):
            raise RetrieverError(f"encoder of a MilvusRetriever must be an Encoder, got {encoder!r:.200}")
        if index not in INDEXES:
            raise RetrieverError(f"index of retriever 'milvus' must be one of {', '.join(INDEXES)}, got {index!r}")
        if _embedded(uri) and index not in EMBEDDED_INDEXES:
            raise RetrieverError(
                f"the embedded engine of Milvus has no index {index!r}; choose one of {', '.join(EMBEDDED_INDEXES)}, or the uri of a server"
            )
        if not isinstance(collection, str) or not _NAME.fullmatch(collection):
            raise RetrieverError(
                f"collection of retriever 'milvus' must be a name of at most 255 letters, digits and underscores, with no digit first, got {collection!r}"
            )
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
            raise RetrieverError(f"timeout of retriever 'milvus' must be a number of seconds greater than 0, got {timeout!r}")
        if not len(corpus):
            raise RetrieverError("a collection needs at least one passage, but the corpus has none")
        self.corpus = corpus
        self.encoder = encoder
        self.collection = collection
        self.rescore_factor = whole_number("rescore_factor of retriever 'milvus'", rescore_factor)
        self.timeout = float(timeout)
        self._arguments = (corpus, encoder, uri, collection, index, index_params, search_params, rescore_factor, timeout, show_progress)
        self._embedded = _embedded(uri)
        self._index: dict[str, Any] = {"index": index, "index_params": _parameters("index_params", index_params)}
        self._search_params = _parameters("search_params", search_params)
        self._client = _connect(uri, self.timeout)
        # A server does each call at once; the embedded engine can be caught halfway by another thread, a flush by an upsert too.
        with _OPENING if self._embedded else nullcontext():
            self._open(show_progress)

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        """Answer all requests; equal queries are encoded and searched once."""
        for request in requests:
            check_request(request, self.name)
            if request.top_k > _MOST_RESULTS:
                raise RetrieverError(
                    f"top_k of retriever 'milvus' must be at most {_MOST_RESULTS}, Milvus's own limit, got {request.top_k}"
                )
        if not requests:
            return []
        queries = list(dict.fromkeys(request.query for request in requests))
        vectors = dict(zip(queries, self.encoder.encode_queries(queries), strict=True))
        deadline = time.monotonic() + self.timeout
        ranked: dict[tuple[str, int], list[tuple[int, float]]] = {}
        # One search for each top_k: on it depends how many candidates an approximate index gives, and so what it misses.
        for top_k in {request.top_k for request in requests}:
            asked = list(dict.fromkeys(request.query for request in requests if request.top_k == top_k))
            best = self._best(np.stack([vectors[query] for query in asked]), top_k, deadline)
            ranked.update(((query, top_k), hits) for query, hits in zip(asked, best, strict=True))
        return [[Hit(self.corpus[position], score) for position, score in ranked[request.query, request.top_k]] for request in requests]

    def cache_key(self, request: SearchRequest) -> Hashable:
        return default_cache_key(request)

    def stamp(self) -> dict[str, Any]:
        """The settings that a result depends on, for the record of a run; where the server is, is not among them."""
        approximate = (
            {} if self._index["index"] == "FLAT" else {"rescore_factor": self.rescore_factor, "search_params": self._search_params}
        )
        return {
            "retriever": self.name,
            "encoder": self.encoder.stamp(),
            **self._index,
            **approximate,
            "corpus_sha256": self.corpus.sha256,
            "passages": len(self.corpus),
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> MilvusRetriever:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return MilvusRetriever, self._arguments

    def __repr__(self) -> str:
        return f"MilvusRetriever({self.corpus!r}, {self.encoder!r}, collection={self.collection!r}, index={self._index['index']!r})"

    # -- searching -----------------------------------------------------------------------------------------------------------------------

    def _best(self, vectors: npt.NDArray[np.float32], top_k: int, deadline: float) -> list[list[tuple[int, float]]]:
        """The ``top_k`` best (position, score) for each query vector of float32[Q, D]."""
        most = min(len(self.corpus), _MOST_RESULTS)
        factor = 1 if self._index["index"] == "FLAT" else self.rescore_factor
        limit = min(factor * top_k + _MARGIN, most)
        best: list[list[tuple[int, float]]] = [[] for _ in vectors]
        pending = list(range(len(vectors)))
        while pending:
            tied = []
            for row, candidates in zip(pending, self._candidates(vectors[pending], limit, deadline), strict=True):
                best[row] = candidates[:top_k]
                # Where the last that is wanted ties with the last that came, others with the same score may have been left out.
                if len(candidates) > top_k and candidates[top_k - 1][1] <= candidates[-1][1] + _TIE and limit < most:
                    tied.append(row)
            pending, limit = tied, min(4 * limit, most)
        return best

    def _candidates(self, vectors: npt.NDArray[np.float32], limit: int, deadline: float) -> list[list[tuple[int, float]]]:
        """(position, score) of what the server gives for each query vector, in our order."""
        size = max(1, _BYTES_A_CALL // (limit * self.encoder.dimension * 4))
        raised = {key: max(self._search_params[key], limit) for key in _AT_LEAST_LIMIT if key in self._search_params}
        answers = []
        for start in range(0, len(vectors), size):
            batch = vectors[start : start + size]
            found = self._call(
                "search",
                data=list(batch),
                anns_field="vector",
                limit=limit,
                output_fields=["vector"],
                search_params={"metric_type": "IP", "params": self._search_params | raised},
                consistency_level="Strong",
                timeout=_left(deadline),
            )
            if len(found) != len(batch):
                raise RetrieverError(f"Milvus gave {len(found)} answers to {len(batch)} queries; it must give one each")
            answers += [self._scored(vector, hits) for vector, hits in zip(batch, found, strict=True)]
        return answers

    def _scored(self, query: npt.NDArray[np.float32], hits: Any) -> list[tuple[int, float]]:
        if not len(hits):
            return []
        positions = [int(hit["position"]) for hit in hits]
        stored = np.array([hit["entity"]["vector"] for hit in hits], dtype=np.float32)  # [H, D]
        if stored.shape != (len(positions), len(query)) or not all(0 <= position < len(self.corpus) for position in positions):
            raise MilvusCollectionError(f"the collection {self.collection!r} was changed while it was in use; drop it to fill it anew")
        # Not a matrix product, whose last bits depend on how many rows there are.
        scores = (stored.astype(np.float64) * query.astype(np.float64)).sum(axis=1).astype(np.float32)
        return sorted(zip(positions, map(float, scores), strict=True), key=lambda hit: (-hit[1], hit[0]))

    # -- filling -------------------------------------------------------------------------------------------------------------------------

    def _record(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "corpus_sha256": self.corpus.sha256,
            "passages": len(self.corpus),
            "dimension": self.encoder.dimension,
            "fingerprint": self.encoder.fingerprint,
            **self._index,
        }

    def _open(self, show_progress: bool) -> None:
        """Make the collection where there is none, and fill in the rows that are not there yet."""
        if not self._call("has_collection"):
            try:
                self._create()
            except RetrieverError:
                if not self._call("has_collection"):  # else another process made it meanwhile
                    raise
        description = self._call("describe_collection")
        wanted = self._record()
        there = _parsed((description.get("properties") or {}).get(_RECORD) or description.get("description"))
        if there != wanted:
            different = (
                "no record of a corpus"
                if there is None
                else ", ".join(f"{key} {there.get(key)!r} instead of {wanted[key]!r}" for key in wanted if there.get(key) != wanted[key])
            )
            raise MilvusCollectionError(
                f"the collection {self.collection!r} has {different}; give the name of another collection, or drop this one"
            )
        self._call("load_collection")
        if self._count() != len(self.corpus):
            self._fill(show_progress)
            self._call("flush")
        rows = self._count()
        if rows != len(self.corpus):
            raise MilvusCollectionError(
                f"the collection {self.collection!r} has {rows} rows, not one for each of the {len(self.corpus)} passages; drop it to fill it anew"
            )
        probe = np.eye(1, self.encoder.dimension, dtype=np.float32)  # shows search parameters that are refused
        self._candidates(probe, min(_MARGIN, len(self.corpus)), time.monotonic() + self.timeout)

    def _create(self) -> None:
        from pymilvus import DataType, MilvusClient

        record = json.dumps(self._record())
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=record)
        schema.add_field("position", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self.encoder.dimension)
        index = MilvusClient.prepare_index_params()
        params = self._index["index_params"]
        # The client sends each parameter by itself, but milvus-lite looks for all in one called params, and else takes its defaults.
        sent = {**params, "params": params} if self._embedded and params else params
        index.add_index("vector", index_type=self._index["index"], metric_type="IP", params=sent)
        self._call("create_collection", schema=schema, index_params=index, consistency_level="Strong", properties={_RECORD: record})

    def _fill(self, show_progress: bool) -> None:
        n = len(self.corpus)
        begun = self._count() > 0
        logger.info("encoding %d passages into the collection %r", n, self.collection)
        with _bar(n, show_progress) as advance:
            for start in range(0, n, _BATCH):
                end = min(start + _BATCH, n)
                if not begun or self._count(f"position >= {start} and position < {end}") != end - start:
                    vectors = self.encoder.encode_passages([self.corpus.contents(i) for i in range(start, end)])
                    # An upsert, so that rows that are there, or that another process puts there, do not come twice.
                    rows = [{"position": position, "vector": vector} for position, vector in enumerate(vectors, start=start)]
                    self._call("upsert", data=rows)
                advance(end - start)

    def _count(self, condition: str = "") -> int:
        [row] = self._call("query", filter=condition, output_fields=["count(*)"], consistency_level="Strong")
        return int(row["count(*)"])

    def _call(self, method: str, **arguments: Any) -> Any:
        """One call of the client about the collection, with the timeout."""
        from pymilvus.exceptions import MilvusException

        with _translated(f"collection {self.collection!r}"):
            arguments = {"timeout": self.timeout, **arguments}
            try:
                return getattr(self._client, method)(self.collection, **arguments)
            except MilvusException as error:
                if error.code != _NOT_LOADED or method == "load_collection":
                    raise
            # A server that was started again, or somebody who released the collection; its rows are as they were.
            self._client.load_collection(self.collection, timeout=arguments["timeout"])
            return getattr(self._client, method)(self.collection, **arguments)


def make(
    corpus: Callable[[], Corpus],
    uri: str,
    collection: str = "searchqa",
    encoder: str | Mapping[str, Any] = "search-r1",
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    index: str = "FLAT",
    index_params: Mapping[str, Any] | None = None,
    search_params: Mapping[str, Any] | None = None,
    rescore_factor: int = 4,
    timeout: float = 30.0,
    show_progress: bool = True,
) -> Retriever:
    """The retriever ``"milvus"`` of a configuration; ``encoder`` may be a mapping with the fields of ``EncoderSettings``."""
    from searchqa_retrievers.encoders import Encoder, encoder_settings

    made = Encoder(encoder_settings(encoder), model, device, dtype)
    return MilvusRetriever(
        corpus(), made, uri, collection, index, index_params, search_params, rescore_factor, timeout, show_progress
    )  # fmt: skip


def _embedded(uri: str) -> bool:
    return "://" not in uri and not uri.startswith("unix:")


def _parameters(name: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of ``index_params`` or ``search_params``, checked as far as can be without the server."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise RetrieverError(f"{name} of retriever 'milvus' must be a mapping from names of parameters to their values, got {given!r:.200}")
    for key in sorted(_WHOLE & set(given)):
        whole_number(f"{key} in {name} of retriever 'milvus'", given[key])
    return dict(given)


def _connect(uri: str, timeout: float) -> Any:
    try:
        from pymilvus import MilvusClient

        if _embedded(uri):
            import milvus_lite  # type: ignore[import-untyped] # noqa: F401 - the client starts it
    except ImportError as error:
        missing = "milvus-lite" if (error.name or "").startswith("milvus_lite") else "pymilvus"
        raise RetrieverError(f"retriever 'milvus' needs {missing} for {uri!r}: pip install 'searchqa-gym[milvus]'") from error
    # Threads that open one folder of the embedded engine at once would lock each other out.
    with _OPENING if _embedded(uri) else nullcontext(), _translated("the connection"):
        return MilvusClient(uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=timeout)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """What the client raises, as an error of ours with that as its cause."""
    import grpc  # type: ignore[import-untyped] # it comes with pymilvus, without types
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError, OSError, ValueError) as error:
        message = f"Milvus, {what}: {type(error).__name__}: {error}"
        if _is_lost(error):
            raise RetrieverUnavailable(message) from error
        if getattr(error, "code", None) == _NOT_FOUND:
            raise MilvusCollectionError(f"{message}; it was dropped while it was in use") from error
        raise RetrieverError(f"{message}; Milvus refuses this, and asking again would not help: check the settings") from error


def _is_lost(error: BaseException) -> bool:
    """Whether an exception of the client tells of a failed connection or of no answer in time, and not of a refusal."""
    import grpc
    from pymilvus import exceptions

    status = grpc.StatusCode
    lost = (status.UNAVAILABLE, status.DEADLINE_EXCEEDED, status.CANCELLED, status.ABORTED)
    causes = _causes(error)
    # The status of the call decides where there is one: the client reports a refused token, too, as a failed connection.
    statuses = [cause.code() for cause in causes if isinstance(cause, grpc.Call)]
    if statuses:
        return statuses[0] in lost
    broken = (exceptions.ConnectError, exceptions.ConnectionNotExistException, exceptions.MilvusUnavailableException)
    return any(
        isinstance(cause, (ConnectionError, TimeoutError, grpc.FutureTimeoutError, *broken))
        or (isinstance(cause, ValueError) and "closed channel" in str(cause))
        or (isinstance(cause, exceptions.MilvusException) and (cause.code in lost or cause.code in _LOST_CODES))
        or getattr(cause, "retriable", False) is True
        for cause in causes
    )


def _causes(error: BaseException) -> list[BaseException]:
    """An exception and what it came from, the nearest first; the client makes circles of them by raising an exception from itself."""
    causes = [error]
    for cause in causes:
        causes += [inner for inner in (cause.__cause__, cause.__context__) if inner is not None and all(inner is not c for c in causes)]
    return causes


@contextmanager
def _bar(passages: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where a person looks at it."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Encoding passages", total=passages)
        yield lambda done: bar.advance(task, done)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise RetrieverUnavailable("Milvus did not answer within the timeout")
    return left


def _parsed(record: object) -> dict[str, Any] | None:
    """The record of a collection, None where it is none of ours."""
    try:
        parsed = json.loads(record) if isinstance(record, str) else None
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
