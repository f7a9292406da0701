"""``searchqa index``: build, look at, measure and verify search indexes."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from searchqa_retrievers.types import RetrieverError

if TYPE_CHECKING:
    from searchqa_agents.index_needs import Part
    from searchqa_retrievers import Corpus, Retriever
    from searchqa_retrievers.stored_indexes import StoredIndex

_CORPUS = """
FILE is a corpus in any form that is known: .jsonl[.gz] with id, title, text or contents (Search-R1's wiki-18), KILT, HotpotQA's abstracts. One of more than
1 GB is copied to the cache once and read from there. key=value are options of the retriever, each value in YAML, as for `searchqa serve`.
Indexes lie in $SEARCHQA_CACHE, else in the user's cache folder.
"""
_CUTOFFS = (3, 5, 10)


class IndexCommandError(RetrieverError):
    """An index cannot be built here."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from searchqa_agents.cli import UsageError

        raise UsageError(f"{message}. See `{self.prog} --help`.")


def main(argv: Sequence[str]) -> int:
    """Run ``searchqa index <argv>``; the exit code is 0, or 1 where ``verify`` finds damage or ``build --needs`` that there is no room."""
    parser = _parser()
    try:
        arguments, rest = parser.parse_known_args(argv)
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 2
    options = getattr(arguments, "options", None)
    if rest and (options is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options is not None:
        arguments.options = [*options, *rest]
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="searchqa index",
        description="Search indexes: build one before a run needs it, see what there is, measure, check files.",
        epilog="`searchqa index COMMAND --help` tells more.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str, epilog: str
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.add_argument("--json", action="store_true", help="one JSON object on standard output, for programs")
        made.set_defaults(run=run)
        return made

    build = command(
        "build",
        _build,
        "build the index of a corpus, or go on with one; says first what it will take",
        "Print what the index takes on disk and in memory, and build it, or stop where there is not so much. Vectors and FAISS indexes\n"
        "go on after a kill where they were; BM25 (minutes) begins again. What is complete is not built again.",
        f"{_CORPUS}\nExamples:\n"
        "  searchqa index build --corpus corpus.jsonl.gz\n"
        "  searchqa index build --corpus wiki-18.jsonl.gz backend=disk preset=search-r1\n"
        "  searchqa index build --corpus corpus.jsonl --retriever dense encoder=e5 index=ivf-pq storage=float16\n"
        "  searchqa index build --corpus corpus.jsonl --retriever hybrid retrievers='[bm25, {name: dense, encoder: minilm}]'\n"
        "  searchqa index build --corpus corpus.jsonl --retriever dense --needs      only the needs; exit code 1: no room",
    )
    _add_retriever(build)
    build.add_argument("--needs", action="store_true", help="print what it takes, and build nothing")
    build.add_argument("--force", action="store_true", help="build even where disk or memory will not do by the estimate")

    info = command(
        "info",
        _info,
        "what indexes there are: kind, corpus, passages, settings, size, complete or partial",
        "List the indexes and stored corpora of a folder; default: the cache.",
        "Examples:\n  searchqa index info\n  searchqa index info ~/.cache/searchqa/dense --json",
    )
    info.add_argument("folder", nargs="?", type=Path, help="a cache, one of its folders, or the folder of an index")

    bench = command(
        "bench",
        _bench,
        "queries a second, alone and in batches, p50 and p99; recall where questions name their passages",
        "Measure a retriever, without memory of answers. Half of the queries are asked one by one, the other half in batches. Queries are\n"
        "3 to 8 words of passages drawn at random, or the questions of a file, whose supporting_ids or supporting_titles give recall.",
        f"{_CORPUS}\nExamples:\n"
        "  searchqa index bench --corpus corpus.jsonl.gz\n"
        "  searchqa index bench --corpus hotpotqa/corpus.jsonl.gz --questions hotpotqa/questions.jsonl.gz preset=search-r1\n"
        "  searchqa index bench --corpus corpus.jsonl --retriever dense index=hnsw --queries 200 --json",
    )
    _add_retriever(bench)
    bench.add_argument("--questions", type=Path, help="questions.jsonl or .jsonl.gz")
    bench.add_argument("--queries", type=int, default=1000, help="at most so many, at least 2 (default: 1000)")
    bench.add_argument("--top-k", type=int, default=3, help="passages for each query (default: 3); recall is at 3, 5 and 10")
    bench.add_argument("--batch", type=int, default=64, help="queries of a batch (default: 64)")

    verify = command(
        "verify",
        _verify,
        "compare every file with its checksum; exit code 1 where one is damaged",
        "Read all files of the indexes in a folder (default: the cache) and compare them with their checksums. Damaged ones are named.",
        "Examples:\n  searchqa index verify\n  searchqa index verify ~/.cache/searchqa/bm25",
    )
    verify.add_argument("folder", nargs="?", type=Path, help="a cache, one of its folders, or the folder of an index")
    return parser


def _add_retriever(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", type=Path, required=True, metavar="FILE", help="the passages")
    parser.add_argument("--retriever", default="bm25", metavar="NAME", help="any that searches a corpus (default: bm25)")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="folder for indexes and stored corpora instead of the cache")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the retriever")


# -- build -------------------------------------------------------------------------------------------------------------------------------


def _build(arguments: argparse.Namespace) -> int:
    from searchqa_agents.index_needs import parts as parts_of
    from searchqa_retrievers import build_retriever

    root = _root(arguments)
    config = _config(arguments)
    with _said_on_stderr():
        corpus = _open(arguments)
        parts = parts_of(config, corpus, root)
        roots = list(dict.fromkeys(part.root for part in parts)) or [root]
        short = _say_needs(arguments, corpus, parts, roots)
        if arguments.needs:
            return 1 if short else 0
        if short and not arguments.force:
            raise IndexCommandError(f"{' '.join(short)} Make room, choose another index or storage, or build all the same with --force.")
        before = _indexes(roots)
        started = time.perf_counter()
        retriever = build_retriever(config, corpus, cache_entries=0)
        seconds = time.perf_counter() - started
        written = [index for signature, index in _indexes(roots).items() if signature not in before and index.kind != "corpus"]
        stamp = retriever.stamp() if hasattr(retriever, "stamp") else {}
    peak = _peak_memory()
    if arguments.json:
        _print_json(
            {
                "written": [_record(index) for index in written],
                "seconds": seconds,
                "peak_memory": peak,
                "corpus_sha256": corpus.sha256,
                "passages": len(corpus),
                "stamp": stamp,
            }
        )
        return 0
    for index in written:
        _say(f"{index.kind}: {_bytes(index.size)} in {index.folder}")
    if not written:
        _say(
            f"Nothing was written in {_listed(roots)}: the index is complete already, or so small that it is built in memory at every start."
            if parts
            else f"Nothing was written in {_listed(roots)}: this retriever keeps no index there."
        )
    _say(f"{len(corpus):,} passages, {seconds:,.1f} s, peak memory {_bytes(peak)}")
    return 0


def _indexes(roots: Sequence[Path]) -> dict[tuple[str, Path, str, int], StoredIndex]:
    """What is in some caches, by all that changes when an index is written."""
    from searchqa_retrievers.stored_indexes import find_indexes

    return {(index.kind, index.folder, index.state, index.size): index for root in roots for index in find_indexes(root)}


def _say_needs(arguments: argparse.Namespace, corpus: Corpus, parts: Sequence[Part], roots: Sequence[Path]) -> list[str]:
    """Print them; what will not do, in sentences."""
    available = _available_memory()
    building = max((part.needs.building for part in parts), default=0)
    searching = sum(part.needs.memory for part in parts)
    short, frees = [], []
    for together in _by_disk(roots):
        disk, free = sum(part.needs.disk for part in parts if part.root in together), _free_disk(together[0])
        frees.append(f"{_bytes(free)} of disk in {_listed(together)}")
        if disk > free:
            short.append(f"The index needs about {_bytes(disk)} of disk in {_listed(together)}, but {_bytes(free)} are free.")
    if available is not None and max(building, searching) > available:
        short.append(f"It needs about {_bytes(max(building, searching))} of memory, but {_bytes(available)} are available.")
    if arguments.json:
        if arguments.needs:
            rows = [
                {"index": part.name, "cache": str(part.root), **part.needs._asdict(), "encoding_seconds": part.seconds} for part in parts
            ]
            free_disk = {str(root): _free_disk(root) for root in roots}
            _print_json({"passages": len(corpus), "needs": rows, "free_disk": free_disk, "available_memory": available, "problems": short})
        return short
    from rich.table import Table

    table = Table("index", "disk", "memory to build", "memory to search", "encoding")
    for part in parts:
        encoding = "" if part.seconds is None else _duration(part.seconds) if part.seconds else "is there"
        table.add_row(part.name, _bytes(part.needs.disk), _bytes(part.needs.building), _bytes(part.needs.memory), encoding)
    if parts:
        _console().print(table)
    else:
        _say(f"Retriever {arguments.retriever!r} keeps no index whose needs are known.")
    memory = "unknown" if available is None else _bytes(available)
    _say(f"{corpus!r}; estimates; free: {', '.join(frees)}, {memory} of memory")
    if arguments.needs or arguments.force:
        for sentence in short:
            _say(sentence)
    return short


# -- info, verify ------------------------------------------------------------------------------------------------------------------------


def _info(arguments: argparse.Namespace) -> int:
    from searchqa_retrievers.stored_indexes import find_indexes

    folder = _folder(arguments)
    indexes = find_indexes(folder)
    if arguments.json:
        _print_json({"folder": str(folder), "indexes": [_record(index) for index in indexes]})
        return 0
    last = None
    for index in indexes:
        if index.folder != last:
            _say(str(index.folder))
        last = index.folder
        passages = [] if index.passages is None else [f"{index.passages:,} passages"]
        corpus = [] if index.corpus is None else [f"corpus {index.corpus[:12]}"]
        settings = [f"{key} {value}" for key, value in index.settings.items()]
        _say(f"  {index.kind}: {', '.join([index.state, _bytes(index.size), *passages, *corpus, *settings])}")
    _say(f"{len(indexes)} in {folder}, {_bytes(sum(index.size for index in indexes))}" if indexes else f"No index in {folder}.")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from searchqa_retrievers.stored_indexes import COMPLETE, find_indexes, verify

    folder = _folder(arguments)
    results = [verify(index) for index in find_indexes(folder)]
    damaged = [one for one in results if one.problems or one.stored.state.startswith("damaged")]
    if arguments.json:
        rows = [{**_record(one.stored), "problems": list(one.problems)} for one in results]
        _print_json({"folder": str(folder), "indexes": rows, "damaged": len(damaged)})
        return 1 if damaged else 0
    for one in results:
        where = f"{one.stored.kind} {_below(one.stored.folder, folder)}"
        for problem in one.problems:
            _say(f"{where}: {problem}. Delete the folder {one.stored.folder}, and it is built again.")
        if not one.problems:
            _say(f"{where}: {'as written' if one.stored.state == COMPLETE else one.stored.state}")
    _say(f"{len(results)} in {folder}, {len(damaged)} damaged" if results else f"No index in {folder}.")
    return 1 if damaged else 0


# -- bench -------------------------------------------------------------------------------------------------------------------------------


def _bench(arguments: argparse.Namespace) -> int:
    from searchqa_agents.cli import UsageError
    from searchqa_agents.progress import progress
    from searchqa_retrievers import SearchRequest, build_retriever
    from searchqa_retrievers.measures import read_asked, recall, sampled_queries, speed

    if arguments.queries < 2 or arguments.batch < 1 or arguments.top_k < 1:
        raise UsageError(
            f"--queries must be at least 2, --batch and --top-k 1; got {arguments.queries}, {arguments.batch} and {arguments.top_k}."
        )
    _root(arguments)
    config = _config(arguments)
    with _said_on_stderr():
        corpus = _open(arguments)
        started = time.perf_counter()
        retriever: Retriever = build_retriever(config, corpus, cache_entries=0)
        opened = time.perf_counter() - started
    asked = read_asked(arguments.questions)[: arguments.queries] if arguments.questions else sampled_queries(corpus, arguments.queries)
    queries = [one.query for one in asked]
    if len(queries) < 2:
        raise UsageError("One query is asked alone and another in a batch; there must be at least 2.")
    with_recall = any(one.ids or one.titles for one in asked)
    # What is measured is asked once: an encoder remembers the vectors of queries.
    retriever.search([SearchRequest("first words", arguments.top_k)])
    done = 0
    with progress("Measuring", len(queries) * (2 if with_recall else 1)) as show:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            show(done, "")

        speeds = [speed(retriever, queries[start::2], arguments.top_k, batch, advance) for start, batch in ((0, 1), (1, arguments.batch))]
        answers = []
        if with_recall:
            for begin in range(0, len(queries), arguments.batch):
                part = queries[begin : begin + arguments.batch]
                answers += retriever.search([SearchRequest(query, max(_CUTOFFS)) for query in part])
                advance(len(part))
    recalls = recall(asked, answers, _CUTOFFS) if with_recall else []
    peak = _peak_memory()
    if arguments.json:
        _print_json(
            {
                "passages": len(corpus),
                "queries": len(queries),
                "top_k": arguments.top_k,
                "open_seconds": opened,
                "peak_memory": peak,
                "speed": [one._asdict() for one in speeds],
                "recall": [one._asdict() for one in recalls],
                "stamp": retriever.stamp() if hasattr(retriever, "stamp") else {},
            }
        )
        return 0
    from rich.table import Table

    table = Table("requests a call", "queries a second", "p50 of a call", "p99 of a call")
    for one in speeds:
        table.add_row(str(one.batch), f"{one.rate:,.0f}", f"{1e3 * one.p50:.3f} ms", f"{1e3 * one.p99:.3f} ms")
    console = _console()
    console.print(table)
    if recalls:
        table = Table("top k", "supporting passages found", "questions with all found")
        for row in recalls:
            table.add_row(str(row.top_k), f"{row.share:.3f}", f"{row.all_found:.3f}")
        console.print(table)
    of = f", {recalls[0].questions:,} with supporting passages" if recalls else ""
    _say(f"{corpus!r}, {len(queries):,} queries{of}, top {arguments.top_k}; opened in {opened:,.2f} s, peak memory {_bytes(peak)}")
    return 0


# -- shared ------------------------------------------------------------------------------------------------------------------------------


def _config(arguments: argparse.Namespace) -> dict[str, Any]:
    import yaml

    from searchqa_agents.cli import UsageError

    options: dict[str, Any] = {}
    for word in arguments.options:
        key, equals, value = word.partition("=")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or key == "name":
            raise UsageError(f"An option of the retriever is key=value, such as preset=search-r1; got {word!r}.")
    from searchqa_agents.index_needs import check_config
    from searchqa_retrievers.build import searches_corpus

    if not searches_corpus(arguments.retriever):
        raise UsageError(
            f"Retriever {arguments.retriever!r} has no index of a corpus; choose one that searches a corpus, such as bm25 or dense."
        )
    config = {"name": arguments.retriever, **options}
    check_config(config)
    return config


def _open(arguments: argparse.Namespace) -> Corpus:
    from searchqa_retrievers.stored_corpus import open_corpus

    return open_corpus(arguments.corpus)


def _root(arguments: argparse.Namespace) -> Path:
    """Where indexes go. ``--cache-dir`` holds for all parts of the configuration, so it goes through the environment variable."""
    from searchqa_retrievers.paths import cache_root

    if arguments.cache_dir is not None:
        os.environ["SEARCHQA_CACHE"] = str(arguments.cache_dir.expanduser().absolute())
    return cache_root()


def _folder(arguments: argparse.Namespace) -> Path:
    from searchqa_agents.cli import UsageError
    from searchqa_retrievers.paths import cache_root

    if arguments.folder is None:
        return cache_root()
    folder: Path = arguments.folder.expanduser()
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}; give a cache, one of its folders, or the folder of an index.")
    return folder.absolute()


def _free_disk(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder)).free


def _by_disk(folders: Sequence[Path]) -> list[list[Path]]:
    """Those of one file system, which share its room, together."""
    groups: dict[int, list[Path]] = {}
    for folder in folders:
        groups.setdefault(_existing(folder).stat().st_dev, []).append(folder)
    return list(groups.values())


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def _listed(folders: Sequence[Path]) -> str:
    return " and ".join(map(str, folders))


def _available_memory() -> int | None:
    """Bytes that programs can still have, within the limit of a container; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available
    return min(available, limit - used)


def _peak_memory() -> int:
    """Bytes that this process has had in memory at most."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def _said_on_stderr() -> Iterator[None]:
    """Shows what the package logs while indexes are built."""
    logger = logging.getLogger("searchqa_retrievers")
    level = logger.level
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _record(index: StoredIndex) -> dict[str, Any]:
    return {**index._asdict(), "folder": str(index.folder)}


def _below(folder: Path, root: Path) -> str:
    return str(folder.relative_to(root)) if folder != root and folder.is_relative_to(root) else str(folder)


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.2f} {unit}" if unit == "GB" else f"{number / size:,.1f} {unit}"
    return f"{number:,.0f} bytes"


def _duration(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _console() -> Any:
    from rich.console import Console

    return Console()


def _say(text: str) -> None:
    _console().print(text, markup=False, highlight=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")
