"""find_indexes and verify: what lies in a cache, how far it is, and which of its files are damaged."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("faiss", reason="dense search needs faiss-cpu")

from searchqa_retrievers import BM25Retriever, Corpus
from searchqa_retrievers.bm25_disk import DiskBM25Retriever
from searchqa_retrievers.dense_approximate import open_or_train
from searchqa_retrievers.dense_index import BLOCK, open_or_build
from searchqa_retrievers.stored_corpus import open_corpus
from searchqa_retrievers.stored_indexes import COMPLETE, find_indexes, verify

COUNT = 5100


class NumberEncoder:
    dimension = 16
    fingerprint = "number"
    dtype = "float32"

    def __init__(self, stop_after=COUNT):
        self.left = stop_after

    def encode_passages(self, texts):
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= len(texts)
        vectors = np.random.default_rng(len(texts)).standard_normal((len(texts), self.dimension))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def stamp(self):
        return {"model": "numbers", "dtype": "float32", "fingerprint": self.fingerprint}


@pytest.fixture(scope="module")
def corpus():
    return Corpus.from_passages((f"{number:05}", "", f"text {number}") for number in range(COUNT))


@pytest.fixture
def cache(tmp_path, corpus):
    """One of each kind."""
    root = tmp_path / "cache"
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(passage._asdict()) + "\n" for passage in corpus))
    open_corpus(file, stored=True, cache_dir=root)
    BM25Retriever(corpus, cache_dir=root)
    DiskBM25Retriever(corpus, cache_dir=root)
    vectors = open_or_build(root / "dense" / "a", corpus, NumberEncoder(), "float32")
    open_or_train(root / "dense" / "a", "pq", vectors)
    with pytest.raises(KeyboardInterrupt):
        open_or_build(root / "dense" / "b", corpus, NumberEncoder(2 * BLOCK), "float32")
    return root


def test_all_kinds_are_found_with_their_sizes_and_states(cache, corpus):
    pytest.importorskip("tantivy", reason="BM25 on disk needs tantivy")
    found = {(index.kind, index.folder.name if index.kind.startswith("dense") else ""): index for index in find_indexes(cache)}
    assert set(found) == {("bm25", ""), ("bm25-disk", ""), ("corpus", ""), ("dense", "a"), ("dense-pq", "a"), ("dense", "b")}
    partial = found.pop(("dense", "b"))
    assert partial.state == f"partial, {2 * BLOCK:,} passages"
    assert {index.state for index in found.values()} == {COMPLETE}
    assert {index.passages for index in found.values()} == {COUNT}
    assert found["corpus", ""].corpus == found["dense", "a"].corpus == corpus.sha256
    assert found["dense", "a"].settings == {"model": "numbers", "dtype": "float32", "storage": "float32", "dimension": 16}
    assert found["dense-pq", "a"].settings == {"factory": "PQ2x4fs"}
    assert found["dense-pq", "a"].size == (cache / "dense" / "a" / "pq.faiss").stat().st_size
    assert all(verify(index).problems == () for index in [*found.values(), partial])


def test_an_index_is_found_from_its_own_folder_up(cache):
    everything = find_indexes(cache)
    for index in everything:
        assert index in find_indexes(index.folder)
        assert index in find_indexes(index.folder.parent)
    assert find_indexes(cache / "nothing") == []
    assert find_indexes(cache.parent / "corpus.jsonl") == []


def test_every_damaged_file_is_named_and_no_other(cache):
    for index in find_indexes(cache):
        if index.state != COMPLETE or index.kind == "dense":
            continue
        name = {"bm25": "data.npy", "corpus": "rows.bin", "dense-pq": "pq.faiss"}.get(index.kind)
        file = index.folder / name if name else next((index.folder / "index").glob("*.term"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
        [problem] = verify(index).problems
        assert problem.startswith(str(file.relative_to(index.folder)))
        file.unlink()
        assert verify(index).problems == (f"{file.relative_to(index.folder)} is missing",)
    assert [index.kind for index in find_indexes(cache) if verify(index).problems] == ["bm25", "bm25-disk", "corpus", "dense-pq"]


@pytest.mark.parametrize(("written", "state"), [("{", "damaged: meta.json cannot be read"), ('{"format": 1}', "of another version")])
def test_a_record_that_cannot_be_read_is_said(tmp_path, written, state):
    folder = tmp_path / "bm25" / "0"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(written)
    [index] = find_indexes(tmp_path)
    assert index.state == state


def test_what_a_killed_writer_left_is_partial(tmp_path):
    folder = tmp_path / "bm25-disk" / "0.part-abc"
    folder.mkdir(parents=True)
    (folder / "piece").write_bytes(b"12345")
    [index] = find_indexes(tmp_path)
    assert index.state.startswith("partial")
    assert index.size == 5


def test_a_checkpoint_tells_how_far_it_is(tmp_path):
    folder = tmp_path / "dense" / "0"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"passages": 9, "storage": "float32", "dimension": 4, "encoder": {}}))
    (folder / "ivf-pq.checkpoint-4096.faiss").write_bytes(b"12")
    states = {index.kind: (index.state, index.size) for index in find_indexes(tmp_path)}
    assert states["dense-ivf-pq"] == ("partial, 4,096 passages", 2)
