"""Http: the contract against a real server in every format, and against servers that fail in every way."""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import pickle
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from types import SimpleNamespace

import pytest
import uvicorn

from searchqa_retrievers import (
    BM25Retriever,
    Cached,
    Corpus,
    Hit,
    Passage,
    Retriever,
    RetrieverError,
    RetrieverUnavailable,
    SearchRequest,
    build_retriever,
)
from searchqa_retrievers import http_client as module
from searchqa_retrievers.http_client import Http
from searchqa_retrievers.http_formats import FORMATS
from searchqa_retrievers.http_server import create_app
from searchqa_retrievers.testing import LostBackEndContract, RetrieverContract
from searchqa_retrievers.types import SERVER_NOT_REACHED

CORPUS = Corpus.from_passages(
    [
        (str(number), f"Title {number}", f"The river {number} in France, near a capital; who wrote the novel {number * 7 % 5}?")
        for number in range(12)
    ]
)


@contextlib.contextmanager
def serving(retriever, port=0):
    """A real server in a thread; gives its port."""
    app = create_app(retriever, token="secret")
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def search_server():
    """Address of a real server."""
    with serving(BM25Retriever(CORPUS)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def http(search_server):
    made = []

    def make(format="searchqa", url=search_server, **options):
        made.append(Http(url, format, token="secret", **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


class ContractOverHttp(RetrieverContract):
    format: str

    @pytest.fixture(autouse=True)
    def _server(self, http):
        self._http = http

    def make_retriever(self) -> Retriever:
        return self._http(self.format)


class TestSearchQA(ContractOverHttp):
    format = "searchqa"


class TestSearchR1(ContractOverHttp):
    format = "search-r1"


class TestR1Searcher(ContractOverHttp):
    format = "r1-searcher"


class TestZeroSearch(ContractOverHttp):
    format = "zerosearch"


class TestLostServer(LostBackEndContract):
    @pytest.fixture(autouse=True)
    def _closing(self, http):
        self._http = http

    def make_lost_retriever(self) -> Retriever:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        return self._http(url=f"http://127.0.0.1:{port}", retries=1)


@pytest.mark.parametrize("format", ["searchqa", "search-r1"])
def test_answers_are_those_of_the_retriever_behind_it(http, format):
    requests = [SearchRequest(query, top_k) for query in ("river 3", "novel", "zyzzyva") for top_k in (1, 5)]
    assert http(format).search(requests) == BM25Retriever(CORPUS).search(requests)


@pytest.mark.parametrize("format", ["r1-searcher", "zerosearch"])
def test_texts_are_those_of_the_retriever_behind_it(http, format):
    requests = [SearchRequest(query, 4) for query in ("river 3", "novel", "zyzzyva")]
    expected = [[f"{hit.passage.title} {hit.passage.text}" for hit in hits] for hits in BM25Retriever(CORPUS).search(requests)]
    assert [[hit.passage.text for hit in hits] for hits in http(format).search(requests)] == expected


def test_a_configuration_makes_one_without_reading_a_corpus(search_server, monkeypatch):
    def corpus():
        raise AssertionError("read")

    monkeypatch.setenv("SEARCHQA_RETRIEVER_TOKEN", "secret")
    cached = build_retriever({"name": "http", "url": search_server, "format": "search-r1", "deadline": 20}, corpus)
    request = SearchRequest("river 3", 2)
    assert cached.search([request]) == BM25Retriever(CORPUS).search([request])
    assert "secret" not in str(cached.stamp())
    cached.retriever.close()


def test_threads_share_one(http):
    client = http("zerosearch")
    expected = BM25Retriever(CORPUS)

    def ask(number):
        requests = [SearchRequest(f"river {number}", 2), SearchRequest(f"novel {number % 5}", 2)]
        texts = [[f"{hit.passage.title} {hit.passage.text}" for hit in hits] for hits in expected.search(requests)]
        return [[hit.passage.text for hit in hits] for hits in client.search(requests)] == texts

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(60)))


def _ask_in_child(client, pipe):
    pipe.send(client.search([SearchRequest("river 3", 1)]))
    client.close()


def test_both_sides_of_a_fork_search(http):
    client = http()
    before = client.search([SearchRequest("river 3", 1)])
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_ask_in_child, args=(client, theirs))
    child.start()
    try:
        assert ours.poll(20)
        assert ours.recv() == before == client.search([SearchRequest("river 3", 1)])
    finally:
        child.kill()
        child.join()


def test_copies(http):
    client = http("search-r1", timeout=3.0)
    request = SearchRequest("river 3", 1)
    expected = client.search([request])
    assert copy.deepcopy(client) is client
    other = pickle.loads(pickle.dumps(client))
    assert other.search([request]) == expected
    assert (other.url, other.timeout, other.stamp()) == (client.url, 3.0, client.stamp())
    other.close()


def test_it_works_again_after_close(http):
    client = http()
    expected = client.search([SearchRequest("river 3", 1)])
    client.close()
    client.close()
    assert client.search([SearchRequest("river 3", 1)]) == expected


def test_a_wrong_token_is_an_error_that_does_not_look_like_a_lost_back_end(search_server):
    client = Http(search_server, token="guess")
    with pytest.raises(RetrieverError, match="401") as error:
        client.search([SearchRequest("a", 1)])
    assert not isinstance(error.value, RetrieverUnavailable)
    assert "guess" not in f"{error.value} {client!r} {client.stamp()}"
    client.close()


# -- a server that does as it is told ----------------------------------------------------------------------------------------------------------


def passages(queries):
    return json.dumps({"result": [[{"document": {"id": query, "contents": query}, "score": 1.0}] for query in queries]}).encode()


@pytest.fixture
def scripted(monkeypatch):
    """A server of Search-R1's format: ``script(number, body, handler)`` answers the request, or returns the bytes of a good answer."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    running = []

    def start(script):
        seen = []
        numbers = count()
        stop = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def do_GET(self):
                assert self.path == "/stamp"
                self.answer(None)

            def answer(self, body):
                seen.append(body)
                self.stop = stop
                content = script(next(numbers), body, self)
                if content is not None:
                    self.reply(200, content)

            def reply(self, status, content, length=None, **headers):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content) if length is None else length))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.handle_error = lambda *args: None  # connections that the client gave up
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        client = Http(f"http://127.0.0.1:{server.server_port}", "search-r1", timeout=10.0, deadline=20.0, retries=2)
        running.append((server, thread, client, stop))
        return client, seen

    yield start
    for server, thread, client, stop in running:
        stop.set()
        client.close()
        server.shutdown()
        thread.join()
        server.server_close()


def ask(client, *queries, top_k=1):
    return [[hit.passage.text for hit in hits] for hits in client.search([SearchRequest(query, top_k) for query in queries])]


def truncated(handler):
    handler.reply(200, passages(["a"])[:20], length=500)
    handler.close_connection = True


def slow(handler):
    handler.stop.wait(5)


def trickling(handler):
    handler.reply(200, b"", length=10_000)
    while not handler.stop.wait(0.05):
        handler.wfile.write(b" ")


def hanging_up(handler):
    handler.close_connection = True


FAILURES = {
    "500": lambda handler: handler.reply(500, b"boom"),
    "502 in HTML": lambda handler: handler.reply(502, b"<html>Bad gateway</html>"),
    "429": lambda handler: handler.reply(429, b""),
    "truncated": truncated,
    "slow": slow,
    "trickling": trickling,
    "hanging up": hanging_up,
    "no JSON": lambda handler: handler.reply(200, b"<html>Please log in</html>"),
    "an error with status 200": lambda handler: handler.reply(200, b'{"error": "out of memory"}'),
    "too few answers": lambda handler: handler.reply(200, b'{"result": []}'),
    "an error as a passage": lambda handler: handler.reply(200, b'{"result": [["Error: timeout"]]}'),
    "score NaN": lambda handler: handler.reply(200, b'{"result": [[{"document": {"contents": "a"}, "score": NaN}]]}'),
    "broken gzip": lambda handler: handler.reply(200, b"not gzip", Content_Encoding="gzip"),
}
ENDLESS = ("slow", "trickling")


@pytest.mark.parametrize("failure", FAILURES)
def test_a_try_that_failed_is_repeated(scripted, failure):
    client, seen = scripted(lambda number, body, handler: FAILURES[failure](handler) if number == 0 else passages(body["queries"]))
    if failure in ENDLESS:
        client.timeout = 0.5
    assert ask(client, "a") == [["a"]]
    assert seen == [{"queries": ["a"], "topk": 1, "return_scores": True}] * 2


@pytest.mark.parametrize("failure", FAILURES)
def test_a_server_that_goes_on_failing_is_a_lost_back_end(scripted, failure):
    client, seen = scripted(lambda number, body, handler: FAILURES[failure](handler))
    if failure in ENDLESS:
        client.timeout = 0.2
    with pytest.raises(RetrieverUnavailable, match="3 tries"):
        ask(client, "a")
    assert len(seen) == 3


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413, 422])
def test_a_refusal_is_an_error_and_not_repeated(scripted, status):
    client, seen = scripted(lambda number, body, handler: handler.reply(status, b"no"))
    with pytest.raises(RetrieverError, match=f"status {status}") as error:
        ask(client, "a")
    assert not isinstance(error.value, RetrieverUnavailable)
    assert len(seen) == 1


def test_the_deadline_ends_a_call_whatever_the_server_does(scripted):
    client, _ = scripted(lambda number, body, handler: slow(handler))
    patient = Http(client.url, "search-r1", timeout=60.0, deadline=0.3)
    with pytest.raises(RetrieverUnavailable, match=r"deadline of 0\.3 s"):
        ask(patient, "a")
    patient.close()


@pytest.fixture
def pauses(monkeypatch):
    """How long the client paused between tries, without the time."""
    paused = []

    async def sleep(seconds):
        paused.append(seconds)

    monkeypatch.setattr(module, "_sleep", sleep)
    return paused


def test_retry_after_is_honoured_within_the_deadline(scripted, pauses):
    client, _ = scripted(
        lambda number, body, handler: handler.reply(503, b"", Retry_After="7") if number == 0 else passages(body["queries"])
    )
    assert ask(client, "a") == [["a"]]
    assert pauses == [7.0]


def test_pauses_double_and_are_shortened_at_random_by_up_to_a_half(scripted, pauses, monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 1.0)
    client, _ = scripted(lambda number, body, handler: handler.reply(500, b""))
    client.retries = 4
    for _ in range(3):
        with pytest.raises(RetrieverUnavailable):
            ask(client, "a")
    for number, longest in enumerate([1.0, 2.0, 4.0, 5.0]):
        assert all(longest / 2 <= pause <= longest for pause in pauses[number::4])
    assert len(set(pauses)) == 12


# -- hedging, counters, stamp ------------------------------------------------------------------------------------------------------------------


def test_a_slow_try_is_sent_a_second_time_and_the_first_usable_answer_counts(scripted):
    client, seen = scripted(lambda number, body, handler: slow(handler) if number == 0 else passages(body["queries"]))
    client.hedge_after = 0.05
    assert ask(client, "a") == [["a"]]
    assert seen == [{"queries": ["a"], "topk": 1, "return_scores": True}] * 2
    counted = client.counters()
    assert (counted["search/http_tries"], counted["search/http_hedges"], counted["search/http_retries"]) == (2, 1, 0)


def test_a_quick_answer_is_not_asked_for_twice(scripted):
    client, seen = scripted(lambda number, body, handler: passages(body["queries"]))
    client.hedge_after = 5.0
    assert ask(client, "a") == [["a"]]
    assert len(seen) == 1
    assert client.counters()["search/http_hedges"] == 0


def test_without_hedging_a_slow_try_is_waited_for(scripted):
    client, seen = scripted(lambda number, body, handler: handler.stop.wait(0.3) or passages(body["queries"]))
    assert ask(client, "a") == [["a"]]
    assert len(seen) == 1


def test_a_second_request_that_fails_leaves_the_first_its_time(scripted):
    def script(number, body, handler):
        if number == 1:
            failed.set()
            return handler.reply(500, b"")
        assert failed.wait(10)
        handler.stop.wait(0.1)
        return passages(body["queries"])

    failed = threading.Event()
    client, seen = scripted(script)
    client.hedge_after = 0.05
    assert ask(client, "a") == [["a"]]
    assert len(seen) == 2
    assert client.counters()["search/http_retries"] == 0


def test_a_try_has_failed_when_both_its_requests_have(scripted):
    client, seen = scripted(lambda number, body, handler: slow(handler) if number % 2 == 0 else handler.reply(500, b""))
    client.hedge_after, client.timeout, client.retries = 0.05, 0.4, 1
    with pytest.raises(RetrieverUnavailable, match=r"2 tries: no answer in 0\.4 s"):
        ask(client, "a")
    assert len(seen) == 4
    counted = client.counters()
    assert (counted["search/http_hedges"], counted["search/http_timeouts"], counted["search/http_status_failures"]) == (2, 2, 2)


def test_hedging_never_takes_more_connections_than_there_are(scripted, monkeypatch):
    under_way, most = [], []
    send = module._send

    async def watched(*words):
        under_way.append(words)
        most.append(len(under_way))
        try:
            return await send(*words)
        finally:
            under_way.pop()

    monkeypatch.setattr(module, "CONNECTIONS", 3)
    monkeypatch.setattr(module, "_send", watched)
    client, _ = scripted(lambda number, body, handler: handler.stop.wait(0.15) or passages(body["queries"]))
    client.hedge_after = 0.01
    with ThreadPoolExecutor(7) as pool:
        assert list(pool.map(lambda number: ask(client, f"q{number}"), range(7))) == [[[f"q{number}"]] for number in range(7)]
    assert client.counters()["search/http_hedges"] >= 1
    assert max(most) == 3


def test_the_deadline_holds_with_hedging(scripted):
    client, _ = scripted(lambda number, body, handler: slow(handler))
    patient = Http(client.url, "search-r1", timeout=60.0, deadline=0.3, hedge_after=0.05)
    with pytest.raises(RetrieverUnavailable, match=r"deadline of 0\.3 s"):
        ask(patient, "a")
    patient.close()


KINDS = {
    "500": "status_failures",
    "truncated": "connection_failures",
    "slow": "timeouts",
    "hanging up": "connection_failures",
    "no JSON": "format_failures",
    "too few answers": "format_failures",
}


@pytest.mark.parametrize("failure", KINDS)
def test_failures_are_counted_by_kind(scripted, failure):
    client, _ = scripted(lambda number, body, handler: FAILURES[failure](handler) if number < 2 else passages(body["queries"]))
    if failure == "slow":
        client.timeout = 0.3
    assert client.counters() == dict.fromkeys(module.COUNTERS, 0.0)
    assert ask(client, "a") == [["a"]]
    assert ask(client, "b") == [["b"]]
    expected = {"http_calls": 2.0, "http_tries": 4.0, "http_retries": 2.0, f"http_{KINDS[failure]}": 2.0}
    assert client.counters() == dict.fromkeys(module.COUNTERS, 0.0) | {f"search/{name}": value for name, value in expected.items()}


def test_refusals_of_the_breaker_are_counted_and_a_copy_begins_anew(scripted):
    client, _ = scripted(lambda number, body, handler: handler.reply(500, b""))
    client.retries = 0
    for _ in range(module.BREAK_AFTER + 2):
        with pytest.raises(RetrieverUnavailable):
            ask(client, "a")
    counted = client.counters()
    assert (counted["search/http_calls"], counted["search/http_breaker_refusals"]) == (module.BREAK_AFTER + 2, 2)
    client.close()
    assert client.counters() == counted
    assert pickle.loads(pickle.dumps(client)).counters() == dict.fromkeys(module.COUNTERS, 0.0)


@pytest.mark.parametrize("format", FORMATS)
def test_the_stamp_has_that_of_the_retriever_behind_the_server(http, format):
    assert http(format).stamp()["server"] == BM25Retriever(CORPUS).stamp()
    assert http(format).stamp()["server"]["corpus_sha256"] == CORPUS.sha256


FOREIGN = {
    "no such path": lambda handler: handler.reply(404, b""),
    "no such method": lambda handler: handler.reply(405, b""),
    "its own page": lambda handler: handler.reply(200, b"<html>Welcome</html>"),
    "other JSON": lambda handler: handler.reply(200, b'{"detail": "ok"}'),
    "no object": lambda handler: handler.reply(200, b"[1]"),
    "a stamp that is none": lambda handler: handler.reply(200, b'{"stamp": "v1"}'),
    "an error": lambda handler: handler.reply(500, b"boom"),
}


@pytest.mark.parametrize("said", FOREIGN)
def test_a_server_that_does_not_tell_what_it_is_has_no_stamp_and_is_asked_once(scripted, said):
    client, seen = scripted(lambda number, body, handler: FOREIGN[said](handler))
    for _ in range(3):
        assert client.stamp() == {"retriever": "http", "format": "search-r1", "url": client.url, "server": None}
    assert seen == [None]


@pytest.mark.parametrize("failure", ["503", "slow", "hanging up"])
def test_a_stamp_of_a_server_that_cannot_be_reached_is_bounded_and_asked_for_again(scripted, failure, monkeypatch):
    monkeypatch.setattr(module, "STAMP_SECONDS", 0.3)
    failures = FAILURES | {"503": lambda handler: handler.reply(503, b"")}
    client, seen = scripted(lambda number, body, handler: failures[failure](handler) if number == 0 else b'{"stamp": {"retriever": "x"}}')
    with ThreadPoolExecutor(1) as pool:
        try:
            assert pool.submit(client.stamp).result(timeout=10)["server"] == SERVER_NOT_REACHED
        finally:
            client.close()  # ends one that is not bounded
    assert client.stamp()["server"] == client.stamp()["server"] == {"retriever": "x"}
    assert len(seen) == 2


def test_a_proxy_of_the_environment_is_not_used(http, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, dead)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    client = http(retries=0)
    assert ask(client, "river 3") != [[]]
    assert client.stamp()["server"] == BM25Retriever(CORPUS).stamp()


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("http://search.example.org", True),
        ("http://192.88.99.7:8000", True),
        ("https://search.example.org", False),
        ("http://10.0.0.7:8000", False),
        ("http://[::1]:8000", False),
        ("http://search-node:8000", False),
        ("http://search.cluster.local", False),
    ],
)
def test_a_token_that_leaves_ones_own_network_unencrypted_is_warned_of_once(url, warned, caplog):
    module._warn_of_plain_http.cache_clear()
    Http(url)
    assert not caplog.records
    for _ in range(2):
        Http(url, token="secret-token")
    assert len(caplog.records) == warned
    assert "secret-token" not in caplog.text


@pytest.mark.parametrize("retry_after", ["3600", "Wed, 01 Jan 2200 00:00:00 GMT"])
def test_a_server_that_asks_for_more_than_the_deadline_is_lost_at_once(scripted, retry_after):
    client, seen = scripted(lambda number, body, handler: handler.reply(503, b"", Retry_After=retry_after))
    with pytest.raises(RetrieverUnavailable, match="1 tries: status 503"):
        ask(client, "a")
    assert len(seen) == 1


def test_all_answers_or_none(scripted):
    client, _ = scripted(lambda number, body, handler: passages(body["queries"]) if body["topk"] == 1 else handler.reply(500, b""))
    with pytest.raises(RetrieverUnavailable):
        client.search([SearchRequest("a", 1), SearchRequest("b", 2)])
    assert ask(client, "a") == [["a"]]


def test_equal_requests_are_asked_once_in_one_body_for_each_top_k(scripted):
    client, seen = scripted(lambda number, body, handler: passages(body["queries"]))
    requests = [SearchRequest("a", 1), SearchRequest("b", 1), SearchRequest("a", 2), SearchRequest("a", 1, turn=3)]
    assert [[hit.passage.id for hit in hits] for hits in client.search(requests)] == [["a"], ["b"], ["a"], ["a"]]
    assert sorted((body["topk"], body["queries"]) for body in seen) == [(1, ["a", "b"]), (2, ["a"])]


def test_many_queries_are_asked_in_several_bodies(scripted):
    client, seen = scripted(lambda number, body, handler: passages(body["queries"]))
    queries = [f"q{number}" for number in range(1_200)]
    assert ask(client, *queries) == [[query] for query in queries]
    assert sorted(len(body["queries"]) for body in seen) == [176, 512, 512]


def test_the_breaker_spares_a_lost_server_and_tries_it_again(scripted, monkeypatch):
    later = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + later))
    lost = threading.Event()
    lost.set()
    client, seen = scripted(lambda number, body, handler: handler.reply(500, b"") if lost.is_set() else passages(body["queries"]))
    client.retries = 0
    for _ in range(module.BREAK_AFTER):
        with pytest.raises(RetrieverUnavailable, match="1 tries"):
            ask(client, "a")
    for _ in range(5):
        with pytest.raises(RetrieverUnavailable, match="3 times in a row"):
            ask(client, "a")
    assert len(seen) == 3
    lost.clear()
    later = module.BREAK_SECONDS
    assert ask(client, "a") == [["a"]]
    assert ask(client, "b") == [["b"]]


def test_a_failure_is_never_kept_by_a_cache(scripted):
    client, _ = scripted(lambda number, body, handler: handler.reply(500, b"") if number < 3 else passages(body["queries"]))
    cached = Cached(client)
    with pytest.raises(RetrieverUnavailable):
        ask(cached, "a")
    assert cached.search([SearchRequest("a", 1)]) == [[Hit(Passage("a", "", "a"), 1.0)]]


SERVER = """
import sys
from searchqa_retrievers import Hit, Passage
from searchqa_retrievers.http_server import serve

class Echo:
    def search(self, requests):
        return [[Hit(Passage("1", "", request.query), 1.0)] for request in requests]
    def cache_key(self, request):
        return request.query

serve(Echo(), port=int(sys.argv[1]))
"""


def test_no_answer_is_lost_or_mixed_up_when_the_server_is_killed_and_started_again():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    def start():
        return subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stderr=subprocess.DEVNULL)

    client = Http(f"http://127.0.0.1:{port}", timeout=10.0, deadline=60.0, retries=60)
    stop = threading.Event()
    answered = []

    def ask_on(number):
        wrong = []
        for turn in count():
            if stop.is_set():
                return wrong
            queries = [f"{number} {turn} {place}" for place in range(3)]
            texts = ask(client, *queries)
            if texts != [[query] for query in queries]:
                wrong.append(texts)
            answered.append(number)

    process = start()
    try:
        with ThreadPoolExecutor(4) as pool:
            threads = [pool.submit(ask_on, number) for number in range(4)]
            try:
                for kills in range(3):
                    if kills:
                        process.kill()
                        process.wait()
                        process = start()
                    enough, end = len(answered) + 100, time.monotonic() + 60
                    while len(answered) < enough:
                        assert time.monotonic() < end
                        time.sleep(0.01)
            finally:
                stop.set()
            assert [thread.result() for thread in threads] == [[], [], [], []]
    finally:
        process.kill()
        process.wait()
        client.close()


def test_a_server_that_comes_back_with_another_corpus_is_an_error_and_with_the_same_one_is_not():
    request = [SearchRequest("river", 2)]
    with serving(BM25Retriever(CORPUS)) as port:
        client = Http(f"http://127.0.0.1:{port}", token="secret", deadline=10.0, retries=20)
        expected = client.search(request)
    try:
        with serving(BM25Retriever(Corpus.from_passages([("1", "Other", "a river")])), port):
            for asking in (client, pickle.loads(pickle.dumps(client))):
                with pytest.raises(RetrieverError, match="another corpus or other settings") as caught:
                    asking.search(request)
                assert not isinstance(caught.value, RetrieverUnavailable)
                if asking is not client:
                    asking.close()
        with serving(BM25Retriever(CORPUS, k1=1.2), port), pytest.raises(RetrieverError, match="other settings"):
            client.search(request)
        with serving(BM25Retriever(CORPUS), port):
            assert client.search(request) == expected
    finally:
        client.close()


# -- arguments ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_the_path_of_the_format_may_be_given(format):
    path = FORMATS[format].path
    for url in ("http://h:1", "http://h:1/", f"http://h:1{path}", f"http://h:1{path}/"):
        assert Http(url, format).url == f"http://h:1{path}"
    assert Http("https://h/behind/a/proxy", format).url == f"https://h/behind/a/proxy{path}"


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://h", "http://", "http://h?q=1", "http://h#f", "http://user:pass@h", "http://h:port"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(RetrieverError, match="the address of a search server") as error:
        Http(url)
    assert "pass" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "elastic"}, "format must be one of searchqa"),
        ({"timeout": 0}, "timeout > 0"),
        ({"deadline": float("inf")}, "finite"),
        ({"retries": -1}, "retries >= 0"),
        ({"hedge_after": -0.1}, "hedge_after must be"),
        ({"hedge_after": float("nan")}, "hedge_after must be"),
        ({"format": "zerosearch", "require_scores": True}, "have no scores"),
        ({"token": ""}, "token must be"),
        ({"token": "a\r\nHost: b"}, "token must be"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(RetrieverError, match=message):
        Http("http://h", **options)


def test_filters_go_only_where_the_format_has_them(http):
    with pytest.raises(RetrieverError, match="has no filters"):
        http("search-r1").search([SearchRequest("a", 1, filters={"lang": "en"})])
    with pytest.raises(RetrieverError, match=r"422.*retriever 'bm25' has no filters"):  # sent, and refused by what is behind the server
        http().search([SearchRequest("a", 1, filters={"lang": "en"})])
    with pytest.raises(RetrieverError, match="top_k must be at least 1"):
        http().search([SearchRequest("a", 0)])
