"""What searching costs: calls of a back end, their failures, seconds, latencies and money, as numbers that can be added up.

Every counter is a sum since its retriever was made, so that counters of several retrievers, processes or runs add up, and the difference of two
readings says what happened in between:

| counter | what |
|---|---|
| ``search/searches`` | searches of episodes that were executed (counted by environments) |
| ``search/distinct`` | what of these the retriever was asked: equal ones of one step count once |
| ``search/errors`` | searches that a lost back end left without an answer |
| ``search/seconds`` | spent waiting for the retriever |
| ``search/cache_hits``, ``cache_joins``, ``cache_misses`` | requests that memory answered; that waited for an equal one under way; the others |
| ``search/disk_hits``, ``disk_joins``, ``disk_misses`` | the same of a cache file, which several processes may share |
| ``search/disk_errors`` | readings and writings of a cache file that failed, without harm to the answers |
| ``search/record_hits`` | requests answered as the recording has them |
| ``search/backend_calls``, ``backend_requests`` | calls of back ends behind all caches, and the requests in them |
| ``search/backend_failures``, ``backend_seconds`` | calls that raised, and the time that all calls took |
| ``search/money`` | the price of all requests to back ends, or of what they bill instead |
| ``search/simulated_*``, ``search/simulator_*`` | what a simulated search engine wrote and its endpoint was asked; see ``simulated.py`` |
| ``search/latency/<n>`` | calls of back ends that took at most ``2**(n/4)`` microseconds, and more than at n - 1 |

:func:`search_figures` works out fractions and percentiles from them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from searchqa_retrievers.types import Hit, Retriever, RetrieverError, SearchRequest
from searchqa_retrievers.wrapped import Wrapped, begin_in_forks

LATENCY = "search/latency/"
_LAST_BUCKET = 4 * 36  # 19 hours


def merged_counters(*retrievers: object) -> dict[str, float]:
    """The sums of what retrievers count. One without ``counters`` adds nothing, one that is given twice counts once."""
    if len(retrievers) == 1:
        counters = getattr(retrievers[0], "counters", None)
        return {} if counters is None else dict(counters())
    distinct = {id(retriever): retriever for retriever in retrievers}.values()
    return added_counters(*(retriever.counters() for retriever in distinct if hasattr(retriever, "counters")))


def added_counters(*counters: Mapping[str, float]) -> dict[str, float]:
    """The sums by key; a mapping may lack a key."""
    sums: dict[str, float] = {}
    for one in counters:
        for key, value in one.items():
            sums[key] = sums.get(key, 0.0) + value
    return sums


def counted_since(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """What was counted between two readings of the same counters."""
    return {key: value - before.get(key, 0.0) for key, value in now.items()}


def search_figures(counters: Mapping[str, float]) -> dict[str, float]:
    """The counters, with what can be worked out from them in place of the latencies' buckets; a figure without any data is left out.

    ``search/duplicate_fraction``
        Share of the searches that were equal to another one of the same step.
    ``search/hit_fraction``, ``search/disk_hit_fraction``
        Share of the requests to caches in memory, and to cache files, that were answered without a question to what is behind them.
    ``search/noisy_fraction``, ``search/noise``
        Share of a simulated search engine's answers that were noisy, and the probability of it: ZeroSearch's curriculum.
    ``search/p50_ms``, ``search/p90_ms``, ``search/p99_ms``
        Percentiles (nearest rank) of the milliseconds that a call of a back end took, by the upper end of their bucket: at most 19 % too high.
    """
    figures = {key: value for key, value in counters.items() if not key.startswith(LATENCY)}
    searches = counters.get("search/searches", 0.0)
    if searches:
        figures["search/duplicate_fraction"] = 1 - counters.get("search/distinct", 0.0) / searches
    for kind, figure in (("cache", "search/hit_fraction"), ("disk", "search/disk_hit_fraction")):
        saved = counters.get(f"search/{kind}_hits", 0.0) + counters.get(f"search/{kind}_joins", 0.0)
        asked = saved + counters.get(f"search/{kind}_misses", 0.0)
        if asked:
            figures[figure] = saved / asked
    simulated = counters.get("search/simulated_answers", 0.0)
    if simulated:
        figures["search/noisy_fraction"] = counters.get("search/simulated_noisy", 0.0) / simulated
        figures["search/noise"] = counters.get("search/simulated_expected_noisy", 0.0) / simulated
    buckets = sorted((int(key.removeprefix(LATENCY)), count) for key, count in counters.items() if key.startswith(LATENCY) and count)
    if buckets:
        for percent in (50, 90, 99):
            figures[f"search/p{percent}_ms"] = _percentile(buckets, percent / 100)
    return figures


class SearchCounters(Mapping[str, float]):
    """Counters as they were at one moment, with the figures of :func:`search_figures`, which are worked out when first asked for.

    ``sums`` has the counters alone, which can be added up and subtracted.
    """

    def __init__(self, sums: Mapping[str, float]) -> None:
        self.sums = sums
        self._figures: dict[str, float] | None = None

    @property
    def figures(self) -> dict[str, float]:
        """Counters and figures as a plain dict."""
        if self._figures is None:
            self._figures = search_figures(self.sums)
        return self._figures

    def __getitem__(self, key: str) -> float:
        return self.figures[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.figures)

    def __len__(self) -> int:
        return len(self.figures)

    def __repr__(self) -> str:
        return f"SearchCounters({self.figures!r})"


def _percentile(buckets: Sequence[tuple[int, float]], share: float) -> float:
    """Upper end, in milliseconds, of the bucket in which the call of that rank lies."""
    rank = math.ceil(share * sum(count for _, count in buckets))
    ends = accumulate(count for _, count in buckets)
    bucket = next(bucket for (bucket, _), end in zip(buckets, ends, strict=True) if end >= rank)
    return float(2 ** (bucket / 4) / 1000)


def latency_bucket(seconds: float) -> int:
    """The number ``n`` of ``search/latency/<n>`` that a call of that length is counted in."""
    return min(max(math.ceil(4 * math.log2(seconds * 1e6)), 0), _LAST_BUCKET) if seconds > 1e-6 else 0


class Counted(Wrapped):
    """Counts what a back end is asked, and what that costs. It belongs directly round the back end, inside all caches.

    Round a composition whose parts are counted themselves it adds the money only, as their calls are the back end's.

    Parameters
    ----------
    retriever : Retriever
    price : float
        Of one request, in the currency of your choice. A request of a call that fails is counted too: many providers charge for it. Where the
        retriever has ``billed_calls`` (see :class:`~searchqa_retrievers.types.Retriever`), such as ``online``, it is the price of one of these.
    """

    def __init__(self, retriever: Retriever, price: float = 0.0) -> None:
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < math.inf:
            raise RetrieverError(f"price must be a number of at least 0, of one request, got {price!r}")
        super().__init__(retriever)
        self.price = float(price)
        begin_in_forks(self)
        self._calls = self._requests = self._failures = 0
        self._seconds = 0.0
        self._latencies: dict[str, float] = {}

    def begin_process(self) -> None:
        """A lock is that of one process."""
        self._lock = threading.Lock()

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        if not requests:
            return self.retriever.search(requests)
        failed = True
        started = time.perf_counter()
        try:
            answers = self.retriever.search(requests)
            failed = False
        finally:
            seconds = time.perf_counter() - started
            bucket = f"{LATENCY}{latency_bucket(seconds)}"
            with self._lock:
                self._calls += 1
                self._requests += len(requests)
                self._failures += failed
                self._seconds += seconds
                self._latencies[bucket] = self._latencies.get(bucket, 0.0) + 1
        return answers

    def counters(self) -> dict[str, float]:
        """See the module; with those of the retriever inside."""
        counters = merged_counters(self.retriever)
        billed: int | None = getattr(self.retriever, "billed_calls", None)
        with self._lock:
            charged = self._requests if billed is None else billed
            counters["search/money"] = counters.get("search/money", 0.0) + charged * self.price
            if "search/backend_calls" not in counters:
                counters["search/backend_calls"] = float(self._calls)
                counters["search/backend_requests"] = float(self._requests)
                counters["search/backend_failures"] = float(self._failures)
                counters["search/backend_seconds"] = self._seconds
                counters.update(self._latencies)
        return counters

    def __reduce__(self) -> tuple[Any, ...]:
        return Counted, (self.retriever, self.price)

    def __repr__(self) -> str:
        return f"Counted({self.retriever!r}, price={self.price})"
