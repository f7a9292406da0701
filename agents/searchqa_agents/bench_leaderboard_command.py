"""``searchqa bench leaderboard``: the results that come with the package, as a table; and that table in the README."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from searchqa_agents.bench import results
from searchqa_agents.bench.results import BenchResultError, Entry, shipped
from searchqa_agents.bench.sides import DEFAULT_SUITE, SEEDS, Sides, named, wanted_tasks
from searchqa_agents.bench.statistics import RESAMPLES
from searchqa_agents.bench.table import Comparison, as_text, columns, compared, markdown_table, notes, text_rows
from searchqa_agents.runs import replace_file
from searchqa_agents.table import in_parts, legible, show

BASELINE = "grpo"
BEGIN, END = "<!-- leaderboard -->", "<!-- /leaderboard -->"
MOST_COMMANDS = 3
"""So many different commands stand beneath the table; more are left to the files."""


def main(line: Sequence[str]) -> int:
    """Run ``searchqa bench leaderboard <line>``."""
    from rich.console import Console

    try:
        arguments = _parser().parse_args(line)
    except SystemExit as stop:  # argparse has already said why
        return stop.code if isinstance(stop.code, int) else 2
    suite: str = arguments.suite
    entries = shipped(suite)
    console = legible(Console())
    if not entries:
        there = sorted(folder.name for folder in results.LEADERBOARD.glob("*") if any(folder.glob("*.json")))
        raise BenchResultError(f"No results of the suite {suite} come with this package; there are some of: {', '.join(there) or 'none'}.")
    comparison = leaderboard(suite, entries, RESAMPLES)
    if arguments.write:
        write_block(arguments.write, as_markdown(suite, comparison))
        console.print(f"Written: {arguments.write}", markup=False, highlight=False, soft_wrap=True)
    if arguments.out:
        from searchqa_agents.bench_compare_command import write_report

        sides = Sides(suite, {one.name: one.entry for one in comparison.standings}, (), comparison.tasks, ())
        for title, file in write_report(Path(arguments.out), comparison, sides, [], notes(comparison)):
            console.print(f"{title}: {file}", markup=False, highlight=False, soft_wrap=True)
    if arguments.markdown:
        console.print(as_markdown(suite, comparison), markup=False, highlight=False, soft_wrap=True)
    elif not (arguments.write or arguments.out):
        chosen = columns(comparison)
        titles, rows = [column.title for column in chosen], text_rows(comparison, chosen)
        for part in in_parts(console.width, titles, rows):
            show(console, f"{suite}: final scores, 95% intervals", [titles[i] for i in part], [[row[i] for i in part] for row in rows])
        for text in notes(comparison):
            console.print(text, markup=False, highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="searchqa bench leaderboard",
        description="The results that come with the package, ranked by the IQM of final scores; docs/benchmark.md defines every number.",
    )
    parser.add_argument("--suite", metavar="NAME", default=DEFAULT_SUITE, help=f"default: {DEFAULT_SUITE}")
    parser.add_argument("--markdown", action="store_true", help="as the README has it between its markers")
    parser.add_argument("--write", metavar="FILE", help=f"put that into a file, between {BEGIN} and {END}")
    parser.add_argument("--out", metavar="FOLDER", help="write pictures and a page with all numbers, commands and stamps")
    return parser


def leaderboard(suite: str, entries: Mapping[str, Entry], resamples: int = RESAMPLES) -> Comparison:
    """The comparison of all entries of a suite's leaderboard, by algorithm; differences are from GRPO, where it is one of them."""
    by_name = {algorithm: named(entry.label) for algorithm, entry in entries.items()}
    names = list(by_name.values())
    by_name = {algorithm: name if names.count(name) == 1 else algorithm for algorithm, name in by_name.items()}
    return compared(
        {by_name[algorithm]: entry for algorithm, entry in entries.items()},
        tasks=list(wanted_tasks(suite, entries)),
        seeds=SEEDS,
        baseline=by_name.get(BASELINE),
        resamples=resamples,
    )


def as_markdown(suite: str, comparison: Comparison) -> str:
    """What stands between the markers: the table, in short, and what a reader must know of it."""
    standings = comparison.standings
    commands = list(dict.fromkeys(one.entry.command for one in standings))
    told = [f"```bash\n{chr(10).join(_in_fence(command) for command in commands)}\n```"] if len(commands) <= MOST_COMMANDS else []
    machines = list(
        dict.fromkeys(
            f"{stamp['platform']}, {stamp.get('cpus', '?')} CPUs" for one in standings if "platform" in (stamp := one.entry.stamp)
        )
    )
    seconds = f" Seconds are of {'; '.join(map(as_text, machines))}." if machines else ""
    return "\n\n".join(
        [
            markdown_table(comparison, [column for column in columns(comparison) if column.short]),
            f"Suite {as_text(suite)}: scores on held-out questions at the end of each task's budget of sampled tokens, 0 without search, 1 the oracle; "
            f"over tasks their interquartile mean (IQM). In brackets 95% intervals over seeds.{seconds} "
            "`searchqa bench leaderboard` shows more, `searchqa bench compare mine` puts yours beside it; [the protocol](docs/benchmark.md).",
            *told,
            *(as_text(text) for text in notes(comparison)),
        ]
    )


def _in_fence(command: str) -> str:
    """A command that cannot end the block it stands in."""
    return command.replace("```", "` ` `").replace("\r", " ")


def write_block(path: str | Path, text: str) -> None:
    """Put a text between the markers of a file.

    Raises
    ------
    BenchResultError
        If the file has not just one of each marker, in their order.
    """
    file = Path(path)
    before, after = _around(file)
    replace_file(file, lambda partial: partial.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8"))


def block_of(path: str | Path) -> str:
    """What stands between the markers of a file; raises as :func:`write_block`."""
    file = Path(path)
    before, after = _around(file)
    text = file.read_text(encoding="utf-8")
    return text[len(before) + len(BEGIN) : len(text) - len(after) - len(END)].strip("\n")


def _around(file: Path) -> tuple[str, str]:
    text = file.read_text(encoding="utf-8")
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise BenchResultError(f"{file} must have {BEGIN} and behind it {END}, each once: the table goes between them.")
    return text.partition(BEGIN)[0], text.partition(END)[2]
