"""The search of one step of 64 environments, next to bm25s (numba) on the distinct queries, and with the duplicates of GRPO groups.

    python tests/benchmarks/bench_search_step.py --corpus hotpotqa/corpus.jsonl.gz --questions hotpotqa/questions.jsonl.gz
    python tests/benchmarks/bench_search_step.py --passages 100000

"step" is what an environment does between the policy's queries and its observations: ``Rules.search`` (equal requests asked once, analysis, BM25, top 3
with texts) and ``Rules.information`` (passages as text, tags neutralised, encoded to ids). "search" is the first of the two. bm25s is its ``tokenize``
and ``retrieve`` of the distinct queries, on one thread. Nothing is remembered from one step to the next.
In the second table the 64 requests are 8 questions in groups of 8; so many of the requests as the rate says repeat one of their own group: word for
word ("exact"), or with other spaces, capitals and marks ("normalised"). "each" asks every request by itself and formats its answer.
All ways take turns, in changing order, each with cold caches of the processor; the median over steps of the fastest of ``--repeats`` rounds counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import bm25s
import gymnasium as gym
import numpy as np
import Stemmer
import synthetic_corpus

import searchqa_envs  # noqa: F401 - registers the environments
from searchqa_retrievers import BM25Retriever, Corpus, SearchRequest
from searchqa_retrievers.analysis import Analyzer
from searchqa_retrievers.measures import read_asked

ENVIRONMENTS = 64
GROUP = 8
TOP_K = 3
BALLAST_BYTES = 64_000_000
RATES = (0.0, 0.25, 0.5, 0.75)

Step = list[SearchRequest]


class Ways:
    """The same passages behind an environment's rules and behind bm25s."""

    def __init__(self, corpus: Corpus) -> None:
        self.retriever = BM25Retriever(corpus)
        question = {"id": "q", "question": "?", "golden_answers": ["a"], "metadata": {}}
        passages = [{"id": "a", "contents": '"T"\ntext'}]
        env: Any = gym.make("SearchQA-Custom-v0", questions=[question], corpus=passages, retriever=self.retriever)
        self.rules = env.unwrapped.rules
        self.analyzer = Analyzer()
        self.stemmer = Stemmer.Stemmer("english")
        self.theirs = bm25s.BM25(backend="numba")
        texts = list(map(corpus.contents, range(len(corpus))))
        self.theirs.index(bm25s.tokenize(texts, stopwords="en", stemmer=self.stemmer, show_progress=False), show_progress=False)

    def search(self, step: Step) -> Any:
        answers, error, _ = self.rules.search(step)
        assert error is None
        return answers

    def forget(self) -> None:
        """Begin as after a step with other queries."""
        self.rules._information.clear()
        self.retriever._terms = self.analyzer.query_terms()

    def step(self, step: Step) -> None:
        for hits in self.search(step):
            self._observe(hits)

    def each(self, step: Step) -> None:
        for request in step:
            self._observe(self.rules.search([request])[0][0])

    def search_each(self, step: Step) -> None:
        for request in step:
            self.rules.search([request])

    def bm25s(self, step: Step) -> None:
        queries = list(dict.fromkeys(request.query for request in step))
        tokens = bm25s.tokenize(queries, stopwords="en", stemmer=self.stemmer, return_ids=False, show_progress=False)
        self.theirs.retrieve(tokens, k=TOP_K, n_threads=1, show_progress=False)

    def bm25s_each(self, step: Step) -> None:
        for request in step:
            self.bm25s([request])

    def _observe(self, hits: Any) -> None:
        self.rules.information(tuple(hit.passage for hit in hits), "", self.rules.max_observation_tokens)


def fastest(forget: Callable[[], None], ways: dict[str, Callable[[Step], object]], steps: Sequence[Step], repeats: int) -> dict[str, float]:
    """Seconds of a step in each way: the median over the steps of the fastest round of each."""
    best = {name: [float("inf")] * len(steps) for name in ways}
    ballast = np.zeros(BALLAST_BYTES // 8)
    for turn in range(repeats):
        order = list(ways.items())
        order = order[turn % len(order) :] + order[: turn % len(order)]
        for number, step in enumerate(steps):
            for name, way in order:
                forget()
                ballast += (
                    1.0  # as after a policy's turn, nothing of the index is in the processor's caches; else who comes second is quicker
                )
                started = time.perf_counter()
                way(step)
                best[name][number] = min(best[name][number], time.perf_counter() - started)
    return {name: median(times) for name, times in best.items()}


def steps_of(queries: Sequence[str], count: int) -> list[Step]:
    """Of distinct queries each."""
    distinct = list(dict.fromkeys(queries))
    picks = [[distinct[(number * ENVIRONMENTS + slot) % len(distinct)] for slot in range(ENVIRONMENTS)] for number in range(count)]
    return [[SearchRequest(query, TOP_K) for query in picked] for picked in picks]


def with_duplicates(steps: Sequence[Step], rate: float, kind: str) -> list[Step]:
    """So many of each group, drawn at random, become another one of it."""
    generator = np.random.default_rng(0)
    changed = []
    for step in steps:
        queries = [request.query for request in step]
        for start in range(0, ENVIRONMENTS, GROUP):
            slots = generator.permutation(GROUP).tolist()
            kept = max(1, GROUP - round(rate * GROUP))
            for slot in slots[kept:]:
                original = queries[start + slots[int(generator.integers(kept))]]
                queries[start + slot] = original if kind == "exact" else _varied(original, generator)
        changed.append([SearchRequest(query, TOP_K) for query in queries])
    return changed


def _varied(query: str, generator: np.random.Generator) -> str:
    ways = (
        query.upper(),
        query.title(),
        f" {query}",
        f"{query} ",
        f"{query}.",
        f"{query}?",
        query.replace(" ", "  ", 1),
        query.capitalize(),
    )
    return ways[int(generator.integers(len(ways)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--passages", type=int, help="so many made-up passages instead")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_search_step"), help="for made-up passages")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.passages:
        folder = arguments.folder / str(arguments.passages)
        corpus = Corpus.from_jsonl(synthetic_corpus.write_passages(folder, arguments.passages))
        queries = synthetic_corpus.read_queries(folder)
    elif arguments.corpus and arguments.questions:
        corpus = Corpus.from_jsonl(arguments.corpus)
        queries = [one.query for one in read_asked(arguments.questions)]
    else:
        parser.error("give --corpus and --questions, or --passages")
    ways = Ways(corpus)
    steps = steps_of(queries, arguments.steps)
    for way in (ways.step, ways.each, ways.bm25s):
        way(steps[0])

    distinct = fastest(ways.forget, {"search": ways.search, "step": ways.step, "bm25s": ways.bm25s}, steps, arguments.repeats)
    print(f"{len(corpus):,} passages, {ENVIRONMENTS} environments, top {TOP_K}, bm25s {bm25s.__version__}\n")
    print("| 64 distinct queries | ms | of bm25s |")
    print("|---|---|---|")
    for name, label in (("bm25s", "bm25s tokenize + retrieve"), ("search", "ours: search"), ("step", "ours: search and format (step)")):
        print(f"| {label} | {1e3 * distinct[name]:.2f} | {distinct[name] / distinct['bm25s']:.2f} |")
    print(
        f"\n| groups of {GROUP}, duplicates | distinct of 64 | step ms | each ms | each / step | search ms "
        "| search each / search | bm25s each ms | bm25s each / step | step / bm25s distinct |"
    )
    print("|---" * 10 + "|")
    for kind in ("exact", "normalised"):
        for rate in RATES:
            repeated = with_duplicates(steps, rate, kind)
            number = np.mean([len({request.query for request in step}) for step in repeated])
            times = fastest(
                ways.forget,
                {
                    "step": ways.step,
                    "each": ways.each,
                    "search": ways.search,
                    "search each": ways.search_each,
                    "bm25s each": ways.bm25s_each,
                    "bm25s": ways.bm25s,
                },
                repeated,
                arguments.repeats,
            )
            print(
                f"| {rate:.2f} {kind} | {number:.1f} | {1e3 * times['step']:.2f} | {1e3 * times['each']:.2f} | {times['each'] / times['step']:.2f} | "
                f"{1e3 * times['search']:.2f} | {times['search each'] / times['search']:.2f} | "
                f"{1e3 * times['bm25s each']:.2f} | {times['bm25s each'] / times['step']:.2f} | {times['step'] / times['bm25s']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
