"""Indexes of candidates: recall against the exact search on real embeddings, exact scores, files that are what was written."""

from __future__ import annotations

import random

import numpy as np
import pytest

pytest.importorskip("faiss", reason="dense search needs faiss-cpu")
pytest.importorskip("torch", reason="encoders need PyTorch")

from searchqa_retrievers import Corpus, RetrieverError, SearchRequest
from searchqa_retrievers import dense_approximate as module
from searchqa_retrievers.bm25_index import DamagedIndexError
from searchqa_retrievers.dense import DenseRetriever
from searchqa_retrievers.dense_approximate import KINDS, estimate, open_or_train
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
    return made_up(1100)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("indexes")


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
    requests = [SearchRequest(question, 10) for question in QUESTIONS]
    best = [{hit.passage.id for hit in hits} for hits in flat.search(requests)]
    found = []
    for factor in (1, 4, 110):
        retriever = DenseRetriever(corpus, encoder, index="pq", cache_dir=cache, rescore_factor=factor)
        found.append(sum(len(ids & {hit.passage.id for hit in hits}) for ids, hits in zip(best, retriever.search(requests), strict=True)))
    assert found[0] < found[1] <= found[2] == 10 * len(requests)  # 110 * 10 candidates are the whole corpus


def test_one_list_of_many_misses_some(corpus, encoder, cache, flat):
    requests = [SearchRequest(question, 10) for question in QUESTIONS]
    assert DenseRetriever(corpus, encoder, index="ivf", cache_dir=cache, nprobe=1).search(requests) != flat.search(requests)
    assert DenseRetriever(corpus, encoder, index="ivf", cache_dir=cache, nprobe=10_000, rescore_factor=110).search(requests) == flat.search(
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
