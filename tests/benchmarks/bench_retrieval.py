"""Index build and search speed of BM25Retriever next to plain bm25s (tokenize + retrieve, numba backend), in one run.

    python tests/benchmarks/bench_retrieval.py --corpus hotpotqa/corpus.jsonl.gz --questions hotpotqa/questions.jsonl.gz

The two take turns, so that a busy machine slows both; the fastest repeat of each counts. Both get texts and give documents with
scores for the top 3, on one thread. "build" begins with passages in memory and ends with an index ready to search (ours: stored on
disk and mapped; bm25s: in memory). Compilation by numba is done before. "analysed" is bm25s without its tokenizer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bm25s
import numpy as np
import Stemmer

from searchqa_retrievers import BM25Retriever, Corpus, SearchRequest

TOP_K = 3


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fastest_of(repeats: int, works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Run all works in turn, ``repeats`` times; the least seconds of each."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(repeats):
        for name, work in works.items():
            best[name] = min(best[name], seconds(work))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, type=Path)
    parser.add_argument("--questions", required=True, type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--build-repeats", type=int, default=3)
    arguments = parser.parse_args()

    corpus = Corpus.from_jsonl(arguments.corpus)
    opener = gzip.open if arguments.questions.suffix == ".gz" else open
    with opener(arguments.questions, "rt", encoding="utf-8") as lines:
        questions = [json.loads(line)["question"] for line in lines]
    texts = [corpus.contents(i) for i in range(len(corpus))]
    stemmer = Stemmer.Stemmer("english")

    def tokenize(queries: list[str]) -> list[list[str]]:
        return bm25s.tokenize(queries, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)

    def build_theirs() -> bm25s.BM25:
        index = bm25s.BM25(backend="numba")
        index.index(bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False)
        return index

    def search_theirs(index: bm25s.BM25, size: int) -> None:
        for start in range(0, len(questions), size):
            tokens = tokenize(questions[start : start + size])
            index.retrieve(tokens, k=TOP_K, n_threads=1, show_progress=False)

    def retrieve_only(index: bm25s.BM25, tokens: list[list[str]], size: int) -> None:
        for start in range(0, len(questions), size):
            index.retrieve(tokens[start : start + size], k=TOP_K, n_threads=1, show_progress=False)

    def search_ours(retriever: BM25Retriever, size: int) -> None:
        for start in range(0, len(questions), size):
            retriever.search([SearchRequest(query, TOP_K) for query in questions[start : start + size]])

    with tempfile.TemporaryDirectory() as folder:

        def build_ours() -> BM25Retriever:
            with_own_folder = tempfile.mkdtemp(dir=folder)
            return BM25Retriever(corpus, cache_dir=with_own_folder, show_progress=False)

        ours, theirs = build_ours(), build_theirs()
        search_ours(ours, 64)
        search_theirs(theirs, 64)
        tokens = tokenize(questions)
        answers = ours.search([SearchRequest(query, TOP_K) for query in questions])
        expected = theirs.retrieve(tokens, k=TOP_K, n_threads=1, show_progress=False).scores
        # bm25s fills up with passages of score 0, which we leave out.
        scores = np.array([[hit.score for hit in hits] + [0.0] * (TOP_K - len(hits)) for hits in answers], dtype=np.float32)
        equal = bool((scores == expected).all())
        build = fastest_of(arguments.build_repeats, {"ours": build_ours, "bm25s": build_theirs})
        batch = fastest_of(
            arguments.repeats,
            {
                "ours": lambda: search_ours(ours, 64),
                "bm25s": lambda: search_theirs(theirs, 64),
                "analysed": lambda: retrieve_only(theirs, tokens, 64),
            },
        )
        single = fastest_of(
            arguments.repeats,
            {
                "ours": lambda: search_ours(ours, 1),
                "bm25s": lambda: search_theirs(theirs, 1),
                "analysed": lambda: retrieve_only(theirs, tokens, 1),
            },
        )

    print(f"{len(corpus):,} passages, {len(questions):,} questions, top {TOP_K}, bm25s {bm25s.__version__}")
    print(f"scores equal bit for bit: {equal}")
    print(f"build        ours {build['ours']:.2f} s   bm25s {build['bm25s']:.2f} s   ratio {build['bm25s'] / build['ours']:.2f}")
    for name, result in (("batch of 64", batch), ("single", single)):
        ours_rate, theirs_rate, analysed_rate = (len(questions) / result[key] for key in ("ours", "bm25s", "analysed"))
        print(
            f"{name:<12} ours {ours_rate:,.0f} q/s   bm25s {theirs_rate:,.0f} q/s   ratio {ours_rate / theirs_rate:.2f}   "
            f"(bm25s, analysed: {analysed_rate:,.0f} q/s, ratio {ours_rate / analysed_rate:.2f})"
        )


if __name__ == "__main__":
    main()
