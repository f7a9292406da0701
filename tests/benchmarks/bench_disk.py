"""BM25 on disk and an IVF-PQ index at a million passages, built and searched with little memory; from several sizes, an estimate for Wikipedia.

    python tests/benchmarks/bench_disk.py --passages 1000000
    python tests/benchmarks/bench_disk.py --passages 100000 300000 1000000 --estimate 21000000

Each part runs in a process of its own, on one thread. Its peak memory counts all, mapped files included; more than ``--limit`` GB is said, and makes
the exit code 1. Its own memory is without mapped files, whose pages the system takes back where it needs room. Text and vectors are made up (see
``synthetic_corpus``), in files below ``--folder``; a run that was stopped goes on. The estimate is a straight line through the sizes (least squares),
for each number by itself. Needs the extra ``disk``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import processes
import synthetic_corpus

from searchqa_retrievers import SearchRequest

PARTS = ("corpus stored", "BM25 on disk, build", "BM25 on disk, search", "IVF-PQ, build", "IVF-PQ, search")
TOP_K = 3
EXACT_QUERIES = 64


def measure(part: str, folder: Path) -> dict[str, float]:
    """Seconds, bytes on disk, peak memory; of a search also queries a second and latencies."""
    own = processes.OwnMemory()
    numbers = _measure(part, folder)
    return {**numbers, "memory": numbers.get("memory", processes.peak_memory()), "own memory": own.peak}


def _measure(part: str, folder: Path) -> dict[str, float]:
    cache = folder / "cache"
    started = time.perf_counter()
    if part == "corpus stored":
        _corpus(folder)
        return _built(started, cache / "corpora")
    if part == "BM25 on disk, build":
        _bm25(folder)
        return _built(started, cache / "bm25-disk")
    if part == "IVF-PQ, build":
        from searchqa_retrievers.dense_approximate import estimate

        _, vectors = _vector_index(folder)
        needs = estimate("ivf-pq", *vectors.shape)
        told = {"disk as estimated ahead": needs.memory, "own memory as estimated ahead": needs.building}
        return {**_built(started, cache / "dense"), **told}
    if part == "BM25 on disk, search":
        retriever = _bm25(folder)
        loaded = time.perf_counter() - started
        requests = [[SearchRequest(query, TOP_K)] for query in synthetic_corpus.read_queries(folder)]
        return _searched(loaded, lambda number: retriever.search(requests[number]), len(requests))
    index, vectors = _vector_index(folder)
    loaded = time.perf_counter() - started
    queries = np.load(folder / "query_vectors.npy")
    numbers = _searched(loaded, lambda number: index.search(queries[number : number + 1], TOP_K), len(queries))
    from searchqa_retrievers.dense_index import DenseIndex, mapped_anew

    few = queries[:EXACT_QUERIES]
    exact, found = DenseIndex(mapped_anew(vectors)).search(few, 10), index.search(few, 10)
    common = sum(len(set(one[0]) & set(other[0])) for one, other in zip(exact, found, strict=True))
    return {**numbers, "recall of the exact top 10": common / (10 * len(few))}


def _corpus(folder: Path) -> Any:
    from searchqa_retrievers.stored_corpus import open_corpus

    return open_corpus(folder / "corpus.jsonl", stored=True, cache_dir=folder / "cache")


def _bm25(folder: Path) -> Any:
    from searchqa_retrievers.bm25_disk import DiskBM25Retriever

    return DiskBM25Retriever(_corpus(folder), cache_dir=folder / "cache")


def _vector_index(folder: Path) -> tuple[Any, Any]:
    from searchqa_retrievers.dense_approximate import ApproximateIndex, open_or_train

    vectors = np.load(folder / "vectors.npy", mmap_mode="r").view(np.ndarray)
    return ApproximateIndex(vectors, open_or_train(folder / "cache" / "dense", "ivf-pq", vectors, show_progress=True)), vectors


def _built(started: float, folder: Path) -> dict[str, float]:
    return {"seconds": time.perf_counter() - started, "disk": processes.disk(folder)}


def _searched(loaded: float, search: Any, count: int) -> dict[str, float]:
    for number in range(min(count, 32)):
        search(number)
    times = []
    begun = time.perf_counter()
    for number in range(count):
        started = time.perf_counter()
        search(number)
        times.append(time.perf_counter() - started)
    return {
        "load seconds": loaded,
        "memory": processes.peak_memory(),  # before the vectors are all read, to tell the recall
        "mean ms": 1e3 * (time.perf_counter() - begun) / count,
        "p50 ms": 1e3 * processes.percentile(times, 0.5),
        "p99 ms": 1e3 * processes.percentile(times, 0.99),
    }


def make(what: str, folder: Path, count: int) -> dict[str, float]:
    started = time.perf_counter()
    write = synthetic_corpus.write_passages if what == "text" else synthetic_corpus.write_vectors
    file = write(folder, count)
    return {"seconds": time.perf_counter() - started, "disk": file.stat().st_size, "memory": processes.peak_memory()}


def shown(key: str, value: float) -> str:
    if "disk" in key or "memory" in key:
        return f"{value / 1e9:,.2f} GB"
    if key.endswith("seconds"):
        return f"{value:,.2f} s" if value < 3600 else f"{value / 3600:,.1f} h"
    return f"{value:,.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--estimate", type=int, help="also a number of passages to estimate for, from two sizes at least")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/bench_disk"), help="for text, vectors, indexes and results (4 GB a million)"
    )
    parser.add_argument("--limit", type=float, default=4.0, help="GB of memory that no process may pass")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help=f"only some of: {'; '.join(PARTS)}")
    parser.add_argument("--delete", action="store_true", help="delete text, vectors and indexes of a size once it is measured")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        part, count = arguments.worker
        if part in ("text", "vectors"):
            processes.answer(make(part, arguments.folder, int(count)))
        else:
            processes.answer(measure(part, arguments.folder))
        return 0
    if arguments.estimate and len(set(arguments.passages)) < 2:
        parser.error("--estimate needs at least two different --passages")
    results = processes.Results(arguments.folder / "results.json")
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for count in sorted(set(arguments.passages)):
        folder = arguments.folder / str(count)
        parts = [part for part in PARTS if part in arguments.parts]
        missing = [part for part in parts if f"{count} {part}" not in results]
        for what, wanted in (("text", any("IVF" not in part for part in missing)), ("vectors", any("IVF" in part for part in missing))):
            if wanted:
                processes.in_process(__file__, "--folder", str(folder), "--worker", what, str(count))
        for part in parts:
            rows.setdefault(part, {})[count] = results.get(
                f"{count} {part}", __file__, "--folder", str(folder), "--worker", part, str(count)
            )
        if arguments.delete:
            shutil.rmtree(folder, ignore_errors=True)
    sizes = sorted(set(arguments.passages))
    last = [f"{arguments.estimate:,} (estimate)"] if arguments.estimate else []
    print("| | " + " | ".join([f"{size:,}" for size in sizes] + last) + " |")
    print("|---" * (1 + len(sizes) + len(last)) + "|")
    for part, numbers in rows.items():
        for key in next(iter(numbers.values())):
            values = [numbers[size][key] for size in sizes]
            cells = [shown(key, value) for value in values]
            if arguments.estimate:
                if key.startswith("recall"):
                    cells.append("")
                else:
                    slope, start = np.polyfit(sizes, values, 1)
                    cells.append(shown(key, float(start + slope * arguments.estimate)))
            print(f"| {part}: {key} | " + " | ".join(cells) + " |")
    over = [
        f"{part} at {size:,}: {shown('memory', numbers[size]['memory'])}"
        for part, numbers in rows.items()
        for size in sizes
        if numbers[size]["memory"] > arguments.limit * 1e9
    ]
    print(f"\npeak memory of every process within {arguments.limit:g} GB: {'no: ' + '; '.join(over) if over else 'yes'}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
