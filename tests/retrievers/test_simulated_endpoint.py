"""A simulator behind endpoints: what is sent, whose answer comes back, and endpoints that fail. Real servers on the loopback, one with a real model."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
import socket
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_retrievers import (
    Corpus,
    RetrieverError,
    RetrieverUnavailable,
    SearchRequest,
    build_retriever,
    polite_http,
    simulated_endpoint,
)
from searchqa_retrievers.testing import LostBackEndContract, RetrieverContract

ROWS = [SearchRequest(f"query {n % 3}", 5, f"q{n}", f"question {n}", n % 2, 100 + n, (f"answer {n}", "other")) for n in range(8)]
NOTHING = Corpus.from_passages([])


class Server(ThreadingHTTPServer):
    """Chat completions: ``say(prompt, body)`` gives the content, or a status and the bytes of a body, or None for no answer at all."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, say=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.say = say or echo
        self.bodies, self.headers, self.paths = [], [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.released = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def handle_error(self, request, client_address):
        """A client that gives up breaks the connection."""

    def stop(self):
        self.released.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.bodies.append(body)
        server.headers.append(dict(self.headers.items()))
        server.paths.append(self.path)
        said = server.say(body["messages"][-1]["content"][0]["text"], body)
        if said is None:
            server.released.wait(30)
            self.close_connection = True
            return
        status, content = said if isinstance(said, tuple) else (200, completion(said))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def completion(content):
    message = {"role": "assistant", "content": content}
    return json.dumps({"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()


def hashed(prompt):
    return hashlib.sha256(prompt.encode()).hexdigest()


def echo(prompt, body):
    return f"Doc 1: {hashed(prompt)}\nDoc 2: of seed {body['seed']}"


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(polite_http, "FIRST_PAUSE", 0.01)
    made = []

    def start(say=None):
        made.append(Server(say))
        return made[-1]

    yield start
    for server in made:
        server.stop()


@pytest.fixture
def simulated():
    made = []

    def make(url, **options):
        made.append(
            build_retriever({"name": "simulated", "url": url, "cache_entries": 0, "timeout": 5, "deadline": 10, **options}, NOTHING)
        )
        return made[-1]

    yield make
    for retriever in made:
        retriever.close()


class TestContract(RetrieverContract):
    @pytest.fixture(autouse=True)
    def _serve(self, serve, simulated):
        self.server = serve()
        self.simulated = simulated

    def make_retriever(self):
        return self.simulated(self.server.url, noise={"start": 0.5, "end": 0.5})

    def request(self, query, top_k=3):
        return SearchRequest(query, top_k, question_id="q", question="who", golden_answers=("nobody",))


class TestLostEndpoint(LostBackEndContract):
    @pytest.fixture(autouse=True)
    def _make(self, simulated, monkeypatch):
        monkeypatch.setattr(polite_http, "FIRST_PAUSE", 0.01)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.retriever = simulated(f"http://127.0.0.1:{port}/v1", prompt="{query}", retries=1)

    def make_lost_retriever(self):
        return self.retriever


def test_a_request_has_the_published_form(serve, simulated, monkeypatch):
    monkeypatch.setenv("SEARCHQA_SIMULATOR_KEY", "secret-key")
    server = serve(lambda prompt, body: "Doc 1: one\nDoc 2: two")
    [hits] = simulated(server.url).search([ROWS[0]])
    assert [(hit.passage.title, hit.passage.text, hit.score) for hit in hits] == [("", "one", 1.0), ("", "two", 0.5)]
    [body], [headers], [path] = server.bodies, server.headers, server.paths
    text = body["messages"][1]["content"][0].pop("text")
    seed = body.pop("seed")
    assert body == {
        "model": "",
        "messages": [{"role": "system", "content": ""}, {"role": "user", "content": [{"type": "text"}]}],
        "max_tokens": 600,
        "temperature": 0.8,
    }
    assert text.startswith(
        "You are the Google search engine.\nGiven a query, you need to generate five useful documents for the query.\n\n"
    )
    assert 'the question: "question 0" whose answer is answer 0.' in text
    assert 0 <= seed < 2**31
    assert headers["Authorization"] == "Bearer secret-key"
    assert path == "/v1/chat/completions"


def test_settings_reach_the_endpoint(serve, simulated):
    server = serve()
    options = {"model": "big", "temperature": 0, "max_tokens": 9, "system": None, "extra": {"top_p": 0.5}, "prompt": "{query}"}
    simulated(f"{server.url}/chat/completions/", **options).search([ROWS[0]])
    [body] = server.bodies
    assert body["messages"] == [{"role": "user", "content": [{"type": "text", "text": "query 0"}]}]
    assert (body["model"], body["temperature"], body["max_tokens"], body["top_p"]) == ("big", 0.0, 9, 0.5)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_an_address_may_be_of_the_server_or_of_its_chat_completions(serve, simulated, path):
    server = serve()
    simulated(server.url.removesuffix("/v1") + path).search(ROWS[:1])
    assert server.paths == ["/v1/chat/completions"]


def test_a_path_of_ones_own_is_kept(serve, simulated):
    server = serve()
    simulated(f"{server.url}/proxy/v2").search(ROWS[:1])
    assert server.paths == ["/v1/proxy/v2/chat/completions"]


def test_each_answer_is_of_its_own_rows_prompt(serve, simulated):
    """Whatever rows search, and in whatever order answers come back."""
    server = serve()
    slow = threading.local()

    def late(prompt, body):
        time.sleep(body["seed"] % 5 / 1_000)
        slow.last = prompt
        return echo(prompt, body)

    server.say = late
    retriever = simulated(server.url, prompt="{query}|{question}|{answer}", concurrency=4)

    @settings(deadline=None, max_examples=25)
    @given(st.lists(st.sampled_from(range(8)), max_size=10))
    def check(rows):
        answers = retriever.search([ROWS[row] for row in rows])
        assert [hits[0].passage.text for hits in answers] == [hashed(f"query {row % 3}|question {row}|answer {row}") for row in rows]

    check()


def test_seeds_are_of_the_request_alone(serve, simulated):
    server = serve()
    together = simulated(server.url).search(ROWS)
    alone = [simulated(server.url).search([row])[0] for row in reversed(ROWS)]
    assert together == alone[::-1]
    assert len({hits[1].passage.text for hits in together}) == len(ROWS)
    other = simulated(server.url, seed=1).search(ROWS)
    assert all(a[1] != b[1] for a, b in zip(together, other, strict=True))


def test_several_endpoints_share_the_requests(serve, simulated):
    servers = [serve(), serve()]
    requests = [SearchRequest(f"query {n}", 5, "q", "who", golden_answers=("nobody",)) for n in range(40)]
    urls = [server.url for server in servers]
    answers = simulated(urls).search(requests)
    counts = [len(server.bodies) for server in servers]
    assert sum(counts) == 40
    assert min(counts) > 5
    assert simulated(urls).search(requests) == answers
    assert [len(server.bodies) for server in servers] == [2 * count for count in counts]


def test_thoughts_are_no_documents(serve, simulated):
    server = serve(lambda prompt, body: "<think>Doc 1: hm</think>\nDoc 1: one")
    assert [hit.passage.text for hit in simulated(server.url).search(ROWS[:1])[0]] == ["one"]


@pytest.mark.parametrize(
    "said", ["<think>the answer is Doc 1: answer 0", "\n<think>\nthe answer is", "<think>a</think><think>the answer is"]
)
def test_thoughts_that_do_not_end_are_an_empty_text(serve, simulated, said):
    retriever = simulated(serve(lambda prompt, body: said).url)
    assert retriever.search(ROWS[:1]) == [[]]
    assert retriever.counters()["search/simulated_empty"] == 1


def test_an_empty_text_is_an_empty_result(serve, simulated):
    retriever = simulated(serve(lambda prompt, body: "").url)
    assert retriever.search(ROWS[:2]) == [[], []]
    assert retriever.counters()["search/simulated_empty"] == 2


FAILURES = {
    "status 500": lambda prompt, body: (500, b"the worker died"),
    "status 429": lambda prompt, body: (429, b"too many"),
    "not JSON": lambda prompt, body: (200, b"<html>hello"),
    "no choices": lambda prompt, body: (200, b'{"error": "overloaded"}'),
    "no text": lambda prompt, body: (200, completion(None)),
    "a number": lambda prompt, body: (200, completion(7)),
    "refused": lambda prompt, body: (400, b'{"error": "context too long"}'),
    "silence": lambda prompt, body: None,
}


@pytest.mark.parametrize("failure", FAILURES)
def test_an_endpoint_that_fails_is_lost_in_bounded_time_and_never_a_text(serve, simulated, failure):
    server = serve(FAILURES[failure])
    retriever = simulated(server.url, timeout=0.2, deadline=1, retries=1)
    with pytest.raises(RetrieverUnavailable, match="simulator at http"):
        retriever.search(ROWS)
    assert len(server.bodies) <= 2 * len(ROWS)
    counted = retriever.counters()
    assert counted["search/simulated_answers"] == 0
    assert counted["search/backend_failures"] == 1


def repeating(prompt, body):
    """As servers do that say what was wrong with which input."""
    return 422, json.dumps(
        {"detail": [{"loc": ["messages"], "input": body["messages"]}], "repr": repr(prompt), "cut": prompt[40:]}
    ).encode()


REPEATING = {
    "refused": repeating,
    "out of order": lambda prompt, body: (500, prompt.encode()),
    "not JSON": lambda prompt, body: (200, prompt.encode()),
    "no choices": lambda prompt, body: (200, json.dumps({"prompt": prompt}).encode()),
    "no text": lambda prompt, body: (200, completion([prompt])),
    "not found": lambda prompt, body: (404, prompt.encode()),
    "a wrong key": lambda prompt, body: (403, prompt.encode()),
}


@pytest.mark.parametrize("failure", REPEATING)
def test_no_message_repeats_what_the_simulator_was_told(serve, simulated, failure):
    retriever = simulated(serve(REPEATING[failure]).url, retries=0)
    with pytest.raises(RetrieverError) as caught:
        retriever.search(ROWS[:1])
    shown = "".join(traceback.format_exception(caught.value))
    assert "simulator at http" in shown
    assert not any(told in str(caught.value) for told in ("answer 0", "question 0", "query 0", "search engine"))
    assert "answer 0" not in shown.replace('("answer 0"', "")


@pytest.mark.parametrize("status", [400, 429])
@pytest.mark.parametrize("words", ["credits", "billing  and\nquota", "insufficient\nfunds", "API_KEY_INVALID"])
@pytest.mark.parametrize("shown", [repr, str, lambda prompt: " ".join(prompt.split()), lambda prompt: prompt.upper()])
def test_a_query_cannot_end_a_run_by_words_that_the_endpoint_repeats(serve, simulated, status, words, shown):
    server = serve(lambda prompt, body: (status, json.dumps({"error": f"bad input {shown(prompt)}"}).encode()))
    retriever = simulated(server.url, retries=0, prompt="{query}", extra={"list": [1, "word"]})
    with pytest.raises(RetrieverUnavailable):
        retriever.search([SearchRequest(f"on {words} so far", 5)])


def test_an_account_that_is_spent_ends_a_run(serve, simulated):
    said = {"error": {"message": "You exceeded your current quota, please check your plan and billing details."}}
    retriever = simulated(serve(lambda prompt, body: (429, json.dumps(said).encode())).url, prompt="{query}")
    with pytest.raises(RetrieverError, match="what was paid for is spent") as caught:
        retriever.search([SearchRequest("words", 5)])
    assert not isinstance(caught.value, RetrieverUnavailable)


def test_one_failure_loses_the_whole_search_and_the_other_texts_are_not_paid_for_again(serve, simulated):
    refused = True

    def say(prompt, body):
        return (400, b"") if refused and "question 3" in prompt else echo(prompt, body)

    server = serve(say)
    retriever = simulated(server.url, retries=0, concurrency=1)
    for _ in range(2):
        with pytest.raises(RetrieverUnavailable, match="1 of the 8 texts of a search are lost"):
            retriever.search(ROWS)
    assert len(server.bodies) == len(ROWS) + 1
    refused = False
    answers = retriever.search(ROWS)
    assert len(server.bodies) == len(ROWS) + 2
    assert answers == simulated(server.url).search(ROWS)
    retriever.search(ROWS[:2])  # what was handed over is not kept: that is what caches are for
    assert len(server.bodies) == 2 * len(ROWS) + 4


def test_only_so_many_texts_of_failed_searches_are_kept(serve, simulated, monkeypatch):
    monkeypatch.setattr(simulated_endpoint, "_KEPT", 3)
    server = serve(lambda prompt, body: (400, b"") if "question 7" in prompt else echo(prompt, body))
    retriever = simulated(server.url, retries=0)
    for _ in range(2):
        with pytest.raises(RetrieverUnavailable):
            retriever.search(ROWS)
    assert len(server.bodies) == 2 * len(ROWS) - 3


def test_a_refused_key_stops_the_other_requests(serve, simulated):
    server = serve(lambda prompt, body: (401, b""))
    with pytest.raises(RetrieverError, match="does not accept the key"):
        simulated(server.url, concurrency=1).search(ROWS)
    assert len(server.bodies) < len(ROWS)


def test_a_failure_that_passes_is_tried_again(serve, simulated):
    seen = set()

    def second_time(prompt, body):
        first = prompt not in seen
        seen.add(prompt)
        return (503, b"busy") if first else echo(prompt, body)

    server = serve(second_time)
    retriever = simulated(server.url)
    retriever.search(ROWS)
    counted = retriever.counters()
    assert counted["search/simulator_retries"] == len(ROWS)
    assert counted["search/simulator_calls"] == 2 * len(ROWS)
    assert counted["search/simulator_answers"] == len(ROWS)


def test_a_wrong_key_is_said(serve, simulated, monkeypatch):
    monkeypatch.setenv("SEARCHQA_SIMULATOR_KEY", "secret-key")
    server = serve(lambda prompt, body: (401, b"no such key: secret-key"))
    with pytest.raises(RetrieverError, match="SEARCHQA_SIMULATOR_KEY") as caught:
        simulated(server.url).search(ROWS[:1])
    assert not isinstance(caught.value, RetrieverUnavailable)
    assert "secret-key" not in str(caught.value)


def test_the_key_goes_over_no_open_network(monkeypatch):
    monkeypatch.setenv("SEARCHQA_SIMULATOR_KEY", "secret-key")
    with pytest.raises(RetrieverError, match="unencrypted"):
        build_retriever({"name": "simulated", "url": "http://example.org/v1"}, NOTHING)
    retriever = build_retriever({"name": "simulated", "url": "http://example.org/v1", "allow_hosts": ["example.org"]}, NOTHING)
    assert "secret" not in json.dumps(retriever.stamp())


def test_the_stamp_names_endpoint_and_model(serve, simulated):
    stamp = simulated("http://127.0.0.1:1/v1", model="big", extra={"top_p": 0.5}).stamp()
    assert stamp["url"] == ["http://127.0.0.1:1/v1/chat/completions"]
    assert (stamp["model"], stamp["temperature"], stamp["extra"]) == ("big", 0.8, {"top_p": 0.5})


def _ask_in_child(retriever, pipe):
    pipe.send(retriever.search(ROWS))
    retriever.close()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_it_works_on_both_sides_of_a_fork(serve, simulated):
    retriever = simulated(serve().url)
    before = retriever.search(ROWS)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_ask_in_child, args=(retriever, theirs))
    child.start()
    try:
        assert ours.poll(20)
        assert ours.recv() == before == retriever.search(ROWS)
    finally:
        child.kill()
        child.join()


def test_a_pickled_one_and_a_closed_one_connect_again(serve, simulated):
    retriever = simulated(serve().url, concurrency=3)
    expected = retriever.search(ROWS)
    again = pickle.loads(pickle.dumps(retriever))
    assert again.search(ROWS) == expected
    again.close()
    retriever.close()
    assert retriever.search(ROWS) == expected


def test_no_more_requests_are_under_way_than_allowed(serve, simulated):
    lock, under_way, most = threading.Lock(), 0, 0

    def count(prompt, body):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.01)
        with lock:
            under_way -= 1
        return echo(prompt, body)

    simulated(serve(count).url, concurrency=3).search(ROWS)
    assert most == 3
