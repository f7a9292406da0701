"""Shards: several servers with a part each answer as one index over all does, or not at all."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("faiss", reason="dense search needs faiss-cpu")

from searchqa_retrievers import (
    Cached,
    Corpus,
    Hit,
    Http,
    Passage,
    RetrieverError,
    RetrieverUnavailable,
    SearchRequest,
    build_retriever,
    from_function,
)
from searchqa_retrievers import http_client as client_module
from searchqa_retrievers.shards import Shards, make, merged
from searchqa_retrievers.testing import LostBackEndContract, RetrieverContract

# A process of a shard, and the index over all of them in this one: FAISS flat over vectors that follow from each text alone.
DENSE = """
import sys, zlib
import numpy as np
from searchqa_retrievers import Corpus
from searchqa_retrievers.dense import DenseRetriever
from searchqa_retrievers.encoders import Encoder

class Drawn(Encoder):
    dimension = 16
    fingerprint = "drawn"
    dtype = "float32"
    def __init__(self):
        pass
    def __reduce__(self):
        return Drawn, ()
    def encode_queries(self, texts):
        seeds = [zlib.crc32(text.encode("utf-8", "surrogatepass")) for text in texts]
        drawn = np.array([np.random.default_rng(seed).normal(size=16) for seed in seeds], dtype=np.float32).reshape(-1, 16)
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    encode_passages = encode_queries
    def stamp(self):
        return {"fingerprint": self.fingerprint}

def dense(passages, folder):
    return DenseRetriever(Corpus.from_passages(passages), Drawn(), cache_dir=folder)
"""
SERVER = """
from searchqa_retrievers.http_server import serve
path, folder, port = sys.argv[1:]
serve(dense(Corpus.from_jsonl(path), folder), port=int(port))
"""
exec(DENSE)

PASSAGES = [(f"p{number}", f"Title {number % 9}", f"Text {number // 2}") for number in range(200)]
"""Some have equal vectors: the text of two, and every 18th title with it, are alike."""
TWINS = [(f"twin{number}", "Twin", "The same in every shard.") for number in range(6)]
SHARED = ("shared", "Shared", "A passage that two shards hold.")
ALL = [*PASSAGES, *TWINS, SHARED]
PARTS = [[*ALL[0::3], SHARED], [*ALL[1::3], SHARED], ALL[2::3]]
QUERIES = ["river", "who wrote it", '"Twin"\nThe same in every shard.', '"Shared"\nA passage that two shards hold.', *map(str, range(30))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("indexes")


@pytest.fixture(scope="module")
def whole(folder):
    return dense(ALL, folder)  # noqa: F821


@pytest.fixture(scope="module")
def parts(folder):
    return [dense(part, folder) for part in PARTS]  # noqa: F821


class TestShards(RetrieverContract):
    queries = (*QUERIES[:3], "a query that is like nothing")

    @pytest.fixture(autouse=True)
    def _parts(self, parts):
        self.parts = parts

    def make_retriever(self):
        return Shards(self.parts)


class TestLostShard(LostBackEndContract):
    @pytest.fixture(autouse=True)
    def _parts(self, parts):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.lost = Http(f"http://127.0.0.1:{port}", retries=0)
        self.parts = parts
        yield
        self.lost.close()

    def make_lost_retriever(self):
        return Shards([self.parts[0], self.lost, self.parts[2]])


def requests():
    return [SearchRequest(query, top_k) for query in QUERIES for top_k in (1, 3, 10, 300)]


def test_shards_answer_as_the_whole_index_does(whole, parts):
    assert Shards(parts).search(requests()) == whole.search(requests())


class Servers:
    """A real process for each shard."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = {}
        self.ports = []
        for number, part in enumerate(PARTS):
            rows = "".join(json.dumps({"id": id_, "title": title, "text": text}) + "\n" for id_, title, text in part)
            (folder / f"part{number}.jsonl").write_text(rows)
            with socket.create_server(("127.0.0.1", 0)) as listener:
                self.ports.append(listener.getsockname()[1])
        self.urls = [f"http://127.0.0.1:{port}" for port in self.ports]

    def start(self, number):
        line = [sys.executable, "-c", DENSE + SERVER, self.folder / f"part{number}.jsonl", self.folder, str(self.ports[number])]
        self.processes[number] = subprocess.Popen(line, stderr=subprocess.DEVNULL)

    def until_ready(self):
        end = time.monotonic() + 60
        for number, url in enumerate(self.urls):
            while True:
                assert time.monotonic() < end
                assert self.processes[number].poll() is None
                try:
                    if httpx2.get(f"{url}/ready", timeout=10).status_code == 200:
                        break
                except httpx2.RequestError:
                    time.sleep(0.05)

    def kill(self, number):
        self.processes[number].kill()
        self.processes[number].communicate()


@pytest.fixture(scope="module")
def servers(folder):
    running = Servers(folder)
    try:
        for number in range(3):
            running.start(number)
        running.until_ready()
        yield running
    finally:
        for number in running.processes:
            running.kill(number)


def test_shards_behind_real_servers_answer_as_the_whole_index_does_and_never_in_part(servers, whole, monkeypatch):
    monkeypatch.setattr(client_module, "BREAK_AFTER", 1_000_000)
    retriever = make(list, urls=servers.urls, retries=1)
    try:
        expected = whole.search(requests())
        assert retriever.search(requests()) == expected
        hashes = [shard["server"]["corpus_sha256"] for shard in retriever.stamp()["shards"]]
        assert hashes == [Corpus.from_passages(part).sha256 for part in PARTS]
        assert retriever.counters()["search/http_calls"] == 3
        servers.kill(1)
        for query in QUERIES[:3]:
            with pytest.raises(RetrieverUnavailable, match=str(servers.ports[1])):
                retriever.search([SearchRequest(query, 3)])
        servers.start(1)
        servers.until_ready()
        assert retriever.search(requests()) == expected
    finally:
        for shard in retriever._inner:
            shard.close()


def retriever_of(*rows, name="f"):
    return from_function(lambda queries, top_k: [list(rows) for _ in queries], name)


def test_hits_of_equal_score_are_ordered_by_id_whatever_the_shard():
    one = retriever_of(("b", "", "b", 1.0), ("d", "", "d", 1.0), ("z", "", "z", 2.0))
    other = retriever_of(("a", "", "a", 1.0), ("c", "", "c", 1.0))
    for shards in ([one, other], [other, one]):
        [hits] = Shards(shards).search([SearchRequest("q", 4)])
        assert [(hit.passage.id, hit.score) for hit in hits] == [("z", 2.0), ("a", 1.0), ("b", 1.0), ("c", 1.0)]


def test_a_passage_of_two_shards_counts_once_with_its_best_score():
    one, other = retriever_of(("a", "", "a", 1.0), ("b", "", "b", 0.5)), retriever_of(("a", "", "a", 3.0), ("c", "", "c", 2.0))
    [hits] = Shards([one, other]).search([SearchRequest("q", 3)])
    assert [(hit.passage.id, hit.score) for hit in hits] == [("a", 3.0), ("c", 2.0), ("b", 0.5)]


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 30), st.sampled_from([-1.0, 0.0, 0.5, 2.0])), max_size=12), max_size=4), st.integers(1, 20)
)
def test_a_merged_answer_is_the_best_of_all_each_once(rows, top_k):
    answers = [[Hit(Passage(f"{number:02}", "", f"text {number}"), score) for number, score in hits] for hits in rows]
    best = {}
    for number, score in (row for hits in rows for row in hits):
        best[f"{number:02}"] = max(score, best.get(f"{number:02}", score))
    expected = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:top_k]
    assert [(hit.passage.id, hit.score) for hit in merged(answers, top_k)] == expected


def test_one_id_for_two_passages_is_an_error():
    with pytest.raises(RetrieverError, match="the id 'a' to different passages") as error:
        Shards([retriever_of(("a", "", "one", 1.0)), retriever_of(("a", "", "two", 1.0))]).search([SearchRequest("q", 1)])
    assert not isinstance(error.value, RetrieverUnavailable)


def test_all_shards_are_asked_at_the_same_time():
    barrier = threading.Barrier(3)

    def find(queries, top_k):
        barrier.wait(20)
        return [[] for _ in queries]

    assert Shards([from_function(find)] * 3).search([SearchRequest("q", 1)]) == [[]]


def test_it_passes_on_what_its_shards_need_and_count(parts):
    class Learning:
        needs_gold = True
        progress = None

        def search(self, requests):
            return [[] for _ in requests]

        def cache_key(self, request):
            return (request.query, request.top_k, request.golden_answers)

        def set_progress(self, step, total):
            self.progress = (step, total)

        def counters(self):
            return {"search/money": 0.5}

    one, other = Learning(), Learning()
    shards = Shards([one, Cached(other), parts[0]])
    assert shards.needs_gold
    shards.set_progress(3, 9)
    assert one.progress == other.progress == (3, 9)
    assert shards.counters()["search/money"] >= 0.5
    keys = {shards.cache_key(SearchRequest("q", 1, golden_answers=golden)) for golden in ((), ("a",), ("b",))}
    assert len(keys) == 3


def test_copies():
    retriever = make(list, urls=["http://h:1", "http://h:2"], format="search-r1", timeout=3.0)
    assert copy.deepcopy(retriever) is retriever
    again = pickle.loads(pickle.dumps(retriever))
    assert [(shard.url, shard.timeout) for shard in again._inner] == [("http://h:1/retrieve", 3.0), ("http://h:2/retrieve", 3.0)]


def test_the_options_of_one_server_are_those_of_each_shard():
    own = {"corpus", "url", "urls"}
    ours, theirs = inspect.signature(make).parameters, inspect.signature(client_module.make).parameters
    assert {name: p for name, p in ours.items() if name not in own} == {name: p for name, p in theirs.items() if name not in own}
    options = {"timeout": 3.0, "deadline": 7.0, "retries": 1, "hedge_after": 0.5}
    [shard] = make(list, urls=["http://h:1"], format="search-r1", **options)._inner
    assert {name: getattr(shard, name) for name in options} == options
    for urls in (5, "http://h:1", ["http://h:1", 5]):
        with pytest.raises(RetrieverError, match="must be a list"):
            make(list, urls=urls)
    with pytest.raises(RetrieverError, match="in a list"):
        Shards(5)


def test_a_server_that_leaves_scores_out_is_lost_rather_than_merged_by_rank():
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Bare(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            content = b'{"result": [[{"id": "1", "contents": "text"}]]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Bare)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    alone, strict = Http(url, "search-r1"), Http(url, "search-r1", require_scores=True, retries=0)
    try:
        assert alone.search([SearchRequest("q", 1)])[0][0].passage.text == "text"
        with pytest.raises(RetrieverUnavailable, match="no scores"):
            Shards([strict]).search([SearchRequest("q", 1)])
    finally:
        alone.close()
        strict.close()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs the option urls"),
        ({"urls": []}, "at least one shard"),
        ({"urls": "http://h:1"}, "must be a list"),
        ({"urls": 5}, "must be a list"),
        ({"urls": ["http://h:1", 5]}, "must be a list"),
        ({"urls": ["http://h:1", "http://h:1/search"]}, "twice"),
        ({"urls": ["h:1"]}, "the address of a search server"),
        ({"urls": ["http://h:1"], "format": "zerosearch"}, "have no scores"),
        ({"urls": ["http://h:1"], "format": "r1-searcher"}, "have no scores"),
        ({"urls": ["http://h:1"], "hedge_after": -1}, "hedge_after"),
    ],
)
def test_wrong_configurations_are_refused(options, message):
    with pytest.raises(RetrieverError, match=message):
        build_retriever({"name": "shards", **options}, list)
