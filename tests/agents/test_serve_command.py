"""searchqa serve: the command as a process, and wrong lines."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from searchqa_agents.cli import main


def test_it_serves_a_corpus_until_it_is_told_to_stop(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"id": "1", "contents": '"Oslo"\nThe capital of Norway.'}) + "\n")
    words = ["serve", "--corpus", str(corpus), "--retriever", "bm25", "--host", "127.0.0.1", "--port", "0", "preset=search-r1"]
    process = subprocess.Popen([sys.executable, "-m", "searchqa_agents.cli", *words], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = None
        for line in process.stderr:
            url = re.search(r"http://127\.0\.0\.1:\d+", line)
            if url is not None:
                break
        assert url is not None
        assert httpx2.get(f"{url[0]}/ready").json() == {"ready": True}
        reply = httpx2.post(f"{url[0]}/retrieve", json={"queries": ["Norway"], "topk": None, "return_scores": False})
        assert reply.json() == {"result": [[{"id": "1", "contents": '"Oslo"\nThe capital of Norway.'}]]}
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        assert process.returncode in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "--corpus"),
        (["--corpus", "c.jsonl", "--port", "many"], 2, "invalid int value"),
        (["--corpus", "c.jsonl", "--port", "70000"], 2, "70000"),
        (["--corpus", "c.jsonl", "--top-k", "0"], 2, "--top-k"),
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
