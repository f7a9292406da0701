"""Made-up data in the formats of the real sets, and threads kept to one: two busy ones are slower than one on a small machine."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

PASSAGES = [
    ("Marie Curie", "Marie Curie was a physicist born in Warsaw. She married Pierre Curie."),
    ("Pierre Curie", "Pierre Curie was a French physicist born in Paris, the husband of Marie Curie."),
    ("Warsaw", "Warsaw is the capital of Poland, on the river Vistula."),
    ("Vistula", "The Vistula is the longest river of Poland; it flows into the Baltic Sea."),
    ("Łódź", "Łódź is a city in Poland known for its textile industry. 東京 is another."),
    ("Paris", "Paris is the capital of France."),
]
QUESTIONS: list[dict[str, Any]] = [
    {"id": "q1", "question": "On which river lies the birthplace of Marie Curie?", "golden_answers": ["Vistula", "the Vistula"]},
    {"id": "q2", "question": "Who was the husband of Marie Curie?", "golden_answers": ["Pierre Curie"]},
    {"id": "q3", "question": "Which sea does the Vistula flow into", "golden_answers": ["Baltic Sea"]},
    {"id": "q4", "question": "What is the capital of France?", "golden_answers": ["Paris"]},
    {"id": "q5", "question": "Which industry is Łódź known for?", "golden_answers": ["textile industry"]},
]
SUPPORTING = {"q1": ["Marie Curie", "Warsaw"], "q2": ["Marie Curie"], "q3": ["Vistula"], "q4": ["Paris"]}
SETS = ("hotpotqa", "2wikimultihopqa", "musique", "bamboogle", "nq", "triviaqa", "popqa")


def question_rows() -> list[dict[str, Any]]:
    """Five questions, as rows of questions.jsonl."""
    rows = []
    for row in QUESTIONS:
        metadata = {"split": "train", "type": "bridge"}
        if row["id"] in SUPPORTING:
            metadata["supporting_titles"] = SUPPORTING[row["id"]]
        rows.append({**row, "metadata": metadata})
    return rows


def corpus_rows() -> list[dict[str, str]]:
    """Six passages, as rows of corpus.jsonl."""
    return [{"id": f"p{i}", "title": title, "contents": f'"{title}"\n{text}'} for i, (title, text) in enumerate(PASSAGES)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON lines, gzipped where the name says so."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with all seven sets, five questions and six passages each."""
    folder = tmp_path_factory.mktemp("data")
    for name in SETS:
        write_jsonl(folder / name / "questions.jsonl", question_rows())
        write_jsonl(folder / name / "corpus.jsonl.gz", corpus_rows())
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes built by tests do not touch the user's cache."""
    before = os.environ.get("SEARCHQA_CACHE")
    os.environ["SEARCHQA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["SEARCHQA_CACHE"]
    else:
        os.environ["SEARCHQA_CACHE"] = before


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests on real questions run only where SEARCHQA_DATA names them; elsewhere they are deselected, which pytest counts."""
    if os.environ.get("SEARCHQA_DATA"):
        return
    without_data = [item for item in items if item.get_closest_marker("data") is None]
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("data") is not None])
    items[:] = without_data
