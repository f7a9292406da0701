"""Measures of retrieval against values worked out by hand."""

from __future__ import annotations

import gzip
import json

import pytest

from searchqa_retrievers import Corpus, Hit, Passage, RetrieverError, from_function
from searchqa_retrievers.measures import Asked, Recall, read_asked, recall, sampled_queries, speed


def hits(*ids):
    return [Hit(Passage(id_, f"Title {id_}", ""), 1.0) for id_ in ids]


def test_recall_is_the_mean_share_of_supporting_passages_among_the_first():
    asked = [Asked("a", ids=("1", "2")), Asked("b", ids=("9",)), Asked("c")]
    answers = [hits("1", "x", "y", "2"), hits("x", "y"), hits("1")]
    assert recall(asked, answers, (1, 3, 4)) == [Recall(1, 0.25, 0.0, 2), Recall(3, 0.25, 0.0, 2), Recall(4, 0.5, 0.5, 2)]


def test_titles_count_where_no_ids_are_known_and_one_passage_of_a_title_is_enough():
    asked = [Asked("a", titles=("Title 1", "Title 2"))]
    assert recall(asked, [hits("1", "1", "2")], (2, 3)) == [Recall(2, 0.5, 0.0, 1), Recall(3, 1.0, 1.0, 1)]


def test_without_supporting_passages_there_is_no_recall():
    assert recall([Asked("a")], [hits("1")]) == []


@pytest.mark.parametrize("name", ["questions.jsonl", "questions.jsonl.gz"])
def test_questions_are_read_with_their_supporting_passages(tmp_path, name):
    rows = [
        {"id": "1", "question": "who", "metadata": {"supporting_ids": ["a", "b", "a"], "supporting_titles": ["A", "B", "A"]}},
        {"id": "2", "question": "what"},
    ]
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert read_asked(tmp_path / name) == [Asked("who", ("a", "b"), ("A", "B")), Asked("what")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("", "no questions"),
        ("{", "cannot read"),
        ('{"id": "1"}', "line 1: a question needs"),
        ("[1]", "cannot read"),
    ],
)
def test_a_file_without_questions_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "questions.jsonl").write_text(text)
    with pytest.raises(RetrieverError, match=message):
        read_asked(tmp_path / "questions.jsonl")


def test_sampled_queries_are_words_of_one_passage_and_the_same_for_a_seed():
    corpus = Corpus.from_passages([("1", "One", "the red fox and the lazy dog jump"), ("2", "", "of the and"), ("3", "Two", "blue whale")])
    asked = sampled_queries(corpus, 50)
    assert len(asked) == 50
    assert asked == sampled_queries(corpus, 50)
    assert asked != sampled_queries(corpus, 50, seed=1)
    sources = [{"one", "red", "fox", "lazy", "dog", "jump"}, {"two", "blue", "whale"}]
    assert all(any(set(one.query.split()) <= source for source in sources) for one in asked)


def test_a_corpus_without_words_gives_no_queries():
    with pytest.raises(RetrieverError, match="no words"):
        sampled_queries(Corpus.from_passages([("1", "", "of the")]), 3)


def test_all_queries_are_asked_in_calls_of_the_batch():
    calls, progress = [], []
    retriever = from_function(lambda queries, top_k: calls.append((len(queries), top_k)) or [[] for _ in queries], name="f")
    result = speed(retriever, [f"query {number}" for number in range(10)], 3, 4, progress.append)
    assert calls == [(4, 3), (4, 3), (2, 3)]
    assert progress == [4, 4, 2]
    assert result.batch == 4
    assert result.p50 <= result.p99
