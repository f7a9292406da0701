"""The request code of Search-R1, R1-Searcher and ZeroSearch, written from its description, against a real `searchqa serve`.

What each function sends and reads is what that system's client sends and reads, field for field: nothing here knows of this package.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("uvicorn", reason="a search server needs uvicorn")

from searchqa_retrievers import BM25Retriever, Corpus, SearchRequest

CORPUS = Corpus.from_passages(
    [(str(number), f"Title {number}", f"The river {number} in Łódź.\nIts {number * 7 % 5} bridges are old.") for number in range(40)]
    + [("no title", "", "A text without a title, about a lake.")]
)
QUERIES = ["river 3", "bridges title 17", "a lake without a title", "Łódź 東京", "zyzzyva", ""]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of `searchqa serve --corpus ...`, in a process of its own."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": p.id, "contents": f'"{p.title}"\n{p.text}'}) + "\n" for p in CORPUS))
    line = [sys.executable, "-m", "searchqa_agents.cli", "serve", "--corpus", str(path), "--port", "0"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = (re.search(r"http://127\.0\.0\.1:\d+", text) for text in process.stderr)
        yield next(match[0] for match in found if match)
    finally:
        process.kill()
        process.communicate()


def expected(query, top_k=3):
    """The passages that the server must find."""
    return [hit.passage for hit in BM25Retriever(CORPUS).search([SearchRequest(query, top_k)])[0]]


def scores_of(query, top_k=3):
    return [hit.score for hit in BM25Retriever(CORPUS).search([SearchRequest(query, top_k)])[0]]


def post(url, payload):
    """A plain POST of JSON, as `requests.post(url, json=payload).json()` makes it; all three clients do so."""
    request = urllib.request.Request(url, json.dumps(payload).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


# -- Search-R1 ---------------------------------------------------------------------------------------------------------------------------------


def search_r1_trainer(url, queries, topk):
    """All queries of a turn in one blocking POST; each result as the text of an observation."""
    results = post(f"{url}/retrieve", {"queries": queries, "topk": topk, "return_scores": True})["result"]
    return [search_r1_observation(result) for result in results]


def search_r1_observation(result):
    text = ""
    for number, item in enumerate(result):
        title, *rest = item["document"]["contents"].split("\n")
        text += f"Doc {number + 1}(Title: {title}) " + "\n".join(rest) + "\n"
    return text


def search_r1_text(query, top_k=3):
    return "".join(f'Doc {number}(Title: "{p.title}") {p.text}\n' for number, p in enumerate(expected(query, top_k), start=1))


@pytest.mark.parametrize("topk", [1, 3, 10])
def test_search_r1s_trainer(server, topk):
    assert search_r1_trainer(server, QUERIES, topk) == [search_r1_text(query, topk) for query in QUERIES]


def test_search_r1s_trainer_gets_scores_with_its_documents(server):
    result = post(f"{server}/retrieve", {"queries": QUERIES[:2], "topk": 3, "return_scores": True})["result"]
    assert [[item["score"] for item in items] for items in result] == [scores_of(query) for query in QUERIES[:2]]
    assert [[item["document"]["id"] for item in items] for items in result] == [[p.id for p in expected(query)] for query in QUERIES[:2]]


def test_search_r1s_demo_asks_one_query(server):
    for query in QUERIES:
        [result] = post(f"{server}/retrieve", {"queries": [query], "topk": 3, "return_scores": True})["result"]
        assert search_r1_observation(result) == search_r1_text(query)


def test_search_r1_with_topk_null_gets_as_many_as_its_own_server_gives(server):
    payload = {"queries": QUERIES, "topk": None, "return_scores": True}
    assert [search_r1_observation(result) for result in post(f"{server}/retrieve", payload)["result"]] == [
        search_r1_text(query, 3) for query in QUERIES
    ]


@pytest.mark.parametrize("payload", [{"return_scores": False}, {}])
def test_search_r1_without_scores_gets_bare_documents(server, payload):
    result = post(f"{server}/retrieve", {"queries": QUERIES, "topk": 2, **payload})["result"]
    assert result == [[{"id": p.id, "contents": f'"{p.title}"\n{p.text}'} for p in expected(query, 2)] for query in QUERIES]


# -- R1-Searcher -------------------------------------------------------------------------------------------------------------------------------


def r1_searcher(url, queries, **k):
    """A batch of queries; the texts found for each."""
    reply = post(f"{url}/queries", {"queries": queries, **k})
    assert reply["queries"] == queries
    return reply["answers"]


@pytest.mark.parametrize("k", [{}, {"k": 5}])
def test_r1_searcher(server, k):
    texts = [[f"{p.title} {p.text}" if p.title else p.text for p in expected(query, k.get("k", 3))] for query in QUERIES]
    assert r1_searcher(server, QUERIES, **k) == texts


# -- ZeroSearch's wiki server ------------------------------------------------------------------------------------------------------------------


def zerosearch(url, query, top_k, tries=10, pause=0.0):
    """One query a call, tried ten times."""
    for number in range(tries):
        try:
            return [row["text"] for row in post(f"{url}/retrieve", {"query": query, "top_k": top_k})]
        except (OSError, ValueError, KeyError):
            if number == tries - 1:
                raise
            time.sleep(pause)
    raise AssertionError


def test_zerosearch_asks_one_query_a_call_from_ten_threads(server):
    queries = QUERIES * 10
    with ThreadPoolExecutor(10) as pool:
        texts = list(pool.map(lambda query: zerosearch(server, query, 3), queries))
    assert texts == [[f"{p.title} {p.text}" if p.title else p.text for p in expected(query)] for query in queries]


# -- what they get when something is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/retrieve", "/queries"])
def test_an_error_never_looks_like_an_answer(server, path):
    with pytest.raises(urllib.error.HTTPError) as error:
        post(f"{server}{path}", {"queries": [3]})
    assert error.value.code == 422
    assert set(json.load(error.value)) == {"error"}
    error.value.close()
