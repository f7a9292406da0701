"""Runs and entries of the benchmark, made by hand: a score at the end, and a straight line to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from searchqa_agents.bench.results import SHARES, Entry, Point, ScoreRun, common_part, write_run

REFERENCES = {"no_search": 0.0, "oracle": 1.0}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def stamp_of(task: str, seed: int, algorithm: str, **changes: Any) -> dict[str, Any]:
    """A stamp like that of a training run."""
    return {
        "dataset": "world",
        "revision": "generator-1",
        "split": "train",
        "preset": task,
        "corpus_sha256": "c" * 64,
        "retriever": {"retriever": "bm25", "k1": 1.5},
        "top_k": 1,
        "dialect": "search-r1",
        "prompt": "bare",
        "tokenizer": "world-1",
        "max_turns": 4,
        "searchqa_gym": "0.1.0",
        "commit": COMMIT,
        "platform": "Linux x86_64",
        "cpus": 2,
        "seed": seed,
        "algorithm": algorithm,
        "command": f"searchqa bench suite=hand-v1 algorithm={algorithm} 'seed=range(5)'",
    } | changes


def run_of(
    task: str,
    seed: int,
    final: float,
    *,
    algorithm: str = "mine",
    best: float | None = None,
    budget: int = 8000,
    status: str = "finished",
    settings: Mapping[str, Any] | None = None,
    stamp: Mapping[str, Any] | None = None,
    **changes: Any,
) -> ScoreRun:
    """A run whose score rises along a straight line from 0 to its final one; with ``best`` it is that high at 7/8 of its budget.

    An eighth of the budget is ten CPU seconds, 15 seconds and 500 environment tokens.
    """
    scores = [round(final * share, 6) for share in SHARES]
    if best is not None:
        scores[-2] = best
    points = tuple(
        Point(share, int(share * budget), place * 500, place, place * 15.0, place * 10.0, max(score, 0.0), 1.0, score)
        for place, (share, score) in enumerate(zip(SHARES, scores, strict=True))
    )
    own = {"learning_rate": 5e-4, "group_size": 8, "seed": seed} | dict(settings or {})
    whole = stamp_of(task, seed, algorithm, **(stamp or {}))
    return replace(ScoreRun("hand-v1", task, 1, algorithm, seed, budget, REFERENCES, points, own, whole, status), **changes)


def entry_of(finals: Mapping[str, Sequence[float]], algorithm: str = "mine", label: str | None = None, **changes: Any) -> Entry:
    """An entry with these final scores: task -> those of the seeds 0, 1, ..."""
    runs = [run_of(task, seed, final, algorithm=algorithm, **changes) for task, own in finals.items() for seed, final in enumerate(own)]
    return with_runs(runs, label or algorithm)


def with_runs(runs: Sequence[ScoreRun], label: str) -> Entry:
    """An entry of these runs."""
    ordered = tuple(sorted(runs, key=lambda run: (run.task, run.seed)))
    command = str(ordered[0].stamp["command"])
    return Entry(ordered[0].algorithm, ordered[0].suite, ordered, command, common_part([run.stamp for run in ordered]), label)


def sweep(folder: Path, *entries: Entry) -> Path:
    """A folder as a sweep leaves it: ``<algorithm>/<task>/seed-<n>/score.json``."""
    for entry in entries:
        for run in entry.runs:
            job = folder / run.algorithm / run.task / f"seed-{run.seed}"
            job.mkdir(parents=True)
            (job / "config.yaml").write_text("algorithm: {}\n")
            write_run(job, run)
    return folder
