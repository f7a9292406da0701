"""What retrievers that are made of other retrievers have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.counted import merged_counters
from searchqa_retrievers.types import Hit, Retriever, RetrieverError, SearchRequest, follows_progress

_WITHOUT_FILTERS = (
    "bm25.BM25Retriever",
    "bm25_disk.DiskBM25Retriever",
    "controls.RandomRetriever",
    "dense.DenseRetriever",
    "milvus.MilvusRetriever",
    "online.Online",
)


class Composition:
    """Base of a retriever round others: it passes on what they need and tell."""

    name: str

    def __init__(self, inner: Sequence[Retriever]) -> None:
        for retriever in inner:
            if not isinstance(retriever, Retriever):
                raise RetrieverError(
                    f"retriever {self.name!r} is made of retrievers, objects with `search` and `cache_key`, got {type(retriever).__name__}"
                )
        self._inner = tuple(inner)
        self.needs_gold: bool = any(getattr(retriever, "needs_gold", False) for retriever in self._inner)
        self.follows_progress: bool = any(map(follows_progress, self._inner))

    def serves_filter(self, key: str) -> bool | None:
        """Whether ``filters`` of a request may have this key, which they may where all inner retrievers serve it; None: it cannot be known."""
        served = [serves_filter(retriever, key) for retriever in self._inner]
        return False if False in served else None if None in served else True

    @property
    def max_top_k(self) -> int | None:
        """The greatest ``top_k`` that all inner retrievers can serve; see the function of this name."""
        limits = [limit for limit in map(max_top_k, self._inner) if limit is not None]
        return min(limits, default=None)

    def _within_reach(self, option: str, depth: int) -> int:
        """``depth``, the passages that inner retrievers are asked for at least. Raises :class:`RetrieverError` where one cannot give as many."""
        limit = self.max_top_k
        if limit is not None and depth > limit:
            raise RetrieverError(f"{option} of retriever {self.name!r} must be at most {limit}, what its retrievers can give, got {depth}")
        return depth

    def set_progress(self, step: int, total: int) -> None:
        """Pass the progress of training on."""
        for retriever in self._inner:
            follow = getattr(retriever, "set_progress", None)
            if follow is not None:
                follow(step, total)

    def counters(self) -> dict[str, float]:
        """The sums of what the inner retrievers count; see ``searchqa_retrievers.counted``."""
        return merged_counters(*self._inner)

    def close(self) -> None:
        """Close the inner retrievers, where they can be closed."""
        for retriever in self._inner:
            close = getattr(retriever, "close", None)
            if close is not None:
                close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Composition:
        return self


def ask(retriever: Retriever, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
    """The answers of an inner retriever. Raises :class:`RetrieverError` unless there is one for each request."""
    answers = retriever.search(requests)
    if len(answers) != len(requests):
        raise RetrieverError(
            f"retriever {name_of(retriever)!r} gave {len(answers)} answers to {len(requests)} requests; it must give one each"
        )
    return answers


def name_of(retriever: Retriever) -> str:
    """The retriever's name, or its type's."""
    return str(getattr(retriever, "name", type(retriever).__name__))


def stamp_of(retriever: Retriever) -> dict[str, Any]:
    """The retriever's stamp, or its name where it has none."""
    stamp = getattr(retriever, "stamp", None)
    return {"retriever": name_of(retriever)} if stamp is None else dict(stamp())


def serves_filter(retriever: object, key: str) -> bool | None:
    """Whether ``filters`` of a request may have this key; None where that cannot be known, as of a server.

    A retriever of a user's says it by an attribute ``filter_keys``, a tuple of str. A wrapper that does not, such as a cache, is looked through by
    its attribute ``retriever``.
    """
    if isinstance(retriever, Composition):
        return retriever.serves_filter(key)
    keys: Sequence[str] | None = getattr(retriever, "filter_keys", None)
    if keys is not None:
        return key in keys
    if f"{type(retriever).__module__}.{type(retriever).__qualname__}".removeprefix("searchqa_retrievers.") in _WITHOUT_FILTERS:
        return False
    inner = getattr(retriever, "retriever", None)
    return None if inner is None else serves_filter(inner, key)


def max_top_k(retriever: object) -> int | None:
    """The greatest ``top_k`` that a retriever can serve, by its attribute ``max_top_k``; None where it has no limit that is known.

    A wrapper that does not say is looked through by its attribute ``retriever``.
    """
    limit: int | None = getattr(retriever, "max_top_k", None)
    if limit is not None:
        return limit
    inner = getattr(retriever, "retriever", None)
    return None if inner is None else max_top_k(inner)


def source_names_of(retriever: object) -> tuple[str, ...] | None:
    """The values that ``filters["source"]`` may have, by the attribute ``sources``; None where a retriever does not say."""
    sources: Iterable[str] | None = getattr(retriever, "sources", None)
    if sources is not None:
        return tuple(sources)
    inner = getattr(retriever, "retriever", None)
    return None if inner is None else source_names_of(inner)


def build_inner(config: Any, corpus: Callable[[], Corpus], composition: str) -> Retriever:
    """The retriever of a configuration inside another one, without a cache of its own unless it asks for one."""
    from searchqa_retrievers.build import build_retriever

    if config is None:
        raise RetrieverError(
            f'retriever {composition!r} needs the retriever that it is made of, such as {{"name": {composition!r}, "retriever": "bm25"}}'
        )
    return build_retriever(config, corpus, cache_entries=0)


def whole_number(name: str, value: object) -> int:
    """``value``, which must be an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RetrieverError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value
