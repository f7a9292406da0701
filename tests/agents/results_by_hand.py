"""Results of evaluations made by hand, for tests of what is read from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from searchqa_agents.results import write_results

STAMP: dict[str, Any] = {
    "split": "dev",
    "questions_sha256": "b" * 64,
    "questions_played": 4,
    "question_list": {"kind": "all", "count": 4, "sha256": "d" * 64},
    "corpus_sha256": "a" * 64,
    "retriever": {"retriever": "bm25", "k1": 1.5, "corpus_sha256": "a" * 64},
    "top_k": 3,
    "samples": 1,
    "scoring_version": 1,
    "agent": {"kind": "search_once"},
    "seed": 0,
}


def score(set_name: str, question: str, sample: int = 0, answer: str | None = "Ada", **changes: Any) -> dict[str, Any]:
    """A row of scores; ``changes`` are metrics, beside ``groups`` and ``turns``."""
    own = {key: changes.pop(key) for key in ("groups", "turns") if key in changes}
    return {
        "schema_version": 1,
        "set": set_name,
        "id": question,
        "sample": sample,
        "question": f"{question}?",
        "golden_answers": ["Ada"],
        "answer": answer,
        "groups": {},
        "metrics": {"em": 0.0, "f1": 0.0, "searches": 1.0, **changes},
        "turns": [],
        "terminated": True,
        "truncated": False,
        "retokenized": False,
        **own,
    }


def seconds(row: Mapping[str, Any], model: float = 0.25, search: float = 0.75) -> dict[str, Any]:
    """A row of times."""
    return {"set": row["set"], "id": row["id"], "sample": row["sample"], "seconds": {"model": model, "search": search}}


def results(folder: Path, scores: Mapping[str, Sequence[float]], changes: Mapping[str, Any] | None = None, **more: Any) -> Path:
    """A folder with results: for each set the exact match (and F1) of its questions q0, q1, ...; ``changes`` of each set's stamp."""
    rows = [score(name, f"q{i}", em=value, f1=value, **more) for name, values in scores.items() for i, value in enumerate(values)]
    stamps = {name: {"dataset": name, **STAMP, **(changes or {})} for name in scores}
    folder.mkdir(parents=True)
    write_results(folder, rows, [seconds(row) for row in rows], stamps)
    return folder
