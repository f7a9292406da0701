"""Entries of the benchmark beside each other: where each stands, as numbers, as a table's cells, and in sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeVar

from searchqa_agents.bench.results import Entry
from searchqa_agents.bench.statistics import (
    RESAMPLES,
    Aggregates,
    Cell,
    Collapses,
    Estimate,
    IncompleteEntryError,
    Paired,
    Reached,
    aggregates,
    collapses,
    paired,
    probability_of_improvement,
    tokens_to_reach,
)
from searchqa_agents.table import markdown, number

HALF = 0.5
"""The score whose tokens are told: half of the oracle's."""
FEWEST_SEEDS = 3
"""Of each task, for words to say anything of a difference: intervals of fewer say next to nothing."""
NOTHING = 1e-9
"""Differences up to this are rounding."""
MARK = "►"
"""Marks a row of ``mine``."""
DASH = "–"


@dataclass(frozen=True)
class Standing:
    """What is known of one entry, over the tasks of a comparison.

    Attributes
    ----------
    name
        As the table calls it.
    entry
        Its runs on these tasks.
    mine
        Whether it is one of those that the comparison is about.
    missing
        Task and seed of the runs that the protocol wants and that it lacks.
    final, best
        Of all tasks together; None where no seed has all tasks.
    tasks
        Task -> mean over the seeds of the final scores.
    improvement
        Probability that a run of it is better than one of the baseline; None for the baseline itself, or without one.
    difference
        From the baseline, run by run; None likewise.
    reached
        Tokens to :data:`HALF`.
    seconds, cpu_seconds, environment_tokens
        Means over the runs, of the whole training of each.
    """

    name: str
    entry: Entry
    mine: bool
    missing: tuple[Cell, ...]
    final: Aggregates | None
    best: Aggregates | None
    tasks: Mapping[str, Estimate]
    improvement: Estimate | None
    difference: Paired | None
    reached: Reached | None
    collapses: Collapses | None
    seconds: float
    cpu_seconds: float
    environment_tokens: float

    @property
    def iqm(self) -> float:
        """The IQM by which it is ranked; NaN where there is none."""
        return math.nan if self.final is None else self.final.iqm.value

    @property
    def runs(self) -> str:
        """How many there are, and of how many, where some are missing."""
        count = len(self.entry.runs)
        return f"{count} of {count + len(self.missing)}" if self.missing else str(count)


class Comparison(NamedTuple):
    """Standings, the best first and those without a rank last; the name of the baseline, if there is one; and the tasks."""

    standings: tuple[Standing, ...]
    baseline: str | None
    tasks: tuple[str, ...]
    resamples: int

    def of(self, name: str) -> Standing:
        """The standing of a name."""
        return next(one for one in self.standings if one.name == name)


def compared(
    entries: Mapping[str, Entry],
    *,
    tasks: Sequence[str],
    seeds: Collection[int],
    mine: Collection[str] = (),
    baseline: str | None = None,
    resamples: int = RESAMPLES,
) -> Comparison:
    """All numbers of a comparison.

    Parameters
    ----------
    entries
        By name. Runs on other tasks are left out.
    tasks, seeds
        Those that the protocol wants.
    mine
        Names of those that the comparison is about.
    baseline
        The name of the entry that differences are taken from.
    """
    own = {name: replace(entry, runs=tuple(run for run in entry.runs if run.task in tasks)) for name, entry in entries.items()}
    against = None if baseline is None else own[baseline]
    standings = [
        _standing(name, entry, name in mine, None if name == baseline else against, tasks, seeds, resamples) for name, entry in own.items()
    ]
    standings.sort(key=lambda one: (math.isnan(one.iqm), 0.0 if math.isnan(one.iqm) else -one.iqm, one.name))
    return Comparison(tuple(standings), baseline, tuple(tasks), resamples)


def _standing(
    name: str, entry: Entry, mine: bool, baseline: Entry | None, tasks: Sequence[str], seeds: Collection[int], resamples: int
) -> Standing:
    there = {(run.task, run.seed) for run in entry.runs}
    ends = [run.points[-1] for run in entry.runs]
    return Standing(
        name=name,
        entry=entry,
        mine=mine,
        missing=tuple((task, seed) for task in tasks for seed in seeds if (task, seed) not in there),
        final=_known(lambda: aggregates(entry, tasks=tasks, complete=False, resamples=resamples)),
        best=_known(lambda: aggregates(entry, "best", tasks=tasks, complete=False, resamples=resamples)),
        tasks={task: aggregates(entry, tasks=[task], complete=False, resamples=resamples).mean for task in tasks if task in entry.tasks},
        improvement=None
        if baseline is None
        else _known(lambda: probability_of_improvement(entry, baseline, tasks=tasks, complete=False, resamples=resamples)),
        difference=None if baseline is None else _known(lambda: paired(entry, baseline, resamples=resamples)),
        reached=tokens_to_reach(entry, HALF) if ends else None,
        collapses=collapses(entry) if ends else None,
        seconds=_mean([end.seconds for end in ends]),
        cpu_seconds=_mean([end.cpu_seconds for end in ends]),
        environment_tokens=_mean([end.environment_tokens for end in ends]),
    )


Value = TypeVar("Value")


def _known(of: Callable[[], Value]) -> Value | None:
    """None where runs are missing for it."""
    try:
        return of()
    except IncompleteEntryError:
        return None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


# -- cells -----------------------------------------------------------------------------------------------------------------------------------


class TableCell(NamedTuple):
    """A cell: its text, what belongs to it in brackets or small beneath, and what its column is sorted by (None: last)."""

    text: str
    beneath: str = ""
    value: float | str | None = None

    @property
    def line(self) -> str:
        """Both in one line."""
        return f"{self.text} ({self.beneath})" if self.beneath else self.text


class Column(NamedTuple):
    """A column: its title, what it is in a sentence, its cell of a standing; whether small values come first; whether short tables have it."""

    title: str
    explained: str
    cell: Callable[[Standing], TableCell]
    small_first: bool = False
    short: bool = False


def columns(comparison: Comparison) -> list[Column]:
    """Those of the table, the name first."""
    ranks = {one.name: place + 1 for place, one in enumerate(comparison.standings) if not math.isnan(one.iqm)}
    against = [] if comparison.baseline is None else _against(comparison.baseline)
    return [
        Column("algorithm", "", lambda one: TableCell(one.name, value=one.name), small_first=True, short=True),
        Column(
            "rank",
            "By the IQM alone; neighbours whose intervals overlap may well change places with other seeds.",
            lambda one: TableCell(str(ranks[one.name]), value=ranks[one.name]) if one.name in ranks else TableCell(DASH),
            small_first=True,
            short=True,
        ),
        Column(
            "IQM",
            "Interquartile mean of the final scores over all tasks and seeds, with its 95% interval (bootstrap over seeds within each task). "
            "0 is without search, 1 the oracle.",
            lambda one: _estimate(None if one.final is None else one.final.iqm),
            short=True,
        ),
        *(
            Column(task, f"Final score on {task}: mean over seeds, with its 95% interval.", _of_task(task), short=True)
            for task in comparison.tasks
        ),
        Column(
            "mean",
            "Mean of the final scores over tasks and seeds, with its 95% interval.",
            lambda one: _estimate(None if one.final is None else one.final.mean),
        ),
        Column(
            "best",
            "Mean over tasks and seeds of the best of a run's nine scores: too high as a maximum of noisy ones, and not what is ranked.",
            lambda one: _estimate(None if one.best is None else one.best.mean, interval=False),
        ),
        *against,
        Column(
            "tokens to 0.5",
            "Tokens that the policy had sampled at the first measurement with half of the oracle's score: the median over runs, and how many of them got "
            "there; never, where half of them or more did not.",
            _tokens,
            small_first=True,
            short=True,
        ),
        Column(
            "collapsed",
            "Share of runs that ended at less than half of their best score, or diverged.",
            lambda one: _share(one.collapses),
            small_first=True,
            short=True,
        ),
        Column(
            "CPU seconds",
            "Of training, without measuring: mean over runs. Seconds of different machines cannot be compared.",
            lambda one: _amount(one.cpu_seconds),
            small_first=True,
            short=True,
        ),
        Column("seconds", "The same by the clock, with whatever else the machine did.", lambda one: _amount(one.seconds), small_first=True),
        Column(
            "environment tokens",
            "Tokens that the environment wrote in training, prompts and passages: mean over runs.",
            lambda one: _amount(one.environment_tokens),
            small_first=True,
        ),
        Column(
            "runs",
            "Finished ones, and of how many where some are missing.",
            lambda one: TableCell(one.runs, value=len(one.entry.runs)),
            short=True,
        ),
    ]


def _against(baseline: str) -> list[Column]:
    return [
        Column(
            f"difference from {baseline}",
            f"Final score minus that of {baseline} with the same task and seed: mean, with its 95% interval. The two are told apart if it is without 0.",
            lambda one: _estimate(None if one.difference is None else one.difference.difference, shown=signed),
            short=True,
        ),
        Column(
            f"P(better than {baseline})",
            f"Probability that a run has a higher final score than a run of {baseline} on the same task, with its 95% interval.",
            lambda one: _estimate(one.improvement),
        ),
    ]


def _of_task(task: str) -> Callable[[Standing], TableCell]:
    return lambda one: _estimate(one.tasks.get(task))


def _estimate(estimate: Estimate | None, *, interval: bool = True, shown: Callable[[float], str] = number) -> TableCell:
    if estimate is None:
        return TableCell(DASH)
    beneath = f"{shown(estimate.interval[0])} to {shown(estimate.interval[1])}" if interval and estimate.interval else ""
    return TableCell(shown(estimate.value), beneath, estimate.value)


def signed(value: float) -> str:
    """Three digits behind the point, with the sign."""
    return f"{round(value, 3) + 0.0:+.3f}"


def _tokens(one: Standing) -> TableCell:
    if one.reached is None:
        return TableCell(DASH)
    beneath = "" if one.reached.reached == one.reached.runs else f"{one.reached.reached} of {one.reached.runs}"
    if one.reached.median is None:
        return TableCell("never", beneath)
    return TableCell(f"{one.reached.median:,.0f}", beneath, one.reached.median)


def _share(found: Collapses | None) -> TableCell:
    if found is None:
        return TableCell(DASH)
    return TableCell(f"{found.rate:.0%}", f"{len(found.cells)} of {found.runs}" if found.cells else "", found.rate)


def _amount(value: float) -> TableCell:
    return TableCell(DASH) if math.isnan(value) else TableCell(f"{value:,.0f}" if value >= 10 else f"{value:.1f}", value=value)


def text_rows(comparison: Comparison, chosen: Sequence[Column]) -> list[list[str]]:
    """Rows for a terminal; those of ``mine`` bear :data:`MARK`."""
    return [
        [
            f"{MARK} {cell.line}" if one.mine and place == 0 else cell.line
            for place, cell in enumerate(column.cell(one) for column in chosen)
        ]
        for one in comparison.standings
    ]


def markdown_table(comparison: Comparison, chosen: Sequence[Column]) -> str:
    """The table in Markdown, with rows of ``mine`` in bold; what other people wrote, such as labels, can be no markup in it."""
    rows = []
    for one in comparison.standings:
        cells = [as_text(column.cell(one).line) for column in chosen]
        rows.append([f"**{cells[0]}**" if one.mine else cells[0], *cells[1:]])
    return markdown([as_text(column.title) for column in chosen], rows)


_MARKUP = re.compile(r"[&<>|\\`*\[\]]")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")


def as_text(text: str) -> str:
    """Text that Markdown shows as it is: what could be markup as entities, and in one line."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", one_line(text))


def one_line(text: str) -> str:
    """Text without line breaks and control characters, which could rewrite a terminal."""
    return _UNPRINTABLE.sub(" ", text).strip()


# -- sentences -------------------------------------------------------------------------------------------------------------------------------


def in_words(comparison: Comparison, name: str) -> list[str]:
    """Where one entry stands: its score and rank, which others it can be told apart from, and how far that carries."""
    own = comparison.of(name)
    if own.final is None:
        lacking = ", ".join(task for task in comparison.tasks if task not in own.tasks)
        return [f"{name} has no place over all tasks yet: {f'it has no run on {lacking}' if lacking else 'no seed of it has all tasks'}."]
    ranked = [one for one in comparison.standings if one.final is not None]
    seeds, tasks = _count(len(own.final.seeds), "seed"), _count(len(comparison.tasks), "task")
    iqm = _estimate(own.final.iqm).line
    sentences = [
        f"{name} is number {ranked.index(own) + 1} of {len(ranked)} by the IQM of its final scores, {iqm}, over {seeds} and {tasks}."
    ]
    others = sorted((one for one in ranked if one is not own), key=lambda one: one.name != comparison.baseline)
    told: dict[str, list[str]] = {"better": [], "worse": [], "alike": [], "unknown": []}
    for other in others:
        difference = _difference(own, other, comparison.resamples)
        if difference is None or difference.interval is None:
            told["unknown"].append(other.name)
            continue
        low, high = difference.interval
        kind = "better" if low > NOTHING else "worse" if high < -NOTHING else "alike"
        bounds = f"{signed(low)} to {signed(high)}"
        size = f"({signed(difference.value)}, {bounds})" if kind == "alike" else f"by {signed(difference.value)} ({bounds})"
        told[kind].append(f"{other.name} {size}")
    parts = [f"it is {kind} than {_listed(told[kind])}" for kind in ("better", "worse") if told[kind]]
    parts += [f"it cannot be told apart from {_listed(told['alike'])}"] if told["alike"] else []
    parts += (
        [f"nothing can be said beside {_listed(told['unknown'])}: fewer than {FEWEST_SEEDS} seeds of a task are in common"]
        if told["unknown"]
        else []
    )
    if parts:
        sentences.append(f"On the same tasks and seeds {'; '.join(parts)}.")
    overlapping = [one.name for one in others if _overlap(own, one)]
    if overlapping:
        sentences.append(f"Its rank is not settled: the interval of its IQM overlaps with {_listed(overlapping)}.")
    compared_with = len(others) - len(told["unknown"])
    if compared_with > 1:
        sentences.append(
            f"Intervals are over {seeds} on the same questions, and not corrected for the {compared_with} comparisons: "
            "of twenty equal algorithms about two look different, for intervals from so few seeds are a little narrow."
        )
    return sentences


def _difference(own: Standing, other: Standing, resamples: int) -> Estimate | None:
    """None where they have too few seeds in common."""
    found = _known(lambda: paired(own.entry, other.entry, resamples=resamples))
    return None if found is None or min(task.pairs for task in found.tasks.values()) < FEWEST_SEEDS else found.difference


def _overlap(one: Standing, other: Standing) -> bool:
    intervals = [side.final.iqm.interval for side in (one, other) if side.final is not None and side.final.iqm.interval is not None]
    return len(intervals) == 2 and intervals[0][0] <= intervals[1][1] and intervals[1][0] <= intervals[0][1]


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the table must know: which entries are not complete, and in what."""
    lines = []
    for one in comparison.standings:
        if one.missing:
            lines.append(f"{one.name} has {one.runs} runs; missing: {_cells(one.missing)}.")
        if one.entry.unfinished:
            lines.append(
                f"{one.name} has {_count(len(one.entry.unfinished), 'run')} without a result: {_listed(list(map(str, one.entry.unfinished)))}."
            )
        if one.missing and one.final is not None and len(one.final.seeds) < len(one.entry.seeds):
            kept = ", ".join(map(str, one.final.seeds))
            lines.append(f"{one.name}: numbers over all tasks are of the seeds that have them all, {kept}.")
        if one.collapses is not None and one.collapses.diverged:
            lines.append(f"{one.name} diverged on {_cells(one.collapses.diverged)}: the score is 0 from there.")
    return lines


def _cells(cells: Sequence[Cell]) -> str:
    by_task: dict[str, list[int]] = {}
    for task, seed in cells:
        by_task.setdefault(task, []).append(seed)
    return ", ".join(f"{task} seed{'s' if len(seeds) > 1 else ''} {' '.join(map(str, seeds))}" for task, seeds in by_task.items())


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _count(number_of: int, what: str) -> str:
    return f"{number_of} {what}{'' if number_of == 1 else 's'}"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers, as what JSON can say."""
    return {
        "baseline": comparison.baseline,
        "tasks": list(comparison.tasks),
        "entries": [_standing_as_json(place + 1, one) for place, one in enumerate(comparison.standings)],
    }


def _standing_as_json(place: int, one: Standing) -> dict[str, Any]:
    return {
        "name": one.name,
        "algorithm": one.entry.algorithm,
        "mine": one.mine,
        "rank": None if one.final is None else place,
        "runs": len(one.entry.runs),
        "missing": [list(cell) for cell in one.missing],
        "unfinished": [str(path) for path in one.entry.unfinished],
        "final": None if one.final is None else _plain(asdict(one.final)),
        "best": None if one.best is None else _plain(asdict(one.best)),
        "by_task": {task: _plain(estimate._asdict()) for task, estimate in one.tasks.items()},
        "probability_of_improvement": None if one.improvement is None else _plain(one.improvement._asdict()),
        "difference": None if one.difference is None else _plain(asdict(one.difference)),
        "tokens_to_half": None
        if one.reached is None
        else {"median": one.reached.median, "reached": one.reached.reached, "runs": one.reached.runs},
        "collapse_rate": None if one.collapses is None else one.collapses.rate,
        "diverged": [] if one.collapses is None else [list(cell) for cell in one.collapses.diverged],
        "seconds": _plain(one.seconds),
        "cpu_seconds": _plain(one.cpu_seconds),
        "environment_tokens": _plain(one.environment_tokens),
    }


def _plain(value: Any) -> Any:
    """With estimates as objects, and None for numbers that JSON cannot say."""
    if isinstance(value, Estimate):
        return {"value": _plain(value.value), "interval": None if value.interval is None else list(value.interval)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
