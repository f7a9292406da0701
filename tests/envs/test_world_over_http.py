"""Generated worlds whose searches go to a server: the pages are those of the question's own world, or there is an error."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
import uvicorn

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_envs.world import WorldSource
from searchqa_envs.world.source import WorldsElsewhere, _recipe
from searchqa_retrievers import Hit, Passage, RetrieverError, RetrieverUnavailable, SearchRequest
from searchqa_retrievers.http_server import create_app


@pytest.fixture(scope="module")
def url():
    """A server with the retriever of an environment on the training worlds."""
    source = WorldSource("train", num_worlds=100)
    app = create_app(source.build_retriever({"name": "bm25"}), ready_filters=source.filters(source[0]))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def chain_requests(source, indices):
    questions = [source[index] for index in indices]
    return [SearchRequest(hop["query"], 3, filters=source.filters(q)) for q in questions for hop in q.metadata["chain"]]


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_every_split_and_number_is_searched_in_its_own_world(url, split):
    source = WorldSource(split, num_worlds=1_000)
    requests = chain_requests(source, [0, 1, len(source) // 2, len(source) - 1])
    elsewhere = source.build_retriever({"name": "http", "url": url})
    assert elsewhere.search(requests) == source.build_retriever({"name": "bm25"}).search(requests)
    assert all(hit.passage.id.startswith(f"easy-{split}-0-") for hits in elsewhere.search(requests) for hit in hits)


@pytest.mark.parametrize("other", [{"world_seed": 1}, {"preset": "medium"}, {"style": "natural"}, {"entities": 120}])
def test_a_server_with_worlds_of_other_settings_refuses(url, other):
    source = WorldSource("train", **other)
    with pytest.raises(RetrieverError, match=r"made with other settings. Give both sides the same preset") as error:
        source.build_retriever({"name": "http", "url": url}).search(chain_requests(source, [0]))
    assert not isinstance(error.value, RetrieverUnavailable)


def test_a_format_without_filters_is_an_error(url):
    source = WorldSource("train")
    with pytest.raises(RetrieverError, match="has no filters"):
        source.build_retriever({"name": "http", "url": url, "format": "search-r1"}).search(chain_requests(source, [0]))


def test_stamps_tell_splits_apart_and_name_the_worlds_of_the_server(url):
    config = {"name": "http", "url": url}
    train, test = (WorldSource(split).build_retriever(config).stamp() for split in ("train", "test"))
    assert train != test  # a cache file that both use must not mix them up
    assert train["server"] == test["server"] == WorldSource("train", num_worlds=100).build_retriever({"name": "bm25"}).stamp()


class Spy:
    """Writes down what it is asked."""

    name = "spy"
    needs_gold = True
    progress = None

    def __init__(self):
        self.asked = []

    def search(self, requests):
        self.asked += requests
        return [[Hit(Passage("1", "", "text"), 1.0)] for _ in requests]

    def cache_key(self, request):
        return (request.query, request.top_k, request.filters["world"])

    def set_progress(self, step, total):
        self.progress = (step, total)


def test_the_world_and_other_filters_are_sent_on():
    spy = Spy()
    source = WorldSource("dev")
    elsewhere = WorldsElsewhere(source, spy)
    request = SearchRequest("Mako", 2, filters={"world": "7", "lang": "en"}, golden_answers=("a",), turn=3)
    assert elsewhere.search([request]) == [[Hit(Passage("1", "", "text"), 1.0)]]
    [asked] = spy.asked
    assert (asked.query, asked.top_k, asked.golden_answers, asked.turn) == ("Mako", 2, ("a",), 3)
    assert {"world": "7", "lang": "en", "split": "dev"}.items() <= asked.filters.items()
    assert elsewhere.cache_key(request) == ("Mako", 2, "7")
    assert elsewhere.needs_gold
    elsewhere.set_progress(1, 2)
    assert spy.progress == (1, 2)
    assert copy.deepcopy(elsewhere) is elsewhere


def test_one_client_serves_all_worlds(monkeypatch):
    made = []
    monkeypatch.setattr("searchqa_retrievers.http_client.Http.__init__", lambda self, *words, **options: made.append(words))
    source = WorldSource("train")
    source.build_retriever({"name": "http", "url": "http://h:1"})
    assert len(made) == 1


@pytest.mark.parametrize(
    "filters",
    [
        {"world": "1", "split": "dev"},
        {"world": "1", "split": "extra", "recipe": _recipe(WorldSource("dev"))},
        {"world": "1", "split": "dev", "recipe": "0" * 16},
    ],
)
def test_a_world_that_is_not_named_in_full_is_an_error(filters):
    with pytest.raises(RetrieverError, match="world"):
        WorldSource("dev").build_retriever({"name": "bm25"}).search([SearchRequest("Mako", 1, filters=filters)])


def test_a_retriever_of_worlds_elsewhere_is_pickled(url):
    source = WorldSource("dev")
    elsewhere = source.build_retriever({"name": "http", "url": url})
    requests = chain_requests(source, [3])
    assert pickle.loads(pickle.dumps(elsewhere)).search(requests) == elsewhere.search(requests)


def test_an_episode_over_http_is_the_episode_in_one_process(url):
    episodes = []
    for retriever in ("bm25", {"name": "http", "url": url}):
        env = gym.make("SearchQA-World-v0", split="test", retriever=retriever)
        observation, _ = env.reset(options={"index": 17})
        seen = [observation]
        base = env.unwrapped
        for hop in base.source[17].metadata["chain"]:
            observation, *_, info = env.step(base.tokenizer.encode(f"<search>{hop['query']}</search>"))
            assert info["backend_error"] is None
            seen.append(observation)
        episodes.append(seen)
    assert all(np.array_equal(one, other) for one, other in zip(*episodes, strict=True))
    assert len(episodes[0][-1]) > len(episodes[0][0])


def test_a_recording_of_a_world_is_replayed_without_it(tmp_path):
    source = WorldSource("dev")
    requests = chain_requests(source, [0, 100])
    expected = source.build_retriever({"name": "bm25", "record": str(tmp_path / "searches.jsonl")}).search(requests)
    assert source.build_retriever({"name": "replay", "file": str(tmp_path / "searches.jsonl")}).search(requests) == expected


def test_a_replay_finds_the_searches_of_its_split_in_a_file_of_several(tmp_path):
    file = str(tmp_path / "searches.jsonl")
    answers = {}
    for split in ("train", "test"):
        source = WorldSource(split)
        recorded = source.build_retriever({"name": "bm25", "record": file})
        answers[split] = recorded.search(chain_requests(source, [0]))
    assert answers["train"] != answers["test"]
    for split, expected in answers.items():
        source = WorldSource(split)
        assert source.build_retriever({"name": "replay", "file": file}).search(chain_requests(source, [0])) == expected


@pytest.fixture
def failing_url():
    """A server with all worlds of which every fourth search is lost."""
    app = create_app(WorldSource("train").build_retriever({"name": "bm25"}))
    searches = itertools.count(1)

    async def failing(scope, receive, send):
        if scope["type"] == "http" and scope["path"] == "/search" and next(searches) % 4 == 0:
            await send({"type": "http.response.start", "status": 503, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"no"})
        else:
            await app(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(failing, port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def played(split, retriever):
    """Episodes that search for the hops of their questions, and the counters."""
    env = gym.make("SearchQA-World-v0", split=split, retriever=retriever)
    base, seen = env.unwrapped, []
    for index in (0, 5, 17, 0):
        observation, _ = env.reset(options={"index": index})
        seen.append(observation.tolist())
        for hop in base.source[index].metadata["chain"] * 2:
            observation, reward, terminated, truncated, info = env.step(base.tokenizer.encode(f"<search>{hop['query']}</search>"))
            seen.append([observation.tolist(), reward, terminated, truncated, info["backend_error"]])
            if terminated or truncated:
                break
    return seen, base.search_counters(), base.stamp()


def test_a_run_over_http_with_outages_is_replayed_split_by_split(failing_url, tmp_path):
    file = str(tmp_path / "searches.jsonl")
    splits = ("train", "dev", "test")
    runs = {split: played(split, {"name": "http", "url": failing_url, "retries": 0, "record": file}) for split in splits}
    assert sum(counters["search/errors"] for _, counters, _ in runs.values()) >= 3
    for split, (seen, counters, stamp) in runs.items():
        again, counted, stamp_again = played(split, {"name": "replay", "file": file})
        assert again == seen
        assert stamp_again == stamp
        assert counted["search/errors"] == counters["search/errors"]
        assert "search/backend_calls" not in counted
        narrowed = {"name": "replay", "file": file, "stamp": {"retriever": "http"}}
        assert played(split, narrowed)[0] == seen
    with pytest.raises(RetrieverError, match="but it has 0"):
        WorldSource("train", world_seed=3).build_retriever({"name": "replay", "file": file})


def test_a_world_without_search_has_no_back_end():
    source = WorldSource("dev")
    without, with_search = (source.build_retriever({"name": name}) for name in ("none", "bm25"))
    for retriever in (without, with_search):
        retriever.search(chain_requests(source, [0])[:1])
    assert "search/backend_calls" not in without.counters()
    assert with_search.counters()["search/backend_calls"] == 1
