"""A bounded memory of answers around any retriever."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

from searchqa_retrievers.types import Hit, Retriever, RetrieverError, SearchRequest


class Cached:
    """Answers requests with an equal ``cache_key`` from memory; the least recently used are forgotten first.

    The inner retriever is asked once for each distinct key of a call. A failure is never kept. Can be shared by threads, which do not
    wait for one another's searches. A pickled copy starts empty.

    Parameters
    ----------
    retriever : Retriever
    max_entries : int
        At least 1.

    Attributes
    ----------
    hits, misses : int
        Requests answered without and with a question to the inner retriever; an equal request of the same call is a hit.
    """

    def __init__(self, retriever: Retriever, max_entries: int = 10_000) -> None:
        if max_entries < 1:
            raise RetrieverError(f"max_entries must be at least 1, got {max_entries}; use the retriever itself for no cache")
        self.retriever = retriever
        self.max_entries = max_entries
        self.name: str = getattr(retriever, "name", type(retriever).__name__)
        self.needs_gold: bool = getattr(retriever, "needs_gold", False)
        self.hits = 0
        self.misses = 0
        self._answers: OrderedDict[Hashable, tuple[Hit, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        keys = [self.retriever.cache_key(request) for request in requests]
        found: dict[Hashable, tuple[Hit, ...]] = {}
        missing: dict[Hashable, SearchRequest] = {}
        with self._lock:
            for key, request in zip(keys, requests, strict=True):
                if key in found or key in missing:
                    continue
                answer = self._answers.get(key)
                if answer is None:
                    missing[key] = request
                else:
                    self._answers.move_to_end(key)
                    found[key] = answer
            answers_kept = self._answers
        if missing:
            fresh = self.retriever.search(list(missing.values()))
            if len(fresh) != len(missing):
                raise RetrieverError(f"retriever {self.name!r} gave {len(fresh)} answers to {len(missing)} requests; it must give one each")
            new = {key: tuple(hits) for key, hits in zip(missing, fresh, strict=True)}
            found.update(new)
            with self._lock:
                if answers_kept is self._answers:  # else `clear` was called meanwhile, and these may be out of date
                    self._answers.update(new)
                    while len(self._answers) > self.max_entries:
                        self._answers.popitem(last=False)
        with self._lock:
            self.hits += len(requests) - len(missing)
            self.misses += len(missing)
        return [list(found[key]) for key in keys]

    def cache_key(self, request: SearchRequest) -> Hashable:
        return self.retriever.cache_key(request)

    def clear(self) -> None:
        """Forget all answers; the counters stay."""
        with self._lock:
            self._answers = OrderedDict()

    def set_progress(self, step: int, total: int) -> None:
        """Pass the progress of training on; a retriever that follows it may answer differently from now on, so its answers go."""
        follow = getattr(self.retriever, "set_progress", None)
        if follow is not None:
            follow(step, total)
            self.clear()

    def stamp(self) -> dict[str, Any]:
        """The stamp of the inner retriever: a cache changes no result."""
        stamp = getattr(self.retriever, "stamp", None)
        return {"retriever": self.name} if stamp is None else dict(stamp())

    def __len__(self) -> int:
        return len(self._answers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cached:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Cached, (self.retriever, self.max_entries)

    def __repr__(self) -> str:
        return f"Cached({self.retriever!r}, max_entries={self.max_entries})"
