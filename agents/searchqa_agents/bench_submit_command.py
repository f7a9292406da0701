"""``searchqa bench submit``: checks that the runs of an algorithm are an entry of the leaderboard, and writes the one file to send in."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from searchqa_agents.bench.alike import REFERENCES_WITHIN, unlike
from searchqa_agents.bench.results import BenchResultError, Entry, ScoreRun, common_part, shipped, write_entry
from searchqa_agents.bench.sides import DEFAULT_SUITE, SEEDS, Wanted, named, read_mine, wanted_tasks
from searchqa_agents.comparable import shown
from searchqa_agents.table import legible
from searchqa_envs.errors import SearchQAError

OF_THE_RUN = frozenset({"seed", "token_budget"})
"""Settings that are not one for all tasks and seeds."""
MOST_ABOVE = 1 / 8
"""A run may use so much more than its budget, which is a last rollout: as part of the budget."""


class SubmissionError(SearchQAError):
    """Runs are no entry of the leaderboard; the message lists everything that is wrong."""


def main(line: Sequence[str]) -> int:
    """Run ``searchqa bench submit <line>``."""
    from rich.console import Console

    from searchqa_agents.cli import UsageError

    try:
        arguments = _parser().parse_args(line)
    except SystemExit as stop:  # argparse has already said why
        return stop.code if isinstance(stop.code, int) else 2
    if arguments.out is not None and not arguments.out.endswith(".json"):
        raise UsageError(f"--out needs the name of a file that ends in .json, such as mine.json; got {arguments.out!r}.")
    if arguments.tried is not None and arguments.tried < 0:
        raise UsageError(f"--tried is how many configurations were tried; got {arguments.tried}.")
    entry = read_mine(arguments.side, arguments.suite, arguments.runs)
    board = shipped(entry.suite)
    tasks = wanted_tasks(entry.suite, board)
    if not tasks:
        raise BenchResultError(
            f"Nothing is known here of a suite {entry.suite!r}, which the runs name: send in runs of one that is part of this package."
        )
    code = None if arguments.code is None else code_stamp(arguments.code)
    problems = [*wrong_with(entry, tasks, board), *_wrong_with_code(entry, code)]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise SubmissionError(
            f"{named(entry.label)} is no entry of {entry.suite} yet:\n{listed}\nMend all of it, and give this line again."
        )
    ready, left_out = as_submitted(entry, tasks, label=arguments.label, code=code, tried=arguments.tried)
    out = Path(arguments.out or f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', entry.algorithm)}.json")
    write_entry(out, ready)
    legible(Console()).print("\n".join(_told(out, ready, left_out)), markup=False, highlight=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="searchqa bench submit",
        description="Checks that an algorithm's runs are complete and follow the protocol (all tasks of the leaderboard, seeds 0 to 4, one setting for all, "
        "the budgets and versions of the suite), lists everything that is wrong at once, and writes the one file to send in.",
        epilog="Example: searchqa bench submit mine --tried 8 --code https://example.org/mine.py. docs/benchmark.md is the protocol.",
    )
    parser.add_argument("side", metavar="MINE", help="an algorithm's name under the folder of --runs, a folder of runs, or a results file")
    parser.add_argument("--suite", metavar="NAME", help=f"default: that of the file or folder, else {DEFAULT_SUITE}")
    parser.add_argument("--runs", metavar="FOLDER", help="where names are looked for; default: runs/bench/SUITE")
    parser.add_argument("--out", metavar="FILE.json", help="default: the algorithm's name, here")
    parser.add_argument("--label", metavar="TEXT", help="the name in tables; default: the algorithm's")
    parser.add_argument("--tried", metavar="N", type=int, help="how many configurations were tried before this one: part of the protocol")
    parser.add_argument("--code", metavar="FILE_OR_URL", help="where the algorithm can be read; of a file the hash is kept")
    return parser


# -- what is wrong -----------------------------------------------------------------------------------------------------------------------------


def wrong_with(entry: Entry, tasks: Mapping[str, Wanted], board: Mapping[str, Entry]) -> list[str]:
    """Everything that keeps an entry from the leaderboard of its suite, a sentence each. Empty: it may be sent in.

    Parameters
    ----------
    tasks
        What the protocol says of each task of the leaderboard.
    board
        The entries that are there: this one must be measured as they are.
    """
    runs = [run for run in entry.runs if run.task in tasks and run.seed in SEEDS]
    return [
        *_missing(entry, tasks),
        *_other_settings(runs),
        *_other_than(tasks, runs),
        *_tokens(runs),
        *_not_alike(entry, runs, board),
        *([] if entry.command.strip() else ["The runs do not say by which command they were made."]),
    ]


def _missing(entry: Entry, tasks: Mapping[str, Wanted]) -> Iterator[str]:
    there = {(run.task, run.seed) for run in entry.runs}
    incomplete = False
    for task in tasks:
        missing = [str(seed) for seed in SEEDS if (task, seed) not in there]
        if missing:
            incomplete = True
            yield f"{task}: there is no result of seed{'s' if len(missing) > 1 else ''} {' '.join(missing)}."
    if incomplete:
        begun = f"; {', '.join(map(str, entry.unfinished))} was begun" if entry.unfinished else ""
        made_by = f", with the settings of the line that made the others: `{entry.command}`" if entry.command else ""
        yield f"`searchqa bench suite={entry.suite} algorithm=... 'seed=range(5)'` runs what is missing{made_by}{begun}."


def _other_settings(runs: Sequence[ScoreRun]) -> Iterator[str]:
    """Settings that are not the same in all runs: an entry has one for all tasks."""
    for key in dict.fromkeys(key for run in runs for key in run.settings if key not in OF_THE_RUN):
        values: dict[str, list[str]] = {}
        for run in runs:
            values.setdefault(shown(run.settings[key]) if key in run.settings else "not told", []).append(f"{run.task} seed {run.seed}")
        if len(values) > 1:
            told = "; ".join(f"{value} ({', '.join(where[:3])}{', ...' if len(where) > 3 else ''})" for value, where in values.items())
            yield f"settings.{key} must be one for all tasks and seeds; it is {told}."


def _other_than(tasks: Mapping[str, Wanted], runs: Sequence[ScoreRun]) -> Iterator[str]:
    """Where runs are of another version, budget or other references than the suite has."""
    told: dict[str, None] = {}
    for run in runs:
        wanted = tasks[run.task]
        for key, is_now, should in (("task_version", run.task_version, wanted.version), ("budget", run.budget, wanted.budget)):
            if is_now != should:
                told[f"{run.task}: {key} must be {should}; it is {is_now}."] = None
        for name, should_be in wanted.references.items():
            if abs(run.references[name] - should_be) > REFERENCES_WITHIN:
                told[f"{run.task}: references.{name} must be {should_be:g}; it is {run.references[name]:g}."] = None
    yield from told


def _tokens(runs: Sequence[ScoreRun]) -> Iterator[str]:
    for run in runs:
        used = run.points[-1].policy_tokens
        if used > run.budget * (1 + MOST_ABOVE):
            yield (
                f"{run.task} seed {run.seed}: used {used:,} sampled tokens of a budget of {run.budget:,}; a last rollout may be {MOST_ABOVE:.1%} of the "
                "budget at most."
            )
        short = [point for point in run.points if run.status == "finished" and point.policy_tokens < point.share * run.budget]
        if short:
            yield (
                f"{run.task} seed {run.seed}: at {short[0].share:g} of the budget only {short[0].policy_tokens:,} of "
                f"{short[0].share * run.budget:,.0f} tokens had been sampled: its points are of a smaller budget. Run it again in a new folder."
            )


def _not_alike(entry: Entry, runs: Sequence[ScoreRun], board: Mapping[str, Entry]) -> Iterator[str]:
    """Where its runs were not measured as each other, or as those of the leaderboard, beyond version, budget and references."""
    if not runs:
        return
    own = replace(entry, runs=tuple(runs))
    sides = {**dict(list(board.items())[:1]), f"{named(entry.label)} here": own}
    for one in unlike(sides)[0]:
        if one.difference.key.partition(".")[0] not in ("task_version", "budget", "references"):
            yield f"Not measured alike: {one.told()}; the first is of {one.first}."
    versions = sorted({str(run.stamp.get("searchqa_gym")) for run in runs})
    if len(versions) > 1:
        yield f"All runs must be of one version of searchqa-gym; they are of {', '.join(versions)}."


# -- code --------------------------------------------------------------------------------------------------------------------------------------


def code_stamp(code: str) -> dict[str, str]:
    """Where the algorithm can be read: a URL as it is, or the name of a file with its hash."""
    from searchqa_agents.cli import UsageError

    if re.match(r"https?://", code):
        return {"url": code}
    file = Path(code)
    if not file.is_file():
        raise UsageError(f"--code must be a file, or a URL that begins with https://; got {code!r}.")
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def plugin_hashes(entry: Entry) -> list[str]:
    """Hashes (sha256) of the plugins that the runs were made with, as far as their stamps tell them."""
    found = (value for run in entry.runs for key, part in run.stamp.items() if key.startswith("plugin") for value in _hashes(part))
    return list(dict.fromkeys(found))


def _hashes(part: Any) -> Iterator[str]:
    if isinstance(part, str) and re.fullmatch(r"[0-9a-f]{64}", part):
        yield part
    elif isinstance(part, Mapping):
        for value in part.values():
            yield from _hashes(value)
    elif isinstance(part, list):
        for value in part:
            yield from _hashes(value)


def _wrong_with_code(entry: Entry, code: Mapping[str, str] | None) -> Iterator[str]:
    """A file that is not the one the runs were made with."""
    hashes = plugin_hashes(entry)
    if code is not None and "sha256" in code and hashes and code["sha256"] not in hashes:
        yield (
            f"--code {code['file']} is not the plugin that the runs were made with: its sha256 is {code['sha256'][:12]}..., that of the runs "
            f"{', '.join(f'{one[:12]}...' for one in hashes)}. Give the file as it was, or run it again."
        )


# -- the file ----------------------------------------------------------------------------------------------------------------------------------


def as_submitted(
    entry: Entry, tasks: Mapping[str, Wanted], *, label: str | None = None, code: Mapping[str, str] | None = None, tried: int | None = None
) -> tuple[Entry, list[str]]:
    """The entry with the protocol's runs only, and what is told with it in its stamps; and sentences on what is left out."""
    added: dict[str, Any] = ({} if code is None else {"code": dict(code)}) | ({} if tried is None else {"configurations_tried": tried})
    runs = tuple(replace(run, stamp={**run.stamp, **added}) for run in entry.runs if run.task in tasks and run.seed in SEEDS)
    others = [f"{run.task} seed {run.seed}" for run in entry.runs if run.task not in tasks or run.seed not in SEEDS]
    left_out = [f"Left out, as no part of the leaderboard: {', '.join(others)}."] if others else []
    ready = replace(entry, runs=runs, stamp=common_part([run.stamp for run in runs]), label=label or entry.label, unfinished=())
    return ready, left_out


def _told(out: Path, entry: Entry, left_out: Sequence[str]) -> Iterator[str]:
    hashes, code, tried = plugin_hashes(entry), entry.stamp.get("code"), entry.stamp.get("configurations_tried")
    yield f"Written: {out} ({len(entry.runs)} runs, {out.stat().st_size / 1024:.0f} kB)."
    yield from left_out
    yield f"Command: {entry.command}"
    if hashes:
        yield f"Plugin: sha256 {', '.join(hashes)}"
    if str(entry.stamp.get("commit", "")).endswith("+changes"):
        yield "The runs were made with changes to this package that are in no commit: say which, or nobody can run them again."
    if code is None and hashes:
        yield "It does not say where the algorithm can be read: give --code FILE_OR_URL."
    if tried is None:
        yield "It does not say how many configurations were tried before this one: give --tried N. The protocol asks for it."
    yield (
        f"What to do with it: open a pull request that adds it as agents/searchqa_agents/bench/leaderboard/{entry.suite}/{entry.algorithm}.json with the "
        "algorithm's file, or an issue with both attached. docs/benchmark.md says what is looked at."
    )
