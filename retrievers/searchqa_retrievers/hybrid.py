"""Several retrievers as one: their rankings are fused by reciprocal ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from searchqa_retrievers.checks import check_request
from searchqa_retrievers.composition import Composition, ask, build_inner, stamp_of, whole_number
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.types import Hit, Passage, Retriever, RetrieverError, SearchRequest


class Hybrid(Composition):
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009).

    The score of a passage is the sum, over the retrievers that found it, of ``weight / (k + rank)`` with ranks counted from 1. Scores
    of the inner retrievers play no part, so that they need no common scale. A passage is known by its id; where retrievers have
    different passages under one id, the first retriever's is given.

    Each inner retriever is asked for ``max(depth, top_k)`` passages: up to ``depth``, a smaller ``top_k`` gives the beginning of the
    answer to a larger one.

    Parameters
    ----------
    retrievers : sequence of Retriever
        One or more. All of them get the request's ``filters``.
    depth : int
        Passages of each ranking that take part, at least 1.
    k : float
        Greater than 0; the larger, the less the first ranks stand out. 60 is the paper's.
    weights : sequence of float or None
        One for each retriever, greater than 0. Default: 1 each.

    Raises
    ------
    RetrieverError
        A setting is out of its range.
    """

    name = "hybrid"

    def __init__(self, retrievers: Sequence[Retriever], depth: int = 100, k: float = 60.0, weights: Sequence[float] | None = None) -> None:
        if not isinstance(retrievers, Sequence) or not retrievers:
            raise RetrieverError(f"retriever 'hybrid' needs a list of at least one retriever, got {retrievers!r:.200}")
        super().__init__(retrievers)
        self.retrievers = self._inner
        self.depth = self._within_reach("depth", whole_number("depth of retriever 'hybrid'", depth))
        self.k = _positive("k", k)
        given = [1.0] * len(retrievers) if weights is None else weights
        if not isinstance(given, Sequence) or len(given) != len(retrievers):
            raise RetrieverError(
                f"weights of retriever 'hybrid' must be one number for each of its {len(retrievers)} retrievers, got {weights!r}"
            )
        self.weights = tuple(_positive("each of the weights", weight) for weight in given)

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        if not requests:
            return []
        deep = [self._deep(request) for request in requests]
        rankings = [ask(retriever, deep) for retriever in self.retrievers]
        return [self._fused([ranking[position] for ranking in rankings])[: request.top_k] for position, request in enumerate(requests)]

    def cache_key(self, request: SearchRequest) -> Hashable:
        deep = self._deep(request)
        return (request.top_k, *(retriever.cache_key(deep) for retriever in self.retrievers))

    def stamp(self) -> dict[str, Any]:
        """The settings that a result depends on, for the record of a run."""
        return {
            "retriever": self.name,
            "depth": self.depth,
            "k": self.k,
            "weights": list(self.weights),
            "retrievers": [stamp_of(retriever) for retriever in self.retrievers],
        }

    def __repr__(self) -> str:
        return f"Hybrid({list(self.retrievers)!r}, depth={self.depth}, k={self.k}, weights={self.weights})"

    def _deep(self, request: SearchRequest) -> SearchRequest:
        check_request(replace(request, filters=None), self.name)
        return replace(request, top_k=max(self.depth, request.top_k))

    def _fused(self, rankings: Sequence[Sequence[Hit]]) -> list[Hit]:
        passages: dict[str, Passage] = {}
        parts: dict[str, list[float]] = {}
        for weight, ranking in zip(self.weights, rankings, strict=True):
            seen: set[str] = set()
            for rank, hit in enumerate(ranking, start=1):
                id_ = hit.passage.id
                if id_ not in seen:
                    seen.add(id_)
                    passages.setdefault(id_, hit.passage)
                    parts.setdefault(id_, []).append(weight / (self.k + rank))
        # fsum rounds once, so that the order of the retrievers cannot change a score
        hits = [Hit(passage, math.fsum(parts[id_])) for id_, passage in passages.items()]
        return sorted(hits, key=lambda hit: (-hit.score, hit.passage.id))


def make(
    corpus: Callable[[], Corpus],
    retrievers: Sequence[str | Mapping[str, Any] | Retriever],
    depth: int = 100,
    k: float = 60.0,
    weights: Sequence[float] | None = None,
) -> Retriever:
    """The retriever ``"hybrid"`` of a configuration; ``retrievers`` is a list of configurations."""
    if isinstance(retrievers, str) or not isinstance(retrievers, Sequence):
        raise RetrieverError(f"retrievers of retriever 'hybrid' must be a list of names or configurations, got {retrievers!r:.200}")
    return Hybrid([build_inner(config, corpus, Hybrid.name) for config in retrievers], depth, k, weights)


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise RetrieverError(f"{name} of retriever 'hybrid' must be a number greater than 0, got {value!r}")
    return float(value)
