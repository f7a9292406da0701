"""The results of benchmark runs as files, read strictly: ``score.json`` of one run, and the results file of all runs of one algorithm.

A results file is made to be read in a diff: what all runs have in common stands at its top, and each run is one line::

    {
    "schema": 1,
    "suite": "world-v1",
    "algorithm": "grpo",
    "label": "grpo",
    "command": "searchqa bench suite=world-v1 algorithm=grpo 'seed=range(5)'",
    "settings": {...},                     what is alike in all runs' settings
    "stamp": {...},                        and in their stamps
    "runs": [
    {"task": "sparse", "task_version": 1, "seed": 0, ...},
    ...
    ]
    }
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from searchqa_agents.runs import replace_file
from searchqa_envs.errors import SearchQAError

SCHEMA_VERSION = 1
SCORE_FILE = "score.json"
SHARES = tuple(eighth / 8 for eighth in range(9))
"""At which shares of its budget a run is measured."""
STATUSES = ("finished", "diverged")
LEADERBOARD = Path(__file__).parent / "leaderboard"
"""Where the results files of the shipped leaderboard lie: ``<suite>/<algorithm>.json``."""
SCORE_TOLERANCE = 1e-3
"""How far a stored score may be from what its em and references give: stored numbers are rounded."""

_AGAIN = "Write it again: a run's by the line of `searchqa bench` that made the run, a results file by `searchqa bench submit`."


class BenchResultError(SearchQAError, ValueError):
    """A result of the benchmark cannot be read or does not belong with the others; the message names file, field and the way out."""


@dataclass(frozen=True)
class Point:
    """What a run had used and reached at one share of its budget.

    Attributes
    ----------
    share
        Of the budget: 0, 1/8, ..., 1.
    policy_tokens, environment_tokens
        Tokens sampled by the policy, and written by the environment, in training up to here.
    steps
        Training steps up to here.
    seconds, cpu_seconds
        Of training only (rollouts and updates, not measuring) up to here: by the clock, and of the processor.
    em
        Mean exact match on the held-out questions, 0 to 1.
    searches
        Mean number of searches per held-out episode.
    score
        ``(em - no_search) / (oracle - no_search)``: 0 is what is reached without searching, 1 the oracle. Below 0 and above 1 are possible.
    """

    share: float
    policy_tokens: int
    environment_tokens: int
    steps: int
    seconds: float
    cpu_seconds: float
    em: float
    searches: float
    score: float


@dataclass(frozen=True)
class ScoreRun:
    """One run of an algorithm on a task: what ``score.json`` holds.

    Attributes
    ----------
    budget
        In policy-sampled tokens.
    references
        Exact match of ``no_search`` and ``oracle`` on the same held-out questions.
    points
        Nine, at the shares 0, 1/8, ..., 1. Of a run that diverged, those after it have a score and an em of 0.
    settings
        Of the algorithm and its training, as far as they are told; not interpreted.
    stamp
        What a number needs to be comparable.
    status
        ``finished`` or ``diverged`` (a loss that is not finite).
    """

    suite: str
    task: str
    task_version: int
    algorithm: str
    seed: int
    budget: int
    references: Mapping[str, float]
    points: tuple[Point, ...]
    settings: Mapping[str, Any]
    stamp: Mapping[str, Any]
    status: str


@dataclass(frozen=True)
class Entry:
    """All runs of one algorithm on one suite: what a results file holds.

    Attributes
    ----------
    runs
        By task and seed. Each has its whole stamp and settings.
    command
        The line that makes them.
    stamp
        What the stamps of all runs have in common.
    label
        The name in tables.
    unfinished
        Folders of jobs that were begun and have no result; only of an entry that was collected from a folder, and in no file.
    """

    algorithm: str
    suite: str
    runs: tuple[ScoreRun, ...]
    command: str
    stamp: Mapping[str, Any]
    label: str
    unfinished: tuple[Path, ...] = field(default=(), compare=False)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that have a run, sorted."""
        return tuple(sorted({run.task for run in self.runs}))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds that any task has, ascending."""
        return tuple(sorted({run.seed for run in self.runs}))


def normalised_score(em: float, references: Mapping[str, float]) -> float:
    """``(em - no_search) / (oracle - no_search)``."""
    return (em - references["no_search"]) / (references["oracle"] - references["no_search"])


# -- one run ---------------------------------------------------------------------------------------------------------------------------------


def write_run(folder: str | os.PathLike[str], run: ScoreRun) -> Path:
    """Write ``score.json`` of a run's folder at once; raises ``BenchResultError`` for a run that could not be read back."""
    path = Path(folder) / SCORE_FILE
    text = _as_text({"schema": SCHEMA_VERSION, **_run_as_json(run)}, str(path), indent=2) + "\n"
    _run_of_text(text, f"{path}, as it would be written")
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def read_run(folder: str | os.PathLike[str]) -> ScoreRun:
    """The result in a job's folder, or in a file like ``score.json``.

    Raises
    ------
    BenchResultError
        If there is none, or it is not exactly what :class:`ScoreRun` says.
    """
    path = Path(folder)
    path = path / SCORE_FILE if path.is_dir() or path.suffix != ".json" else path
    return _run_of_text(_read_text(path), str(path))


def runs_under(folder: str | os.PathLike[str]) -> list[ScoreRun]:
    """All runs below a folder that have a result, by algorithm, task and seed; what is unfinished is :func:`unfinished_under`."""
    runs = [read_run(job) for job in _jobs(Path(folder)) if (job / SCORE_FILE).is_file()]
    return sorted(runs, key=lambda run: (run.algorithm, run.task, run.seed))


def unfinished_under(folder: str | os.PathLike[str]) -> list[Path]:
    """Folders of jobs below a folder that were begun (``config.yaml``) and have no result (``score.json``), sorted."""
    return [job for job in _jobs(Path(folder)) if not (job / SCORE_FILE).is_file()]


def _jobs(folder: Path) -> Iterator[Path]:
    """Folders of jobs, sorted; nothing is looked for inside them, nor in hidden folders."""
    if not folder.is_dir():
        raise BenchResultError(
            f"{folder} is no folder with runs of the benchmark; they are made by `searchqa bench suite=... algorithm=...`."
        )
    for place, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if SCORE_FILE in files or "config.yaml" in files:
            inner.clear()
            yield Path(place)


def _run_of_text(text: str, name: str) -> ScoreRun:
    value = _Object(_parsed(text, name), name)
    value.schema()
    return _read_run(value, value.take("suite", str), value.take("algorithm", str))


def _run_as_json(run: ScoreRun) -> dict[str, Any]:
    return {**asdict(run), "points": [{name: _rounded(name, value) for name, value in asdict(point).items()} for point in run.points]}


def _rounded(name: str, value: float) -> float:
    return round(value, 3 if name.endswith("seconds") else 6) if isinstance(value, float) else value


def _read_run(value: _Object, suite: str, algorithm: str) -> ScoreRun:
    run = ScoreRun(
        suite=suite,
        algorithm=algorithm,
        task=value.take("task", str),
        task_version=value.count("task_version", least=1),
        seed=value.count("seed"),
        budget=value.count("budget", least=1),
        references=_read_references(value.inner("references")),
        points=tuple(_read_point(point) for point in value.inner_list("points")),
        settings=value.plain("settings"),
        stamp=value.plain("stamp"),
        status=value.take("status", str),
    )
    value.nothing_else()
    if run.status not in STATUSES:
        raise value.error("status", f"must be one of {', '.join(STATUSES)}", run.status)
    shares = [point.share for point in run.points]
    if shares != list(SHARES):
        raise value.error("points", "must be measured at the shares 0, 1/8, ..., 1 of the budget, in this order", shares)
    for name in ("policy_tokens", "environment_tokens", "steps", "seconds", "cpu_seconds"):
        used = [getattr(point, name) for point in run.points]
        if used != sorted(used):
            raise value.error(f"points.{name}", "counts from the start of the run, so it cannot fall", used)
    for place, point in enumerate(run.points):
        filled = run.status == "diverged" and point.em == point.score == 0
        if not filled and abs(point.score - normalised_score(point.em, run.references)) > SCORE_TOLERANCE:
            meant = round(normalised_score(point.em, run.references), 6)
            raise value.error(f"points[{place}].score", f"must be (em - no_search) / (oracle - no_search) = {meant}", point.score)
    return run


def _read_references(value: _Object) -> dict[str, float]:
    references = {name: value.number(name, 0.0, 1.0) for name in ("no_search", "oracle")}
    value.nothing_else()
    if references["oracle"] <= references["no_search"]:
        raise value.error("oracle", "must be above no_search, or no score can be told", references)
    return references


def _read_point(value: _Object) -> Point:
    point = Point(
        share=value.number("share", 0.0, 1.0),
        policy_tokens=value.count("policy_tokens"),
        environment_tokens=value.count("environment_tokens"),
        steps=value.count("steps"),
        seconds=value.number("seconds", 0.0),
        cpu_seconds=value.number("cpu_seconds", 0.0),
        em=value.number("em", 0.0, 1.0),
        searches=value.number("searches", 0.0),
        score=value.number("score"),
    )
    value.nothing_else()
    return point


# -- all runs of an algorithm ----------------------------------------------------------------------------------------------------------------


def collect(folder: str | os.PathLike[str], algorithm: str, *, command: str | None = None, label: str | None = None) -> Entry:
    """The entry of an algorithm from the runs of a sweep.

    Parameters
    ----------
    folder
        Of the sweep, with a folder for each algorithm, or of the algorithm.
    command
        The line that makes the runs; by default the one that their stamps name (several, one after the other, if they were begun by several).
    label
        By default the algorithm's name.

    Returns
    -------
    Entry
        Of the finished runs; ``unfinished`` has the folders of the others.

    Raises
    ------
    BenchResultError
        If there is no finished run of the algorithm, one cannot be read, or they do not belong together.
    """
    root = Path(folder)
    root = root / algorithm if (root / algorithm).is_dir() else root
    unfinished = tuple(unfinished_under(root))
    found = {str(job / SCORE_FILE): read_run(job) for job in _jobs(root) if job not in unfinished}
    own = {path: run for path, run in found.items() if run.algorithm == algorithm}
    if not own:
        others = sorted({run.algorithm for run in found.values()})
        raise BenchResultError(
            f"{root} has no finished run of the algorithm {algorithm!r} ({SCORE_FILE}): "
            f"it has {', '.join(others) if others else 'none of any other'}, and {len(unfinished)} unfinished. "
            f"Run `searchqa bench suite=... algorithm={algorithm}`, or go on with what is unfinished by giving its line again."
        )
    check_together(own)
    runs = tuple(sorted(own.values(), key=lambda run: (run.task, run.seed)))
    told = (
        command if command is not None else " && ".join(dict.fromkeys(str(run.stamp["command"]) for run in runs if "command" in run.stamp))
    )
    name = algorithm if label is None else label
    return Entry(algorithm, runs[0].suite, runs, told, common_part([run.stamp for run in runs]), name, unfinished)


def check_together(runs: Mapping[str, ScoreRun]) -> None:
    """Check that runs of one algorithm, by where they come from, can stand in one entry; raises ``BenchResultError``.

    One suite and algorithm; each task and seed once; for each task one version, one budget and one pair of references.
    """
    first: dict[str, tuple[str, ScoreRun]] = {}
    seen: dict[tuple[str, int], str] = {}
    for place, run in runs.items():
        before, other = first.setdefault(run.task, (place, run))
        anywhere, any_run = next(iter(first.values()))
        for name in ("suite", "algorithm"):
            if getattr(run, name) != getattr(any_run, name):
                raise _different(
                    place, name, getattr(run, name), anywhere, getattr(any_run, name), "Collect them from folders of their own."
                )
        for name in ("task_version", "budget"):
            if getattr(run, name) != getattr(other, name):
                way_out = f"Runs of one task have one {name}: run the older ones again."
                raise _different(place, name, getattr(run, name), before, getattr(other, name), way_out)
        for name, value in run.references.items():
            if abs(value - other.references[name]) > 1e-6:
                way_out = "Scores of one task are measured with one pair of references: run the older ones again."
                raise _different(place, f"references.{name}", value, before, other.references[name], way_out)
        twice = seen.setdefault((run.task, run.seed), place)
        if twice != place:
            raise BenchResultError(f"{place}: seed: task {run.task!r} has seed {run.seed} twice, also in {twice}. Remove one of the two.")


def _different(place: str, name: str, value: object, other_place: str, other: object, way_out: str) -> BenchResultError:
    return BenchResultError(f"{place}: {name}: is {value!r}, but {other!r} in {other_place}. {way_out}")


def write_entry(path: str | os.PathLike[str], entry: Entry) -> None:
    """Write a results file at once: one run to a line, floats rounded to 6 digits after the point, seconds to 3.

    Raises
    ------
    BenchResultError
        If the entry could not be read back.
    """
    name = f"{path}, as it would be written"
    for number, run in enumerate(entry.runs):
        if (run.suite, run.algorithm) != (entry.suite, entry.algorithm):
            raise BenchResultError(
                f"{name}: runs[{number}]: is of suite {run.suite!r} and algorithm {run.algorithm!r}, the entry of {entry.suite!r} and "
                f"{entry.algorithm!r}. An entry has the runs of one algorithm on one suite: make one for each."
            )
    text = entry_text(entry)
    entry_of_text(text, name)
    replace_file(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))


def entry_text(entry: Entry) -> str:
    """What :func:`write_entry` writes."""
    ordered = sorted(entry.runs, key=lambda run: (run.task, run.seed))
    values = [json.loads(_as_text(_run_as_json(run), f"{run.task}, seed {run.seed}")) for run in ordered]
    common = {part: common_part([value[part] for value in values]) for part in ("settings", "stamp")}
    head = {part: getattr(entry, part) for part in ("suite", "algorithm", "label", "command")}
    for value in values:
        value |= {part: without_common_part(value[part], common[part]) for part in common}
        del value["suite"], value["algorithm"]
    tops = [f"{json.dumps(part)}: {json.dumps(value)},\n" for part, value in {"schema": SCHEMA_VERSION, **head, **common}.items()]
    return "{\n" + "".join(tops) + '"runs": [\n' + ",\n".join(map(json.dumps, values)) + "\n]\n}\n"


def read_entry(path: str | os.PathLike[str]) -> Entry:
    """A results file.

    Raises
    ------
    BenchResultError
        If it cannot be read, or is not exactly what :class:`Entry` says.
    """
    return entry_of_text(_read_text(Path(path)), str(path))


def entry_of_text(text: str, name: str) -> Entry:
    """The entry in the text of a results file, which messages call ``name``; raises ``BenchResultError``."""
    value = _Object(_parsed(text, name), name)
    value.schema()
    known = {part: value.take(part, str) for part in ("suite", "algorithm", "label", "command")}
    settings, stamp = value.plain("settings"), value.plain("stamp")
    runs: dict[str, ScoreRun] = {}
    for line in value.inner_list("runs"):
        for part, common in (("settings", settings), ("stamp", stamp)):
            line.rest[part] = merged(common, line.plain(part))
        for part in ("suite", "algorithm"):
            if part in line.rest:
                raise line.error(part, "stands at the top of the file only", line.rest[part])
        runs[line.place] = _read_run(line, known["suite"], known["algorithm"])
    value.nothing_else()
    if not runs:
        raise value.error("runs", "must have at least one run", [])
    check_together(runs)
    ordered = tuple(sorted(runs.values(), key=lambda run: (run.task, run.seed)))
    return Entry(known["algorithm"], known["suite"], ordered, known["command"], common_part([run.stamp for run in ordered]), known["label"])


def shipped(suite: str) -> dict[str, Entry]:
    """The entries of the shipped leaderboard by algorithm, sorted; none for a suite that has no leaderboard.

    Raises
    ------
    BenchResultError
        If a file is malformed, or is not of the suite and the algorithm that its place says.
    """
    entries = {}
    for path in sorted((LEADERBOARD / suite).glob("*.json")):
        entry = read_entry(path)
        if (entry.suite, entry.algorithm) != (suite, path.stem):
            raise BenchResultError(
                f"{path}: suite, algorithm: the file's place says {suite!r} and {path.stem!r}, "
                f"its content {entry.suite!r} and {entry.algorithm!r}. Move it to <suite>/<algorithm>.json."
            )
        entries[entry.algorithm] = entry
    return entries


# -- what mappings have in common ------------------------------------------------------------------------------------------------------------


def common_part(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all mappings have with equal values; of values that are mappings themselves, their common part, unless it is empty."""
    first, *others = mappings
    common: dict[str, Any] = {}
    for name, value in first.items():
        if not all(name in other for other in others):
            continue
        values = [value, *(other[name] for other in others)]
        if all(_equal(value, other) for other in values[1:]):
            common[name] = value
        elif all(isinstance(one, Mapping) for one in values) and (part := common_part(values)):
            common[name] = part
    return common


def without_common_part(mapping: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """What a mapping has beyond the common part, so that :func:`merged` gives it back."""
    own: dict[str, Any] = {}
    for name, value in mapping.items():
        if name not in common:
            own[name] = value
        elif not _equal(value, common[name]):
            rest = without_common_part(value, common[name])
            if rest:
                own[name] = rest
    return own


def merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping from the common part and its own: its own goes before, and mappings in both are merged."""
    whole = dict(common)
    for name, value in own.items():
        inside = isinstance(value, Mapping) and isinstance(common.get(name), Mapping)
        whole[name] = merged(common[name], value) if inside else value
    return whole


def _equal(first: Any, second: Any) -> bool:
    """Equal as JSON: 1, 1.0 and true are three values."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


# -- JSON ------------------------------------------------------------------------------------------------------------------------------------


class _Object:
    """An object of a JSON file that is taken apart field by field; ``place`` is its file and where in it, for messages."""

    def __init__(self, value: Any, place: str) -> None:
        self.place = place
        if not isinstance(value, dict):
            raise BenchResultError(f"{place}: must be a JSON object; got {_shown(value)}. {_AGAIN}")
        self.rest: dict[str, Any] = dict(value)

    def error(self, name: str, rule: str, value: Any) -> BenchResultError:
        return BenchResultError(f"{self.place}: {name}: {rule}; got {_shown(value)}. {_AGAIN}")

    def schema(self) -> None:
        version = self.take("schema", int)
        if version != SCHEMA_VERSION:
            raise BenchResultError(
                f"{self.place}: schema: this version reads schema {SCHEMA_VERSION}; got {version}. Read it with the version of searchqa-gym that wrote it."
            )

    def take(self, name: str, kind: type) -> Any:
        """A field's value, which must be of just this type: true is no number here."""
        if name not in self.rest:
            raise BenchResultError(f"{self.place}: {name}: the field is missing. {_AGAIN}")
        value = self.rest.pop(name)
        if type(value) is not kind:
            raise self.error(name, f"must be {_KINDS[kind]}", value)
        return value

    def count(self, name: str, least: int = 0) -> int:
        value: int = self.take(name, int)
        if value < least:
            raise self.error(name, f"must be at least {least}", value)
        return value

    def number(self, name: str, least: float = -math.inf, most: float = math.inf) -> float:
        kind = int if type(self.rest.get(name)) is int else float
        value = self.take(name, kind)
        if not abs(value) <= sys.float_info.max:  # nor a whole number that no float holds
            raise self.error(name, "must be finite", value)
        if not least <= value <= most:
            raise self.error(name, f"must be at least {least:g}" if most == math.inf else f"must be between {least:g} and {most:g}", value)
        return float(value)

    def plain(self, name: str) -> dict[str, Any]:
        """A mapping of any JSON, with finite numbers."""
        value: dict[str, Any] = self.take(name, dict)
        for where, number in _numbers(value, name):
            if not math.isfinite(number):
                raise self.error(where, "must be finite", number)
        return value

    def inner(self, name: str) -> _Object:
        return _Object(self.take(name, dict), f"{self.place}: {name}")

    def inner_list(self, name: str) -> list[_Object]:
        return [_Object(one, f"{self.place}: {name}[{number}]") for number, one in enumerate(self.take(name, list))]

    def nothing_else(self) -> None:
        if self.rest:
            raise BenchResultError(f"{self.place}: {', '.join(sorted(self.rest))}: not known to schema {SCHEMA_VERSION}. {_AGAIN}")


_KINDS: dict[type, str] = {str: "a string", int: "a whole number", float: "a number", dict: "an object", list: "a list"}


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield where, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{where}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _numbers(inner, f"{where}[{number}]")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BenchResultError(
            f"{path}: there is no such file: the run is not finished. Give its line again, which goes on with it."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise BenchResultError(f"{path}: cannot be read ({error}). {_AGAIN}") from error


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BenchResultError(f"{name}: not JSON ({error}). {_AGAIN}") from error


def _as_text(value: Any, name: str, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent)  # in ASCII, which also holds the bytes that a command line may have
    except (TypeError, ValueError) as error:
        raise BenchResultError(
            f"{name}: settings, stamp: must be plain values that JSON has; {error}. Turn the others into strings."
        ) from error
