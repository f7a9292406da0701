"""A filter by title: which titles pass, exactness under widening, and bounds."""

import importlib.util
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_retrievers import BM25Retriever, Cached, Corpus, Hit, Passage, RetrieverError, SearchRequest, build_retriever
from searchqa_retrievers.composition import serves_filter
from searchqa_retrievers.filtered import Filtered, words
from searchqa_retrievers.testing import RetrieverContract

CORPUS = Corpus.from_passages((f"{i:03d}", f"{'Odd' if i % 2 else 'Even'} number {i}", f"The capital river number {i}.") for i in range(60))


class Ranked:
    """The titles it was made with, in that order; tells how deep it was asked."""

    name = "ranked"

    def __init__(self, titles):
        self.titles = titles
        self.asked = []

    def search(self, requests):
        self.asked.append([request.top_k for request in requests])
        return [[Hit(Passage(f"{i:05d}", title, ""), -float(i)) for i, title in enumerate(self.titles[: r.top_k])] for r in requests]

    def cache_key(self, request):
        return (request.query, request.top_k)


def titles(retriever, wanted, top_k=3):
    [hits] = retriever.search([SearchRequest("capital", top_k, filters=None if wanted is None else {"title": wanted})])
    return [hit.passage.title for hit in hits]


class TestWithoutFilter(RetrieverContract):
    def make_retriever(self):
        return Filtered(BM25Retriever(CORPUS))


class TestWithFilter(RetrieverContract):
    def make_retriever(self):
        return Filtered(BM25Retriever(CORPUS), max_candidates=30)

    def request(self, query, top_k=3):
        return SearchRequest(query, top_k, filters={"title": "odd"})


@pytest.mark.parametrize(
    ("title", "wanted", "kept"),
    [
        ("Lisbon, Portugal", "lisbon", True),
        ("Lisbon, Portugal", "PORTUGAL lisbon", True),  # any order, any case
        ("Lisbonne", "lisbon", False),  # whole words
        ("Lisbon", "lisbon portugal", False),  # all of them
        ("Straße", "STRASSE", True),  # case-folded
        ("Ｌｉｓｂｏｎ", "lisbon", True),  # NFKC
        ("Lo\u0301dz\u0301", "lódź", True),
        ("東京 タワー", "東京", True),
        ("", "lisbon", False),
        ("Apollo-11", "apollo 11", True),
    ],
)
def test_a_title_passes_when_it_has_every_word(title, wanted, kept):
    assert titles(Filtered(Ranked([title])), wanted) == [title] * kept


def test_without_a_title_the_request_passes_through_as_it_is():
    inner = Ranked(["a", "b", "c", "d"])
    assert titles(Filtered(inner), None, 2) == ["a", "b"]
    assert inner.asked == [[2]]


def test_it_asks_deeper_until_there_are_enough():
    inner = Ranked(["no"] * 40 + ["yes"] * 40)
    assert titles(Filtered(inner), "yes", 2) == ["yes"] * 2
    assert inner.asked == [[8], [32], [128]]


def test_it_stops_where_the_inner_retriever_has_no_more():
    inner = Ranked(["no"] * 10)
    assert titles(Filtered(inner), "yes", 1) == []
    assert inner.asked == [[4], [16]]


def test_it_stops_at_the_bound():
    inner = Ranked(["no"] * 1000 + ["yes"])
    assert titles(Filtered(inner, max_candidates=100), "yes", 3) == []
    assert inner.asked == [[12], [48], [100]]


def test_only_those_that_lack_hits_are_asked_again():
    inner = Ranked(["yes"] * 4 + ["no"] * 20 + ["late"] * 9)
    requests = [SearchRequest("q", 1, filters=f) for f in ({"title": "yes"}, None, {"title": "late"})]
    answers = Filtered(inner).search(requests)
    assert [[hit.passage.title for hit in hits] for hits in answers] == [["yes"], ["yes"], ["late"]]
    assert inner.asked == [[4, 1, 4], [16], [64]]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["red", "blue", "red blue"]), max_size=60), st.sampled_from(["red", "blue", "blue red"]), st.integers(1, 20)
)
def test_it_is_the_inner_ranking_filtered(given_titles, wanted, top_k):
    expected = [title for title in given_titles if set(wanted.split()) <= set(title.split())][:top_k]
    assert titles(Filtered(Ranked(given_titles)), wanted, top_k) == expected


def test_equal_filters_have_equal_keys_and_others_differ():
    retriever = Filtered(BM25Retriever(CORPUS))

    def key(**filters):
        return retriever.cache_key(SearchRequest("q", 1, filters=filters or None))

    assert key(title="Odd  number") == key(title="number ODD")
    assert len({key(), key(title="odd"), key(title="even")}) == 3


def test_a_cache_round_it_tells_filters_apart():
    retriever = Cached(Filtered(BM25Retriever(CORPUS)))
    assert {title.split()[0] for title in titles(retriever, "odd")} == {"Odd"}
    assert {title.split()[0] for title in titles(retriever, "even")} == {"Even"}


def test_other_filters_go_on_to_the_inner_retriever():
    with pytest.raises(RetrieverError, match="has no filters"):
        Filtered(BM25Retriever(CORPUS)).search([SearchRequest("q", 1, filters={"title": "odd", "year": "1999"})])
    assert (Filtered(BM25Retriever(CORPUS)).serves_filter("title"), Filtered(BM25Retriever(CORPUS)).serves_filter("year")) == (True, False)


def test_what_an_inner_retriever_does_not_say_cannot_be_known():
    assert Filtered(Ranked([])).serves_filter("year") is None
    assert serves_filter(Cached(Filtered(Ranked([]))), "title") is True
    assert serves_filter(Cached(BM25Retriever(CORPUS)), "title") is False


@pytest.mark.parametrize("title", ["", " ", "!?", "||"])
def test_a_title_without_a_word_is_an_error(title):
    with pytest.raises(RetrieverError, match="at least one word"):
        titles(Filtered(Ranked(["a"])), title)


@given(st.text())
def test_words_never_fail(text):
    assert all(word == word.casefold() for word in words(text))


def test_a_configuration_gives_the_same_retriever():
    built = build_retriever({"name": "filtered", "retriever": "bm25", "max_candidates": 20, "cache_entries": 0}, CORPUS)
    assert titles(built, "odd", 4) == titles(Filtered(BM25Retriever(CORPUS), 20), "odd", 4)
    assert built.stamp() == json.loads(json.dumps(built.stamp()))
    assert built.stamp()["inner"]["retriever"] == "bm25"
    assert titles(pickle.loads(pickle.dumps(built)), "odd", 4) == titles(built, "odd", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs the option retriever"),
        ({"retriever": "bm25", "max_candidates": 0}, "max_candidates"),
        ({"retriever": "bm25", "max_candidates": "9"}, "max_candidates"),
        ({"retriever": 3}, "retriever.*got 3"),
    ],
)
def test_settings_out_of_range_are_errors(options, message):
    with pytest.raises(RetrieverError, match=message):
        build_retriever({"name": "filtered", **options}, CORPUS)


def test_retrievers_that_refuse_filters_are_known_to(tmp_path):
    """By trying: what composition.py says of a plain engine is what the engine does."""
    configs = ["bm25", "random"]
    if importlib.util.find_spec("tantivy"):
        configs.append({"name": "bm25", "backend": "disk", "cache_dir": str(tmp_path)})
    for config in configs:
        retriever = build_retriever(config, CORPUS)
        assert serves_filter(retriever, "title") is False
        with pytest.raises(RetrieverError, match="filters"):
            retriever.search([SearchRequest("q", 1, filters={"title": "odd"})])
    nothing = build_retriever("none", CORPUS)
    assert serves_filter(nothing, "title") is None
    assert nothing.search([SearchRequest("q", 1, filters={"title": "odd"})]) == [[]]
