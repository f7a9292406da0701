"""Retrievers for control experiments: what is left of a result when search gives nothing, or gives noise."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from searchqa_retrievers.checks import check_request
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.types import Hit, Retriever, SearchRequest, default_cache_key


class NoRetriever:
    """Finds nothing: search switched off."""

    name = "none"

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        return [[] for _ in requests]

    def cache_key(self, request: SearchRequest) -> Hashable:
        return default_cache_key(request)

    def stamp(self) -> dict[str, Any]:
        return {"retriever": self.name}

    def __deepcopy__(self, memo: dict[int, Any]) -> NoRetriever:
        return self

    def __repr__(self) -> str:
        return "NoRetriever()"


class RandomRetriever:
    """Passages drawn without replacement, whatever the query says; the same for equal query, ``request.seed`` and ``seed``.

    The passage at rank r (from 1) has the score 1/r; a smaller ``top_k`` gives the beginning of the answer to a larger one.
    """

    name = "random"

    def __init__(self, corpus: Corpus, seed: int = 0) -> None:
        self.corpus = corpus
        self.seed = seed

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        return [self._draw(request) for request in requests]

    def cache_key(self, request: SearchRequest) -> Hashable:
        return (default_cache_key(request), request.seed)

    def stamp(self) -> dict[str, Any]:
        return {"retriever": self.name, "seed": self.seed, "corpus_sha256": self.corpus.sha256, "passages": len(self.corpus)}

    def __deepcopy__(self, memo: dict[int, Any]) -> RandomRetriever:
        return self

    def __repr__(self) -> str:
        return f"RandomRetriever({self.corpus!r}, seed={self.seed})"

    def _draw(self, request: SearchRequest) -> list[Hit]:
        check_request(request, self.name)
        text = f"{self.seed} {request.seed} {request.query}".encode("utf-8", "surrogatepass")
        generator = random.Random(int.from_bytes(hashlib.sha256(text).digest()[:8], "little"))
        moved: dict[int, int] = {}  # a shuffle from the front in which only the drawn places are written down
        hits = []
        for rank in range(min(request.top_k, len(self.corpus))):
            place = generator.randrange(rank, len(self.corpus))
            drawn = moved.get(place, place)
            moved[place] = moved.get(rank, rank)
            hits.append(Hit(self.corpus[drawn], 1 / (rank + 1)))
        return hits


def make_random(corpus: Callable[[], Corpus], seed: int = 0) -> Retriever:
    """The retriever ``"random"`` of a configuration."""
    return RandomRetriever(corpus(), seed)


def make_none(corpus: Callable[[], Corpus]) -> Retriever:
    """The retriever ``"none"`` of a configuration."""
    return NoRetriever()
