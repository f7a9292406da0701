"""DenseRetriever with a real sentence encoder (MiniLM), real FAISS and files on disk."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest

pytest.importorskip("faiss", reason="dense search needs faiss-cpu")
pytest.importorskip("torch", reason="encoders need PyTorch")

from searchqa_retrievers import Cached, Corpus, RetrieverError, SearchRequest, build_retriever
from searchqa_retrievers.dense import DenseRetriever, make
from searchqa_retrievers.testing import RetrieverContract

TOPICS = {
    "Marie Curie": "Marie Curie was a physicist born in Warsaw who studied radioactivity.",
    "Vistula": "The Vistula is the longest river of Poland and flows into the Baltic Sea.",
    "Paris": "Paris is the capital city of France.",
    "Emma": "Emma is a novel written by Jane Austen.",
    "Everest": "Mount Everest is the highest mountain above sea level.",
    "Photosynthesis": "Plants turn sunlight, water and carbon dioxide into sugar and oxygen.",
}
QUESTIONS = {
    "which scientist investigated radiation": "Marie Curie",
    "what is the longest Polish stream": "Vistula",
    "French seat of government": "Paris",
    "who is the author of the book Emma": "Emma",
    "tallest peak in the world": "Everest",
    "how do leaves make food": "Photosynthesis",
}
CORPUS = Corpus.from_passages(
    [(f"p{number}", title, text) for number, (title, text) in enumerate(TOPICS.items())]
    + [(f"copy{number}", "Twin", "The same text in several passages.") for number in (11, 2, 100)]
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("indexes")


class TestDense(RetrieverContract):
    queries = (*list(QUESTIONS)[:3], "the same text")

    @pytest.fixture(autouse=True)
    def _parts(self, encoder, cache):
        self.encoder, self.cache = encoder, cache

    def make_retriever(self):
        return DenseRetriever(CORPUS, self.encoder, cache_dir=self.cache)


class TestDenseInHalfPrecision(TestDense):
    def make_retriever(self):
        return DenseRetriever(CORPUS, self.encoder, storage="float16", cache_dir=self.cache)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_questions_find_passages_that_share_no_word_with_them(encoder, cache, storage):
    retriever = DenseRetriever(CORPUS, encoder, storage=storage, cache_dir=cache)
    answers = retriever.search([SearchRequest(question, 1) for question in QUESTIONS])
    assert [hits[0].passage.title for hits in answers] == list(QUESTIONS.values())


def test_scores_are_cosines_of_query_and_contents(encoder, cache):
    retriever = DenseRetriever(CORPUS, encoder, cache_dir=cache)
    query = encoder.encode_queries(["longest river"])[0]
    [hits] = retriever.search([SearchRequest("longest river", len(CORPUS))])
    assert len(hits) == len(CORPUS)
    for hit in hits:
        [vector] = encoder.encode_passages([f'"{hit.passage.title}"\n{hit.passage.text}'])
        assert hit.score == pytest.approx(float(vector @ query), abs=1e-6)


def test_equal_passages_come_in_the_order_of_their_ids_as_strings(encoder, cache):
    retriever = DenseRetriever(CORPUS, encoder, cache_dir=cache)
    [hits] = retriever.search([SearchRequest("the same text in several passages", 3)])
    assert [hit.passage.id for hit in hits] == ["copy100", "copy11", "copy2"]
    assert len({hit.score for hit in hits}) == 1
    [hits] = retriever.search([SearchRequest("the same text in several passages", 2)])
    assert [hit.passage.id for hit in hits] == ["copy100", "copy11"]


def test_each_query_is_encoded_once_and_the_oldest_is_forgotten(encoder, cache, monkeypatch):
    asked = []
    encode = encoder.encode_queries
    monkeypatch.setattr(encoder, "encode_queries", lambda texts: asked.extend(texts) or encode(texts))
    retriever = DenseRetriever(CORPUS, encoder, cache_dir=cache, query_entries=2)
    first = retriever.search([SearchRequest("a", 1), SearchRequest("a", 2), SearchRequest("b", 1)])
    assert asked == ["a", "b"]
    assert retriever.search([SearchRequest("a", 1), SearchRequest("a", 2), SearchRequest("b", 1)]) == first
    assert asked == ["a", "b"]
    retriever.search([SearchRequest("a", 1)])
    retriever.search([SearchRequest("c", 1)])  # b goes
    retriever.search([SearchRequest("a", 1)])
    assert asked == ["a", "b", "c"]
    retriever.search([SearchRequest("b", 1)])
    assert asked == ["a", "b", "c", "b"]
    many = [SearchRequest(f"query {number}", 1) for number in range(5)]  # more than are kept
    assert retriever.search(many) == [retriever.search([request])[0] for request in many]


def test_a_pickled_retriever_opens_the_same_index(encoder, cache):
    retriever = DenseRetriever(CORPUS, encoder, cache_dir=cache)
    again = pickle.loads(pickle.dumps(retriever))
    requests = [SearchRequest(question, 3) for question in QUESTIONS]
    assert isinstance(again.index.vectors.base, np.memmap)
    assert again.search(requests) == retriever.search(requests)


def test_the_stamp_names_all_that_a_result_depends_on(encoder, cache):
    stamp = DenseRetriever(CORPUS, encoder, cache_dir=cache).stamp()
    assert (stamp["retriever"], stamp["storage"], stamp["passages"]) == ("dense", "float32", len(CORPUS))
    assert stamp["corpus_sha256"] == CORPUS.sha256
    assert stamp["encoder"]["fingerprint"] == encoder.fingerprint
    assert stamp["encoder"]["pooling"] == "mean"


@pytest.mark.parametrize(
    ("request_", "message"), [(SearchRequest("q", 0), "top_k must be"), (SearchRequest("q", 1, filters={"a": "b"}), "has no filters")]
)
def test_requests_that_cannot_be_answered_as_asked_are_refused(encoder, cache, request_, message):
    with pytest.raises(RetrieverError, match=message):
        DenseRetriever(CORPUS, encoder, cache_dir=cache).search([request_])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"storage": "int8"}, "storage must be one of float32, float16"),
        ({"query_entries": 0}, "query_entries"),
        ({"query_entries": 2.5}, "query_entries"),
        ({"encoder": "x"}, "minilm"),
        ({"encoder": 5}, "encoder of retriever 'dense' must be"),
        ({"index": ["flat"]}, "index must be one of flat"),
        ({"rescore_factor": "3"}, "rescore_factor of retriever 'dense' must be a whole number"),
        ({"rescore_factor": 0}, "rescore_factor of retriever 'dense' must be a whole number"),
        ({"nprobe": "x"}, "nprobe of retriever 'dense' must be a whole number"),
        ({"cache_dir": 5}, "cache_dir of retriever 'dense' must be a path"),
        ({"faiss_file": 5, "faiss_rows": "x"}, "faiss_file of retriever 'dense' must be a path"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path):
    with pytest.raises(RetrieverError, match=message):
        DenseRetriever(CORPUS, **{"cache_dir": tmp_path, **arguments})


@pytest.mark.parametrize("by", ["preset", "settings"])
def test_a_configuration_makes_one(encoder, cache, by):
    folder = encoder.settings.model
    how = {"encoder": "minilm", "model": folder} if by == "preset" else {"encoder": {"model": folder, "max_tokens": 256}}
    retriever = build_retriever({"name": "dense", **how, "device": "cpu", "cache_dir": str(cache)}, CORPUS)
    assert isinstance(retriever, Cached)
    assert retriever.stamp() == DenseRetriever(CORPUS, encoder, cache_dir=cache).stamp()
    requests = [SearchRequest(question, 3) for question in QUESTIONS]
    assert retriever.search(requests) == DenseRetriever(CORPUS, encoder, cache_dir=cache).search(requests)


def not_read():
    raise AssertionError("the corpus is read")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": {"max_tokens": 64}}, "a mapping with 'model' and any of model, query_prefix"),
        ({"encoder": {"model": "x", "poolin": "cls"}}, "a mapping with 'model' and any of model, query_prefix"),
        ({"encoder": {"model": "x", "query_prefix": 5}}, "query_prefix of an encoder must be a string"),
        ({"encoder": {"model": "x", "max_tokens": "5"}}, "max_tokens must be at least 8"),
        ({"encoder": "word2vec"}, "must be one of e5"),
        ({"encoder": 5}, "'encoder' of retriever 'dense' must be a string or a mapping"),
        ({"device": 0}, "'device' of retriever 'dense' must be a string or null"),
        ({"nprobe": "x"}, "'nprobe' of retriever 'dense' must be a whole number or null"),
        ({"query_entries": 0}, "query_entries"),
        ({"index": "lsh"}, "index must be one of flat"),
    ],
)
def test_wrong_options_of_a_configuration_are_refused_before_the_corpus_is_read(options, message):
    with pytest.raises(RetrieverError, match=message):
        build_retriever({"name": "dense", **options}, not_read)


def test_that_faiss_is_missing_is_said_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(RetrieverError, match=r"searchqa-gym\[cpu\]"):
        build_retriever({"name": "dense", "encoder": "minilm", "model": str(tmp_path / "none")}, not_read)
    with pytest.raises(RetrieverError, match=r"searchqa-gym\[cpu\]"):
        DenseRetriever(CORPUS, str(tmp_path))


def test_the_number_of_kept_queries_can_be_configured(encoder, cache):
    options = {"encoder": "minilm", "model": encoder.settings.model, "device": "cpu", "cache_dir": str(cache), "query_entries": 2}
    retriever = make(lambda: CORPUS, **options)
    retriever.search([SearchRequest(f"query {number}", 1) for number in range(5)])
    assert len(retriever._queries) == 2
