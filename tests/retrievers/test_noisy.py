"""The unreliable search engine: what a noisy search gets, how often there is one, and that it is the same again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_retrievers import Corpus, Noisy, Passage, RetrieverError, SearchRequest, from_function
from searchqa_retrievers.build import build_retriever

CORPUS = Corpus.from_passages([Passage(str(i), f"river {i}", "river " * (i + 1)) for i in range(8)])


def ranked(queries, top_k):
    return [[(str(i), f"t{i}", query, 10.0 - i) for i in range(min(top_k, 6))] for query in queries]


def requests(count, top_k=2, query="river"):
    return [SearchRequest(query, top_k, question_id=f"q{i % 5}", turn=i % 3, seed=i) for i in range(count)]


def test_a_noisy_search_gets_what_ranks_below_the_best_and_others_get_the_best():
    noisy = Noisy(from_function(ranked), probability=0.5, skip=1)
    asked = requests(200)
    for request, hits in zip(asked, noisy.search(asked), strict=True):
        first = 1 if noisy.is_noisy(request) else 0
        assert [hit.passage.id for hit in hits] == [str(first), str(first + 1)]


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 1))
def test_the_share_of_noisy_searches_is_the_probability(probability):
    noisy = Noisy(from_function(ranked), probability=probability)
    share = sum(map(noisy.is_noisy, requests(2000))) / 2000
    assert abs(share - probability) < 0.05  # 4.5 standard deviations


def test_probability_0_is_the_inner_ranking_and_1_never_has_the_best():
    asked = requests(50)
    inner = from_function(ranked)
    assert Noisy(inner, 0).search(asked) == inner.search(asked)
    assert all(hits[0].passage.id == "3" for hits in Noisy(inner, 1, skip=3).search(asked))


def test_the_same_request_is_noisy_again_and_another_episode_has_its_own_luck():
    noisy = Noisy(from_function(ranked))
    asked = requests(100)
    assert noisy.search(asked) == noisy.search(asked)
    assert [hits for request in reversed(asked) for hits in noisy.search([request])] == noisy.search(asked)[::-1]
    assert len({noisy.is_noisy(SearchRequest("river", 1, question_id="q", seed=seed)) for seed in range(50)}) == 2


def test_a_memory_of_answers_does_not_mix_noisy_and_clean_ones():
    built = build_retriever({"name": "noisy", "retriever": "bm25", "cache_entries": 100}, CORPUS)
    bare = build_retriever({"name": "noisy", "retriever": "bm25", "cache_entries": 0}, CORPUS)
    asked = requests(60)
    assert [built.search([request])[0] for request in asked] == bare.search(asked)


def test_beyond_the_last_passage_there_is_nothing():
    assert Noisy(from_function(ranked), 1, skip=6).search(requests(3)) == [[], [], []]


@pytest.mark.parametrize(
    "options", [{"probability": 1.5}, {"probability": -0.1}, {"probability": True}, {"probability": "half"}, {"skip": 0}]
)
def test_settings_out_of_their_range_are_refused(options):
    with pytest.raises(RetrieverError, match=next(iter(options))):
        build_retriever({"name": "noisy", "retriever": "bm25", **options}, CORPUS)


def test_its_stamp_tells_the_settings_and_the_inner_retriever():
    built = build_retriever({"name": "noisy", "retriever": "bm25", "probability": 0.25, "skip": 2, "cache_entries": 0}, CORPUS)
    stamp = built.stamp()
    assert (stamp["retriever"], stamp["probability"], stamp["skip"]) == ("noisy", 0.25, 2)
    assert stamp["inner"]["retriever"] == "bm25"
