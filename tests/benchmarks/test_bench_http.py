"""The load test in the small: a storm that nothing is lost in, and a count that would see it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from searchqa_retrievers import BM25Retriever, SearchRequest
from searchqa_retrievers.http_server import create_app

SCRIPT = Path(__file__).parent / "bench_http.py"
spec = importlib.util.spec_from_file_location("bench_http", SCRIPT)
bench_http = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_http)


def test_nothing_is_lost_or_mixed_up_in_a_short_storm():
    options = "--connections 8 --seconds 2 --storm --kill-every 0.6 --share 0.3 --late 2.5 --retries 1 --passages 300"
    finished = subprocess.run(
        [sys.executable, SCRIPT, *options.split()], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = re.findall(r"(\d+) connections .* answered ([\d,]+)  unavailable ([\d,]+)  lost (\d+)  mixed up (\d+)", finished.stdout)
    [(connections, answered, unavailable, *wrong)] = rows
    assert (connections, wrong) == ("8", ["0", "0"])
    assert int(answered.replace(",", "")) + int(unavailable.replace(",", "")) > 0
    assert re.search(r"killed [1-9]", finished.stdout)


@pytest.fixture(scope="module")
def served():
    """A server, its corpus, and the right answers."""
    corpus = bench_http.made_up_corpus(200)
    server = uvicorn.Server(uvicorn.Config(create_app(BM25Retriever(corpus)), port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    queries = bench_http.made_up_queries(corpus, 20)
    answers = BM25Retriever(corpus).search([SearchRequest(query, bench_http.TOP_K) for query in queries])
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", dict(zip(queries, answers, strict=True))
    server.should_exit = True
    thread.join()


def test_right_answers_are_counted_as_such(served):
    url, expected = served
    calls = bench_http.ask_on(url, 2, 0.3, expected, 1, 0)
    assert len(calls.seconds) > 0
    assert (calls.unavailable, calls.mixed_up, calls.lost) == (0, 0, 0)


def test_an_answer_to_another_query_is_counted_as_mixed_up(served):
    url, expected = served
    shifted = dict(zip(expected, [*list(expected.values())[1:], next(iter(expected.values()))], strict=True))
    calls = bench_http.ask_on(url, 2, 0.3, shifted, 1, 0)
    assert calls.mixed_up > 0
    assert calls.lost == 0


def test_an_error_other_than_unavailable_is_counted_as_lost(served, capsys):
    url, expected = served
    calls = bench_http.ask_on(f"{url}/elsewhere", 1, 0.2, expected, 0, 0)
    assert calls.lost > 0
    assert not calls.seconds
    assert "status 404" in capsys.readouterr().err


def test_a_call_that_does_not_end_is_counted_as_lost(served, monkeypatch):
    url, expected = served
    go = threading.Event()
    monkeypatch.setattr(bench_http.Http, "search", lambda self, requests: go.wait(20) and [])
    monkeypatch.setattr(bench_http, "DEADLINE", 0.1)
    monkeypatch.setattr(bench_http, "GRACE", 0.1)
    calls = bench_http.ask_on(url, 2, 0.1, expected, 0, 0)
    go.set()
    assert calls.lost == 2
