"""NoRetriever and RandomRetriever, the controls of an experiment."""

import pytest

from searchqa_retrievers import Corpus, NoRetriever, RandomRetriever, RetrieverError, SearchRequest
from searchqa_retrievers.testing import RetrieverContract

CORPUS = Corpus.from_passages((f"{number:03}", f"Title {number}", "text") for number in range(50))


class TestNoRetriever(RetrieverContract):
    def make_retriever(self):
        return NoRetriever()


class TestRandomRetriever(RetrieverContract):
    def make_retriever(self):
        return RandomRetriever(CORPUS, seed=3)


def ids(request, seed=0):
    return [hit.passage.id for hit in RandomRetriever(CORPUS, seed).search([request])[0]]


def test_none_finds_nothing():
    assert NoRetriever().search([SearchRequest("Title 3", 3)] * 2) == [[], []]


def test_random_depends_on_query_and_seeds_only():
    request = SearchRequest("a", 5, seed=1)
    assert ids(request) == ids(SearchRequest("a", 5, seed=1, turn=3, question_id="q"))
    others = [ids(SearchRequest("b", 5, seed=1)), ids(SearchRequest("a", 5, seed=2)), ids(request, seed=1)]
    assert all(other != ids(request) for other in others)
    retriever = RandomRetriever(CORPUS)
    assert retriever.cache_key(request) != retriever.cache_key(SearchRequest("a", 5, seed=2))


def test_random_draws_without_replacement_and_extends_its_answer():
    assert sorted(ids(SearchRequest("a", 50))) == CORPUS.ids
    assert sorted(ids(SearchRequest("a", 1000))) == CORPUS.ids
    assert ids(SearchRequest("a", 50))[:7] == ids(SearchRequest("a", 7))


def test_random_reaches_every_passage_about_equally():
    counts = dict.fromkeys(CORPUS.ids, 0)
    for number in range(1000):
        for id_ in ids(SearchRequest(str(number), 5)):
            counts[id_] += 1
    # Binomial, 1000 draws of probability .1: mean 100, standard deviation 9.5; six of them each way.
    assert all(43 < count < 157 for count in counts.values())


def test_random_refuses_filters():
    with pytest.raises(RetrieverError, match="filters"):
        RandomRetriever(CORPUS).search([SearchRequest("a", 1, filters={"lang": "en"})])
