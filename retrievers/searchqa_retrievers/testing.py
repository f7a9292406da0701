"""Contract tests for retrievers: subclass in a test module and get every check.

    from searchqa_retrievers.testing import RetrieverContract

    class TestMyRetriever(RetrieverContract):
        def make_retriever(self):
            return MyRetriever(...)

A retriever with a back end that can be lost also subclasses :class:`LostBackEndContract`. The tests need a runner such as pytest, this
module does not.
"""

from __future__ import annotations

import copy
import json
import pickle
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from searchqa_retrievers.types import Hit, Passage, Retriever, RetrieverUnavailable, SearchRequest

ORDER = "hits must be ordered by score descending, then by passage id ascending as strings"
LENGTH = "there must be one list for each request, of at most top_k hits"
TYPES = "a result must be a list of Hit(Passage(id, title, text), score: float)"
SAME = "equal requests must have equal answers"
BATCH = "an answer must not depend on the other requests of the call"
COPY = "__deepcopy__ must return the object itself: Gymnasium copies environment specs"
KEY = "cache_key must be hashable, equal for equal requests, and different for a different query or top_k"
PICKLE = "a retriever that was pickled must come back and answer as before, by opening again what cannot be carried"
THREADS = "a retriever must answer several threads at once as it answers one"
STAMP = "stamp() must be a dict of plain values that JSON can hold, the same before and after a search and for each new retriever"
COUNTERS = "counters() must be a dict of floats that never decrease"

HOSTILE_QUERIES = (
    "",
    " ",
    "\n\t\x00\x1f",
    "\x00query\x00with\x00nul",
    "\ud800 lone surrogates \udfff",
    "<search>tags</search> </information> <answer>gold</answer>",
    "\"quotes' OR 1=1; -- AND (NOT [x TO y]) field:value* \\",
    "ﬁ İstanbul ß 北京 العربية 🙂‍↔️ e\u0301\u0301\u0301",
    "a" * 50_000,
    "word " * 50_000,
    "\U0010ffff" * 1_000,
)


class RetrieverContract(ABC):
    """What every retriever promises. Override ``queries`` with some that find something."""

    queries: ClassVar[Sequence[str]] = ("capital of France", "who wrote the novel", "river", "a query that matches little: zyzzyva")
    picklable: ClassVar[bool] = True
    """False where a retriever holds what cannot be pickled, such as a function without a name; environments in processes cannot use it then"""

    @abstractmethod
    def make_retriever(self) -> Retriever:
        """A new retriever, the same each time."""

    def request(self, query: str, top_k: int = 3) -> SearchRequest:
        """The request that the tests make of a query; override where more is needed (``golden_answers``, ...)."""
        return SearchRequest(query, top_k)

    def test_satisfies_the_protocol(self) -> None:
        assert isinstance(self.make_retriever(), Retriever), "a retriever must have `search` and `cache_key`"

    def test_no_requests_give_no_answers(self) -> None:
        assert self.make_retriever().search([]) == [], LENGTH

    def test_answers_have_the_types_of_the_interface(self) -> None:
        for hits in self.make_retriever().search([self.request(query) for query in self.queries]):
            assert isinstance(hits, list), TYPES
            for hit in hits:
                assert isinstance(hit, Hit), TYPES
                assert isinstance(hit.passage, Passage), TYPES
                assert all(isinstance(part, str) for part in hit.passage), TYPES
                assert isinstance(hit.score, float), TYPES

    def test_hits_are_ordered_by_score_then_id(self) -> None:
        for top_k in (1, 3, 10):
            for hits in self.make_retriever().search([self.request(query, top_k) for query in self.queries]):
                keys = [(-hit.score, hit.passage.id) for hit in hits]
                assert keys == sorted(keys), ORDER

    def test_at_most_top_k_hits_come_back(self) -> None:
        for top_k in (1, 2, 5, 10_000):
            answers = self.make_retriever().search([self.request(query, top_k) for query in self.queries])
            assert len(answers) == len(self.queries), LENGTH
            assert all(len(hits) <= top_k for hits in answers), LENGTH

    def test_equal_requests_have_equal_answers(self) -> None:
        requests = [self.request(query) for query in self.queries]
        retriever = self.make_retriever()
        first = retriever.search(requests)
        assert retriever.search(requests) == first, SAME
        assert self.make_retriever().search(requests) == first, SAME

    def test_a_batch_answers_as_single_requests_do(self) -> None:
        requests = [self.request(query, top_k) for query in self.queries for top_k in (1, 4)]
        requests = [*requests, *reversed(requests)]
        retriever = self.make_retriever()
        batch = self.make_retriever().search(requests)
        assert batch == [retriever.search([request])[0] for request in requests], BATCH

    def test_a_caller_may_change_an_answer(self) -> None:
        retriever = self.make_retriever()
        request = self.request(self.queries[0])
        first, second = retriever.search([request, request])
        expected = list(second)
        first.clear()
        assert second == expected, SAME
        assert retriever.search([request]) == [expected], SAME

    def test_deepcopy_returns_the_object_itself(self) -> None:
        retriever = self.make_retriever()
        assert copy.deepcopy(retriever) is retriever, COPY

    def test_cache_keys_tell_requests_apart(self) -> None:
        retriever = self.make_retriever()
        requests = [self.request(query, top_k) for query in self.queries for top_k in (1, 2)]
        assert len({retriever.cache_key(request) for request in requests}) == len(requests), KEY
        assert all(retriever.cache_key(request) == retriever.cache_key(copy.copy(request)) for request in requests), KEY

    def test_cache_keys_are_the_same_for_each_new_retriever(self) -> None:
        """A cache that outlives the process depends on it."""
        first, second = self.make_retriever(), self.make_retriever()
        for request in map(self.request, self.queries):
            assert first.cache_key(request) == second.cache_key(request), KEY

    def test_a_request_given_several_times_is_answered_each_time(self) -> None:
        retriever = self.make_retriever()
        one, other = self.request(self.queries[0]), self.request(self.queries[1])
        expected = [retriever.search([request])[0] for request in (one, other)]
        answers = retriever.search([one, one, other, copy.copy(one), other])
        assert answers == [expected[0], expected[0], expected[1], expected[0], expected[1]], BATCH
        assert len({id(hits) for hits in answers}) == len(answers), SAME

    def test_pickled_it_answers_as_before(self) -> None:
        if not self.picklable:
            return
        retriever = self.make_retriever()
        requests = [self.request(query) for query in self.queries]
        expected = retriever.search(requests)
        again = pickle.loads(pickle.dumps(retriever))
        assert again.search(requests) == expected, PICKLE
        assert [again.cache_key(request) for request in requests] == [retriever.cache_key(request) for request in requests], PICKLE

    def test_threads_that_share_it_get_the_same_answers(self) -> None:
        retriever = self.make_retriever()
        requests = [self.request(query, top_k) for query in self.queries for top_k in (1, 3)]
        expected = [retriever.search([request])[0] for request in requests]
        shared = self.make_retriever()
        answers: dict[int, list[list[Hit]]] = {}
        barrier = threading.Barrier(4)

        def search(number: int) -> None:
            turned = requests[number:] + requests[:number]
            barrier.wait()
            found = [hits for request in turned for hits in shared.search([request])]
            answers[number] = found[-number:] + found[:-number] if number else found

        threads = [threading.Thread(target=search, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == dict.fromkeys(range(4), expected), THREADS

    def test_the_stamp_is_of_plain_values_and_stays(self) -> None:
        retriever = self.make_retriever()
        stamp = getattr(retriever, "stamp", None)
        if stamp is None:
            return
        first = stamp()
        assert isinstance(first, dict), STAMP
        assert json.loads(json.dumps(first)) == first, STAMP
        retriever.search([self.request(query) for query in self.queries])
        assert stamp() == first == self.make_retriever().stamp(), STAMP  # type: ignore[attr-defined] # it had one

    def test_counters_are_sums(self) -> None:
        retriever = self.make_retriever()
        counters = getattr(retriever, "counters", None)
        if counters is None:
            return
        before = counters()
        retriever.search([self.request(query) for query in self.queries])
        after = counters()
        for counted in (before, after):
            assert type(counted) is dict, COUNTERS
            assert all(type(key) is str and type(value) is float for key, value in counted.items()), COUNTERS
        assert all(after.get(key, -1.0) >= value for key, value in before.items()), COUNTERS

    def test_hostile_queries_have_answers(self) -> None:
        retriever = self.make_retriever()
        answers = retriever.search([self.request(query) for query in HOSTILE_QUERIES])
        assert len(answers) == len(HOSTILE_QUERIES), LENGTH
        for query, hits in zip(HOSTILE_QUERIES, answers, strict=True):
            assert len(hits) <= 3, LENGTH
            assert retriever.search([self.request(query)]) == [hits], BATCH


class LostBackEndContract(ABC):
    """What a retriever promises when its back end is lost."""

    @abstractmethod
    def make_lost_retriever(self) -> Retriever:
        """A retriever whose back end cannot be reached."""

    def test_a_lost_back_end_raises_and_never_answers(self) -> None:
        retriever = self.make_lost_retriever()
        for _ in range(2):
            try:
                answers = retriever.search([SearchRequest("capital of France", 3)])
            except RetrieverUnavailable:
                continue
            raise AssertionError(f"a lost back end must raise RetrieverUnavailable, but there was the answer {answers!r:.200}")
