"""Reciprocal rank fusion: by hand, its general properties, and what it passes on."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_retrievers import BM25Retriever, Corpus, Hit, Passage, RetrieverError, SearchRequest, build_retriever
from searchqa_retrievers.hybrid import Hybrid
from searchqa_retrievers.testing import RetrieverContract

CORPUS = Corpus.from_passages(
    [
        ("1", "Paris", "Paris is the capital of France, on the river Seine."),
        ("2", "Rome", "Rome is the capital of Italy, on the river Tiber."),
        ("3", "Novel", "A novel is a long story that somebody wrote."),
        ("4", "Lima", "Lima is a city on the coast."),
    ]
)


class Ranking:
    """Gives the ids it was made with, in that order, whatever is asked."""

    name = "ranking"

    def __init__(self, ids, text="", filter_keys=()):
        self.ids = list(ids)
        self.text = text
        self.filter_keys = filter_keys
        self.asked = []
        self.progress = None

    def search(self, requests):
        self.asked += requests
        return [[Hit(Passage(id_, "", self.text), -float(i)) for i, id_ in enumerate(self.ids[: r.top_k])] for r in requests]

    def cache_key(self, request):
        return (self.text, request.query, request.top_k)

    def set_progress(self, step, total):
        self.progress = (step, total)

    def counters(self):
        return {"calls": 1.0, self.text or "other": 2.0}


def fused(retriever, top_k=10):
    [hits] = retriever.search([SearchRequest("q", top_k)])
    return [(hit.passage.id, hit.score) for hit in hits]


class TestHybrid(RetrieverContract):
    def make_retriever(self):
        return Hybrid([BM25Retriever(CORPUS), BM25Retriever(CORPUS, k1=0.9, b=0.4, stopwords=None)], depth=3)


def test_scores_are_sums_of_weighted_reciprocal_ranks():
    """b is second and first, a first and absent, c absent and second: 1/62 + 1/61, 1/61, 1/62."""
    assert fused(Hybrid([Ranking("ab"), Ranking("bc")])) == [("b", 1 / 62 + 1 / 61), ("a", 1 / 61), ("c", 1 / 62)]


def test_weights_and_k_by_hand():
    """k = 1, weights 1 and 3: a 1/2, b 1/3 + 3/2, c 3/3."""
    assert fused(Hybrid([Ranking("ab"), Ranking("bc")], k=1, weights=[1, 3])) == [("b", pytest.approx(11 / 6)), ("c", 1.0), ("a", 0.5)]


def test_ties_come_in_the_order_of_ids_as_strings():
    assert [id_ for id_, _ in fused(Hybrid([Ranking(["9", "10"]), Ranking(["10", "9"])]))] == ["10", "9"]


def test_an_id_that_one_retriever_gives_twice_counts_once_at_its_first_rank():
    assert fused(Hybrid([Ranking("aba")])) == [("a", 1 / 61), ("b", 1 / 62)]


def test_the_passage_of_the_first_retriever_is_given_for_an_id_known_to_several():
    [[hit]] = Hybrid([Ranking("a", "first"), Ranking("a", "second")]).search([SearchRequest("q", 5)])
    assert hit.passage.text == "first"


@pytest.mark.parametrize(("depth", "top_k", "asked"), [(100, 3, 100), (2, 3, 3), (1, 1, 1)])
def test_inner_retrievers_are_asked_to_depth_or_top_k(depth, top_k, asked):
    inner = Ranking("abcdef")
    hits = fused(Hybrid([inner], depth=depth), top_k)
    assert inner.asked[0].top_k == asked
    assert len(hits) == top_k


RANKINGS = st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=3), unique=True), st.floats(0.1, 1000))
def test_fusing_one_list_keeps_its_order(ids, k):
    assert [id_ for id_, _ in fused(Hybrid([Ranking(ids)], k=k), max(1, len(ids)))] == ids


@settings(max_examples=100, deadline=None)
@given(RANKINGS, st.data())
def test_the_order_of_the_retrievers_changes_nothing(rankings, data):
    shuffled = data.draw(st.permutations(rankings))
    assert fused(Hybrid([Ranking(ids) for ids in shuffled])) == fused(Hybrid([Ranking(ids) for ids in rankings]))


@settings(max_examples=50, deadline=None)
@given(RANKINGS, st.integers(1, 8))
def test_a_smaller_top_k_gives_the_beginning(rankings, top_k):
    hybrid = Hybrid([Ranking(ids) for ids in rankings])
    assert fused(hybrid, top_k) == fused(hybrid, 8)[:top_k]


def test_a_configuration_gives_the_same_retriever():
    config = {"name": "hybrid", "retrievers": ["bm25", {"name": "bm25", "k1": 0.9, "b": 0.4}], "depth": 4, "weights": [2, 1]}
    built = build_retriever({**config, "cache_entries": 0}, CORPUS)
    by_hand = Hybrid([BM25Retriever(CORPUS), BM25Retriever(CORPUS, k1=0.9, b=0.4)], depth=4, weights=[2, 1])
    requests = [SearchRequest(query, 3) for query in ("capital", "river novel", "coast")]
    assert built.search(requests) == by_hand.search(requests)
    assert built.stamp() == by_hand.stamp() == json.loads(json.dumps(built.stamp()))
    assert [inner["k1"] for inner in built.stamp()["retrievers"]] == [1.5, 0.9]
    assert pickle.loads(pickle.dumps(built)).search(requests) == built.search(requests)


def test_filters_progress_counters_and_keys_pass_through():
    first, second = Ranking("a", "x", ("title", "year")), Ranking("b", "y", ("year",))
    hybrid = Hybrid([first, second])
    request = SearchRequest("q", 1, filters={"year": "1999"})
    hybrid.search([request])
    assert [inner.asked[0].filters for inner in (first, second)] == [{"year": "1999"}] * 2
    assert (hybrid.serves_filter("year"), hybrid.serves_filter("title")) == (True, False)
    hybrid.set_progress(1, 2)
    assert first.progress == second.progress == (1, 2)
    assert hybrid.counters() == {"calls": 2.0, "x": 2.0, "y": 2.0}
    assert hybrid.cache_key(request) == (1, ("x", "q", 100), ("y", "q", 100))


def test_gold_is_needed_where_one_retriever_needs_it():
    inner = Ranking("a")
    assert not Hybrid([inner]).needs_gold
    inner.needs_gold = True
    assert Hybrid([Ranking("b"), inner]).needs_gold


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrievers": []}, "at least one retriever"),
        ({"retrievers": "bm25"}, "a list"),
        ({"retrievers": ["bm26"]}, "bm26"),
        ({"retrievers": ["bm25"], "depth": 0}, "depth.*0"),
        ({"retrievers": ["bm25"], "k": 0}, "k of.*0"),
        ({"retrievers": ["bm25"], "k": float("nan")}, "k of.*nan"),
        ({"retrievers": ["bm25"], "weights": [1, 2]}, "weights.*each of its 1"),
        ({"retrievers": ["bm25"], "weights": [-1]}, "weights.*-1"),
    ],
)
def test_settings_out_of_range_are_errors(options, message):
    with pytest.raises(RetrieverError, match=message):
        build_retriever({"name": "hybrid", **options}, CORPUS)


def test_an_inner_retriever_that_loses_answers_is_an_error():
    inner = Ranking("a")
    inner.search = lambda requests: []
    with pytest.raises(RetrieverError, match="0 answers to 1"):
        Hybrid([inner]).search([SearchRequest("q", 1)])


def test_progress_is_followed_where_one_retriever_follows_it():
    assert not Hybrid([BM25Retriever(CORPUS)]).follows_progress
    assert Hybrid([BM25Retriever(CORPUS), Ranking("a")]).follows_progress


def test_it_closes_what_can_be_closed():
    closed = []
    inner = Ranking("a")
    inner.close = lambda: closed.append(True)
    Hybrid([inner, Ranking("b")]).close()
    assert closed == [True]
