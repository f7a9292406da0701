"""An unreliable search engine: some searches do not get the best passages, only what ranks below them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from searchqa_retrievers.checks import check_request
from searchqa_retrievers.composition import Composition, ask, build_inner, stamp_of, whole_number
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.types import Hit, Retriever, RetrieverError, SearchRequest


class Noisy(Composition):
    """With ``probability``, a search gets the inner ranking without its first ``skip`` passages: real ones that share words with the query and seldom help.

    Whether a search is noisy is a function of its query and of the request's ``question_id``, ``turn`` and ``seed`` alone, so that the same episode is the
    same again, and another episode on the same question, whose seed is its own, has its own luck. Scores are the inner ones.

    Raises
    ------
    RetrieverError
        A setting is out of its range.
    """

    name = "noisy"

    def __init__(self, retriever: Retriever, probability: float = 0.5, skip: int = 1) -> None:
        super().__init__([retriever])
        if (
            isinstance(probability, bool)
            or not isinstance(probability, int | float)
            or not math.isfinite(probability)
            or not 0 <= probability <= 1
        ):
            raise RetrieverError(f"probability of retriever 'noisy' must be a number between 0 and 1, got {probability!r:.80}")
        self.retriever = retriever
        self.probability = float(probability)
        self.skip = self._within_reach("skip", whole_number("skip of retriever 'noisy'", skip))

    @property
    def max_top_k(self) -> int | None:
        """What the inner retriever can give beyond the passages that are skipped."""
        limit = super().max_top_k
        return None if limit is None else limit - self.skip

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        """Answer all requests, with one call to the inner retriever."""
        skipped = [self.skip if self.is_noisy(request) else 0 for request in requests]
        asked = [replace(request, top_k=request.top_k + skip) for request, skip in zip(requests, skipped, strict=True)]
        return [hits[skip:] for hits, skip in zip(ask(self.retriever, asked), skipped, strict=True)]

    def is_noisy(self, request: SearchRequest) -> bool:
        """Whether this search does without the best passages."""
        check_request(replace(request, filters=None), self.name)  # filters are the inner retriever's
        words = "\x1f".join((request.query, request.question_id or "", str(request.turn), str(request.seed)))
        drawn = int.from_bytes(hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()[:7], "big") / 2**56  # in [0, 1)
        return drawn < self.probability

    def cache_key(self, request: SearchRequest) -> Hashable:
        return (self.is_noisy(request), self.retriever.cache_key(request))

    def stamp(self) -> dict[str, Any]:
        """The settings that a result depends on, for the record of a run."""
        return {"retriever": self.name, "probability": self.probability, "skip": self.skip, "inner": stamp_of(self.retriever)}

    def __repr__(self) -> str:
        return f"Noisy({self.retriever!r}, probability={self.probability}, skip={self.skip})"


def make(
    corpus: Callable[[], Corpus], retriever: str | Mapping[str, Any] | Retriever, probability: float = 0.5, skip: int = 1
) -> Retriever:
    """The retriever ``"noisy"`` of a configuration; ``retriever`` is the configuration of the inner one."""
    return Noisy(build_inner(retriever, corpus, Noisy.name), probability, skip)
