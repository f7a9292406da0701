"""Readers: every published format gives the same questions, and every malformed file an error that names file, line and field."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_envs.datasets import corpus_from_contexts, make_passage, passage_id, read_questions
from searchqa_envs.errors import ConfigurationError, DataNotFoundError, MalformedRowError

OURS = {
    "id": "q1",
    "question": "Where was the author of Emma born?",
    "golden_answers": ["Steventon", "Steventon, Hampshire"],
    "metadata": {"type": "bridge", "supporting_titles": ["Emma (novel)", "Jane Austen"], "split": "dev"},
}
HOTPOT_CONTEXT = [
    ["Emma (novel)", ["Emma is a novel by Jane Austen.", " It appeared in 1815."]],
    ["Jane Austen", ["Jane Austen was born in Steventon."]],
    ["Bath", ["Bath is a city."]],
    ["Nothing", []],
]
HOTPOT = {
    "_id": "5a7",
    "question": "Where was the author of Emma born?",
    "answer": "Steventon",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": [["Jane Austen", 0], ["Emma (novel)", 0], ["Jane Austen", 0]],
    "context": HOTPOT_CONTEXT,
}
HOTPOT_HUB = {
    "id": "5a7",
    "question": HOTPOT["question"],
    "answer": "Steventon",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": {"title": ["Jane Austen", "Emma (novel)"], "sent_id": [0, 0]},
    "context": {"title": [title for title, _ in HOTPOT_CONTEXT], "sentences": [sentences for _, sentences in HOTPOT_CONTEXT]},
}
TWO_WIKI = {
    "_id": "2w1",
    "type": "comparison",
    "question": "Which river is longer, Po or Adda?",
    "context": [["Po", ["The Po is a river.", "It is 652 km long."]], ["Adda", ["The Adda is a river."]]],
    "entity_ids": "Q1_Q2",
    "supporting_facts": [["Po", 1], ["Adda", 0]],
    "evidences": [["Po", "length", "652 km"]],
    "answer": "Po",
    "answer_id": "Q643",
}
MUSIQUE = {
    "id": "3hop1__1_2_3",
    "paragraphs": [
        {"idx": 0, "title": "Green", "paragraph_text": "Green is\n a  colour.", "is_supporting": False},
        {"idx": 1, "title": "Po", "paragraph_text": "The Po flows east.", "is_supporting": True},
        {"idx": 2, "title": "Po", "paragraph_text": "The Po rises on Monte Viso.", "is_supporting": True},
    ],
    "question": "Where does the river rise?",
    "question_decomposition": [{"id": 1, "question": "x", "answer": "y", "paragraph_support_idx": 1}],
    "answer": "Monte Viso",
    "answer_aliases": ["Monviso", "Monte Viso"],
    "answerable": True,
}


def search_r1(source: str, index: int, question: str, answers: list[str]) -> dict[str, Any]:
    prompt = f"Answer the given question. For example, <answer> Beijing </answer>. Question: {question}\n"
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": answers}},
        "extra_info": {"split": "train", "index": index},
    }


def write_lines(path: Path, *rows: Any) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_list(path: Path, *rows: Any) -> Path:
    path.write_text(json.dumps(rows, indent=1))
    return path


def write_parquet(path: Path, *rows: Any) -> Path:
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


WRITERS: list[tuple[Callable[..., Path], str]] = [
    (write_lines, "q.jsonl"),
    (write_lines, "q.jsonl.gz"),
    (write_list, "q.json"),
    (write_parquet, "q.parquet"),
]


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_our_rows_read_the_same_however_they_are_kept(tmp_path: Path, write: Callable[..., Path], name: str) -> None:
    [(question, passages)] = read_questions(write(tmp_path / name, OURS))
    assert (question.id, question.question) == ("q1", OURS["question"])
    assert question.golden_answers == ("Steventon", "Steventon, Hampshire")
    assert question.supporting_titles == ("Emma (novel)", "Jane Austen")
    assert question.metadata["split"] == "dev"
    assert question.metadata["type"] == "bridge"
    assert passages == ()


@pytest.mark.parametrize(
    ("write", "name", "row"),
    [(write_list, "hotpot_dev.json", HOTPOT), (write_lines, "dev.jsonl", HOTPOT_HUB), (write_parquet, "validation.parquet", HOTPOT_HUB)],
)
def test_hotpotqa_own_file_and_hub_parquet_give_one_question(tmp_path: Path, write: Callable[..., Path], name: str, row: Any) -> None:
    [(question, passages)] = read_questions(write(tmp_path / name, row), split="dev")
    assert question.id == "5a7"
    assert question.golden_answers == ("Steventon",)
    emma = make_passage("Emma (novel)", "Emma is a novel by Jane Austen. It appeared in 1815.")
    austen = make_passage("Jane Austen", "Jane Austen was born in Steventon.")
    assert question.metadata == {
        "type": "bridge",
        "level": "hard",
        "supporting_titles": ("Jane Austen", "Emma (novel)"),
        "supporting_ids": (austen.id, emma.id),
        "split": "dev",
    }
    assert passages == (emma, austen, make_passage("Bath", "Bath is a city."))  # the paragraph without a sentence is none


def test_flashrag_metadata_can_hold_a_context(tmp_path: Path) -> None:
    metadata = {"type": "bridge", "supporting_facts": HOTPOT_HUB["supporting_facts"], "context": HOTPOT_HUB["context"]}
    row = {"id": "dev_0", "question": "q", "golden_answers": ["Steventon"], "metadata": metadata}
    two_wiki = {**row, "id": "dev_1", "metadata": {"context": {"title": ["Po"], "content": [["The Po is a river.", "It is long."]]}}}
    bare = {"id": "dev_2", "question": "q", "golden_answers": ["x"]}
    (first, passages), (_, second_passages), (third, none) = read_questions(
        write_lines(tmp_path / "dev.jsonl", row, two_wiki, bare), split="dev"
    )
    assert first.supporting_titles == ("Jane Austen", "Emma (novel)")
    assert [passage.title for passage in passages] == ["Emma (novel)", "Jane Austen", "Bath"]
    assert set(first.metadata) == {"type", "supporting_titles", "supporting_ids", "split"}
    assert second_passages[0].text == "The Po is a river. It is long."
    assert (third.metadata, none) == ({"split": "dev"}, ())


def test_2wikimultihopqa_sentences_get_the_space_they_lack(tmp_path: Path) -> None:
    [(question, passages)] = read_questions(write_list(tmp_path / "dev.json", TWO_WIKI))
    assert question.id == "2w1"
    assert question.supporting_titles == ("Po", "Adda")
    assert passages[0].text == "The Po is a river. It is 652 km long."


def test_musique_aliases_hops_and_supporting_paragraphs(tmp_path: Path) -> None:
    unanswerable = {**MUSIQUE, "answerable": False}
    [(question, passages)] = read_questions(write_lines(tmp_path / "musique_full_v1.0_dev.jsonl", unanswerable, MUSIQUE))
    assert question.golden_answers == ("Monte Viso", "Monviso")
    assert question.metadata["type"] == "3hop1"
    assert question.supporting_titles == ("Po",)
    assert question.metadata["supporting_ids"] == (passages[1].id, passages[2].id)
    assert passages[0].text == "Green is a colour."


def test_search_r1_rows_of_two_sources_do_not_collide_by_index(tmp_path: Path) -> None:
    rows = [search_r1("nq", 0, "who wrote emma?", ["Austen", "Jane Austen"]), search_r1("hotpotqa", 0, "Is the Question: a book?", ["no"])]
    first, second = (entry.question for entry in read_questions(write_parquet(tmp_path / "train.parquet", *rows)))
    assert (first.id, second.id) == ("nq-train-0", "hotpotqa-train-0")
    assert first.question == "who wrote emma?"
    assert second.question == "Is the Question: a book?"
    assert first.golden_answers == ("Austen", "Jane Austen")
    assert first.metadata == {"source": "nq", "split": "train"}


def test_search_r1_target_can_be_one_string_and_question_a_column() -> None:
    row = search_r1("nq", 7, "ignored", []) | {"question": "who?"}
    row["reward_model"] = {"ground_truth": {"target": "Austen"}}
    [(question, _)] = read_questions([row])
    assert (question.question, question.golden_answers) == ("who?", ("Austen",))


def test_format_can_be_given_and_must_be_known() -> None:
    [(question, _)] = read_questions([HOTPOT | {"evidences": []}], format="hotpotqa")
    assert question.id == "5a7"
    with pytest.raises(ConfigurationError, match=r"searchqa.*got 'squad'"):
        list(read_questions([OURS], format="squad"))


def test_passage_ids_are_as_in_the_published_corpora() -> None:
    title, text = "Moscow State University", "It was founded in 1755."
    assert passage_id(title, text) == hashlib.sha1(b"Moscow State University\x1fIt was founded in 1755.").hexdigest()[:12]
    assert make_passage(" Moscow  State\tUniversity", "It was founded\n in 1755. ") == (passage_id(title, text), title, text)
    assert make_passage("Cafe\u0301", "x") == make_passage("Caf\u00e9", "x")


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_making_a_passage_twice_changes_nothing(title: str, text: str) -> None:
    once = make_passage(title, text)
    assert make_passage(once.title, once.text) == once
    assert unicodedata.is_normalized("NFC", once.text)


def test_corpus_of_contexts_has_each_passage_once(tmp_path: Path) -> None:
    path = write_list(tmp_path / "dev.json", HOTPOT, {**HOTPOT, "_id": "other"}, TWO_WIKI)
    corpus = corpus_from_contexts([path])
    assert corpus is not None
    assert sorted(corpus.titles) == ["Adda", "Bath", "Emma (novel)", "Jane Austen", "Po"]
    assert corpus_from_contexts([[OURS]]) is None


BAD_ROWS = [
    ({**OURS, "id": None}, "id", "found NoneType None"),
    ({**OURS, "id": True}, "id", "found bool True"),
    ({**OURS, "id": " "}, "id", "found str ' '"),
    ({k: v for k, v in OURS.items() if k != "id"}, "id", "found no such field (fields here: 'question', 'golden_answers', 'metadata')"),
    ({**OURS, "question": ["x"]}, "question", "found list ['x']"),
    ({**OURS, "question": "  "}, "question", "expected a non-empty string"),
    ({**OURS, "question": "\ud800"}, "question", "no lone surrogates"),
    ({**OURS, "golden_answers": []}, "golden_answers", "at least one non-empty string, found list []"),
    ({**OURS, "golden_answers": "x"}, "golden_answers", "found str 'x'"),
    ({**OURS, "golden_answers": ["x", ""]}, "golden_answers", "found list ['x', '']"),
    ({**OURS, "golden_answers": ["x", 3]}, "golden_answers", "found list ['x', 3]"),
    ({**OURS, "metadata": []}, "metadata", "expected an object, found list []"),
    ({**OURS, "metadata": {"split": 3}}, "metadata.split", "found int 3"),
    ({**OURS, "metadata": {"supporting_titles": "Po"}}, "metadata.supporting_titles", "found str 'Po'"),
    ({**HOTPOT, "answer": ""}, "answer", "expected a non-empty string"),
    ({k: v for k, v in HOTPOT.items() if k != "answer"}, "answer", "found no such field"),
    ({**HOTPOT, "context": [["Po"]]}, "context", "[[title, [sentence, ...]], ...]"),
    ({**HOTPOT, "context": [["Po", [3]]]}, "context", "found at 0 tuple ('Po', [3])"),
    ({**HOTPOT, "supporting_facts": "Po"}, "supporting_facts", "found str 'Po'"),
    ({**HOTPOT_HUB, "context": {"title": ["a", "b"], "sentences": [["x"]]}}, "context", "{title: [...], sentences: [[...], ...]}"),
    ({**MUSIQUE, "paragraphs": {}}, "paragraphs", "a list of objects"),
    ({**MUSIQUE, "paragraphs": [{"title": "Po"}]}, "paragraph_text", "found no such field"),
    ({**MUSIQUE, "paragraphs": [{**MUSIQUE["paragraphs"][0], "is_supporting": "no"}]}, "is_supporting", "expected true or false"),  # type: ignore[index]
    ({**MUSIQUE, "answer_aliases": [None]}, "answer_aliases", "found list [None]"),
    (search_r1("nq", 0, "q", []), "reward_model.ground_truth.target", "found list []"),
    (search_r1("nq", 0, "", ["x"]), "prompt", "after 'Question:'"),
    ({**search_r1("nq", 0, "q", ["x"]), "extra_info": {}}, "extra_info.index", "found no such field"),
    ({"query": "q"}, "golden_answers", "found the fields 'query'"),
]


@pytest.mark.parametrize(("row", "field", "part"), BAD_ROWS, ids=[f"{number}-{field}" for number, (_, field, _) in enumerate(BAD_ROWS)])
def test_a_malformed_row_is_an_error_with_file_line_and_field(tmp_path: Path, row: dict[str, Any], field: str, part: str) -> None:
    path = write_lines(tmp_path / "questions.jsonl", row)
    with pytest.raises(MalformedRowError) as caught:
        list(read_questions(path))
    message = str(caught.value)
    assert message.startswith(f"{path}, line 1")
    assert f"field '{field}'" in message
    assert part in message


def test_errors_count_lines_in_lines_and_rows_in_lists_and_parquet(tmp_path: Path) -> None:
    bad = {**OURS, "id": "q2", "question": ""}
    lines = tmp_path / "q.jsonl"
    lines.write_text(json.dumps(OURS) + "\n\n" + json.dumps(bad) + "\n")
    with pytest.raises(MalformedRowError, match="line 3, field 'question'"):
        list(read_questions(lines))
    with pytest.raises(MalformedRowError, match="row 2, field 'question'"):
        list(read_questions(write_list(tmp_path / "q.json", OURS, bad)))
    with pytest.raises(MalformedRowError, match="row 2, field 'question'"):
        list(read_questions(write_parquet(tmp_path / "q.parquet", OURS, bad)))
    with pytest.raises(MalformedRowError, match="item 2 of the list given, field 'question'"):
        list(read_questions([OURS, bad]))


def test_a_repeated_id_names_both_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", OURS, {**OURS, "id": "q2"}, OURS)
    with pytest.raises(MalformedRowError, match=r"line 3, field 'id'.*'q1', which .*line 1 has already"):
        list(read_questions(path))


GOOD_LINE = json.dumps(OURS).encode() + b"\n"
BAD_FILES = {
    "not-json.jsonl": (GOOD_LINE + b"{'id': 1}\n", "line 2: expected one JSON object, found bad JSON at column 2"),
    "array-line.jsonl": (GOOD_LINE + b"[1]\n", "line 2: expected one JSON object, found list \\[1\\]"),
    "cut.jsonl": (GOOD_LINE + GOOD_LINE[:40], "line 2.*cut off"),
    "empty.jsonl": (b"", "line 1: expected at least one row, found an empty file"),
    "blank.jsonl": (b"\n \n", "expected at least one row"),
    "empty-list.json": (b"[]", "expected at least one row"),
    "latin1.jsonl": (GOOD_LINE + '{"id": "é"}\n'.encode("latin-1"), "line 2: expected UTF-8, found the bytes e9 22 7d 0a at byte 9"),
    "cut.json": (b'[{"id": 1},\n {"id"', "line 2: expected a JSON list.*cut off"),
    "list-of-numbers.json": (b"[1]", "row 1: expected an object, found int 1"),
    "deep.jsonl": (b'{"a":' + b"[" * 200_000 + b"\n", "line 1"),
    "plain.jsonl.gz": (GOOD_LINE, r"expected gzip data"),
    "cut.jsonl.gz": (gzip.compress(GOOD_LINE)[:-12], "the gzip data are cut off"),
    "broken.jsonl.gz": (gzip.compress(GOOD_LINE)[:20] + b"\xff" * 20 + gzip.compress(GOOD_LINE)[40:], "bad gzip data|cut off"),
    "wrong-sum.jsonl.gz": (gzip.compress(GOOD_LINE)[:-8] + b"\0" * 8, "bad gzip data"),
    "cut.parquet": (b"PAR1" + b"\0" * 20, "row 1: bad parquet data"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_broken_file_is_an_error_with_file_and_line(tmp_path: Path, name: str) -> None:
    content, pattern = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MalformedRowError, match=f"(?s){pattern}") as caught:
        list(read_questions(path))
    assert str(path) in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_give_questions_or_a_typed_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(MalformedRowError):
        list(read_questions(path))


def test_gzip_and_a_byte_order_mark_are_seen_by_content(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + GOOD_LINE))
    assert [entry.question.id for entry in read_questions(path)] == ["q1"]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([OURS]).encode())
    assert [entry.question.id for entry in read_questions(path)] == ["q1"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"no such file: .*nowhere\.jsonl"):
        list(read_questions(tmp_path / "nowhere.jsonl"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "q.parquet", OURS)
    blocked = tmp_path / "blocked" / "pyarrow"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('not here')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(blocked.parent)!r})\n"
        "from pathlib import Path\nfrom searchqa_envs.datasets import read_questions\n"
        f"try:\n    list(read_questions(Path({str(path)!r})))\nexcept ImportError as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MissingDependencyError" in done.stdout
    assert "searchqa-gym[data]" in done.stdout
