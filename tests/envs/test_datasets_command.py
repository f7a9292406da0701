"""``searchqa data list | verify | merge``."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_agents.data_command import main
from searchqa_envs.datasets import clear_cache, load_custom, make_passage, passage_id
from searchqa_envs.datasets.merge import Part, PassageUnion, merge
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.questions import Question
from searchqa_retrievers import Passage

DATA = os.environ.get("SEARCHQA_DATA", "")
PO = make_passage("Po", "The Po is the longest river of Italy.")
ADDA = make_passage("Adda", "The Adda flows into the Po.")


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear_cache()
    monkeypatch.delenv("SEARCHQA_DATA", raising=False)
    monkeypatch.setenv("SEARCHQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return path


def question(identifier: str, split: str | None = None, **metadata: Any) -> dict[str, Any]:
    if split:
        metadata["split"] = split
    return {"id": identifier, "question": "q?", "golden_answers": ["a"], "metadata": metadata}


def passage(item: Passage) -> dict[str, str]:
    return {"id": item.id, "title": item.title, "text": item.text}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    gold = {"supporting_ids": [PO.id], "supporting_titles": ["Po"], "answer_ids": [ADDA.id]}
    write(root / "nq" / "questions.jsonl", question("0", "train", **gold), question("1", "dev"))
    write(root / "nq" / "corpus.jsonl", passage(PO), passage(ADDA))
    write(root / "hotpotqa" / "questions.jsonl", question("0", "train", **gold))
    write(root / "hotpotqa" / "questions_extra.jsonl", question("x"))
    write(
        root / "hotpotqa" / "corpus.jsonl", passage(PO), passage(ADDA), passage(make_passage("po", "the Po is the longest river, of Italy"))
    )
    return root


def test_list_says_where_each_set_is_with_rows_passages_and_licence(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--data-dir", str(data)]) == 0
    out = capsys.readouterr().out
    lines = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in out.splitlines() if line.startswith("│")
    }
    assert lines["nq"] == ["data_dir", "dev 1, train 1", "2", "CC BY-SA 3.0"]
    assert lines["hotpotqa"] == ["data_dir", "train 1; extra 1", "3", "CC BY-SA 4.0"]
    assert lines["popqa"][0] == "not here"
    assert "test 14,267" in lines["popqa"][1]
    assert str(data) in out


def test_verify_of_good_sets(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--data-dir", str(data)]) == 0
    out = capsys.readouterr().out
    assert "hotpotqa" in out
    assert "popqa" not in out
    assert main(["verify", "nq", "--data-dir", str(data)]) == 0


@pytest.mark.parametrize(
    ("rows", "extra", "corpus", "expected"),
    [
        ([question("0"), {"id": "1"}], [], [PO], "questions.jsonl, line 2"),
        ([question("0"), question("0")], [], [PO], "expected an id of its own, found '0'"),
        ([question("0")], [question("0")], [PO], "the id '0' is also in questions.jsonl"),
        ([question("0", supporting_ids=["zzz"])], [], [PO], "supporting_ids must be in the corpus; missing: 'zzz' of question '0'."),
        ([question(str(n), supporting_titles=["Rhine"]) for n in range(5)], [], [PO], "'Rhine' of question '2' and 2 more."),
        ([question("0", answer_titles=["Rhine"])], [], [PO], "answer_titles must be in the corpus; missing: 'Rhine'"),
        ([question("0", supporting_ids=[PO.id])], [], [], "questions name supporting passages, but there is no corpus.jsonl"),
    ],
)
def test_verify_finds_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], extra: list[Any], corpus: list[Passage], expected: str
) -> None:
    write(tmp_path / "nq" / "questions.jsonl", *rows)
    if extra:
        write(tmp_path / "nq" / "questions_extra.jsonl", *extra)
    if corpus:
        write(tmp_path / "nq" / "corpus.jsonl", *map(passage, corpus))
    assert main(["verify", "nq", "--data-dir", str(tmp_path)]) == 1
    assert expected in capsys.readouterr().out


def test_verify_finds_a_bad_corpus_a_changed_file_and_a_missing_set(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(data / "nq" / "corpus.jsonl", passage(PO), {"id": "1"})
    assert main(["verify", "--data-dir", str(data)]) == 1
    assert "corpus.jsonl, line 2, field 'contents'" in capsys.readouterr().out
    sums = {"questions.jsonl": {"sha256": "0" * 64}}
    (data / "hotpotqa" / "searchqa-data.json").write_text(json.dumps({"files": sums}))
    assert main(["verify", "hotpotqa", "popqa", "--data-dir", str(data)]) == 1
    out = capsys.readouterr().out
    found = hashlib.sha256((data / "hotpotqa" / "questions.jsonl").read_bytes()).hexdigest()
    assert f"must have the sha256 {'0' * 64}, has {found}" in out
    assert "popqa: not on this machine" in out
    assert main(["verify", "--data-dir", str(data / "nowhere")]) == 1


def test_merge_keeps_ids_apart_and_the_origin_known(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    assert main(["merge", "nq", "hotpotqa", "--split", "train", "--data-dir", str(data), "--out", str(out)]) == 0
    assert "2 questions; 3 passages of 5 (2 equal, 0 nearly equal dropped)" in capsys.readouterr().out
    first, second = read(out / "questions.jsonl.gz")
    assert (first["id"], second["id"]) == ("nq/0", "hotpotqa/0")
    assert {key: second["metadata"][key] for key in ("origin", "origin_id", "split")} == {
        "origin": "hotpotqa",
        "origin_id": "0",
        "split": "train",
    }
    assert first["metadata"]["supporting_ids"] == [PO.id]
    source = load_custom(out / "questions.jsonl.gz", out / "corpus.jsonl.gz")
    assert (len(source), len(source.corpus())) == (2, 3)
    assert PO in list(source.corpus())
    assert main(["verify", "merged", "--data-dir", str(tmp_path)]) == 0  # the record has the sums of what was written
    assert "2 checked" in capsys.readouterr().out


def test_merge_drops_near_duplicates_when_asked(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    assert main(["merge", "nq", "hotpotqa", "--near-duplicates", "--data-dir", str(data), "--out", str(out)]) == 0
    assert "2 passages of 5 (2 equal, 1 nearly equal dropped)" in capsys.readouterr().out


def test_merge_of_files_with_labels_and_corpora_numbered_alike(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", question("0", supporting_ids=["0"]))
    two = write(tmp_path / "two.jsonl", question("0", supporting_ids=["0"]))
    river = write(tmp_path / "river.jsonl", {"id": 0, "title": "Po", "text": "A river."})
    colour = write(tmp_path / "colour.jsonl", {"id": 0, "title": "Red", "text": "A colour."})
    out = tmp_path / "out"
    parts = [f"a={one}", str(two), "--corpus", f"a={river}", "--corpus", f"two={colour}"]
    assert main(["merge", *parts, "--out", str(out)]) == 0
    first, second = read(out / "questions.jsonl.gz")
    assert (first["id"], second["id"]) == ("a/0", "two/0")
    assert first["metadata"]["supporting_ids"] == [passage_id("Po", "A river.")]
    assert second["metadata"]["supporting_ids"] == [passage_id("Red", "A colour.")]


def test_merge_refuses_what_cannot_be_kept_apart(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--data-dir", str(data), "--out", str(tmp_path / "out")]
    assert main(["merge", "nq", "nq", *out]) == 2
    assert "different labels, got nq, nq" in capsys.readouterr().err
    assert main(["merge", "nq", "--corpus", "other=x.jsonl", *out]) == 2
    assert "--corpus names a part that there is not: other" in capsys.readouterr().err
    assert main(["merge", "nq", "--corpus", "x.jsonl", *out]) == 2
    assert "must be LABEL=PATH" in capsys.readouterr().err
    assert main(["merge", "nq", "--data-dir", str(data), "--out", str(data)]) == 2
    assert "must be empty or not there yet" in capsys.readouterr().err
    bare = write(tmp_path / "bare.jsonl", question("0"))
    assert main(["merge", str(bare), *out]) == 1
    assert "--no-corpus" in capsys.readouterr().err
    assert main(["merge", str(bare), "--no-corpus", *out]) == 0
    assert not (tmp_path / "out" / "corpus.jsonl.gz").exists()


def test_equal_merges_give_equal_bytes(tmp_path: Path) -> None:
    parts = [Part("a", [Question("0", "q?", ("x",), {"type": "bridge"})], [PO, ADDA])]
    for name in ("one", "two"):
        merge(parts, tmp_path / name)
    for name in ("questions.jsonl.gz", "corpus.jsonl.gz", "searchqa-data.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with pytest.raises(ConfigurationError, match="must be empty"):
        merge(parts, tmp_path / "one")


@given(st.lists(st.tuples(st.text("aA", max_size=2), st.text("bB. ", max_size=4)), max_size=12), st.booleans())
def test_a_union_knows_every_passage_by_one_id(contents: list[tuple[str, str]], near: bool) -> None:
    union = PassageUnion(near)
    ids = [union.add(Passage(str(number), title, text)) for number, (title, text) in enumerate(contents)]
    assert set(ids) == set(union.passages)
    assert len(union.passages) == len(contents) - union.equal - union.nearly_equal
    keys = [(title.lower(), "".join(filter(str.isalnum, text.lower()))) if near else (title, text) for title, text in contents]
    assert len(set(keys)) == len(union.passages)
    assert [ids.index(identifier) for identifier in ids] == [keys.index(key) for key in keys]


@pytest.mark.parametrize("arguments", [[], ["merge", "nq"], ["nonsense"], ["download"]])
def test_a_wrong_command_line_is_2_and_help_is_0(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage: searchqa data" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["list"], ["download"], ["verify"], ["merge"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    assert f"usage: searchqa data {' '.join(command)}".strip() in capsys.readouterr().out


@pytest.mark.data
def test_real_sets_verify_and_merge_to_the_union_their_description_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["hotpotqa", "2wikimultihopqa", "musique", "bamboogle", "nq", "triviaqa", "popqa"]
    assert main(["verify", *names, "--data-dir", DATA]) == 0
    assert main(["merge", *names, "--near-duplicates", "--data-dir", DATA, "--out", str(tmp_path / "union")]) == 0
    assert "3,910 questions; 70,080 passages of 70,208 (82 equal, 46 nearly equal dropped)" in capsys.readouterr().out
