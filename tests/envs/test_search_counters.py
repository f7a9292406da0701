"""What environments count of searches: asked, distinct, lost, and what the retriever counts."""

import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import searchqa_envs  # noqa: F401 - registers the ids
from searchqa_envs.tokenizers.byte import ByteTokenizer
from searchqa_retrievers import Cached, Hit, Passage, RetrieverUnavailable, default_cache_key
from searchqa_retrievers.counted import Counted

QUESTIONS = [{"id": f"q{i}", "question": f"Which river is number {i}?", "golden_answers": ["Vistula"], "metadata": {}} for i in range(4)]


class Rivers:
    """Answers every query; fails for the query "storm"."""

    name = "rivers"

    def search(self, requests):
        if any(request.query == "storm" for request in requests):
            raise RetrieverUnavailable("gone")
        return [[Hit(Passage("1", "Vistula", "A river."), 1.0)] for _ in requests]

    def cache_key(self, request):
        return default_cache_key(request)

    def __deepcopy__(self, memo):
        return self


def ids(text):
    return np.array(ByteTokenizer().encode(text), dtype=np.int32)


def search(query):
    return ids(f"<search> {query} </search>")


ANSWER = ids("<answer> Vistula </answer>")


def arguments(price=0.25):
    corpus = [{"id": "a", "contents": '"T"\ntext'}]
    return {"questions": QUESTIONS, "corpus": corpus, "prompt": "bare", "retriever": Cached(Counted(Rivers(), price))}


def make_venv(num_envs=3, mode=AutoresetMode.DISABLED, **changed):
    return gym.make_vec("SearchQA-Custom-v0", num_envs=num_envs, autoreset_mode=mode, **{**arguments(), **changed}).unwrapped


def test_the_vector_environment_counts_searches_duplicates_hits_and_money():
    venv = make_venv()
    venv.reset(seed=0)
    assert venv.search_counters().sums == {
        **dict.fromkeys(("search/searches", "search/distinct", "search/errors", "search/seconds", "search/money"), 0.0),
        **dict.fromkeys(("search/cache_hits", "search/cache_joins", "search/cache_misses"), 0.0),
        **dict.fromkeys(("search/backend_calls", "search/backend_requests", "search/backend_failures", "search/backend_seconds"), 0.0),
    }
    venv.step_at(range(3), [search("a"), search("a"), search("b")])
    venv.step_at(range(3), [search("a"), search("c"), ANSWER])
    counters = venv.search_counters()
    expected = {
        "search/searches": 5,
        "search/distinct": 4,
        "search/errors": 0,
        "search/duplicate_fraction": pytest.approx(1 / 5),
        "search/cache_hits": 1,  # the second "a"
        "search/cache_misses": 3,
        "search/hit_fraction": 1 / 4,
        "search/backend_calls": 2,
        "search/backend_requests": 3,
        "search/money": 0.75,
    }
    assert {key: counters[key] for key in expected} == expected
    assert 0 < counters["search/backend_seconds"] <= counters["search/seconds"]
    assert 0 < counters["search/p50_ms"] <= counters["search/p90_ms"] <= counters["search/p99_ms"]


def test_a_lost_back_end_is_counted_for_every_search_that_it_left_without_an_answer():
    venv = make_venv()
    venv.reset(seed=0)
    *_, truncated, infos = venv.step_at(range(3), [search("storm"), search("a"), ids("nothing")])
    assert truncated.tolist() == [True, True, False]
    counters = infos[0]["turn_record"].counters
    assert (counters["search/searches"], counters["search/errors"], counters["search/backend_failures"]) == (2, 2, 1)


@pytest.mark.parametrize("vector", [False, True])
def test_the_record_of_an_episodes_end_has_the_counters(vector):
    if vector:
        venv = make_venv(1)
        venv.reset(seed=0)

        def step(segment):
            return venv.step_at([0], [segment])[4][0]["turn_record"]
    else:
        env = gym.make("SearchQA-Custom-v0", **arguments())
        env.reset(seed=0)

        def step(segment):
            return env.step(segment)[4]["turn_record"]

    assert step(search("a")).counters == {}
    assert step(search("a")).counters == {}
    record = step(ANSWER)
    assert (record.counters["search/searches"], record.counters["search/cache_hits"], record.counters["search/money"]) == (2, 1, 0.25)
    assert "counters" not in repr(record)
    copied = pickle.loads(pickle.dumps(record))
    assert dict(copied.counters) == dict(record.counters)


def test_counters_are_not_part_of_a_records_equality_and_not_of_the_state():
    records, states = [], []
    env = gym.make("SearchQA-Custom-v0", **arguments())
    for _ in range(2):
        env.reset(seed=0)
        env.step(search("a"))
        states.append(env.unwrapped.get_state())
        records.append(env.step(ANSWER)[4]["turn_record"])
    assert dict(records[0].counters) != dict(records[1].counters)
    assert records[0] == records[1]
    assert states[0] == states[1]


def test_a_snapshot_does_not_change_with_later_searches():
    venv = make_venv(1)
    venv.reset(seed=0)
    venv.step_at([0], [search("a")])
    before = venv.search_counters()
    venv.step_at([0], [search("b")])
    assert (before["search/searches"], venv.search_counters()["search/searches"]) == (1, 2)


def test_a_retriever_without_counters_leaves_the_environments_own():
    venv = make_venv(1, retriever=Rivers())
    venv.reset(seed=0)
    venv.step_at([0], [search("a")])
    assert set(venv.search_counters().sums) == {"search/searches", "search/distinct", "search/errors", "search/seconds"}
    assert "search/p50_ms" not in venv.search_counters()


def test_asynchronous_environments_give_their_counters():
    venv = gym.make_vec("SearchQA-Custom-v0", num_envs=2, vectorization_mode="async", vector_kwargs={"shared_memory": False}, **arguments())
    try:
        venv.reset(seed=0)
        venv.step((search("a"), search("b")))
        assert [counters["search/searches"] for counters in venv.call("search_counters")] == [1, 1]
    finally:
        venv.close()
