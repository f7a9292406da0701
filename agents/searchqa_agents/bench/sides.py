"""What the words of a line mean: an algorithm's name, a folder of runs, or a results file; and the entries that stand beside each other."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from searchqa_agents.bench.results import BenchResultError, Entry, collect, read_entry, runs_under, shipped
from searchqa_agents.bench.table import one_line

DEFAULT_SUITE = "world-v1"
SEEDS = tuple(range(5))
"""Those that the protocol wants of each task."""
LONGEST_NAME = 60


@dataclass(frozen=True)
class Sides:
    """Entries of one comparison.

    Attributes
    ----------
    suite
        Its name.
    entries
        By the name that tables give them: those asked for, then the leaderboard's. A name is one line of at most 60 characters.
    mine
        Names of those asked for.
    tasks
        Those of the leaderboard that all of ``mine`` have.
    left_out
        Sentences on what is not part of the comparison.
    """

    suite: str
    entries: dict[str, Entry]
    mine: tuple[str, ...]
    tasks: tuple[str, ...]
    left_out: tuple[str, ...]

    def called(self, name: str) -> str | None:
        """The entry that a line names: by its name, by its algorithm on the leaderboard, or among those asked for; None if there is none."""
        if name in self.entries:
            return name
        ordered = [key for key in self.entries if key not in self.mine] + list(self.mine)
        return next((key for key in ordered if self.entries[key].algorithm == name), None)


def read_sides(words: Sequence[str], suite: str | None, runs: str | Path | None) -> Sides:
    """The entries that ``words`` name, and the leaderboard of their suite.

    Parameters
    ----------
    suite
        None: that of the first file or folder among the words, or ``world-v1``.
    runs
        The folder in which names are looked for; None: ``runs/bench/<suite>``.

    Raises
    ------
    BenchResultError
        If a word names nothing, or its results cannot be read.
    """
    read = {word: _read_path(word) for word in words if _is_path(word)}
    suite = suite or next((entry.suite for entry in read.values()), DEFAULT_SUITE)
    board = shipped(suite)
    folder = Path(runs) if runs is not None else Path("runs") / "bench" / suite
    mine: dict[str, Entry] = {}
    from_board: list[str] = []
    for word in words:
        entry = read[word] if word in read else _read_name(word, folder, board)
        if any(entry is one for one in board.values()):
            from_board.append(entry.algorithm)
        name = named(entry.label)
        if name in mine:
            name = named(f"{entry.label} ({word})")
        if name in mine:
            raise BenchResultError(f"{word} is named twice: compare it with another.")
        mine[name] = entry
    others = {name: entry for name, entry in board.items() if name not in from_board}
    labels = [named(entry.label) for entry in others.values()]
    rest = {label if labels.count(label) == 1 else name: entry for label, (name, entry) in zip(labels, others.items(), strict=True)}
    mine = {f"{name} (yours)" if name in rest else name: entry for name, entry in mine.items()}
    entries = mine | rest
    tasks, left_out = _tasks(mine, wanted_tasks(suite, board))
    for name, entry in entries.items():
        check_words(name, entry)
    return Sides(suite, entries, tuple(mine), tasks, left_out)


def pasteable(command: str) -> str:
    """A command line whose quotes were lost, as ``seed=range(5)``, as a shell takes it; words that have quotes stay as they are."""
    words = command.split(" ")
    return " ".join(f"'{word}'" if re.search(r"[()\[\]{}*?$;<>!]", word) and not re.search(r"['\"\\]", word) else word for word in words)


def collected(folder: Path, algorithm: str) -> Entry:
    """The entry of runs in a folder, with a command that can be given again."""
    entry = collect(folder, algorithm)
    return replace(entry, command=pasteable(entry.command))


def check_words(name: str, entry: Entry) -> None:
    """Raise ``BenchResultError`` for names of tasks that are no words: they stand in tables, files and terminals."""
    for task in entry.tasks:
        if not re.fullmatch(r"[\w .+-]{1,60}", task):
            raise BenchResultError(
                f"{name}: task: must be letters, digits, spaces and _.+-, at most 60; got {task[:60]!r}. Name the task otherwise."
            )


def named(label: str) -> str:
    """A label as a name: other people's text in one line, and not too long for a table."""
    line = one_line(label) or "without a name"
    return line if len(line) <= LONGEST_NAME else f"{line[: LONGEST_NAME - 1]}…"


class Wanted(NamedTuple):
    """What the protocol says of a task: its version, its budget in tokens, and its references, as far as the leaderboard has them."""

    version: int
    budget: int
    references: Mapping[str, float]


def wanted_tasks(suite: str, board: Mapping[str, Entry]) -> dict[str, Wanted]:
    """The leaderboard tasks of a suite, in its order; of one that is not part of this package, those of the leaderboard's entries."""
    import yaml

    of_board = {run.task: Wanted(run.task_version, run.budget, run.references) for entry in board.values() for run in entry.runs}
    folder = files("searchqa_conf")
    file = folder.joinpath("suite", f"{suite}.yaml")
    if not re.fullmatch(r"[\w.-]+", suite) or not file.is_file():
        return of_board
    tasks = {}
    for name in yaml.safe_load(file.read_text(encoding="utf-8"))["hydra"]["sweeper"]["params"]["task"].split(","):
        task = yaml.safe_load(folder.joinpath("task", f"{name.strip()}.yaml").read_text(encoding="utf-8"))["task"]
        references = of_board[task["name"]].references if task["name"] in of_board else {}
        tasks[task["name"]] = Wanted(task["version"], task["budget"], references)
    return tasks


def read_mine(word: str, suite: str | None, runs: str | Path | None) -> Entry:
    """The entry that one word names; parameters and errors as :func:`read_sides`."""
    if _is_path(word):
        return _read_path(word)
    suite = suite or DEFAULT_SUITE
    return _read_name(word, Path(runs) if runs is not None else Path("runs") / "bench" / suite, {})


def _tasks(mine: Mapping[str, Entry], of_suite: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tasks that all of ``mine`` have of those of the leaderboard (without one: of theirs), and sentences on what that leaves out."""
    wanted = list(of_suite) or list(dict.fromkeys(task for entry in mine.values() for task in entry.tasks))
    tasks = tuple(task for task in wanted if all(task in entry.tasks for entry in mine.values()))
    if not tasks:
        own = "; ".join(f"{name} has {', '.join(entry.tasks)}" for name, entry in mine.items())
        raise BenchResultError(f"There is no task that all have of {', '.join(wanted)}: {own}. Run what is missing with `searchqa bench`.")
    lacking: dict[str, list[str]] = {}
    more: dict[str, list[str]] = {}
    for name, entry in mine.items():
        lacking.setdefault(", ".join(task for task in wanted if task not in entry.tasks), []).append(name)
        more.setdefault(", ".join(task for task in entry.tasks if task not in wanted), []).append(name)
    said = [f"No run on {of}, and so all numbers are of the other tasks: {', '.join(names)}." for of, names in lacking.items() if of]
    said += [
        f"Runs on {of} too, which are no part of the leaderboard and left out: {', '.join(names)}." for of, names in more.items() if of
    ]
    return tasks, tuple(said)


def _is_path(word: str) -> bool:
    return "/" in word or word.endswith(".json")


def _read_path(word: str) -> Entry:
    path = Path(word)
    if path.is_dir():
        return _of_folder(path)
    return read_entry(path)


def _of_folder(folder: Path) -> Entry:
    """The entry of a folder in which there are runs of one algorithm."""
    algorithms = sorted({run.algorithm for run in runs_under(folder)})
    if len(algorithms) > 1:
        raise BenchResultError(f"{folder} has runs of {', '.join(algorithms)}: name one of them, with --runs {folder}, or its folder.")
    return collected(folder, algorithms[0] if algorithms else folder.name)


def _read_name(word: str, folder: Path, board: Mapping[str, Entry]) -> Entry:
    if (folder / word).is_dir():
        return collected(folder, word)
    if word in board:
        return board[word]
    if Path(word).is_dir():
        return _of_folder(Path(word))
    if word.endswith(".py"):
        raise BenchResultError(f"{word} is a plugin: give the name of the algorithm that it registers, whose runs lie in {folder}.")
    there = sorted({file.parents[2].name for file in folder.glob("*/*/*/config.yaml")})
    near = difflib.get_close_matches(word, [*there, *board], n=1)
    raise BenchResultError(
        f"There are no results of {word!r}: {folder} has {', '.join(there) or 'none'}, and the leaderboard {', '.join(board) or 'none'}."
        f"{f' Did you mean {near[0]}?' if near else ''} Run `searchqa bench algorithm={word}`, or give a folder or a results file (--runs says where names "
        "are looked for)."
    )
