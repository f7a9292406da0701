"""searchqa serve: the command as a process over a corpus and for an environment, and wrong lines."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from searchqa_agents.cli import main
from searchqa_envs.world import WorldSource
from searchqa_retrievers import SearchRequest


@contextlib.contextmanager
def serving(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`searchqa serve` as a process, and its address."""
    line = [sys.executable, "-m", "searchqa_agents.cli", "serve", "--port", "0", *words]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = (re.search(r"http://127\.0\.0\.1:\d+", text) for text in process.stderr)
        yield process, next(match[0] for match in found if match)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """A file with two passages."""
    path = tmp_path / "corpus.jsonl"
    rows = [{"id": "1", "contents": '"Oslo"\nThe capital of Norway.'}, {"id": "2", "contents": '"Bergen"\nA city of Norway.'}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_it_serves_a_corpus_until_it_is_told_to_stop(corpus: str) -> None:
    with serving("--corpus", corpus, "--retriever", "bm25", "--host", "127.0.0.1", "preset=search-r1") as (process, url):
        assert httpx2.get(f"{url}/ready").json() == {"ready": True}
        assert httpx2.get(f"{url}/stamp").json()["stamp"]["k1"] == 0.9
        reply = httpx2.post(f"{url}/retrieve", json={"queries": ["capital"], "topk": None, "return_scores": False})
        assert reply.json() == {"result": [[{"id": "1", "contents": '"Oslo"\nThe capital of Norway.'}]]}
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        assert process.returncode in (0, -signal.SIGTERM)


def test_a_retriever_made_of_others_is_described_on_the_line(corpus: str) -> None:
    with serving("--corpus", corpus, "--retriever", "hybrid", "retrievers=[bm25, {name: bm25, k1: 0.9}]") as (_, url):
        assert httpx2.get(f"{url}/stamp").json()["stamp"]["retriever"] == "hybrid"
        [[first, *_]] = httpx2.post(f"{url}/search", json={"requests": [{"query": "capital", "top_k": 2}]}).json()["answers"]
        assert first["id"] == "1"


def test_it_serves_what_an_environment_searches() -> None:
    with serving("env=world", "env.preset=medium", "env.retriever.name=bm25", "env.retriever.k1=1.2") as (_, url):
        assert httpx2.get(f"{url}/ready").json() == {"ready": True}
        assert httpx2.get(f"{url}/stamp").json()["stamp"]["k1"] == 1.2
        source = WorldSource("test", "medium")
        question = source[3]
        request = SearchRequest(question.metadata["chain"][0]["query"], 3, filters=source.filters(question))
        client = source.build_retriever({"name": "http", "url": url})
        assert client.search([request]) == source.build_retriever({"name": "bm25", "k1": 1.2}).search([request]) != [[]]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "--corpus FILE or env=NAME"),
        (["--corpus", "c.jsonl", "env=world"], 2, "--corpus FILE or env=NAME"),
        (["env=world", "--retriever", "bm25"], 2, "env.retriever=bm25"),
        (["env=world", "k1=1"], 2, "env.retriever"),
        (["env=worlds"], 2, "worlds"),
        (["env=world", "env.preset=huge"], 1, "preset must be one of"),
        (["env=world", "env.retriever=bm26"], 1, "'bm26'"),
        (["--corpus", "c.jsonl", "retrievers=[bm25"], 2, "key=value"),
        (["--corpus", "c.jsonl", "--port", "many"], 2, "invalid int value"),
        (["--corpus", "c.jsonl", "--port", "70000"], 2, "70000"),
        (["--corpus", "c.jsonl", "--top-k", "0"], 2, "--top-k"),
        (["--corpus", "c.jsonl", "--waiting", "0"], 2, "--waiting"),
        (["--corpus", "c.jsonl", "preset"], 2, "key=value"),
        (["--corpus", "c.jsonl", "--host", "0.0.0.0"], 1, "needs a token"),
        (["--corpus", "c.jsonl", "--retriever", "bm26"], 1, "'bm26'"),
        (["--corpus", "c.jsonl", "k_1=1"], 1, "no option k_1"),
        (["--corpus", "missing.jsonl"], 1, "missing.jsonl"),
    ],
)
def test_wrong_lines_end_with_a_message(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEARCHQA_RETRIEVER_TOKEN", raising=False)
    assert main(["serve", *words]) == code
    assert message in capsys.readouterr().err
