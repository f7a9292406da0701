"""A filter by title on top of any retriever."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from searchqa_retrievers.checks import check_request
from searchqa_retrievers.composition import Composition, ask, build_inner, stamp_of, whole_number
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.types import Hit, Retriever, RetrieverError, SearchRequest

_GROWTH = 4


class Filtered(Composition):
    """Keeps of the inner ranking what ``filters["title"]`` of the request allows.

    A passage is kept when every word of the filter is a word of its title, in any order: both are brought to Unicode form NFKC and
    case-folded, and a word is a run of letters, digits and underscores. So ``"lisbon"`` keeps "Lisbon, Portugal" but not
    "Lisbonne". Scores are the inner ones. Other filters go on to the inner retriever; a request without a title passes through.

    The inner retriever is asked for four times ``top_k`` passages, then for four times as many again, until there are enough, or it
    has no more, or ``max_candidates`` were looked at: the answer is exact over the first ``max_candidates`` of its ranking.

    Raises
    ------
    RetrieverError
        A setting is out of its range; in searching: a title without any word.
    """

    name = "filtered"

    def __init__(self, retriever: Retriever, max_candidates: int = 4096) -> None:
        super().__init__([retriever])
        self.retriever = retriever
        self.max_candidates = self._within_reach("max_candidates", whole_number("max_candidates of retriever 'filtered'", max_candidates))

    def serves_filter(self, key: str) -> bool | None:
        """``title``, and what the inner retriever serves."""
        return True if key == "title" else super().serves_filter(key)

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        """Answer all requests, with one call to the inner retriever for each widening."""
        split = [self._split(request) for request in requests]
        answers: list[list[Hit]] = [[] for _ in requests]
        pending = {position: self._first(request) for position, request in enumerate(requests)}
        while pending:
            asked = [replace(split[position][1], top_k=top_k) for position, top_k in pending.items()]
            widened: dict[int, int] = {}
            for (position, top_k), hits in zip(pending.items(), ask(self.retriever, asked), strict=True):
                wanted = split[position][0]
                kept = hits if wanted is None else [hit for hit in hits if wanted <= words(hit.passage.title)]
                answers[position] = kept[: requests[position].top_k]
                if wanted is not None and len(kept) < requests[position].top_k and len(hits) >= top_k < self.max_candidates:
                    widened[position] = min(top_k * _GROWTH, self.max_candidates)
            pending = widened
        return answers

    def cache_key(self, request: SearchRequest) -> Hashable:
        wanted, inner = self._split(request)
        return (None if wanted is None else tuple(sorted(wanted)), self.retriever.cache_key(inner))

    def stamp(self) -> dict[str, Any]:
        """The settings that a result depends on, for the record of a run."""
        return {"retriever": self.name, "max_candidates": self.max_candidates, "inner": stamp_of(self.retriever)}

    def __repr__(self) -> str:
        return f"Filtered({self.retriever!r}, max_candidates={self.max_candidates})"

    def _split(self, request: SearchRequest) -> tuple[frozenset[str] | None, SearchRequest]:
        """The words that a title must have, None for any title, and the request as the inner retriever gets it."""
        check_request(replace(request, filters=None), self.name)
        filters = dict(request.filters or {})
        title = filters.pop("title", None)
        wanted = None if title is None else words(title)
        if wanted is not None and not wanted:
            raise RetrieverError(f"filters['title'] must have at least one word of letters or digits, got {title!r:.200}")
        return wanted, replace(request, filters=filters or None)

    def _first(self, request: SearchRequest) -> int:
        if request.filters is None or "title" not in request.filters:
            return request.top_k
        return max(request.top_k, min(request.top_k * _GROWTH, self.max_candidates))


def words(text: str) -> frozenset[str]:
    """The words of a text as :class:`Filtered` compares them."""
    return frozenset(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def make(corpus: Callable[[], Corpus], retriever: str | Mapping[str, Any] | Retriever, max_candidates: int = 4096) -> Retriever:
    """The retriever ``"filtered"`` of a configuration; ``retriever`` is the configuration of the inner one."""
    return Filtered(build_inner(retriever, corpus, Filtered.name), max_candidates)
