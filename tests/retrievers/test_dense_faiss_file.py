"""Published FAISS files, written here by FAISS itself as Search-R1 writes them, are used as they are or refused."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_retrievers import Corpus, RetrieverError, SearchRequest
from searchqa_retrievers import faiss_file as module
from searchqa_retrievers.dense import DenseRetriever

faiss = pytest.importorskip("faiss", reason="dense search needs faiss-cpu")
pytest.importorskip("torch", reason="encoders need PyTorch")

PLACES = ["Warsaw", "Paris", "Kyoto", "Lima", "Cairo", "Oslo", "Quito", "Delhi", "Rome", "Accra", "Perth", "Boston"]
LINES = [
    {"id": str(number), "contents": f'"{place}"\n{place} is a city; fact {number} about it.'} for number, place in enumerate(PLACES * 3)
]
REQUESTS = [SearchRequest(f"what is known about {place}", top_k) for place in PLACES for top_k in (1, 5)]


@pytest.fixture(scope="module")
def vectors(encoder):
    """In the order of the lines, which is not that of the ids as strings."""
    return encoder.encode_passages([line["contents"] for line in LINES])


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "wiki.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


def write(folder, vectors, factory="Flat", metric=faiss.METRIC_INNER_PRODUCT):
    index = faiss.index_factory(vectors.shape[1], factory, metric)
    index.add(vectors)
    faiss.write_index(index, str(folder / "e5.index"))
    return folder / "e5.index"


def dense(rows, encoder, tmp_path, **arguments):
    return DenseRetriever(Corpus.from_jsonl(rows), encoder, cache_dir=tmp_path / "cache", **arguments)


def test_answers_are_those_of_an_index_built_here(encoder, vectors, rows, tmp_path):
    published = dense(rows, encoder, tmp_path, faiss_file=write(tmp_path, vectors), faiss_rows=rows)
    assert not (tmp_path / "cache").exists()
    assert published.search(REQUESTS) == dense(rows, encoder, tmp_path).search(REQUESTS)
    assert published.search(REQUESTS)[0][0].passage.title == "Warsaw"
    assert not published.index.vectors.flags.writeable


def test_a_published_graph_is_used(encoder, vectors, rows, tmp_path):
    file = write(tmp_path, vectors, "HNSW64")
    exact = dense(rows, encoder, tmp_path, faiss_file=file, faiss_rows=rows)
    graph = dense(rows, encoder, tmp_path, index="hnsw", faiss_file=file, faiss_rows=rows)
    assert graph.search(REQUESTS) == exact.search(REQUESTS)
    assert graph.stamp()["faiss_file"] == exact.stamp()["faiss_file"]
    assert not (tmp_path / "cache").exists()


def test_a_quick_index_is_built_over_published_vectors(encoder, vectors, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("searchqa_retrievers.dense_approximate.MIN_PASSAGES", 30)
    file = write(tmp_path, vectors)
    exact = dense(rows, encoder, tmp_path, faiss_file=file, faiss_rows=rows)
    quick = dense(rows, encoder, tmp_path, index="pq", rescore_factor=36, faiss_file=file, faiss_rows=rows)
    assert quick.search(REQUESTS) == exact.search(REQUESTS)


def test_it_can_be_pickled(encoder, vectors, rows, tmp_path):
    retriever = dense(rows, encoder, tmp_path, faiss_file=write(tmp_path, vectors), faiss_rows=rows)
    assert pickle.loads(pickle.dumps(retriever)).search(REQUESTS) == retriever.search(REQUESTS)


def test_a_file_that_was_cut_off_is_refused(encoder, vectors, rows, tmp_path):
    file = write(tmp_path, vectors)
    for size in (file.stat().st_size - 100, 20, 0):
        os.truncate(file, size)
        with pytest.raises(RetrieverError, match="cannot read the FAISS file"):
            dense(rows, encoder, tmp_path, faiss_file=file, faiss_rows=rows)
    with pytest.raises(RetrieverError, match="cannot read the FAISS file"):
        dense(rows, encoder, tmp_path, faiss_file=tmp_path / "nowhere", faiss_rows=rows)


@pytest.mark.parametrize(
    ("change", "factory", "metric", "message"),
    [
        (lambda v: v, "Flat", faiss.METRIC_L2, "must hold an IndexFlatIP"),
        (lambda v: v, "SQfp16", faiss.METRIC_INNER_PRODUCT, "must hold an IndexFlatIP"),
        (lambda v: v[:, :128].copy(), "Flat", faiss.METRIC_INNER_PRODUCT, "have 128 numbers, those of the encoder 384"),
        (lambda v: v[:-1], "Flat", faiss.METRIC_INNER_PRODUCT, "35 vectors, but .* has 36 lines"),
        (lambda v: 2 * v, "Flat", faiss.METRIC_INNER_PRODUCT, "must be of length 1"),
        (lambda v: np.roll(v, 1, axis=0), "Flat", faiss.METRIC_INNER_PRODUCT, "row 0 of .* is not the vector of passage '0'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(encoder, vectors, rows, tmp_path, change, factory, metric, message):
    index = faiss.index_factory(change(vectors).shape[1], factory, metric)
    index.train(change(vectors))
    index.add(change(vectors))
    faiss.write_index(index, str(tmp_path / "e5.index"))
    with pytest.raises(RetrieverError, match=message):
        dense(rows, encoder, tmp_path, faiss_file=tmp_path / "e5.index", faiss_rows=rows)


def test_lines_that_are_not_of_the_corpus_are_refused(encoder, vectors, rows, tmp_path):
    file, other = write(tmp_path, vectors), tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({**line, "id": f"x{line['id']}"}) + "\n" for line in LINES))
    with pytest.raises(RetrieverError, match="are not those of the corpus"):
        dense(rows, encoder, tmp_path, faiss_file=file, faiss_rows=other)
    other.write_text('{"title": "no id"}\n')
    with pytest.raises(RetrieverError, match="cannot read the ids"):
        dense(rows, encoder, tmp_path, faiss_file=file, faiss_rows=other)


def test_half_of_the_arguments_are_refused(encoder, rows, tmp_path):
    with pytest.raises(RetrieverError, match="given together"):
        dense(rows, encoder, tmp_path, faiss_file=tmp_path / "x")
    with pytest.raises(RetrieverError, match="storage must be 'float32'"):
        dense(rows, encoder, tmp_path, faiss_file=tmp_path / "x", faiss_rows=rows, storage="float16")


@given(
    ids=st.lists(st.text(max_size=12).filter(lambda text: "\n" not in text), min_size=1, max_size=40, unique=True),
    shuffled=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_each_line_has_the_position_of_its_id(tmp_path_factory, ids, shuffled):
    """Ids of any characters, also such that one is the beginning of another."""
    corpus = Corpus.from_passages((id_, "", "text") for id_ in ids)
    shuffled.shuffle(ids)
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": id_}) + "\n" for id_ in ids))
    assert module._places(file, len(ids), corpus, "file").tolist() == [corpus.ids.index(id_) for id_ in ids]
    file.write_text("".join(json.dumps({"id": id_}) + "\n" for id_ in [*ids[:-1], ids[0] if len(ids) > 1 else "another" * 3]))
    with pytest.raises(RetrieverError, match="are not those of the corpus"):
        module._places(file, len(ids), corpus, "file")
