"""A bounded memory of answers around any retriever."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

from searchqa_retrievers.counted import merged_counters
from searchqa_retrievers.in_flight import Answers, Flight, InFlight, wait
from searchqa_retrievers.types import Hit, Retriever, RetrieverError, SearchRequest
from searchqa_retrievers.wrapped import Wrapped, begin_in_forks, check_answers

PATIENCE = 120.0


class Cached(Wrapped):
    """Answers requests with an equal ``cache_key`` from memory; the least recently used are forgotten first.

    The inner retriever is asked once for each distinct key of a call. Can be shared by threads: who asks for what another one is just asking
    for waits for that answer, at most ``patience`` seconds. A failure is never kept, and who waited for it asks itself. A pickled copy starts
    empty.

    Parameters
    ----------
    retriever : Retriever
    max_entries : int
        At least 1.
    patience : float
        Seconds.

    Attributes
    ----------
    hits, joins, misses : int
        Requests answered from memory, by waiting for another thread, and by a question to the inner retriever; an equal request of the same
        call is a hit.
    """

    def __init__(self, retriever: Retriever, max_entries: int = 10_000, patience: float = PATIENCE) -> None:
        if max_entries < 1:
            raise RetrieverError(f"max_entries must be at least 1, got {max_entries}; use the retriever itself for no cache")
        super().__init__(retriever)
        self.max_entries = max_entries
        self.patience = patience
        self.hits = self.joins = self.misses = 0
        self._answers: OrderedDict[Hashable, tuple[Hit, ...]] = OrderedDict()
        begin_in_forks(self)

    def begin_process(self) -> None:
        """Locks and calls under way are those of one process; answers stay."""
        self._in_flight = InFlight()
        self._lock = threading.Lock()

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        keys = [self.retriever.cache_key(request) for request in requests]
        found: Answers = {}
        missing: dict[Hashable, SearchRequest] = {}
        joined: dict[Hashable, Flight] = {}
        with self._lock:
            kept, in_flight = self._answers, self._in_flight
            for key, request in zip(keys, requests, strict=True):
                if key in found or key in missing or key in joined:
                    continue
                answer = kept.get(key)
                if answer is not None:
                    kept.move_to_end(key)
                    found[key] = answer
                elif (flight := in_flight.join(key)) is not None:
                    joined[key] = flight
                else:
                    missing[key] = request
            own = in_flight.begin(missing) if missing else None
        if own is not None:
            fresh: Answers | None = None
            try:
                fresh = self._ask(missing)
                found |= fresh
            finally:
                with self._lock:
                    if fresh is not None:
                        self._keep(kept, fresh)
                    in_flight.end(own, missing, fresh)
        waited_for: Answers = {}
        if joined:
            waited_for = wait(joined, self.patience)
            found |= waited_for
            if len(waited_for) < len(joined):
                alone = {key: request for key, request in zip(keys, requests, strict=True) if key in joined and key not in waited_for}
                fresh = self._ask(alone)
                found |= fresh
                with self._lock:
                    self._keep(kept, fresh)
        asked = len(missing) + len(joined) - len(waited_for)
        with self._lock:
            self.hits += len(requests) - asked - len(waited_for)
            self.joins += len(waited_for)
            self.misses += asked
        return [list(found[key]) for key in keys]

    def _ask(self, requests: dict[Hashable, SearchRequest]) -> Answers:
        answers = self.retriever.search(list(requests.values()))
        check_answers(self.name, len(answers), len(requests))
        return {key: tuple(hits) for key, hits in zip(requests, answers, strict=True)}

    def _keep(self, kept: OrderedDict[Hashable, tuple[Hit, ...]], fresh: Answers) -> None:
        if kept is self._answers:  # else `clear` was called meanwhile, and these may be out of date
            kept.update((key, tuple(hits)) for key, hits in fresh.items())
            while len(kept) > self.max_entries:
                kept.popitem(last=False)

    def clear(self) -> None:
        """Forget all answers; the counters stay."""
        with self._lock:
            self._answers, self._in_flight = OrderedDict(), InFlight()

    def set_progress(self, step: int, total: int) -> None:
        """Pass the progress of training on; a retriever that follows it may answer differently from now on, so its answers go."""
        super().set_progress(step, total)
        if self.follows_progress:
            self.clear()

    def counters(self) -> dict[str, float]:
        """Hits, joins and misses, with the counters of the inner retriever; see ``searchqa_retrievers.counted``."""
        counters = merged_counters(self.retriever)
        for key, count in (("search/cache_hits", self.hits), ("search/cache_joins", self.joins), ("search/cache_misses", self.misses)):
            counters[key] = counters.get(key, 0.0) + count
        return counters

    def __len__(self) -> int:
        return len(self._answers)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cached, (self.retriever, self.max_entries, self.patience)

    def __repr__(self) -> str:
        return f"Cached({self.retriever!r}, max_entries={self.max_entries})"
