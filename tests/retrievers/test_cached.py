"""Cached: one question for each distinct key, bounded, never a failure."""

import copy
import os
import pickle
import signal
import threading
from dataclasses import replace

import pytest

from searchqa_retrievers import Cached, Hit, NoRetriever, Passage, RetrieverError, RetrieverUnavailable, SearchRequest, default_cache_key
from searchqa_retrievers.counted import Counted
from searchqa_retrievers.testing import LostBackEndContract, RetrieverContract


class Recording:
    """Answers with the query, and writes down what it was asked."""

    name = "recording"
    needs_gold = True

    def __init__(self):
        self.calls = []
        self.progress = None
        self.fail = False

    def search(self, requests):
        self.calls.append([request.query for request in requests])
        if self.fail:
            raise RetrieverUnavailable("gone")
        return [[Hit(Passage(str(i), "", f"{r.query} {self.progress}"), 1.0) for i in range(r.top_k)] for r in requests]

    def cache_key(self, request):
        return (default_cache_key(request), request.question_id)

    def set_progress(self, step, total):
        self.progress = (step, total)

    def stamp(self):
        return {"retriever": "recording", "version": 3}


class TestCached(RetrieverContract):
    def make_retriever(self):
        return Cached(Recording())


class TestCachedWithoutRoom(RetrieverContract):
    def make_retriever(self):
        return Cached(Recording(), max_entries=1)


class TestCachedLostBackEnd(LostBackEndContract):
    def make_lost_retriever(self):
        inner = Recording()
        inner.fail = True
        return Cached(inner)


def ask(retriever, *queries, top_k=1):
    return retriever.search([SearchRequest(query, top_k) for query in queries])


def test_each_distinct_key_is_asked_once():
    inner = Recording()
    cached = Cached(inner)
    answers = ask(cached, "a", "b", "a", "a")
    assert [hits[0].passage.text for hits in answers] == ["a None", "b None", "a None", "a None"]
    ask(cached, "b", "c")
    ask(cached, "a")
    assert inner.calls == [["a", "b"], ["c"]]
    assert (cached.hits, cached.misses) == (4, 3)


def test_the_key_is_that_of_the_inner_retriever():
    inner = Recording()
    cached = Cached(inner)
    request = SearchRequest("a", 1, question_id="q1", turn=0)
    cached.search([request, replace(request, turn=1), replace(request, question_id="q2"), replace(request, top_k=2)])
    assert inner.calls == [["a", "a", "a"]]


def test_least_recently_used_goes_first():
    inner = Recording()
    cached = Cached(inner, max_entries=2)
    for query in "abac":  # the second "a" makes "b" the oldest
        ask(cached, query)
    ask(cached, "a")
    ask(cached, "b")
    assert inner.calls == [["a"], ["b"], ["c"], ["b"]]
    assert len(cached) == 2


def test_one_call_may_be_larger_than_the_cache():
    cached = Cached(Recording(), max_entries=2)
    assert [hits[0].passage.text for hits in ask(cached, *"abcde")] == [f"{query} None" for query in "abcde"]
    assert len(cached) == 2


def test_a_failure_is_never_kept():
    inner = Recording()
    cached = Cached(inner)
    inner.fail = True
    with pytest.raises(RetrieverUnavailable):
        ask(cached, "a")
    inner.fail = False
    assert ask(cached, "a")[0][0].passage.text == "a None"
    assert (cached.hits, cached.misses) == (0, 1)


def test_empty_answers_are_kept():
    class Empty(Recording):
        def search(self, requests):
            self.calls.append(len(requests))
            return [[] for _ in requests]

    inner = Empty()
    cached = Cached(inner)
    assert ask(cached, "a") == ask(cached, "a") == [[]]
    assert inner.calls == [1]


def test_a_wrong_number_of_answers_is_an_error():
    class Short(Recording):
        def search(self, requests):
            return []

    with pytest.raises(RetrieverError, match="0 answers to 2 requests"):
        ask(Cached(Short()), "a", "b")


def test_progress_reaches_the_retriever_and_empties_the_cache():
    inner = Recording()
    cached = Cached(inner)
    ask(cached, "a")
    cached.set_progress(5, 10)
    assert ask(cached, "a")[0][0].passage.text == "a (5, 10)"
    plain = Cached(NoRetriever())
    ask(plain, "a")
    plain.set_progress(5, 10)  # nothing follows it, so nothing is lost
    assert len(plain) == 1


def test_name_stamp_and_needs_gold_are_those_of_the_retriever():
    cached = Cached(Recording())
    assert (cached.name, cached.needs_gold, cached.stamp()) == ("recording", True, {"retriever": "recording", "version": 3})
    assert Cached(NoRetriever()).needs_gold is False


def test_copies():
    cached = Cached(Recording(), max_entries=7)
    ask(cached, "a")
    assert copy.deepcopy(cached) is cached
    other = pickle.loads(pickle.dumps(cached))
    assert (len(other), other.max_entries, other.name) == (0, 7, "recording")


def test_no_room_at_all_is_an_error():
    with pytest.raises(RetrieverError, match="max_entries"):
        Cached(NoRetriever(), max_entries=0)


def test_threads_share_one_cache():
    cached = Cached(Recording(), max_entries=5)
    failures = []

    def work(start):
        for number in range(300):
            query = str((start + number) % 9)
            if ask(cached, query, query)[1][0].passage.text != f"{query} None":
                failures.append(query)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert cached.hits + cached.joins + cached.misses == 4 * 300 * 2
    assert len(cached) == 5


def test_answers_found_before_a_change_are_not_kept_after_it():
    class Changing(Recording):
        def search(self, requests):
            answers = super().search(requests)
            if self.progress is None:
                cached.set_progress(1, 1)  # as another thread might, while this search runs
            return answers

    cached = Cached(Changing())
    assert ask(cached, "a")[0][0].passage.text == "a None"
    assert ask(cached, "a")[0][0].passage.text == "a (1, 1)"


class Slow(Recording):
    """Each search waits until it is let go."""

    def __init__(self):
        super().__init__()
        self.began = threading.Semaphore(0)
        self.go = threading.Event()

    def search(self, requests):
        self.began.release()
        assert self.go.wait(20)
        return super().search(requests)


def in_threads(*works):
    """Start each, and give back their threads and what they returned or raised."""
    results = [None] * len(works)

    def run(number, work):
        try:
            results[number] = work()
        except RetrieverUnavailable as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number, work)) for number, work in enumerate(works)]
    for thread in threads:
        thread.start()
    return threads, results


def test_threads_that_miss_the_same_key_at_once_ask_once():
    inner = Slow()
    cached = Cached(inner)
    threads, results = in_threads(*[lambda: ask(cached, "a", "b")] * 5, lambda: ask(cached, "b", "c"))
    assert inner.began.acquire(timeout=20)
    inner.go.set()
    for thread in threads:
        thread.join()
    assert sorted(query for call in inner.calls for query in call) == ["a", "b", "c"]
    assert results[:5] == [[[Hit(Passage("0", "", "a None"), 1.0)], [Hit(Passage("0", "", "b None"), 1.0)]]] * 5
    assert results[5][1][0].passage.text == "c None"
    assert cached.misses == 3
    assert cached.hits + cached.joins == 9
    assert cached.counters() == {"search/cache_hits": cached.hits, "search/cache_joins": cached.joins, "search/cache_misses": 3}


def test_who_waited_for_a_failure_asks_itself():
    class FailsFirst(Slow):
        def search(self, requests):
            first = not self.calls
            answers = super().search(requests)
            if first:
                raise RetrieverUnavailable("gone")
            return answers

    inner = FailsFirst()
    cached = Cached(inner)
    first, failed = in_threads(lambda: ask(cached, "a"))
    assert inner.began.acquire(timeout=20)
    second, answered = in_threads(lambda: ask(cached, "a"))
    threading.Event().wait(0.05)  # the second joins the first, or comes too late for that: what is asserted holds either way
    inner.go.set()
    for thread in (*first, *second):
        thread.join()
    assert isinstance(failed[0], RetrieverUnavailable)
    assert answered[0][0][0].passage.text == "a None"
    assert inner.calls == [["a"], ["a"]]


def test_waiting_for_another_thread_is_bounded():
    inner = Slow()
    cached = Cached(inner, patience=0.05)
    first, slow = in_threads(lambda: ask(cached, "a"))
    assert inner.began.acquire(timeout=20)
    second, own = in_threads(lambda: ask(cached, "a"))
    assert inner.began.acquire(timeout=20)  # it has waited enough, and asks itself
    inner.go.set()
    for thread in (*first, *second):
        thread.join()
    assert slow == own
    assert inner.calls == [["a"], ["a"]]


def test_nobody_joins_a_question_from_before_a_change():
    inner = Slow()
    cached = Cached(inner)
    first, _ = in_threads(lambda: ask(cached, "a"))
    assert inner.began.acquire(timeout=20)
    cached.set_progress(1, 2)
    second, _ = in_threads(lambda: ask(cached, "a"))
    assert inner.began.acquire(timeout=20)
    inner.go.set()
    for thread in (*first, *second):
        thread.join()
    assert inner.calls == [["a"], ["a"]]


def test_a_retriever_that_only_passes_progress_on_keeps_its_cache():
    inner = Recording()
    inner.follows_progress = False
    cached = Cached(inner)
    ask(cached, "a")
    cached.set_progress(1, 2)
    ask(cached, "a")
    assert inner.calls == [["a"]]
    assert inner.progress == (1, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("wrap", [Cached, Counted, lambda retriever: Cached(Counted(retriever))])
def test_a_process_forked_beside_a_searching_thread_can_search(wrap):
    """The thread is the parent's: in the child nobody ends its call, or releases a lock that it held."""
    slow = Slow()
    retriever = wrap(slow)
    thread = threading.Thread(target=lambda: ask(retriever, "a"))
    thread.start()
    assert slow.began.acquire(timeout=20)
    retriever._lock.acquire()
    process = os.fork()
    if process == 0:
        signal.alarm(20)
        slow.go.set()
        right = len(ask(retriever, "a")) == 1
        retriever.counters()
        os._exit(0 if right else 1)
    retriever._lock.release()
    slow.go.set()
    thread.join()
    assert os.waitpid(process, 0)[1] == 0
