"""Corpus: reading, ordering, hashing, and errors that name the place."""

import copy
import gzip
import json
import pickle

import pytest

from searchqa_retrievers import Corpus, CorpusError, Passage

PASSAGES = [Passage("b", "Berlin", "A city.\nOn the Spree."), Passage("a", 'The "Old" Town', "Small."), Passage("a10", "", "No title.")]


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_positions_are_in_id_order():
    corpus = Corpus.from_passages(PASSAGES)
    assert corpus.ids == ["a", "a10", "b"]
    assert len(corpus) == 3
    assert corpus[2] == PASSAGES[0]
    assert list(corpus) == [PASSAGES[1], PASSAGES[2], PASSAGES[0]]
    assert corpus.by_id("a10") == PASSAGES[2]
    assert "b" in corpus
    assert "c" not in corpus
    assert corpus.contents(2) == '"Berlin"\nA city.\nOn the Spree.'


def test_unknown_id_is_an_error():
    with pytest.raises(CorpusError, match="'c'"):
        Corpus.from_passages(PASSAGES).by_id("c")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_every_form_of_row_is_read(tmp_path, suffix):
    rows = [
        {"id": "1", "contents": '"Berlin"\nA city.\nOn the Spree.'},
        {"id": "2", "title": "Berlin", "contents": '"Berlin"\nA city.'},
        {"id": "3", "title": "Berlin", "text": "A city."},
        {"id": 4, "text": "No title."},
        {"id": "5", "contents": "One line."},
        {"id": "6", "contents": 'Not quoted\nA "text".'},
        {"id": "7", "contents": '"The "Old" Town"\n'},
        "",
        {"id": "8", "contents": '"From contents"\nOld.', "text": "New."},
    ]
    assert list(Corpus.from_jsonl(write(tmp_path / f"corpus{suffix}", rows))) == [
        Passage("1", "Berlin", "A city.\nOn the Spree."),
        Passage("2", "Berlin", "A city."),
        Passage("3", "Berlin", "A city."),
        Passage("4", "", "No title."),
        Passage("5", "", "One line."),
        Passage("6", "Not quoted", 'A "text".'),
        Passage("7", 'The "Old" Town', ""),
        Passage("8", "From contents", "New."),
    ]


GOOD = {"id": "1", "contents": '"T"\nx'}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": "2", "contents": ', "not a JSON object"),
        ('["2", "x"]', "must be a JSON object, got list"),
        ({"contents": '"T"\nx'}, "field 'id'"),
        ({"id": "", "contents": '"T"\nx'}, "field 'id'"),
        ({"id": True, "contents": '"T"\nx'}, "field 'id'"),  # a boolean is an integer to Python only
        ({"id": 1.5, "contents": '"T"\nx'}, "field 'id'"),
        ({"id": "2"}, "field 'contents'"),
        ({"id": "2", "title": "T"}, "field 'contents'"),
        ({"id": "2", "contents": ["x"]}, "field 'contents'"),
        ({"id": "2", "text": 3}, "field 'text'"),
        ({"id": "2", "title": {}, "text": "x"}, "field 'title'"),
        ({"id": "1", "contents": '"T"\nanother'}, "field 'id'"),  # two passages of one id
    ],
)
def test_malformed_row_is_named_by_file_line_and_field(tmp_path, row, message):
    path = write(tmp_path / "corpus.jsonl", [GOOD, "", row])
    with pytest.raises(CorpusError, match=message) as error:
        Corpus.from_jsonl(path)
    assert f"{path}, line 3" in str(error.value)


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "2", "text": "\xff"}\n')
    with pytest.raises(CorpusError, match="line 2"):
        Corpus.from_jsonl(path)


def test_truncated_or_missing_file_is_an_error(tmp_path):
    path = write(tmp_path / "corpus.jsonl.gz", [GOOD] * 1000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorpusError, match=r"corpus\.jsonl\.gz"):
        Corpus.from_jsonl(path)
    with pytest.raises(CorpusError, match=r"missing\.jsonl"):
        Corpus.from_jsonl(tmp_path / "missing.jsonl")


def test_passage_given_twice_is_kept_once(tmp_path):
    assert len(Corpus.from_jsonl(write(tmp_path / "corpus.jsonl", [GOOD, GOOD]))) == 1
    assert len(Corpus.from_passages([*PASSAGES, *PASSAGES])) == 3
    with pytest.raises(CorpusError, match="'a'"):
        Corpus.from_passages([*PASSAGES, Passage("a", "Other", "")])


def test_passages_must_be_strings():
    with pytest.raises(CorpusError, match="passage 0"):
        Corpus.from_passages([(1, "T", "x")])


def test_columns_must_fit_and_be_sorted():
    with pytest.raises(CorpusError, match="one length"):
        Corpus(["a"], ["A"], [])
    with pytest.raises(CorpusError, match="ascending"):
        Corpus(["b", "a"], ["", ""], ["", ""])


def test_hash_depends_on_content_only(tmp_path):
    corpus = Corpus.from_passages(PASSAGES)
    assert corpus.sha256 == Corpus.from_passages(PASSAGES[::-1]).sha256
    rows = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES]
    assert corpus.sha256 == Corpus.from_jsonl(write(tmp_path / "c.jsonl.gz", rows)).sha256
    # Moving a letter over a border between fields or passages is another corpus.
    variants = [
        [("a", "bc", "d"), ("e", "f", "g")],
        [("a", "b", "cd"), ("e", "f", "g")],
        [("ab", "c", "d"), ("e", "f", "g")],
        [("a", "bc", "d"), ("ef", "", "g")],
        [("a", "bc", "d")],
        [],
    ]
    assert len({Corpus.from_passages(variant).sha256 for variant in variants}) == len(variants)
    assert Corpus.from_passages([("a", "", "\ud800")]).sha256 != Corpus.from_passages([("a", "", "\ud801")]).sha256


def test_hash_is_stable():
    assert Corpus.from_passages([("1", "T", "é")]).sha256 == "3ae7616595dd606a6ae8b1608069b2e8ea087c93544467638056b9ac27bc1b36"


def test_copies():
    corpus = Corpus.from_passages(PASSAGES)
    assert copy.deepcopy(corpus) is corpus
    assert list(pickle.loads(pickle.dumps(corpus))) == list(corpus)
