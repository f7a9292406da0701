"""Statistics and files of 50,000 rows of scores: OMP_NUM_THREADS=1 python tests/benchmarks/bench_results.py

``--rows 1000`` for fewer, ``--samples 4`` for so many rows per question. Rows are made up: 30 metrics, one to four turns of three passages each. Seconds are
of the processor, of one run each, so that other work on the machine disturbs less; memory is what the process needs during the step beyond what it had
before, without mapped files (Linux).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from processes import OwnMemory
from rich.console import Console

from searchqa_agents.eval_statistics import paired, summarise_rows
from searchqa_agents.measures import SCHEMA_VERSION
from searchqa_agents.results import read_results, write_results

METRICS = ("em", "f1", "cover_em", "sub_em", "title_recall_mean", *(f"metric_{i}" for i in range(25)))


def made_rows(count: int, samples: int, seed: int) -> list[dict[str, Any]]:
    """``count`` rows with random values; the questions are the same whatever the seed."""
    rng = np.random.default_rng(seed)
    values = (rng.random((count, len(METRICS))) < 0.4).astype(float).tolist()
    turns = rng.integers(1, 5, count).tolist()
    return [
        {
            "schema_version": SCHEMA_VERSION,
            "set": "made",
            "id": f"question-{i // samples}",
            "sample": i % samples,
            "question": f"What is number {i // samples} of the questions that were made up?",
            "golden_answers": [f"answer {i // samples}"],
            "answer": f"answer {i // samples + int(values[i][0])}",
            "groups": {"type": f"type {i // samples % 10}", "hops": 1 + i // samples % 4},
            "metrics": dict(zip(METRICS, values[i], strict=True)),
            "turns": [
                {
                    "action": "search",
                    "content": f"query {i} {t}",
                    "passages": [[f"p{i}-{t}-{k}", f"Title {k}"] for k in range(3)],
                    "title_recall": 0.5,
                }
                for t in range(turns[i])
            ],
            "terminated": True,
            "truncated": False,
            "retokenized": False,
        }
        for i in range(count)
    ]


def main(line: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--samples", type=int, default=1)
    options = parser.parse_args(line)
    rows, other = (made_rows(options.rows, options.samples, seed) for seed in (0, 1))
    times = [{"set": r["set"], "id": r["id"], "sample": r["sample"], "seconds": {"model": 1.0, "search": 0.1}} for r in rows]
    console = Console()

    def timed(what: str, do: Callable[[], object]) -> None:
        memory = OwnMemory()
        before, started = memory.peak, time.process_time()
        do()
        elapsed = time.process_time() - started
        console.print(f"{what:48} {elapsed:7.2f} s {max(0, memory.peak - before) / 1e6:7.0f} MB", highlight=False)

    console.print(f"{options.rows} rows, {options.samples} of each question, {len(METRICS)} metrics", highlight=False)
    timed("summarise, with intervals and groups", lambda: summarise_rows(rows, times))
    timed("compare two runs in em", lambda: paired(rows, other, "em"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        timed("write scores, times, Parquet", lambda: write_results(folder, rows, times, {"made": {"dataset": "made"}}))
        timed("read scores.jsonl", lambda: read_results(folder / "scores.jsonl"))
        timed("read results.parquet", lambda: read_results(folder / "results.parquet"))
        sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in sorted(folder.iterdir()))
        console.print(sizes, highlight=False)


if __name__ == "__main__":
    main()
