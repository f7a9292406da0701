"""The search server, over loopback: the published clients' requests, batches, limits, tokens, and a lost back end."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import uvicorn

from searchqa_retrievers import BM25Retriever, Corpus, Hit, Passage, RetrieverError, RetrieverUnavailable, from_function
from searchqa_retrievers import http_server as module
from searchqa_retrievers.http_server import Limits, create_app, serve

CORPUS = Corpus.from_passages(
    [
        ("1", "Oslo", "Oslo is the capital of Norway."),
        ("2", "Paris", "Paris is the capital of France."),
        ("3", "Seine", "The Seine is a river in France."),
        ("4", "", "A text without a title, about no river."),
    ]
)


@contextlib.contextmanager
def running(retriever, **options):
    """A client of a real server, with the settings of :func:`serve`."""
    settings = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "run", lambda app, **words: settings.update(app=app, **words))
        serve(retriever, port=0, **options)
    config = uvicorn.Config(**settings | {"log_level": "error", "timeout_graceful_shutdown": 5})
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        with httpx2.Client(base_url=f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client():
    with running(BM25Retriever(CORPUS)) as client:
        yield client


class Slow:
    """Holds each call until it is let go, and writes down what it was asked."""

    def __init__(self):
        self.calls = []
        self.go = threading.Event()

    def search(self, requests):
        self.calls.append([request.query for request in requests])
        assert self.go.wait(20)
        return [[Hit(Passage(request.query, "", f"about {request.query}"), 1.0)] for request in requests]

    def cache_key(self, request):
        return request.query


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_search_r1_with_scores(client):
    reply = client.post("/retrieve", content=b'{"queries": ["river in France", "Norway"], "topk": 1, "return_scores": true}')
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    [[first], [second]] = reply.json()["result"]
    assert first["document"] == {"id": "3", "contents": '"Seine"\nThe Seine is a river in France.'}
    assert second["document"]["contents"] == '"Oslo"\nOslo is the capital of Norway.'
    assert first["score"] > 0


def test_search_r1_without_scores_and_with_the_servers_own_number(client):
    reply = client.post("/retrieve", content=b'{"queries": ["a river, a capital, a title"], "topk": null, "return_scores": false}')
    [documents] = reply.json()["result"]
    assert len(documents) == 3
    assert all(set(document) == {"id", "contents"} for document in documents)


def test_r1_searcher(client):
    reply = client.post("/queries", content=b'{"queries": ["Norway", "zyzzyva"], "k": 5}')
    assert reply.json() == {"queries": ["Norway", "zyzzyva"], "answers": [["Oslo Oslo is the capital of Norway."], []]}


def test_zerosearch(client):
    reply = client.post("/retrieve", content=b'{"query": "title", "top_k": 5}')
    assert reply.json() == [{"text": "A text without a title, about no river."}]


def test_ours(client):
    reply = client.post("/search", content=b'{"requests": [{"query": "Norway", "top_k": 1}]}')
    [[hit]] = reply.json()["answers"]
    assert hit == {"id": "1", "title": "Oslo", "text": "Oslo is the capital of Norway.", "score": hit["score"]}


def test_text_that_utf8_does_not_have_is_answered(client):
    reply = client.post("/queries", content=b'{"queries": ["\\ud800"], "k": 1}')
    assert reply.json() == {"queries": ["\ud800"], "answers": [[]]}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/retrieve", b"", 400),
        ("/retrieve", b"{", 400),
        ("/retrieve", b"[" * 100_000, 400),
        ("/retrieve", b"\xff", 400),
        ("/retrieve", b"[]", 422),
        ("/retrieve", b'{"queries": ["a"], "query": "a"}', 422),
        ("/retrieve", b'{"queries": ["a"], "topk": -1}', 422),
        ("/queries", b'{"queries": "a"}', 422),
        ("/search", b'{"requests": [{"query": "a", "top_k": 1, "filters": {"lang": "en"}}]}', 422),  # BM25 has no filters
        ("/retrieve", b'{"queries": ["a", "b"], "topk": 50001}', 413),
        ("/retrieve", b'{"queries": ["a"], "topk": 1' + b"0" * 4_000 + b"}", 413),
    ],
)
def test_bad_requests_get_a_json_error(client, path, body, status):
    reply = client.post(path, content=body)
    assert reply.status_code == status
    assert set(reply.json()) == {"error"}


def test_other_paths_and_methods(client):
    assert client.post("/elsewhere", content=b"{}").status_code == 404
    assert client.get("/retrieve").status_code == 405


def test_a_body_too_long_is_not_read_to_its_end():
    with running(BM25Retriever(CORPUS), limits=Limits(body_bytes=100)) as client:
        assert client.post("/queries", content=json.dumps({"queries": ["a" * 200]}).encode()).status_code == 413
        assert client.post("/queries", content=iter([b"x" * 60, b"x" * 60])).status_code == 413  # no Content-Length
        assert client.post("/queries", content=b'{"queries": ["Norway"]}').status_code == 200


def raw(client, head, body=b""):
    """A connection of one's own to the server of a client."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)
    connection.sendall(head.replace("\n", "\r\n").encode() + body)
    return connection


POST = "POST /queries HTTP/1.1\nHost: x\nContent-Length: {}\n\n"


@pytest.mark.parametrize("length", ["101", "99999999999", "9" * 20])
def test_a_body_that_says_that_it_is_too_long_is_not_waited_for(length):
    with running(BM25Retriever(CORPUS), limits=Limits(body_bytes=100)) as client, raw(client, POST.format(length)) as connection:
        assert connection.recv(1_000).startswith(b"HTTP/1.1 413")


def test_a_client_that_leaves_within_a_body_is_counted_and_no_fault(caplog):
    with caplog.at_level(logging.INFO), running(BM25Retriever(CORPUS)) as client:
        raw(client, POST.format(1_000), b"{").close()
        until(lambda: 'status="499"} 1' in client.get("/metrics").text)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING or record.exc_info]


def test_bodies_are_bounded_together_and_count_until_they_are_answered():
    retriever = Slow()
    body = json.dumps({"queries": ["a" * 80]}).encode()
    with running(retriever, limits=Limits(held_bytes=150)) as client, ThreadPoolExecutor(1) as pool:
        try:
            under_way = pool.submit(client.post, "/queries", content=body)
            until(lambda: retriever.calls)
            turned_away = client.post("/queries", content=body)
            assert (turned_away.status_code, turned_away.headers["retry-after"]) == (503, "1")
            assert "bodies" in turned_away.json()["error"]
        finally:
            retriever.go.set()
        assert under_way.result().status_code == 200
        for _ in range(3):
            assert client.post("/queries", content=body).status_code == 200


def test_a_connection_without_a_whole_head_is_closed_and_a_long_search_is_not(monkeypatch):
    monkeypatch.setattr(module, "HEAD_SECONDS", 1.0)
    retriever = Slow()
    with running(retriever) as client, ThreadPoolExecutor(1) as pool:
        try:
            under_way = pool.submit(client.post, "/queries", json={"queries": ["a"]})
            until(lambda: retriever.calls)
            with raw(client, "") as silent, raw(client, "GET /health HTTP/1.1\nHost:") as half:
                assert silent.recv(1) == half.recv(1) == b""
            with raw(client, "GET /health HTTP/1.1\nHost: x\n\n") as kept:
                assert kept.recv(1_000).startswith(b"HTTP/1.1 200")
                kept.sendall(b"GET /hea")
                rest = b""
                while part := kept.recv(1_000):
                    rest += part
                assert b"HTTP/1.1" not in rest
        finally:
            retriever.go.set()
        assert under_way.result().status_code == 200


def test_connections_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "CONNECTIONS", 3)
    with running(BM25Retriever(CORPUS)) as client:
        assert client.get("/health").status_code == 200
        silent = [raw(client, "") for _ in range(2)]
        until(lambda: client.get("/health").status_code == 503)
        for connection in silent:
            connection.close()
        until(lambda: client.get("/health").status_code == 200)


def test_searches_that_wait_go_in_one_call_and_each_gets_its_own_answer():
    retriever = Slow()
    with running(retriever) as client, ThreadPoolExecutor(9) as pool:

        def ask(query):
            return client.post("/queries", json={"queries": [query, query + "!"], "k": 1}).json()["answers"]

        first = pool.submit(ask, "first")
        until(lambda: retriever.calls)
        others = {f"q{i}": pool.submit(ask, f"q{i}") for i in range(8)}
        until(lambda: "searchqa_searches_waiting 16" in client.get("/metrics").text)
        retriever.go.set()
        assert first.result() == [["about first"], ["about first!"]]
        for query, answer in others.items():
            assert answer.result() == [[f"about {query}"], [f"about {query}!"]]
        assert [len(call) for call in retriever.calls] == [2, 16]
        metrics = client.get("/metrics").text
        assert 'searchqa_http_requests_total{path="/queries",status="200"} 9' in metrics
        assert "searchqa_searches_total 18" in metrics
        assert "searchqa_search_batches_total 2" in metrics
        assert 'searchqa_http_request_seconds_bucket{le="+Inf"} 9' in metrics


def test_a_full_queue_turns_searches_away():
    retriever = Slow()
    with running(retriever, limits=Limits(waiting=1)) as client, ThreadPoolExecutor(2) as pool:
        try:
            under_way = pool.submit(client.post, "/queries", json={"queries": ["a"]})
            until(lambda: retriever.calls)
            waiting = pool.submit(client.post, "/queries", json={"queries": ["b"]})
            until(lambda: "searchqa_searches_waiting 1" in client.get("/metrics").text)
            turned_away = client.post("/queries", json={"queries": ["c"]}, timeout=5)
            assert (turned_away.status_code, turned_away.headers["retry-after"]) == (503, "1")
        finally:
            retriever.go.set()
        assert under_way.result().status_code == waiting.result().status_code == 200


def test_a_stop_answers_what_is_under_way():
    retriever = Slow()
    with ThreadPoolExecutor(1) as pool:
        with running(retriever) as client:
            answer = pool.submit(httpx2.post, f"{client.base_url}/queries", json={"queries": ["a"]}, timeout=30)
            until(lambda: retriever.calls)
            threading.Timer(0.3, retriever.go.set).start()
        assert answer.result().json()["answers"] == [["about a"]]


def test_a_request_that_the_retriever_refuses_spoils_no_other_of_its_batch():
    def find(queries, top_k):
        calls.append(queries)
        assert go.wait(20)
        if "bad" in queries:
            raise ValueError("no")
        return [[("1", "", query, 1.0)] for query in queries]

    class Refusing:
        def search(self, requests):
            return [[Hit(Passage(*row[:3]), row[3]) for row in rows] for rows in find([r.query for r in requests], 1)]

        def cache_key(self, request):
            return request.query

    calls, go = [], threading.Event()
    with running(Refusing()) as client, ThreadPoolExecutor(3) as pool:
        first = pool.submit(client.post, "/queries", json={"queries": ["first"]})
        until(lambda: calls)
        bad = pool.submit(client.post, "/queries", json={"queries": ["bad"]})
        good = pool.submit(client.post, "/queries", json={"queries": ["good"]})
        until(lambda: "searchqa_searches_waiting 2" in client.get("/metrics").text)
        go.set()
        assert first.result().status_code == 200
        assert bad.result().status_code == 500
        assert good.result().json()["answers"] == [["good"]]
        assert sorted(calls[1]) == ["bad", "good"]


def test_a_lost_back_end_is_503_until_it_is_back():
    lost = threading.Event()
    lost.set()

    def find(queries, top_k):
        if lost.is_set():
            raise RetrieverUnavailable("no route")
        return [[("1", "", "text", 1.0)] for _ in queries]

    with running(from_function(find)) as client:
        reply = client.post("/queries", json={"queries": ["a"]})
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert "no route" in reply.json()["error"]
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        lost.clear()
        assert client.get("/ready").status_code == 200
        assert client.post("/queries", json={"queries": ["a"]}).status_code == 200


def test_probes_make_one_search_in_a_while_and_always_the_same(monkeypatch):
    asked = []

    def find(queries, top_k):
        asked.extend(queries)
        return [[] for _ in queries]

    with running(from_function(find)) as client:
        assert [client.get("/ready").status_code for _ in range(3)] == [200] * 3
        assert len(asked) == 1
        monkeypatch.setattr(module.time, "monotonic", lambda now=time.monotonic: now() + module.READY_SECONDS)
        assert client.get("/ready").status_code == 200
        assert len(asked) == 2
        assert len(set(asked)) == 1


def test_the_metrics_have_what_the_retriever_counts():
    class Counting(Slow):
        def counters(self):
            return {"search/money": 0.5, "online/engine_calls": 2.0}

    counting = Counting()
    with running(counting) as client:
        lines = client.get("/metrics").text.splitlines()
        assert {"# TYPE searchqa_retriever_search_money gauge", "searchqa_retriever_search_money 0.5"} <= set(lines)
        assert "searchqa_retriever_online_engine_calls 2.0" in lines
        counting.counters = lambda: 1 / 0
        assert "searchqa_searches_total 0" in client.get("/metrics").text


def test_the_stamp_is_that_of_the_retriever(client):
    stamp = BM25Retriever(CORPUS).stamp()
    assert client.get("/stamp").json() == {"stamp": stamp}
    assert stamp["corpus_sha256"] == CORPUS.sha256


def test_a_retriever_without_a_stamp_has_its_name_and_one_that_cannot_be_written_is_an_error_of_the_server():
    class Odd:
        def search(self, requests):
            return [[] for _ in requests]

        def cache_key(self, request):
            return request.query

    odd = Odd()
    with running(odd) as client:
        assert client.get("/stamp").json() == {"stamp": {"retriever": "Odd"}}
        odd.stamp = lambda: {"retriever": odd}
        reply = client.get("/stamp")
        assert (reply.status_code, set(reply.json())) == (500, {"error"})
        assert client.post("/queries", json={"queries": ["a"]}).status_code == 200


def test_a_retriever_that_demands_filters_is_ready_when_a_search_with_them_has_an_answer():
    class Scoped:
        def search(self, requests):
            if any(request.filters != {"world": "0"} for request in requests):
                raise RetrieverError("which world?")
            return [[] for _ in requests]

        def cache_key(self, request):
            return request.query

    with running(Scoped()) as client:
        assert client.get("/ready").status_code == 503
    with running(Scoped(), ready_filters={"world": "0"}) as client:
        assert client.get("/ready").status_code == 200


@pytest.mark.parametrize("library", ["uvicorn", "starlette"])
def test_a_missing_library_is_an_error_that_names_the_extra(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    for start in (create_app, serve):
        with pytest.raises(RetrieverError, match=rf"needs {library}; pip install 'searchqa-gym\[serve\]'"):
            start(BM25Retriever(CORPUS))


def test_an_answer_of_the_wrong_length_or_without_json_is_an_error_of_the_server():
    class Odd:
        answers = ()

        def search(self, requests):
            return list(self.answers)

        def cache_key(self, request):
            return request.query

    odd = Odd()
    with running(odd) as client:
        assert client.post("/queries", json={"queries": ["a"]}).status_code == 500
        odd.answers = [[Hit(Passage("1", "", ""), float("nan"))]]
        assert client.post("/search", json={"requests": [{"query": "a", "top_k": 1}]}).status_code == 500


def test_a_token_is_demanded_everywhere_but_for_health():
    with running(BM25Retriever(CORPUS), token="secret") as client:
        right, wrong = {"Authorization": "Bearer secret"}, {"Authorization": "Bearer secre\u00e9".encode("latin-1")}
        for method, path in (
            ("POST", "/search"),
            ("POST", "/retrieve"),
            ("POST", "/queries"),
            ("GET", "/ready"),
            ("GET", "/stamp"),
            ("GET", "/metrics"),
        ):
            for headers in ({}, wrong):
                reply = client.request(method, path, headers=headers, content=b'{"requests": []}')
                assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        for scheme in ("bearer", "BEARER"):
            assert client.get("/ready", headers={"Authorization": f"{scheme} secret"}).status_code == 200
        for wrong in ("secret", "Basic secret", "Bearer", "Bearersecret", "Bearer secret2"):
            assert client.get("/ready", headers={"Authorization": wrong}).status_code == 401
        assert client.post("/search", headers=right, content=b'{"requests": []}').json() == {"answers": []}
        assert client.get("/ready", headers=right).status_code == client.get("/metrics", headers=right).status_code == 200
        assert client.get("/health").json() == {"status": "alive"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_a_server_that_can_be_reached_from_outside_needs_a_token(host):
    with pytest.raises(RetrieverError, match="needs a token"):
        serve(BM25Retriever(CORPUS), host, 0)
