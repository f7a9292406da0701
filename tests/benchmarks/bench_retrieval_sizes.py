"""BM25 at several sizes: ours in memory and on disk next to plain bm25s (numba), tantivy and rank_bm25, in one run.

    python tests/benchmarks/bench_retrieval_sizes.py --passages 10000 100000 1000000

Passages and queries are made up (see ``synthetic_corpus``). Every engine is built in a process of its own. "build": from passages in memory (ours on
disk: from the stored corpus) to an index on disk; "CPU": the same in seconds of the processor, which other processes disturb less; "memory": the peak of
that process. Disk is with the texts for ours on disk and tantivy, without them for the others. Then every engine is loaded in a process of its own, and
all take turns at answering the same queries, top 3, from text to documents with scores, on one thread; the fastest turn of each counts. rank_bm25 cannot
store an index: it is built where it is searched, and since it has no batches, it is asked 4 queries at a time. Memory counts mapped files. ``x`` is the
rate of an engine divided by that of bm25s. A run that was stopped goes on. Needs the extra ``disk``, and rank_bm25.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import processes
import synthetic_corpus

from searchqa_retrievers import BM25Retriever, Corpus, Retriever, SearchRequest

TOP_K = 3
BATCH = 64
SMALL = 100_000
REFERENCE = "bm25s (numba)"
Search = Callable[[list[str]], object]


class Engine(NamedTuple):
    """``build`` reads the passages and gives what is to be timed; ``load`` gives a function that searches."""

    build: Callable[[Path, Path], Callable[[], object]]
    load: Callable[[Path, Path], Search]
    largest: int | None = None
    batch: int = BATCH


def _rows(file: Path) -> list[tuple[str, str]]:
    with file.open(encoding="utf-8") as lines:
        return [(row["id"], f'"{row["title"]}"\n{row["text"]}') for row in map(json.loads, lines)]


def _ours(retriever: Retriever) -> Search:
    return lambda queries: retriever.search([SearchRequest(query, TOP_K) for query in queries])


def build_memory(file: Path, folder: Path) -> Callable[[], object]:
    corpus = Corpus.from_jsonl(file)
    return lambda: BM25Retriever(corpus, cache_dir=folder)


def load_memory(file: Path, folder: Path) -> Search:
    return _ours(BM25Retriever(Corpus.from_jsonl(file), cache_dir=folder))


def build_disk(file: Path, folder: Path) -> Callable[[], object]:
    from searchqa_retrievers.bm25_disk import DiskBM25Retriever
    from searchqa_retrievers.stored_corpus import open_corpus

    corpus = open_corpus(file, stored=True, cache_dir=folder)
    return lambda: DiskBM25Retriever(corpus, cache_dir=folder)


def load_disk(file: Path, folder: Path) -> Search:
    from searchqa_retrievers.bm25_disk import DiskBM25Retriever
    from searchqa_retrievers.stored_corpus import open_corpus

    return _ours(DiskBM25Retriever(open_corpus(file, stored=True, cache_dir=folder), cache_dir=folder))


def _tokenize(texts: Sequence[str], return_ids: bool) -> Any:
    import bm25s
    import Stemmer

    return bm25s.tokenize(list(texts), stopwords="en", stemmer=Stemmer.Stemmer("english"), return_ids=return_ids, show_progress=False)


def build_bm25s(file: Path, folder: Path) -> Callable[[], object]:
    import bm25s

    texts = [text for _, text in _rows(file)]

    def build() -> None:
        index = bm25s.BM25(backend="numba")
        index.index(_tokenize(texts, return_ids=True), show_progress=False)
        index.save(str(folder), show_progress=False)

    return build


def load_bm25s(file: Path, folder: Path) -> Search:
    import bm25s
    import Stemmer

    rows = _rows(file)
    index = bm25s.BM25.load(str(folder), mmap=True, show_progress=False)
    stemmer = Stemmer.Stemmer("english")

    def search(queries: list[str]) -> object:
        tokens = bm25s.tokenize(queries, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)
        found = index.retrieve(tokens, k=TOP_K, n_threads=1, show_progress=False)
        return [[rows[place] for place in places] for places in found.documents.tolist()], found.scores

    return search


def build_tantivy(file: Path, folder: Path) -> Callable[[], object]:
    import tantivy

    rows = _rows(file)

    def build() -> None:
        builder = tantivy.SchemaBuilder()
        builder.add_text_field("id", stored=True, tokenizer_name="raw")
        builder.add_text_field("text", stored=True, tokenizer_name="en_stem")
        writer = tantivy.Index(builder.build(), path=str(folder)).writer(heap_size=512_000_000, num_threads=1)
        for id_, text in rows:
            document = tantivy.Document()
            document.add_text("id", id_)
            document.add_text("text", text)
            writer.add_document(document)
        writer.commit()
        writer.wait_merging_threads()

    return build


def load_tantivy(file: Path, folder: Path) -> Search:
    import tantivy

    index = tantivy.Index.open(str(folder))
    searcher = index.searcher()

    def search(queries: list[str]) -> object:
        answers = []
        for query in queries:
            hits = searcher.search(index.parse_query(query, ["text"]), TOP_K, count=False).hits
            answers.append([(searcher.doc(address).to_dict(), score) for score, address in hits])
        return answers

    return search


def build_rank_bm25(file: Path, folder: Path) -> Callable[[], object]:
    import rank_bm25

    texts = [text for _, text in _rows(file)]
    return lambda: rank_bm25.BM25Okapi(_tokenize(texts, return_ids=False))


def load_rank_bm25(file: Path, folder: Path) -> Search:
    import numpy as np
    import rank_bm25

    rows = _rows(file)
    index = rank_bm25.BM25Okapi(_tokenize([text for _, text in rows], return_ids=False))

    def search(queries: list[str]) -> object:
        answers = []
        for tokens in _tokenize(queries, return_ids=False):
            scores = index.get_scores(tokens)
            best = np.argpartition(scores, -TOP_K)[-TOP_K:]
            answers.append([(rows[place], scores[place]) for place in best[np.argsort(-scores[best])]])
        return answers

    return search


ENGINES = {
    "ours, in memory": Engine(build_memory, load_memory),
    "ours, on disk": Engine(build_disk, load_disk),
    REFERENCE: Engine(build_bm25s, load_bm25s),
    "tantivy": Engine(build_tantivy, load_tantivy),
    "rank_bm25": Engine(build_rank_bm25, load_rank_bm25, largest=SMALL, batch=4),
}


def build(engine: str, folder: Path) -> dict[str, float]:
    place = folder / "indexes" / engine
    place.mkdir(parents=True, exist_ok=True)
    work = ENGINES[engine].build(folder / "corpus.jsonl", place)
    started, processor = time.perf_counter(), time.process_time()
    work()
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    return {"build": seconds, "CPU": processor, "build memory": processes.peak_memory(), "disk": processes.disk(place)}


def serve(engine: str, folder: Path) -> None:
    """Load, then measure a turn for each line."""
    queries = synthetic_corpus.read_queries(folder)
    started = time.perf_counter()
    search = ENGINES[engine].load(folder / "corpus.jsonl", folder / "indexes" / engine)
    loaded = time.perf_counter() - started
    search(queries[:1])
    search(queries[: ENGINES[engine].batch])
    for line in sys.stdin:
        question = json.loads(line)
        if question is None:
            processes.answer({"load": loaded, "search memory": processes.peak_memory()})
            continue
        size, seconds = min(int(question["batch"]), ENGINES[engine].batch), float(question["seconds"])
        asked, begun = 0, time.perf_counter()
        while True:
            search([queries[(asked + offset) % len(queries)] for offset in range(size)])
            asked += size
            spent = time.perf_counter() - begun
            if spent >= seconds:
                break
        processes.answer({"rate": asked / spent})


def take_turns(engines: Sequence[str], folder: Path, turns: int, seconds: float) -> dict[str, dict[str, float]]:
    """The fastest turn of each engine."""
    workers = {}
    try:
        for engine in engines:
            print(f"loading {engine}", file=sys.stderr, flush=True)
            workers[engine] = processes.Worker(__file__, "--folder", str(folder), "--worker", "search", engine)
            workers[engine].ask()
        rates = {engine: {"single": 0.0, "batch": 0.0} for engine in engines}
        for turn in range(turns):
            print(f"turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
            for name, size in (("single", 1), ("batch", BATCH)):
                for engine, worker in workers.items():
                    rate = worker.ask({"batch": size, "seconds": seconds})["rate"]
                    rates[engine][name] = max(rates[engine][name], rate)
        return {engine: {**rates[engine], **worker.ask()} for engine, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES), metavar="ENGINE", help="; ".join(ENGINES))
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/bench_retrieval_sizes"), help="for texts, indexes, results (5 GB a million)"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn, at least")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        what, engine = arguments.worker
        if what == "text":
            synthetic_corpus.write_passages(arguments.folder, int(engine))
            processes.answer(None)
        elif what == "build":
            processes.answer(build(engine, arguments.folder))
        else:
            serve(engine, arguments.folder)
        return
    results = processes.Results(arguments.folder / "results.json")
    print(
        "| passages | engine | build s | CPU s | build memory MB | disk MB | load s | search memory MB | single q/s | x | batch of 64 q/s | x |"
    )
    print("|---" * 12 + "|", flush=True)
    for count in arguments.passages:
        folder = arguments.folder / str(count)
        engines = [name for name in arguments.engines if count <= (ENGINES[name].largest or count)]
        processes.in_process(__file__, "--folder", str(folder), "--worker", "text", str(count))
        built = {
            name: results.get(f"{count} {name} build", __file__, "--folder", str(folder), "--worker", "build", name) for name in engines
        }
        key = f"{count} search: {'; '.join(engines)}"
        if key not in results:
            results.put(key, take_turns(engines, folder, arguments.turns, arguments.seconds))
        searched = results[key]
        for name in engines:
            row = {**built[name], **searched[name]}
            ratio = {how: f"{row[how] / searched[REFERENCE][how]:.2f}" if REFERENCE in searched else "" for how in ("single", "batch")}
            disk = "none" if name == "rank_bm25" else f"{row['disk'] / 1e6:,.1f}"
            print(
                f"| {count:,} | {name} | {row['build']:,.1f} | {row['CPU']:,.1f} | {row['build memory'] / 1e6:,.0f} | {disk} | {row['load']:.2f} | "
                f"{row['search memory'] / 1e6:,.0f} | {row['single']:,.0f} | {ratio['single']} | {row['batch']:,.0f} | {ratio['batch']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
