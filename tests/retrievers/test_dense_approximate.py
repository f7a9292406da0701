"""Indexes of candidates: recall against the exact search on real embeddings, exact scores, files that are what was written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("faiss", reason="dense search needs faiss-cpu")
pytest.importorskip("torch", reason="encoders need PyTorch")

from searchqa_retrievers import Corpus, RetrieverError, SearchRequest
from searchqa_retrievers import dense_approximate as module
from searchqa_retrievers.bm25_index import DamagedIndexError
from searchqa_retrievers.dense import DenseRetriever
from searchqa_retrievers.dense_approximate import KINDS, damaged_files, estimate, open_or_train
from searchqa_retrievers.testing import RetrieverContract

PEOPLE = ["physicist", "novelist", "painter", "king", "sailor", "doctor", "farmer", "singer", "judge", "pilot"]
DEEDS = ["was born in", "died in", "ruled", "wrote about", "married in", "fled from", "built a bridge in", "was buried in"]
PLACES = ["Warsaw", "Paris", "Kyoto", "Lima", "Cairo", "Oslo", "Quito", "Delhi", "Rome", "Accra", "Perth", "Boston", "Lyon", "Riga", "Baku"]
QUESTIONS = [f"which {person} {deed} the city {place}" for person, deed, place in zip(PEOPLE * 6, DEEDS * 8, PLACES * 4, strict=False)]


def made_up(count):
    generator = random.Random(0)
    texts = [f"A {person} {deed} {place}" for person in PEOPLE for deed in DEEDS for place in PLACES]
    generator.shuffle(texts)
    return Corpus.from_passages((f"{number:04}", "", text) for number, text in enumerate(texts[:count]))


@pytest.fixture(scope="module")
def corpus():
    return made_up(1000)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, corpus, encoder):
    """Has the vectors of the corpus (some seconds) and every kind of index over them, for all tests here."""
    folder = tmp_path_factory.mktemp("indexes")
    for kind in KINDS:
        DenseRetriever(corpus, encoder, index=kind, cache_dir=folder)
    return folder


@pytest.fixture(scope="module")
def flat(corpus, encoder, cache):
    return DenseRetriever(corpus, encoder, cache_dir=cache)


class TestApproximate(RetrieverContract):
    queries = QUESTIONS[:4]

    @pytest.fixture(autouse=True, params=KINDS)
    def _parts(self, request, corpus, encoder, cache):
        self.arguments = (corpus, encoder, request.param, "float32", cache)

    def make_retriever(self):
        return DenseRetriever(*self.arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [3, 10])
def test_nearly_all_of_the_best_are_found_with_their_exact_scores(corpus, encoder, cache, flat, kind, top_k):
    retriever = DenseRetriever(corpus, encoder, index=kind, cache_dir=cache)
    requests = [SearchRequest(question, top_k) for question in QUESTIONS]
    common = 0
    for exact, found in zip(flat.search(requests), retriever.search(requests), strict=True):
        common += len({hit.passage.id for hit in exact} & {hit.passage.id for hit in found})
        scores = {hit.passage.id: hit.score for hit in exact}
        assert all(hit.score == scores.get(hit.passage.id, hit.score) for hit in found)
    assert common / (top_k * len(requests)) >= 0.97


def test_more_candidates_find_more(corpus, encoder, cache, flat):
    requests = [SearchRequest(question, 10) for question in QUESTIONS[:20]]
    best = [{hit.passage.id for hit in hits} for hits in flat.search(requests)]
    found = []
    for factor in (1, 4, 100):
        retriever = DenseRetriever(corpus, encoder, index="pq", cache_dir=cache, rescore_factor=factor)
        found.append(sum(len(ids & {hit.passage.id for hit in hits}) for ids, hits in zip(best, retriever.search(requests), strict=True)))
    assert found[0] < found[1] <= found[2] == 10 * len(requests)  # 100 * 10 candidates are the whole corpus


def test_one_list_of_many_misses_some(corpus, encoder, cache, flat):
    requests = [SearchRequest(question, 10) for question in QUESTIONS[:20]]
    assert DenseRetriever(corpus, encoder, index="ivf", cache_dir=cache, nprobe=1).search(requests) != flat.search(requests)
    assert DenseRetriever(corpus, encoder, index="ivf", cache_dir=cache, nprobe=10_000, rescore_factor=100).search(requests) == flat.search(
        requests
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_near_the_size_of_the_file(kind, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((6000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    open_or_train(tmp_path, kind, vectors)
    needs = estimate(kind, 6000, 64)
    assert (tmp_path / f"{kind}.faiss").stat().st_size == pytest.approx(needs.memory, rel=0.15)
    assert needs.disk == needs.memory + vectors.nbytes


def test_the_estimate_for_wikipedia():
    """21 million passages of 768 numbers: 64.5 GB of vectors, half in float16, and 1/64 of it as codes of 4 bits for 8 numbers."""
    assert estimate("flat", 21_000_000, 768).disk == pytest.approx(64.5e9, rel=0.01)
    assert estimate("flat", 21_000_000, 768, "float16").disk == pytest.approx(32.3e9, rel=0.01)
    assert estimate("pq", 21_000_000, 768).memory == pytest.approx(64.5e9 / 64, rel=0.01)


@pytest.mark.parametrize("harm", ["flipped bit", "truncated", "missing", "other vectors"])
def test_a_damaged_or_wrong_file_is_refused(harm, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((1000, 16)).astype(np.float32)
    open_or_train(tmp_path, "hnsw", vectors)
    file = tmp_path / "hnsw.faiss"
    if harm == "flipped bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif harm == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "missing":
        file.unlink()
    else:
        vectors = np.concatenate([vectors, vectors])
    with pytest.raises(DamagedIndexError, match=r"delete hnsw\.json"):
        open_or_train(tmp_path, "hnsw", vectors)
    (tmp_path / "hnsw.json").unlink()
    assert open_or_train(tmp_path, "hnsw", vectors).ntotal == len(vectors)


def test_it_is_trained_once(tmp_path, monkeypatch):
    vectors = np.random.default_rng(0).standard_normal((1000, 16)).astype(np.float32)
    calls = []
    train = module._train
    monkeypatch.setattr(module, "_train", lambda *args: calls.append(1) or train(*args))
    for _ in range(2):
        open_or_train(tmp_path, "pq", vectors)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [("lsh", (1000, 16), "must be one of flat, hnsw"), ("pq", (999, 16), "at least 1000 passages"), ("ivf", (1000, 12), "multiple of 8")],
)
def test_what_cannot_be_indexed_is_refused(kind, shape, message, tmp_path):
    with pytest.raises(RetrieverError, match=message):
        open_or_train(tmp_path, kind, np.ones(shape, dtype=np.float32))


def test_a_full_disk_is_seen_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(RetrieverError, match="GB are free"):
        open_or_train(tmp_path, "pq", np.ones((5000, 64), dtype=np.float32))


def unit_vectors(count, dimension=16):
    vectors = np.random.default_rng(0).standard_normal((count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def interrupt_after(monkeypatch, blocks):
    """The build stops once it has added so many blocks of 300 vectors, each stored in a checkpoint."""
    monkeypatch.setattr(module, "_ADDED_ROWS", 300)
    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(module, "_CHECKPOINT_SHARE", 0)
    due = module._Checkpoint.is_due
    seen = []

    def interrupted(self):
        if len(seen) == blocks:
            raise KeyboardInterrupt
        seen.append(1)
        return due(self)

    monkeypatch.setattr(module._Checkpoint, "is_due", interrupted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [0, 2])
def test_a_stopped_build_goes_on_from_its_checkpoint(kind, blocks, tmp_path, monkeypatch):
    vectors = unit_vectors(2000)
    undisturbed = open_or_train(tmp_path / "undisturbed", kind, vectors)
    with monkeypatch.context() as patch:
        interrupt_after(patch, blocks)
        with pytest.raises(KeyboardInterrupt):
            open_or_train(tmp_path / "index", kind, vectors)
    assert not (tmp_path / "index" / f"{kind}.json").exists()
    monkeypatch.setattr(module, "_sample", None)  # it is not trained again
    index = open_or_train(tmp_path / "index", kind, vectors)
    assert index.ntotal == len(vectors)
    assert sorted(file.name for file in (tmp_path / "index").iterdir()) == [f"{kind}.faiss", f"{kind}.json"]
    for one in (index, undisturbed):
        if kind.startswith("ivf"):
            one.nprobe = 8
    rows, expected = (one.search(vectors[:50], 5)[1] for one in (index, undisturbed))
    if kind == "hnsw":  # the levels of a graph are drawn at random
        assert np.mean(rows[:, 0] == np.arange(50)) >= 0.9
    else:
        assert np.array_equal(rows, expected)


KILLED = """
import sys
from pathlib import Path
import numpy as np
from searchqa_retrievers import dense_approximate as module
module._ADDED_ROWS, module._CHECKPOINT_SECONDS, module._CHECKPOINT_SHARE = 100, 0.0, 0
module.open_or_train(Path(sys.argv[1]), "ivf-pq", np.load(sys.argv[2], mmap_mode="r").view(np.ndarray))
"""


def test_a_killed_build_goes_on_and_gives_the_same_answers(tmp_path):
    vectors = unit_vectors(20_000)
    np.save(tmp_path / "vectors.npy", vectors)
    folder = tmp_path / "index"
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(tmp_path / "vectors.npy")])
    try:
        for _ in range(1200):
            if any(file.name != "ivf-pq.checkpoint-0.faiss" for file in folder.glob("ivf-pq.checkpoint-*.faiss")):
                break
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (folder / "ivf-pq.json").exists()
    index, undisturbed = (open_or_train(where, "ivf-pq", vectors) for where in (folder, tmp_path / "undisturbed"))
    assert np.array_equal(index.search(vectors[:50], 5)[1], undisturbed.search(vectors[:50], 5)[1])


@pytest.mark.parametrize("harm", ["flipped bit", "no file", "record cut off", "other factory"])
def test_a_checkpoint_that_is_not_what_was_written_is_not_used(harm, tmp_path, monkeypatch):
    vectors = unit_vectors(1200)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            open_or_train(tmp_path, "pq", vectors)
    file, record = tmp_path / "pq.checkpoint-300.faiss", tmp_path / "pq.checkpoint.json"
    if harm == "flipped bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif harm == "no file":
        file.unlink()
    elif harm == "record cut off":
        record.write_text(record.read_text()[:20])
    else:
        record.write_text(record.read_text().replace("PQ2", "PQ4"))
    trained = []
    sample = module._sample
    monkeypatch.setattr(module, "_sample", lambda *args: trained.append(1) or sample(*args))
    assert open_or_train(tmp_path, "pq", vectors).ntotal == 1200
    assert trained == [1]


def test_vectors_of_a_mapped_file_are_the_same_through_a_mapping_of_their_own(tmp_path):
    vectors = unit_vectors(500)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r").view(np.ndarray)
    anew = module.mapped_anew(mapped)
    assert np.array_equal(anew, vectors)
    assert not np.shares_memory(anew, mapped)
    assert module.mapped_anew(vectors) is vectors
    assert np.array_equal(module.mapped_anew(mapped[100:200]), vectors[100:200])


def test_verification_finds_a_changed_file_without_loading_it(tmp_path):
    open_or_train(tmp_path, "ivf", unit_vectors(1000))
    assert damaged_files(tmp_path, "ivf") == []
    content = bytearray((tmp_path / "ivf.faiss").read_bytes())
    content[100] ^= 1
    (tmp_path / "ivf.faiss").write_bytes(content)
    assert damaged_files(tmp_path, "ivf") == ["ivf.faiss has a wrong checksum"]
    (tmp_path / "ivf.faiss").unlink()
    assert damaged_files(tmp_path, "ivf") == ["ivf.faiss is missing"]
    (tmp_path / "ivf.json").write_text("{")
    assert damaged_files(tmp_path, "ivf")[0].startswith("ivf.json cannot be read")
