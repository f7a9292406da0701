"""Parts of a corpus, each behind a retriever of its own, as one retriever."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from searchqa_retrievers.composition import Composition, ask, stamp_of
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.types import Hit, Passage, Retriever, RetrieverError, SearchRequest


class Shards(Composition):
    """Asks every shard at once and keeps the best ``top_k`` of all their hits, by score descending and id ascending.

    The scores of the shards must be comparable. Those of dense retrieval are: inner products with one encoder's vectors, so that exact shards
    answer as one exact index would. Those of BM25 are not: each index weighs words by its own part of the corpus, so that a merged order is near
    that of one index only where the parts are large and alike.

    An answer has all shards in it: where one cannot answer, ``search`` raises what it raised. A passage that several shards hold counts once, with
    its best score.

    Parameters
    ----------
    shards : sequence of Retriever
        At least one. They must not share an id for different passages.

    Raises
    ------
    RetrieverError
        There is no shard; ``search``: two shards gave different passages with the same id.
    RetrieverUnavailable
        ``search``: a shard is lost.
    """

    name = "shards"

    def __init__(self, shards: Sequence[Retriever]) -> None:
        if not isinstance(shards, Sequence) or not shards:
            raise RetrieverError(f"there must be at least one shard, in a list, got {shards!r:.200}")
        super().__init__(shards)

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        if not requests:
            return []
        with ThreadPoolExecutor(len(self._inner), thread_name_prefix="searchqa-shards") as threads:
            answers = list(threads.map(lambda shard: ask(shard, requests), self._inner))
        return [merged((lists[place] for lists in answers), request.top_k) for place, request in enumerate(requests)]

    def cache_key(self, request: SearchRequest) -> Hashable:
        return tuple(shard.cache_key(request) for shard in self._inner)

    def stamp(self) -> dict[str, Any]:
        """The stamps of all shards."""
        return {"retriever": self.name, "shards": [stamp_of(shard) for shard in self._inner]}

    def __repr__(self) -> str:
        return f"Shards({list(self._inner)!r})"


def merged(answers: Iterable[Sequence[Hit]], top_k: int) -> list[Hit]:
    """The best ``top_k`` of several answers to one request, each passage once.

    Raises :class:`RetrieverError` where two of them give different passages the same id.
    """
    best: dict[str, Hit] = {}
    for hits in answers:
        for hit in hits:
            known = best.setdefault(hit.passage.id, hit)
            if known is hit:
                continue
            if known.passage != hit.passage:
                raise RetrieverError(_clash(known.passage, hit.passage))
            if hit.score > known.score:
                best[hit.passage.id] = hit
    return sorted(best.values(), key=lambda hit: (-hit.score, hit.passage.id))[:top_k]


def make(
    corpus: Callable[[], Corpus],
    urls: Sequence[str],
    format: str = "searchqa",
    timeout: float = 10.0,
    deadline: float = 30.0,
    retries: int = 4,
    hedge_after: float | None = None,
) -> Retriever:
    """The retriever ``"shards"`` of a configuration: a server for each shard; the other options are those of ``"http"``."""
    from searchqa_retrievers.http_client import Http

    if isinstance(urls, str) or not isinstance(urls, Sequence) or not all(isinstance(url, str) for url in urls):
        raise RetrieverError(f"urls must be a list of the shards' addresses, such as ['http://10.0.0.1:8000', ...]; got {urls!r}")
    token = os.environ.get("SEARCHQA_RETRIEVER_TOKEN") or None
    options: dict[str, Any] = {"timeout": timeout, "deadline": deadline, "retries": retries, "hedge_after": hedge_after, "token": token}
    shards = [Http(url, format, require_scores=True, **options) for url in urls]
    if len({shard.url for shard in shards}) < len(shards):
        raise RetrieverError(f"urls names a shard twice: {list(urls)!r}")
    return Shards(shards)


def _clash(one: Passage, other: Passage) -> str:
    return f"two shards give the id {one.id!r} to different passages, titled {one.title!r} and {other.title!r}; ids must be unique over all shards"
