"""Peak memory, disk and time of BM25 in memory and on disk, over made-up passages; each run in a process of its own.

    python tests/benchmarks/bench_bm25_memory.py --backend disk --passages 100000

Passages have 100 words, drawn by Zipf's law (exponent 1.05) from 1.5 million of which the 33 most frequent are the stop words. They are
written to a file first and read from there as a stored corpus, so that the memory told is that of the index, not of the texts.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from searchqa_retrievers import SearchRequest, build_retriever
from searchqa_retrievers.analysis import ENGLISH_STOP_WORDS, Analyzer
from searchqa_retrievers.stored_corpus import open_corpus

WORDS = 1_500_000
QUERIES = 200


def write_corpus(path: Path, passages: int) -> None:
    shares = np.cumsum(1 / np.arange(1, WORDS + 1) ** 1.05)
    words = [*ENGLISH_STOP_WORDS, *(f"{number:x}q" for number in range(WORDS - len(ENGLISH_STOP_WORDS)))]
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for start in range(0, passages, 10_000):
            rows = np.searchsorted(shares, generator.random((min(10_000, passages - start), 100)) * shares[-1])
            for number, row in enumerate(rows.tolist(), start):
                text = " ".join(words[min(word, WORDS - 1)] for word in row)
                file.write(json.dumps({"id": str(number), "text": text}) + "\n")


def resident() -> dict[str, int]:
    """MB in memory now, and at most so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(lines[name].split()[0]) // 1000 for name in ("RssAnon", "RssFile"))
    return {"own": own, "mapped": mapped, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=("memory", "disk"), required=True)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where the corpus and the index are kept for another run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"passages-{arguments.passages}.jsonl"
        if not file.exists():
            write_corpus(file, arguments.passages)
        started = time.perf_counter()
        corpus = open_corpus(file, stored=True, cache_dir=folder)
        print(f"corpus: {time.perf_counter() - started:.1f} s, MB {resident()}")
        started = time.perf_counter()
        config = {"name": "bm25", "backend": arguments.backend, "cache_dir": str(folder), "cache_entries": 0}
        retriever = build_retriever(config, corpus)
        print(f"index: {time.perf_counter() - started:.1f} s, MB {resident()}")
        indexes = folder / ("bm25" if arguments.backend == "memory" else "bm25-disk")
        print(f"disk: {sum(path.stat().st_size for path in indexes.rglob('*') if path.is_file()) / 1e6:.0f} MB")
        draw, analyzer = random.Random(0), Analyzer()
        terms = [analyzer.terms(corpus.texts[draw.randrange(len(corpus))]) for _ in range(QUERIES)]
        queries = [" ".join(draw.sample(words, min(len(words), draw.randint(3, 8)))) for words in terms]
        retriever.search([SearchRequest("warm up", 3)])
        started = time.perf_counter()
        for query in queries:
            retriever.search([SearchRequest(query, 3)])
        print(f"query: {(time.perf_counter() - started) / QUERIES * 1e3:.2f} ms, MB {resident()}")


if __name__ == "__main__":
    main()
