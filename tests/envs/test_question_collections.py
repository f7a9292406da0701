"""Published collections of questions as the questions of a custom environment, by name; and R1-Searcher's own rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import searchqa_envs  # noqa: F401, registers the ids
from searchqa_envs.datasets import clear_cache, read_questions
from searchqa_envs.errors import DataNotFoundError, MalformedRowError

HTTP = {"name": "http", "url": "http://127.0.0.1:9", "format": "search-r1"}  # nothing listens there, and nothing is asked


@pytest.fixture(autouse=True)
def _no_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear_cache()
    monkeypatch.delenv("SEARCHQA_DATA", raising=False)
    monkeypatch.setenv("SEARCHQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def search_r1_row(source: str, split: str, index: int) -> dict[str, Any]:
    return {
        "data_source": source,
        "question": f"{source} {split} {index}?",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["yes"]}},
        "extra_info": {"split": split, "index": index},
    }


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["nq_hotpotqa_train", "zerosearch"])
def test_a_collection_is_played_by_name_and_needs_no_corpus_where_a_server_is_asked(tmp_path: Path, name: str) -> None:
    write(tmp_path / name / "train.jsonl", search_r1_row("nq", "train", 0), search_r1_row("hotpotqa", "train", 0))
    write(tmp_path / name / "test.jsonl", search_r1_row("bamboogle", "test", 0))
    env = gym.make("SearchQA-Custom-v0", questions=name, data_dir=str(tmp_path), retriever=HTTP)
    ids = {env.unwrapped.source[index].id for index in range(len(env.unwrapped.source))}  # type: ignore[attr-defined]
    assert ids == {"nq-train-0", "hotpotqa-train-0"}
    assert env.unwrapped.stamp()["dataset"] == name  # type: ignore[attr-defined]
    _, info = env.reset(seed=0)
    assert info["question_id"] in ids
    held_out = gym.make("SearchQA-Custom-v0", questions=name, split="test", data_dir=str(tmp_path), retriever=HTTP)
    assert [held_out.unwrapped.source[0].id] == ["bamboogle-test-0"]  # type: ignore[attr-defined]


def test_a_collection_that_is_nowhere_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match="searchqa data download nq_hotpotqa_train"):
        gym.make("SearchQA-Custom-v0", questions="nq_hotpotqa_train", data_dir=str(tmp_path), retriever=HTTP)


def test_r1_searcher_rows_are_read_and_what_they_hold_of_generations_is_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "stage_1.jsonl", {"idx": 7, "question": "who?", "answer": "Ann", "pred_anses": ["Bob"]})
    [entry] = read_questions(path)
    assert (entry.question.id, entry.question.question, entry.question.golden_answers) == ("7", "who?", ("Ann",))


def test_an_r1_searcher_answer_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "stage_1.jsonl", {"idx": 7, "question": "who?", "answer": 4})
    with pytest.raises(MalformedRowError, match="answer"):
        list(read_questions(path))
