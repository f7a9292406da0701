"""from_function: any function becomes a retriever that keeps the contract."""

import pytest

from searchqa_retrievers import RetrieverError, RetrieverUnavailable, SearchRequest, from_function
from searchqa_retrievers.testing import LostBackEndContract, RetrieverContract


def shuffled(queries, top_k):
    """Too many results, in no order, with ties."""
    return [[(str(i * 7 % 11), f"Title {i}", query, [1, 2.5, 1][i % 3]) for i in range(top_k + 2)] for query in queries]


def refuse(queries, top_k):
    raise ConnectionError("refused")


class TestFromFunction(RetrieverContract):
    def make_retriever(self):
        return from_function(shuffled)


class TestFromFunctionLostBackEnd(LostBackEndContract):
    def make_lost_retriever(self):
        return from_function(refuse)


def test_results_are_sorted_and_cut():
    rows = [("10", "", "", 1.0), ("9", "", "", 1.0), ("1", "", "", 0.5), ("2", "", "", 3)]
    [hits] = from_function(lambda queries, top_k: [rows]).search([SearchRequest("a", 3)])
    assert [(hit.passage.id, hit.score) for hit in hits] == [("2", 3.0), ("10", 1.0), ("9", 1.0)]  # "10" < "9" as strings


def test_distinct_queries_are_asked_once_for_each_top_k():
    calls = []

    def search(queries, top_k):
        calls.append((queries, top_k))
        return shuffled(queries, top_k)

    requests = [SearchRequest("a", 1), SearchRequest("b", 1), SearchRequest("a", 2), SearchRequest("a", 1)]
    answers = from_function(search).search(requests)
    assert calls == [(["a", "b"], 1), (["a"], 2)]
    assert [(hits[0].passage.text, len(hits)) for hits in answers] == [("a", 1), ("b", 1), ("a", 2), ("a", 1)]


def test_name():
    assert from_function(shuffled).name == "shuffled"
    assert from_function(shuffled, name="mine").stamp() == {"retriever": "mine"}


def test_any_failure_of_the_function_is_a_lost_back_end():
    with pytest.raises(RetrieverUnavailable, match="ConnectionError: refused") as error:
        from_function(refuse).search([SearchRequest("a", 1)])
    assert isinstance(error.value.__cause__, ConnectionError)


def test_its_own_report_of_a_lost_back_end_passes_through():
    lost = RetrieverUnavailable("three tries")

    def search(queries, top_k):
        raise lost

    with pytest.raises(RetrieverUnavailable) as error:
        from_function(search).search([SearchRequest("a", 1)])
    assert error.value is lost


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "must return a list of lists, got NoneType"),
        ("text", "must return a list of lists, got str"),
        ([], "1 queries, 0 lists"),
        ([[], []], "1 queries, 2 lists"),
        ([None], "must give a list of"),
        ([["text"]], "a result must be"),
        ([[("1", "T", "x")]], "a result must be"),  # no score
        ([[(1, "T", "x", 1.0)]], "a result must be"),
        ([[("1", "T", None, 1.0)]], "a result must be"),
        ([[("1", "T", "x", "high")]], "must be a number"),
        ([[("1", "T", "x", None)]], "must be a number"),
        ([[("1", "T", "x", float("nan"))]], "need an order"),
    ],
)
def test_results_of_a_wrong_shape_are_errors_that_do_not_look_like_a_lost_back_end(result, message):
    with pytest.raises(RetrieverError, match=message) as error:
        from_function(lambda queries, top_k: result, name="mine").search([SearchRequest("a", 1)])
    assert not isinstance(error.value, RetrieverUnavailable)
    assert "'mine'" in str(error.value)


def test_requests_that_it_cannot_pass_on_are_errors():
    with pytest.raises(RetrieverError, match="filters"):
        from_function(shuffled).search([SearchRequest("a", 1, filters={"lang": "en"})])
    with pytest.raises(RetrieverError, match="top_k"):
        from_function(shuffled).search([SearchRequest("a", 0)])
