"""``searchqa data``: list, download, verify, merge and select question sets; write them as rows for training engines; export episodes."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from searchqa_agents import export_command
from searchqa_envs.datasets.location import SetFiles, data_roots, find_corpus, find_set
from searchqa_envs.datasets.registry import COLLECTIONS, DATASETS
from searchqa_envs.errors import ConfigurationError, SearchQAError
from searchqa_retrievers.types import RetrieverError

if TYPE_CHECKING:
    from searchqa_envs.datasets.merge import Part

_WHERE = """
Sets are looked for in --data-dir, else in $SEARCHQA_DATA, else in the user's cache ($SEARCHQA_CACHE moves it). Downloads go to --data-dir or the
cache. Downloads follow HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN. SearchQA-World-v0 is embedded and needs no data.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``searchqa data <argv>``; the exit code is 0, 1 for problems with data, 2 for a wrong command line."""
    line = sys.argv[1:] if argv is None else list(argv)
    if line[:1] == ["select"]:  # its words are Hydra's
        return _select(line[1:])
    try:
        arguments = _parser().parse_args(line)
    except SystemExit as stop:  # argparse has already said why
        return stop.code if isinstance(stop.code, int) else 2
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except (SearchQAError, RetrieverError) as error:
        from rich.console import Console

        Console(stderr=True).print(f"searchqa data: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2 if isinstance(error, ConfigurationError) else 1


def _select(line: Sequence[str]) -> int:
    from searchqa_agents import select_command

    if any(word in ("-h", "--help") for word in line):
        sys.stdout.write(select_command.help_text() + "\n")
        return 0
    return select_command.main(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="searchqa data",
        description="Question sets: what is on this machine, download, check, merge, select by difficulty, rows for training engines; episodes exported.",
        epilog=_WHERE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    names = ", ".join(DATASETS)

    listing = commands.add_parser("list", help="the sets, where they are on this machine, rows, passages, licences", epilog=_WHERE)
    _add_data_dir(listing)
    listing.set_defaults(run=_list)

    download = commands.add_parser(
        "download",
        help="fetch sets from the hub, with checksums; the revision is recorded and used again",
        description="Fetch sets from the hub. What is complete is not fetched again; a broken download goes on where it stopped.",
        epilog=f"Examples: searchqa data download hotpotqa | searchqa data download popqa nq --data-dir data. Names: {names}; also "
        f"{', '.join(COLLECTIONS)} (the Wikipedia corpus of 2018: tens of gigabytes; Search-R1's training rows).",
    )
    download.add_argument("names", nargs="+", metavar="NAME", help="a set, or 'all' for the seven sets")
    download.add_argument("--revision", help="commit, branch or tag; default: the recorded one, else the newest, which is then recorded")
    download.add_argument("--origin", help="another repository that has the set: 'flashrag' for hotpotqa and musique")
    download.add_argument("--force", action="store_true", help="fetch again what is complete")
    _add_data_dir(download)
    download.set_defaults(run=_download)

    verify = commands.add_parser(
        "verify",
        help="read all files of sets and check ids, gold passages and checksums; exit code 1 on any problem",
        description="Check that every row can be read, ids are unique, supporting and answer passages are in the corpus, and sums are as recorded.",
        epilog=_WHERE,
    )
    verify.add_argument("names", nargs="*", metavar="NAME", help="sets to check; default: all that are on this machine")
    _add_data_dir(verify)
    verify.set_defaults(run=_verify)

    merge = commands.add_parser(
        "merge",
        help="several sets or question files as one, with unique ids",
        description="Write questions.jsonl.gz and corpus.jsonl.gz from several parts. Ids become <part>/<id>, metadata keeps origin and origin_id, "
        "equal passages are kept once. Use the result as SearchQA-Custom-v0 with questions=... and corpus=...",
        epilog="Examples: searchqa data merge nq hotpotqa --split train --out merged | "
        "searchqa data merge hotpotqa mine=questions.jsonl --corpus mine=corpus.jsonl --out merged",
    )
    merge.add_argument("parts", nargs="+", metavar="PART", help="name of a set, path of a question file, or LABEL=PATH")
    merge.add_argument("--out", type=Path, required=True, help="folder to write to; it must be empty or not there yet")
    merge.add_argument("--split", default="all", help="split taken of every part: train, dev, test, extra or all (default)")
    merge.add_argument("--corpus", action="append", default=[], metavar="LABEL=PATH", help="corpus of a part that is a question file")
    merge.add_argument("--no-corpus", action="store_true", help="merge the questions only")
    merge.add_argument(
        "--near-duplicates", action="store_true", help="also drop passages that differ only in upper case, spaces and punctuation"
    )
    _add_data_dir(merge)
    merge.set_defaults(run=_merge)

    commands.add_parser("select", help="play each question until it is right; keep those that are easy, medium or hard", add_help=False)

    rows = commands.add_parser(
        "rows",
        help="write questions as rows for verl or OpenRLHF",
        description="Write one row for each question, which says where the question is found; the engine's rollout plays it in our environment. "
        "The prompt in a row is for the engine's logs and length filters.",
        epilog="Examples: searchqa data rows hotpotqa --split train --out train.parquet | "
        "searchqa data rows world --option preset=medium --count 10000 --out world.parquet | "
        "searchqa data rows custom --option questions=questions.jsonl --engine openrlhf --out train.jsonl",
    )
    rows.add_argument("name", metavar="NAME", help=f"world, custom, {names}")
    rows.add_argument("--split", help="train, dev, test, extra or all; default: the set's own")
    rows.add_argument("--engine", default="verl", help="verl (default) or openrlhf")
    rows.add_argument("--out", type=Path, required=True, help="file to write: .parquet or .jsonl")
    rows.add_argument("--count", type=int, help="only the first so many questions")
    rows.add_argument(
        "--dialect", default="search-r1", help="whose prompt stands in the rows: search-r1 (default), r1-searcher, zerosearch, bare"
    )
    rows.add_argument("--agent-name", default="searchqa", help="verl: the agent loop that plays them (default: searchqa)")
    rows.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what only the world or a custom set takes (preset, hops, ..., questions); the environment must be given the same",
    )
    _add_data_dir(rows)
    rows.set_defaults(run=_write_rows)

    export = commands.add_parser(
        "export",
        help="write the episodes of runs as Parquet or as a Minari data set",
        description=export_command.ABOUT,
        epilog=export_command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export_command.add_arguments(export)
    export.set_defaults(run=export_command.run)
    return parser


def _add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, help="folder with one folder per set")


def _find(name: str, data_dir: Path | None) -> tuple[str, SetFiles] | None:
    for called, root in data_roots(data_dir):
        found = find_set(name, root)
        if found is not None:
            return called, found
    return None


def _list(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Column, Table

    from searchqa_envs.datasets.formats import read_questions
    from searchqa_envs.datasets.rows import count_lines

    table = Table(Column("set", no_wrap=True), "found in", Column("rows here", overflow="fold"), "passages", "licence")
    for name, info in DATASETS.items():
        found = _find(name, arguments.data_dir)
        if found is None:
            published = ", ".join(f"{split} {rows:,}" for split, rows in info.sizes.items())
            table.add_row(name, "not here", f"({info.hub.repo}: {published})", "", info.licence)
            continue
        called, files = found
        counts: Counter[str | None] = Counter()
        for path, split in files.questions:
            counts.update(entry.question.metadata.get("split") for entry in read_questions(path, split=split))
        rows = _rows(counts)
        if files.extra is not None:
            rows += f"; extra {sum(1 for _ in read_questions(files.extra)):,}"
        if files.corpus is not None:
            passages = f"{count_lines(files.corpus):,}"
        else:
            passages = "in the questions' contexts" if info.has_contexts else "none"
        table.add_row(name, called, rows, passages, info.licence)
    console = Console()
    console.print(table)
    for called, root in data_roots(arguments.data_dir):
        console.print(f"{called}: {root}", markup=False, highlight=False, soft_wrap=True)
        for name in COLLECTIONS:
            folder = root / name
            if name == "wiki18" and (corpus := find_corpus(name, root)):
                console.print(f"  {name}: {corpus}", markup=False, highlight=False, soft_wrap=True)
            elif name != "wiki18" and folder.is_dir():
                console.print(f"  {name}: {folder}", markup=False, highlight=False, soft_wrap=True)
    console.print("world: embedded, needs no data", highlight=False)
    return 0


def _rows(counts: Counter[str | None]) -> str:
    named = [f"{split} {rows:,}" for split, rows in sorted(counts.items(), key=str) if split is not None]
    return ", ".join([*named, f"no split {counts[None]:,}"] if counts[None] else named)


def _download(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from searchqa_envs.datasets.download import download_files
    from searchqa_envs.datasets.location import cache_data_root, read_record

    root = arguments.data_dir or cache_data_root()
    for name in [*DATASETS] if arguments.names == ["all"] else arguments.names:
        folder = download_files(name, root, revision=arguments.revision, origin=arguments.origin, force=arguments.force)
        record = read_record(folder)
        size = sum(entry["size"] for entry in record["files"].values())
        line = f"{name}: {len(record['files'])} files, {size / 1e6:,.1f} MB, {record['repo']} at {record['revision']}, in {folder}"
        Console().print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Column, Table

    from searchqa_envs.datasets.verify import verify_set

    console = Console()
    table = Table(Column("set", no_wrap=True), "rows", "extra", "passages", "sums", "problems")
    problems: list[str] = []
    checked = 0
    for name in arguments.names or DATASETS:
        found = _find(name, arguments.data_dir)
        if found is None:
            if arguments.names:
                looked = ", ".join(str(root / name) for _, root in data_roots(arguments.data_dir))
                problems.append(f"{name}: not on this machine, or its download is unfinished; looked at {looked}.")
                table.add_row(name, "not here", "", "", "", "1")
            continue
        report = verify_set(found[1])
        checked += 1
        problems += report.problems
        passages = "none" if report.passages is None else f"{report.passages:,}"
        sums = f"{report.checked_sums} checked" if report.checked_sums else "no record"
        table.add_row(name, _rows(report.splits), f"{report.extra:,}", passages, sums, str(len(report.problems)))
    console.print(table)
    if not checked and not problems:
        looked = ", ".join(str(root) for _, root in data_roots(arguments.data_dir))
        problems.append(f"there is no set to check; looked in {looked}. Fetch one: searchqa data download hotpotqa")
    for problem in problems:
        console.print(problem, markup=False, highlight=False, soft_wrap=True)
    return 1 if problems else 0


def _merge(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from searchqa_envs.datasets.merge import merge

    corpora = dict(_labelled(given) for given in arguments.corpus)
    parts = [_part(given, corpora, arguments) for given in arguments.parts]
    unknown = set(corpora) - {part.label for part in parts}
    if unknown:
        labels = ", ".join(part.label for part in parts)
        raise ConfigurationError(f"--corpus names a part that there is not: {', '.join(sorted(unknown))}. The parts are {labels}.")
    merged = merge(parts, arguments.out, near_duplicates=arguments.near_duplicates)
    table = Table("part", "questions")
    for label, rows in merged.rows.items():
        table.add_row(label, f"{rows:,}")
    console = Console()
    console.print(table)
    kept = merged.passages - merged.equal - merged.nearly_equal
    console.print(
        f"{sum(merged.rows.values()):,} questions; {kept:,} passages of {merged.passages:,} "
        f"({merged.equal:,} equal, {merged.nearly_equal:,} nearly equal dropped); written to {arguments.out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _write_rows(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from searchqa_agents.integrations.rows import question_rows, write_rows

    rows = question_rows(
        arguments.name,
        arguments.split,
        arguments.engine,
        dialect=arguments.dialect,
        agent_name=arguments.agent_name,
        count=arguments.count,
        data_dir=arguments.data_dir,
        options=dict(_option(given) for given in arguments.option),
    )
    count = write_rows(rows, arguments.out)
    Console().print(f"{count:,} rows for {arguments.engine} written to {arguments.out}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _option(given: str) -> tuple[str, str | int]:
    key, separator, value = given.partition("=")
    if not (key and separator and value):
        raise ConfigurationError(f"--option must be KEY=VALUE, got {given!r}.")
    return key, int(value) if value.isdecimal() else value


def _labelled(given: str) -> tuple[str, str]:
    label, separator, path = given.partition("=")
    if not (label and separator and path):
        raise ConfigurationError(f"--corpus must be LABEL=PATH, got {given!r}.")
    return label, path


def _part(given: str, corpora: dict[str, str], arguments: argparse.Namespace) -> Part:
    from searchqa_envs.datasets.merge import Part
    from searchqa_envs.datasets.sources import load_custom, load_source
    from searchqa_envs.errors import DataNotFoundError

    label, separator, path = given.partition("=")
    if not separator:
        path = "" if given in DATASETS else given
        label = given if given in DATASETS else Path(given).name.split(".", 1)[0]
    if path:
        source = load_custom(path, corpora.get(label), arguments.split, name=label)
    else:
        source = load_source(given, arguments.split, arguments.data_dir, corpora.get(label))
    if arguments.no_corpus:
        return Part(label, list(source))
    try:
        return Part(label, list(source), source.corpus())
    except DataNotFoundError as error:
        raise DataNotFoundError(f"{error}\nOr merge the questions only: --no-corpus.") from None


if __name__ == "__main__":
    sys.exit(main())
