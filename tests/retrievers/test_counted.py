"""Counted: calls, failures, latencies and money of a back end, by hand; sums and differences of counters."""

import copy
import math
import pickle
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_retrievers import Cached, Hit, NoRetriever, Passage, RetrieverError, RetrieverUnavailable, SearchRequest, default_cache_key
from searchqa_retrievers.counted import (
    Counted,
    SearchCounters,
    added_counters,
    counted_since,
    latency_bucket,
    merged_counters,
    search_figures,
)
from searchqa_retrievers.testing import LostBackEndContract, RetrieverContract


class Echo:
    name = "echo"

    def __init__(self):
        self.fail = False

    def search(self, requests):
        if self.fail:
            raise RetrieverUnavailable("gone")
        return [[Hit(Passage("1", "", request.query), 1.0)] for request in requests]

    def cache_key(self, request):
        return default_cache_key(request)


class TestCounted(RetrieverContract):
    def make_retriever(self):
        return Counted(Echo(), 0.5)


class TestCountedLostBackEnd(LostBackEndContract):
    def make_lost_retriever(self):
        inner = Echo()
        inner.fail = True
        return Counted(inner)


def ask(retriever, *queries):
    return retriever.search([SearchRequest(query, 1) for query in queries])


def timeless(counters):
    """The counters that are the same each time."""
    return {key: value for key, value in counters.items() if not key.startswith("search/latency/") and not key.endswith("seconds")}


def test_calls_requests_failures_and_money_by_hand():
    inner = Echo()
    counted = Counted(inner, price=0.01)
    ask(counted, "a", "b", "a")
    ask(counted, "c")
    inner.fail = True
    with pytest.raises(RetrieverUnavailable):
        ask(counted, "d", "e")
    inner.fail = False
    assert counted.search([]) == []
    counters = counted.counters()
    assert timeless(counters) == {
        "search/backend_calls": 3,
        "search/backend_requests": 6,
        "search/backend_failures": 1,
        "search/money": pytest.approx(0.06),
    }
    assert counters["search/backend_seconds"] > 0
    assert sum(value for key, value in counters.items() if key.startswith("search/latency/")) == 3


def test_only_what_no_cache_knows_is_paid():
    cached = Cached(Counted(Echo(), price=2))
    ask(cached, "a", "b", "a")
    ask(cached, "a", "c")
    counters = cached.counters()
    assert (counters["search/money"], counters["search/backend_requests"]) == (6, 3)
    assert (counters["search/cache_hits"], counters["search/cache_misses"]) == (2, 3)


def test_round_a_composition_only_the_price_is_added():
    class Pair(Echo):
        def __init__(self):
            super().__init__()
            self.parts = [Counted(Echo(), 1.0), Counted(Echo(), 2.0)]

        def search(self, requests):
            first, _ = (part.search(requests) for part in self.parts)
            return first

        def counters(self):
            return merged_counters(*self.parts)

    counted = Counted(Pair(), price=10.0)
    ask(counted, "a", "b")
    assert timeless(counted.counters()) == {
        "search/backend_calls": 2,
        "search/backend_requests": 4,
        "search/backend_failures": 0,
        "search/money": 2 * 1 + 2 * 2 + 2 * 10,
    }


def test_a_retriever_that_is_given_twice_counts_once():
    counted = Counted(Echo())
    ask(counted, "a")
    assert merged_counters(counted, NoRetriever(), counted)["search/backend_calls"] == 1
    assert merged_counters(counted, counted, Counted(Echo()))["search/backend_calls"] == 1
    assert merged_counters() == merged_counters(NoRetriever()) == {}


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0.0, 0), (1e-6, 0), (1.1e-6, 1), (2e-6, 4), (2.1e-6, 5), (1024e-6, 40), (1.0, 80), (1e9, 144)]
)
def test_buckets_of_latencies_are_quarters_of_a_doubling(seconds, bucket):
    assert latency_bucket(seconds) == bucket


def test_percentiles_by_hand():
    # 100 calls: 50 of at most 1.024 ms, 40 of at most 2.048 ms, 9 of at most 4.096 ms, one of at most 1048.576 ms
    buckets = {"search/latency/40": 50, "search/latency/44": 40, "search/latency/48": 9, "search/latency/80": 1}
    figures = search_figures(buckets)
    assert figures == {"search/p50_ms": 1.024, "search/p90_ms": 2.048, "search/p99_ms": 4.096}
    assert search_figures({"search/latency/4": 1}) == dict.fromkeys(("search/p50_ms", "search/p90_ms", "search/p99_ms"), 0.002)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50))
def test_a_percentile_is_at_most_a_bucket_above_the_exact_one(latencies):
    sums = added_counters(*({f"search/latency/{latency_bucket(seconds)}": 1.0} for seconds in latencies))
    for percent in (50, 90, 99):
        exact = sorted(latencies)[math.ceil(percent / 100 * len(latencies)) - 1] * 1e3
        assert exact * (1 - 1e-9) <= search_figures(sums)[f"search/p{percent}_ms"] <= exact * 2**0.25 * (1 + 1e-9)


def test_fractions_by_hand_and_none_without_data():
    counters = {
        "search/searches": 10,
        "search/distinct": 7,
        "search/cache_hits": 1,
        "search/cache_joins": 1,
        "search/cache_misses": 6,
        "search/disk_hits": 3,
        "search/disk_joins": 0,
        "search/disk_misses": 1,
    }
    figures = search_figures(counters)
    assert figures["search/duplicate_fraction"] == pytest.approx(0.3)
    assert (figures["search/hit_fraction"], figures["search/disk_hit_fraction"]) == (0.25, 0.75)
    assert search_figures(dict.fromkeys(counters, 0)) == dict.fromkeys(counters, 0)


@given(*[st.dictionaries(st.sampled_from("abcd"), st.integers(0, 100).map(float))] * 2)
def test_what_was_counted_since_is_what_must_be_added(before, more):
    now = added_counters(before, more)
    assert added_counters(before, counted_since(now, before)) == now


def test_the_noise_of_a_simulator_is_shares_of_its_answers():
    counters = {"search/simulated_answers": 8.0, "search/simulated_noisy": 2.0, "search/simulated_expected_noisy": 1.0}
    figures = search_figures(counters)
    assert (figures["search/noisy_fraction"], figures["search/noise"]) == (0.25, 0.125)
    assert "search/noise" not in search_figures({"search/simulated_answers": 0.0})


def test_figures_read_like_a_mapping_and_do_not_change_the_sums():
    counters = SearchCounters({"search/searches": 4.0, "search/distinct": 3.0})
    assert dict(counters) == {"search/searches": 4.0, "search/distinct": 3.0, "search/duplicate_fraction": 0.25}
    assert counters.sums == {"search/searches": 4.0, "search/distinct": 3.0}
    assert dict(pickle.loads(pickle.dumps(counters))) == dict(counters)


@pytest.mark.parametrize("price", [-0.1, math.inf, math.nan, "1", None, True])
def test_a_price_that_is_none_is_an_error(price):
    with pytest.raises(RetrieverError, match="price must be a number of at least 0"):
        Counted(Echo(), price)


def test_threads_lose_no_count():
    counted = Counted(Echo(), price=1)

    def work():
        for _ in range(500):
            ask(counted, "a", "b")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counters = counted.counters()
    assert (counters["search/backend_calls"], counters["search/backend_requests"], counters["search/money"]) == (2000, 4000, 4000)


def test_copies():
    counted = Counted(Echo(), 0.5)
    assert copy.deepcopy(counted) is counted
    other = pickle.loads(pickle.dumps(counted))
    assert (other.price, other.name, other.counters()["search/backend_calls"]) == (0.5, "echo", 0)


def test_money_is_for_what_a_back_end_bills_where_it_says_so():
    class Pages(Echo):
        """Bills three pages for each request."""

        billed_calls = 0

        def search(self, requests):
            self.billed_calls += 3 * len(requests)
            return super().search(requests)

    inner = Pages()
    counted = Counted(inner, price=0.01)
    outside = Counted(Cached(Counted(inner)), price=2)
    ask(counted, "a", "b")
    inner.fail = True
    with pytest.raises(RetrieverUnavailable):
        ask(counted, "c")
    assert counted.counters()["search/money"] == pytest.approx(0.09)
    assert counted.counters()["search/backend_requests"] == 3
    assert outside.counters()["search/money"] == 18
