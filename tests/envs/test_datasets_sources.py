"""Sources: where a set is found, which rows a split has, one object per set and process, no corpus read before it is needed."""

from __future__ import annotations

import copy
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from searchqa_envs.datasets import DATASETS, clear_cache, dataset_info, load_custom, load_source, make_passage, passage_id
from searchqa_envs.datasets.location import find_set
from searchqa_envs.errors import ConfigurationError, DataError, DataNotFoundError, MalformedRowError, UnknownQuestionError
from searchqa_retrievers import CorpusError, Passage, SearchRequest

PO = make_passage("Po", "The Po is the longest river of Italy.")
ADDA = make_passage("Adda", "The Adda flows into the Po.")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear_cache()
    monkeypatch.delenv("SEARCHQA_DATA", raising=False)
    monkeypatch.setenv("SEARCHQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there


def row(identifier: str, split: str | None = None, **metadata: Any) -> dict[str, Any]:
    if split is not None:
        metadata["split"] = split
    return {"id": identifier, "question": f"question {identifier}?", "golden_answers": [f"answer {identifier}"], "metadata": metadata}


def corpus_row(passage: Passage) -> dict[str, str]:
    return {"id": passage.id, "title": passage.title, "contents": f'"{passage.title}"\n{passage.text}'}


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(item) + "\n" for item in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def hotpot(identifier: str, *passages: Passage) -> dict[str, Any]:
    return {
        "id": identifier,
        "question": "q?",
        "answer": "a",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": {"title": [passages[0].title], "sent_id": [0]},
        "context": {"title": [p.title for p in passages], "sentences": [[p.text] for p in passages]},
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """nq with train, dev and rows without split; popqa with test only; triviaqa without any split; bamboogle with dev and test."""
    root = tmp_path / "data"
    write(root / "nq" / "questions.jsonl.gz", row("a", "train"), row("b", "dev"), row("c"), row("d", "train"))
    write(root / "nq" / "questions_extra.jsonl.gz", row("x", "dev"))
    write(root / "nq" / "corpus.jsonl.gz", corpus_row(PO), corpus_row(ADDA))
    write(root / "popqa" / "questions.jsonl", row("p", "test"), row("r"))
    write(root / "triviaqa" / "questions.jsonl", row("t"), row("u"))
    write(root / "bamboogle" / "questions.jsonl", row("m", "dev"), row("n", "test"))
    return root


def ids(source: Any) -> list[str]:
    return [question.id for question in source]


@pytest.mark.parametrize(
    ("name", "split", "expected", "chosen"),
    [
        ("nq", None, ["a", "d"], "train"),
        ("nq", "train", ["a", "d"], "train"),
        ("nq", "dev", ["b"], "dev"),
        ("nq", "validation", ["b"], "dev"),
        ("nq", "all", ["a", "b", "c", "d"], "all"),
        ("nq", "extra", ["x"], "extra"),
        ("popqa", None, ["p"], "test"),
        ("triviaqa", None, ["t", "u"], "all"),
    ],
)
def test_splits(data: Path, name: str, split: str | None, expected: list[str], chosen: str) -> None:
    source = load_source(name, split, data)
    assert ids(source) == expected
    assert (source.name, source.split, len(source)) == (name, chosen, len(expected))
    assert [source.index_of(identifier) for identifier in expected] == list(range(len(expected)))


def test_an_absent_split_lists_those_there_with_their_rows(data: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nq has no split 'test'. Splits here: dev \(1 rows\), train \(2 rows\), all \(4 rows\)"):
        load_source("nq", "test", data)
    with pytest.raises(ConfigurationError, match=r"bamboogle .*choose one. Splits here: dev \(1 rows\), test \(1 rows\), all"):
        load_source("bamboogle", None, data)
    with pytest.raises(ConfigurationError, match=r"no questions_extra.*test \(1 rows\)"):
        load_source("popqa", "extra", data)
    with pytest.raises(ConfigurationError, match="got ''"):
        load_source("nq", "", data)


def test_unknown_names_and_misplaced_arguments_are_refused(data: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"one of hotpotqa, .*got 'squad'.*'custom'"):
        load_source("squad", None, data)
    with pytest.raises(ConfigurationError, match="belong to the set 'custom'"):
        load_source("nq", None, data, questions="x.jsonl")
    with pytest.raises(ConfigurationError, match="needs questions="):
        load_source("custom")
    with pytest.raises(ConfigurationError, match="not data_dir"):
        load_source("custom", questions="x.jsonl", data_dir=data)


def test_order_of_places(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, variable = tmp_path / "cache" / "data", tmp_path / "variable"
    write(cache / "nq" / "questions.jsonl", row("from-cache"))
    assert ids(load_source("nq")) == ["from-cache"]
    write(variable / "nq" / "questions.jsonl", row("from-variable"))
    monkeypatch.setenv("SEARCHQA_DATA", str(variable))
    assert ids(load_source("nq")) == ["from-variable"]
    assert ids(load_source("nq", None, data)) == ["a", "d"]
    shutil.rmtree(variable / "nq")
    assert ids(load_source("nq")) == ["from-cache"]


def test_what_is_nowhere_is_an_error_that_names_every_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHQA_DATA", str(tmp_path / "variable"))
    with pytest.raises(DataNotFoundError) as caught:
        load_source("nq")
    message = str(caught.value)
    for part in (
        f"$SEARCHQA_DATA: {tmp_path / 'variable' / 'nq'}",
        f"the cache: {tmp_path / 'cache' / 'data' / 'nq'}",
        "http://127.0.0.1:9 cannot be reached for RUC-NLPIR/FlashRAG_datasets",
        "searchqa data download nq",
        "SEARCHQA_DATA=<folder>",
        "data_dir=<folder>",
        "SearchQA-Custom-v0",
        "SearchQA-World-v0 is embedded and needs no data",
    ):
        assert part in message


def test_an_explicit_folder_is_the_only_place_looked_at(tmp_path: Path) -> None:
    write(tmp_path / "cache" / "data" / "nq" / "questions.jsonl", row("from-cache"))
    with pytest.raises(DataNotFoundError, match=r"(?s)data_dir: .*download: not tried, because data_dir was given"):
        load_source("nq", None, tmp_path / "empty")


def test_equal_arguments_share_one_source_and_one_corpus(data: Path) -> None:
    source = load_source("nq", "train", data)
    assert load_source("nq", "train", data) is source
    other = load_source("nq", "dev", data)
    assert other is not source
    assert other.corpus() is source.corpus()
    assert copy.deepcopy(source) is source
    write(data / "nq" / "questions.jsonl.gz", row("new", "train"))
    assert ids(load_source("nq", "train", data)) == ["new"]  # a changed file is read again


def test_the_corpus_is_not_read_before_it_is_needed(data: Path) -> None:
    write(data / "nq" / "corpus.jsonl.gz", {"id": "p1"})
    source = load_source("nq", None, data)
    assert source[0].id == "a"
    assert "corpus_sha256" not in source.stamp()
    with pytest.raises(CorpusError, match="line 1"):
        source.corpus()


def test_indexes_and_ids_that_are_not_there(data: Path) -> None:
    source = load_source("nq", "train", data)
    with pytest.raises(UnknownQuestionError, match="indexes 0 to 1; got 2"):
        source[2]
    with pytest.raises(UnknownQuestionError, match=r"no question with the id 'zzz' among its 2.*'a'.*split='all'"):
        source.index_of("zzz")
    assert source.filters(source[0]) is None


def test_the_stamp_tells_what_a_number_needs(data: Path, tmp_path: Path) -> None:
    source = load_source("nq", "train", data)
    stamp = source.stamp()
    assert stamp == {"dataset": "nq", "split": "train", "questions": 2, "questions_sha256": stamp["questions_sha256"]}
    corpus = source.corpus()
    assert source.stamp() == {**stamp, "passages": 2, "corpus_sha256": corpus.sha256}
    plain = tmp_path / "plain"
    write(plain / "nq" / "questions.jsonl", row("a", "train"), row("d", "train"))
    assert load_source("nq", None, plain).stamp()["questions_sha256"] == stamp["questions_sha256"]
    write(plain / "nq" / "questions.jsonl", row("a", "train"), {**row("d", "train"), "golden_answers": ["other"]})
    assert load_source("nq", None, plain).stamp()["questions_sha256"] != stamp["questions_sha256"]


def test_the_retriever_searches_the_sets_passages(data: Path) -> None:
    retriever = load_source("nq", None, data).build_retriever({"name": "bm25", "show_progress": False})
    [[hit]] = retriever.search([SearchRequest("longest river of Italy", 1)])
    assert hit.passage == PO


def test_without_search_no_passages_are_needed() -> None:
    source = load_custom([row("a")])
    assert source.build_retriever({"name": "none"}).search([SearchRequest("river", 3)]) == [[]]
    with pytest.raises(DataNotFoundError, match=r"(?s)retriever object.*from_function.*retriever='none'"):
        source.build_retriever({"name": "bm25"})


def test_published_files_as_they_are(tmp_path: Path) -> None:
    shards = tmp_path / "hotpotqa" / "distractor"
    shards.mkdir(parents=True)
    for number, identifier in enumerate(("h1", "h2")):
        table = pyarrow.Table.from_pylist([hotpot(identifier, PO)])
        parquet.write_table(table, shards / f"train-0000{number}-of-00002.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([hotpot("v1", ADDA, PO)]), shards / "validation-00000-of-00001.parquet")
    assert ids(load_source("hotpotqa", None, tmp_path)) == ["h1", "h2"]
    dev = load_source("hotpotqa", "dev", tmp_path)
    assert ids(dev) == ["v1"]
    assert dev[0].metadata["split"] == "dev"
    assert ids(load_source("hotpotqa", "all", tmp_path)) == ["h1", "h2", "v1"]
    assert dev.corpus() is load_source("hotpotqa", "train", tmp_path).corpus()  # one corpus, whatever the split
    assert set(dev.corpus()) == {PO, ADDA}

    write(tmp_path / "nq" / "dev.jsonl", row("dev_0"))
    write(tmp_path / "nq" / "test.jsonl", row("test_0"))
    write(tmp_path / "nq" / "train.jsonl", row("train_0"), row("train_1"))
    assert ids(load_source("nq", None, tmp_path)) == ["train_0", "train_1"]
    assert ids(load_source("nq", "all", tmp_path)) == ["dev_0", "test_0", "train_0", "train_1"]
    with pytest.raises(DataNotFoundError, match=r"(?s)nq has no passages.*corpus=<path.*searchqa data download wiki18"):
        load_source("nq", None, tmp_path).corpus()
    write(tmp_path / "wiki18" / "wiki-18.jsonl.gz", corpus_row(PO))
    assert list(load_source("nq", "dev", tmp_path).corpus()) == [PO]


def test_only_the_file_of_the_split_is_read(tmp_path: Path) -> None:
    write(tmp_path / "nq" / "dev.jsonl", row("dev_0"))
    (tmp_path / "nq" / "train.jsonl").write_text("not json")
    assert ids(load_source("nq", "dev", tmp_path)) == ["dev_0"]
    with pytest.raises(MalformedRowError, match=r"train\.jsonl, line 1"):
        load_source("nq", "train", tmp_path)


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("dev.jsonl", "dev"),
        ("musique_ans_v1.0_train.jsonl", "train"),
        ("hotpot_train_v1.1.json", "train"),
        ("NQ-open.dev.jsonl.gz", "dev"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("distractor/validation-00000-of-00001.parquet", "dev"),
    ],
)
def test_the_split_is_in_the_name_of_a_published_file(tmp_path: Path, file: str, split: str) -> None:
    path = tmp_path / "nq" / file
    path.parent.mkdir(parents=True)
    path.touch()
    write(tmp_path / "nq" / "notes_about_training.jsonl", row("not a split"))
    found = find_set("nq", tmp_path)
    assert found is not None
    assert found.questions == ((path, split),)


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hotpotqa").mkdir()
    for name in ("hotpot_dev_distractor_v1.json", "hotpot_dev_fullwiki_v1.json"):
        (tmp_path / "hotpotqa" / name).write_text("[]")
    with pytest.raises(
        DataError, match=r"one file .* for the split 'dev', found hotpot_dev_distractor_v1[.]json, hotpot_dev_fullwiki_v1[.]json"
    ):
        load_source("hotpotqa", "dev", tmp_path)
    write(tmp_path / "nq" / "questions.jsonl", row("a"))
    write(tmp_path / "nq" / "questions.jsonl.gz", row("b"))
    with pytest.raises(DataError, match=r"both questions\.jsonl and questions\.jsonl\.gz"):
        load_source("nq", None, tmp_path)


def test_ids_repeated_across_files_of_a_set_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "nq" / "dev.jsonl", row("0"))
    write(tmp_path / "nq" / "test.jsonl", row("0"))
    with pytest.raises(DataError, match=r"'0' occurs twice.*searchqa data merge"):
        load_source("nq", "all", tmp_path)


def test_an_unfinished_download_is_not_taken_for_a_set(tmp_path: Path) -> None:
    write(tmp_path / "nq" / "dev.jsonl", row("0"))
    record = tmp_path / "nq" / "searchqa-data.json"
    record.write_text(json.dumps({"complete": False, "files": {}}))
    with pytest.raises(DataNotFoundError):
        load_source("nq", None, tmp_path)
    record.write_text(json.dumps({"complete": True, "files": {"dev.jsonl": {}, "train.jsonl": {}}}))
    with pytest.raises(DataNotFoundError):
        load_source("nq", None, tmp_path)
    record.write_text(json.dumps({"complete": True, "revision": "abc", "files": {"dev.jsonl": {}}}))
    assert load_source("nq", None, tmp_path).stamp()["revision"] == "abc"
    record.write_text("{")
    with pytest.raises(DataError, match=r"searchqa-data\.json must be a JSON object.*Delete it"):
        load_source("nq", "dev", tmp_path)


def test_another_corpus_can_be_given(data: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "other.jsonl", {"id": 1, "title": "Po", "text": "A river."})
    assert list(load_source("nq", None, data, path).corpus()) == [Passage("1", "Po", "A river.")]
    with pytest.raises(DataNotFoundError, match="no corpus file at"):
        load_source("nq", None, data, tmp_path / "nowhere.jsonl").corpus()
    with pytest.raises(DataNotFoundError, match="corpus='wiki18' is not on this machine"):
        load_source("nq", None, data, "wiki18").corpus()


def test_custom_from_paths(tmp_path: Path) -> None:
    questions = write(tmp_path / "mine.jsonl.gz", row("a"), row("b"))
    corpus = write(tmp_path / "passages.jsonl", corpus_row(PO))
    source = load_source("custom", questions=str(questions), corpus=str(corpus))
    assert (source.name, source.split, ids(source)) == ("custom", "all", ["a", "b"])
    assert list(source.corpus()) == [PO]
    assert load_custom(questions, str(corpus)) is source
    more = write(tmp_path / "more.jsonl", row("c", "dev"))
    assert ids(load_custom([questions, more], split="all")) == ["a", "b", "c"]
    assert ids(load_custom([questions, more])) == ["c"]  # the only split there is


def test_custom_from_rows() -> None:
    passages = [PO, {"id": "x", "title": "T", "text": "text"}, {"id": "y", "contents": '"U"\nmore text'}, {"id": 3, "contents": "bare"}]
    source = load_custom([row("a"), row("b")], passages)
    assert ids(source) == ["a", "b"]
    assert set(source.corpus()) == {PO, Passage("x", "T", "text"), Passage("y", "U", "more text"), Passage("3", "", "bare")}
    assert load_custom([row("a"), row("b")], list(passages)) is source  # equal arguments, though not the same objects
    assert load_custom([row("a"), row("c")], passages) is not source
    with pytest.raises(MalformedRowError, match="passage 1 of the list given, field 'id'"):
        load_custom([row("a")], [{"text": "x"}]).corpus()
    with pytest.raises(MalformedRowError, match=r"passage 1 of the list given: expected a Passage.*str 'x'"):
        load_custom([row("a")], ["x"]).corpus()  # type: ignore[list-item]


def test_custom_makes_its_corpus_from_contexts_or_says_what_to_give(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    path.write_text(json.dumps([hotpot("1", PO, ADDA), hotpot("2", PO)]))
    source = load_custom(path)
    assert set(source.corpus()) == {PO, ADDA}
    assert source[0].metadata["supporting_ids"] == (PO.id,)
    bare = load_custom([row("a")])
    with pytest.raises(DataNotFoundError, match=r"(?s)custom has no passages.*corpus=<path"):
        bare.corpus()


@pytest.mark.parametrize("questions", [[], [1], [row("a"), "x"]])
def test_custom_refuses_what_is_no_list_of_questions(questions: Any) -> None:
    with pytest.raises(ConfigurationError, match="questions must be a path"):
        load_custom(questions)


def test_import_is_light() -> None:
    code = (
        "import sys, searchqa_envs.datasets\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'huggingface_hub', 'bm25s', 'numba', 'rich', 'platformdirs', 'filelock'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_registry() -> None:
    assert list(DATASETS) == ["hotpotqa", "2wikimultihopqa", "musique", "bamboogle", "nq", "triviaqa", "popqa"]
    test_rows = {name: info.sizes.get("test", info.sizes.get("dev")) for name, info in DATASETS.items()}
    assert sum(rows for rows in test_rows.values() if rows) == 51_713  # Search-R1's seven test sets together
    assert DATASETS["nq"].sizes["train"] + DATASETS["hotpotqa"].sizes["train"] == 169_615
    assert (dataset_info("nq").default_split, dataset_info("popqa").default_split) == ("train", "test")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "default", "splits", "passages"),
    [
        ("hotpotqa", "train", {"train": 561, "dev": 847, "all": 1408, "extra": 11167}, 27043),
        ("2wikimultihopqa", "train", {"train": 345, "dev": 118, "all": 463, "extra": 8756}, 16907),
        ("musique", "train", {"train": 72, "dev": 145, "all": 217, "extra": 15468}, 7337),
        ("bamboogle", "test", {"test": 125, "all": 125}, 2067),
        ("nq", "dev", {"dev": 350, "all": 355, "extra": 2186}, 6928),
        ("triviaqa", "all", {"all": 352, "extra": 631}, 2492),
        ("popqa", "test", {"test": 990, "all": 990, "extra": 5924}, 7434),
    ],
)
def test_real_sets_whole(name: str, default: str, splits: dict[str, int], passages: int) -> None:
    root = real_data()
    assert load_source(name, None, root).split == default
    assert {split: len(load_source(name, split, root)) for split in splits} == splits
    source = load_source(name, "all", root)
    corpus = source.corpus()
    assert len(corpus) == passages
    assert all(passage_id(title, text) == identifier for identifier, title, text in corpus)
    titles = set(corpus.titles)
    for question in source:
        assert set(question.supporting_titles) <= titles
        assert all(identifier in corpus for identifier in question.metadata.get("supporting_ids", ()))
        assert all(identifier in corpus for identifier in question.metadata.get("answer_ids", ()))
    counted = Counter(question.metadata.get("split") for question in source)
    assert all(counted[split] == rows for split, rows in splits.items() if split not in ("all", "extra"))


def real_data() -> Path:
    return Path(_DATA_AT_START)


_DATA_AT_START = os.environ.get("SEARCHQA_DATA", "")  # the fixture above hides it from the other tests


def test_a_source_can_be_pickled_with_its_questions(data: Path) -> None:
    source = load_source("nq", None, data)
    again = pickle.loads(pickle.dumps(source))
    assert ids(again) == ids(source)
    assert again.corpus().sha256 == source.corpus().sha256
