"""What the runs of algorithms on a suite say: aggregates with intervals, profiles, curves, collapses, and differences from a baseline.

The methods are those of Agarwal et al. 2021 (arXiv 2108.13264). Point estimates come from its library, rliable (``rliable.metrics``). Its other half,
``rliable.library`` (the stratified bootstrap and the profiles), cannot be imported beside pandas 3: it needs arch < 8, which calls a decorator that pandas
has changed. It would also draw from NumPy's global state whatever ``random_state`` it is given, so that one seed gave other intervals each time. So both
are computed here, with the same draws and the same percentiles: equal to rliable's where it can be loaded, which is tested.

All intervals are 95 % percentile intervals of a bootstrap over seeds, stratified by task, unless said otherwise: they tell how much the seeds matter, for
just these tasks. Where there is a single seed there is nothing to tell it by, and an interval is None. Everything random is seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from searchqa_agents.bench.results import SHARES, BenchResultError, Entry, ScoreRun
from searchqa_envs.errors import ConfigurationError

RESAMPLES = 2000
CONFIDENCE = 0.95
THRESHOLDS = np.linspace(0.0, 1.0, 41)
"""Scores at which a performance profile is told unless others are asked for."""
COLLAPSED_BELOW = 0.5
"""A run has collapsed if it ends below this part of its best score."""
_NUMBERS_AT_A_TIME = 2_000_000

FloatArray = NDArray[np.float64]
Interval = tuple[float, float]
Measure = Literal["final", "best"]
Clock = Literal["cpu_seconds", "seconds"]
Cell = tuple[str, int]
"""A task and a seed."""


class IncompleteEntryError(BenchResultError):
    """Runs are missing that a statistic needs; the message names task and seed."""


class Estimate(NamedTuple):
    """A number and its 95 % interval; None where it cannot be told."""

    value: float
    interval: Interval | None


class Scores(NamedTuple):
    """Scores of one entry: ``values`` is float64[seeds, tasks], or float64[seeds, tasks, points]."""

    values: FloatArray
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Aggregates:
    """Scores of all seeds and tasks in one number.

    Attributes
    ----------
    iqm
        Interquartile mean: the mean of the middle half of all runs.
    mean, median
        Mean and median over tasks of the mean over seeds.
    optimality_gap
        By how much scores miss 1 on average; those above 1 count as 1. Small is good.
    seeds, tasks
        Of which runs.
    """

    iqm: Estimate
    mean: Estimate
    median: Estimate
    optimality_gap: Estimate
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """A line with its pointwise 95 % band: ``x, y, low, high`` are float64[points]; ``low`` and ``high`` are None where there is a single seed."""

    x: FloatArray
    y: FloatArray
    low: FloatArray | None
    high: FloatArray | None


@dataclass(frozen=True)
class Reached:
    """When runs reached a score.

    Attributes
    ----------
    score
        The one asked for.
    tokens
        By task and seed: policy tokens at the first measured point with at least that score (a point is an eighth of the budget after the one before);
        None if it was never reached.
    reached, runs
        How many of how many reached it.
    median
        Over all runs, of which those that never did come after all others; None where half of them or more never did.
    """

    score: float
    tokens: dict[Cell, int | None]
    reached: int
    runs: int
    median: float | None


@dataclass(frozen=True)
class Collapses:
    """Which runs collapsed (:func:`collapsed`): their cells, of them those that diverged, how many runs there are, and the share that collapsed."""

    cells: tuple[Cell, ...]
    diverged: tuple[Cell, ...]
    runs: int

    @property
    def rate(self) -> float:
        return len(self.cells) / self.runs


@dataclass(frozen=True)
class TaskDifference:
    """Of one task: the mean of the pairs' differences with Student's t interval (None for one pair), and the pairs won, lost and equal."""

    difference: Estimate
    pairs: int
    wins: int
    losses: int
    ties: int


@dataclass(frozen=True)
class Paired:
    """Differences from a baseline over runs with the same task and seed.

    Attributes
    ----------
    difference
        Mean over tasks of the mean over pairs, with the interval of a bootstrap over the pairs of each task; None unless each task has two.
    tasks
        By task.
    pairs, wins, losses, ties
        Numbers of pairs: all, and those in which the entry scores higher, lower, and the same.
    alone, baseline_alone
        Task and seed of runs that only the entry, only the baseline has. They are left out.
    """

    difference: Estimate
    tasks: dict[str, TaskDifference]
    pairs: int
    wins: int
    losses: int
    ties: int
    alone: tuple[Cell, ...]
    baseline_alone: tuple[Cell, ...]


# -- one run ---------------------------------------------------------------------------------------------------------------------------------


def final_score(run: ScoreRun) -> float:
    """The score at the whole budget."""
    return run.points[-1].score


def best_score(run: ScoreRun) -> float:
    """The highest of the measured scores. As a maximum of noisy measurements it is too high on average: compare it between algorithms only."""
    return max(point.score for point in run.points)


def collapsed(run: ScoreRun) -> bool:
    """Whether a run lost what it had learned: it diverged, or ends at less than half of its best measured score.

    A run whose best score is not above 0 had nothing to lose, and has collapsed only if it diverged.
    """
    best = best_score(run)
    return run.status == "diverged" or (best > 0 and final_score(run) < COLLAPSED_BELOW * best)


_OF_A_RUN: dict[Measure, Callable[[ScoreRun], float]] = {"final": final_score, "best": best_score}


# -- matrices --------------------------------------------------------------------------------------------------------------------------------


def score_matrix(entry: Entry, of: Measure = "final", *, tasks: Sequence[str] | None = None, complete: bool = True) -> Scores:
    """Final (or best) scores as float64[seeds, tasks].

    Parameters
    ----------
    tasks
        Which, in this order; by default all of the entry's.
    complete
        Whether every seed of the entry must have every task. If not, only seeds that have all of the tasks count.

    Raises
    ------
    IncompleteEntryError
        If runs are missing; without ``complete``, if no seed has all tasks.
    """
    return _scores(entry, lambda run: np.float64(_of_a_run(of)(run)), tasks, complete)


def missing_cells(entry: Entry, tasks: Sequence[str] | None = None) -> list[Cell]:
    """Task and seed of the runs that an entry lacks, so that each of its seeds had each task."""
    there = {(run.task, run.seed) for run in entry.runs}
    return [(task, seed) for task in (entry.tasks if tasks is None else tasks) for seed in entry.seeds if (task, seed) not in there]


def _of_a_run(of: Measure) -> Callable[[ScoreRun], float]:
    if of not in _OF_A_RUN:
        raise ConfigurationError(f"of must be one of {', '.join(_OF_A_RUN)}; got {of!r}.")
    return _OF_A_RUN[of]


def _scores(entry: Entry, numbers: Callable[[ScoreRun], FloatArray | np.float64], tasks: Sequence[str] | None, complete: bool) -> Scores:
    """Numbers of each run, stacked to float64[seeds, tasks, ...]."""
    runs = {(run.task, run.seed): run for run in entry.runs}
    names = entry.tasks if tasks is None else tuple(tasks)
    missing = missing_cells(entry, names)
    seeds = [seed for seed in entry.seeds if all((task, seed) in runs for task in names)]
    if missing and (complete or not seeds):
        told = ", ".join(f"{task} seed {seed}" for task, seed in missing[:12])
        more = f" and {len(missing) - 12} more" if len(missing) > 12 else ""
        way_out = "or ask with complete=False for the seeds that have all tasks" if seeds else "since no seed has all tasks"
        raise IncompleteEntryError(
            f"{entry.label}: every seed must have every task; missing: {told}{more}. Give the line of `searchqa bench` again, which adds what is missing, "
            f"{way_out}."
        )
    if not seeds or not names:
        raise IncompleteEntryError(f"{entry.label}: there must be a run at least; got {len(seeds)} seeds of {len(names)} tasks.")
    return Scores(np.array([[numbers(runs[task, seed]) for task in names] for seed in seeds], dtype=np.float64), tuple(seeds), names)


# -- aggregates ------------------------------------------------------------------------------------------------------------------------------


def aggregates(
    entry: Entry,
    of: Measure = "final",
    *,
    tasks: Sequence[str] | None = None,
    complete: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Aggregates:
    """IQM, mean, median and optimality gap (to 1) of the final or best scores, with intervals; parameters and errors as :func:`score_matrix`."""
    rliable = _library("rliable.metrics")
    scores = score_matrix(entry, of, tasks=tasks, complete=complete)
    values = scores.values
    points = [
        rliable.aggregate_iqm(values),
        rliable.aggregate_mean(values),
        rliable.aggregate_median(values),
        rliable.aggregate_optimality_gap(values, gamma=1),
    ]
    resampled = _bootstrap(
        lambda drawn: np.stack([_iqm(drawn), _mean(drawn), np.median(drawn.mean(axis=1), axis=1), 1 - _mean(np.minimum(drawn, 1))], axis=1),
        [values],
        resamples,
        seed,
    )
    estimates = [Estimate(float(point), _interval(resampled, place)) for place, point in enumerate(points)]
    iqm, mean, median, gap = estimates
    return Aggregates(iqm, mean, median, gap, seeds=scores.seeds, tasks=scores.tasks)


def performance_profile(
    entry: Entry,
    thresholds: FloatArray | Sequence[float] = THRESHOLDS,
    of: Measure = "final",
    *,
    tasks: Sequence[str] | None = None,
    complete: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Curve:
    """The share of runs that score above a threshold (``y``), by threshold (``x``); other parameters and errors as :func:`score_matrix`."""
    x = np.asarray(thresholds, dtype=np.float64)
    values = score_matrix(entry, of, tasks=tasks, complete=complete).values

    def profile(drawn: FloatArray) -> FloatArray:  # float64[R, seeds, tasks] -> float64[R, thresholds]
        ordered = np.sort(drawn.reshape(len(drawn), -1), axis=1)
        return np.stack([1 - np.searchsorted(one, x, side="right") / ordered.shape[1] for one in ordered])

    return _curve(x, profile, values, resamples, seed)


def probability_of_improvement(
    entry: Entry,
    baseline: Entry,
    of: Measure = "final",
    *,
    tasks: Sequence[str] | None = None,
    complete: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The chance that a run of the entry scores higher than one of the baseline on the same task: the mean over tasks of ``U / (n m)``.

    U is Mann and Whitney's, in which a tie counts half. The two may have other seeds, and other numbers of them.

    Parameters
    ----------
    tasks
        By default all of both.
    complete
        If not, the tasks that both have, and of each entry the seeds that have them all.

    Raises
    ------
    IncompleteEntryError
        If runs are missing, or without ``complete``, there is no task that both have.
    """
    rliable = _library("rliable.metrics")
    if tasks is None:
        tasks = sorted({*entry.tasks, *baseline.tasks}) if complete else [task for task in entry.tasks if task in baseline.tasks]
    if not tasks:
        raise IncompleteEntryError(
            f"{entry.label} and {baseline.label} have no task in common: {', '.join(entry.tasks)}, and {', '.join(baseline.tasks)}. Run both on one suite."
        )
    pair = [score_matrix(one, of, tasks=tasks, complete=complete).values for one in (entry, baseline)]
    value = float(rliable.probability_of_improvement(*pair))

    def chance(drawn: FloatArray, other: FloatArray) -> FloatArray:
        mine, theirs = drawn[:, :, None, :], other[:, None, :, :]
        chances: FloatArray = np.mean((mine > theirs) + 0.5 * (mine == theirs), axis=(1, 2, 3))
        return chances

    return Estimate(value, _interval(_bootstrap(chance, pair, resamples, seed)))


# -- curves ----------------------------------------------------------------------------------------------------------------------------------


def sample_efficiency(
    entry: Entry, *, tasks: Sequence[str] | None = None, complete: bool = True, resamples: int = RESAMPLES, seed: int = 0
) -> Curve:
    """IQM of the scores (``y``) by the share of the budget of policy tokens (``x``: 0, 1/8, ..., 1); parameters and errors as :func:`score_matrix`.

    For the band whole runs are drawn.
    """
    values = _scores(entry, lambda run: np.array([point.score for point in run.points]), tasks, complete).values
    return _curve(np.array(SHARES), _iqm, values, resamples, seed)


def curve_by_time(
    entry: Entry,
    grid: FloatArray | Sequence[float] | None = None,
    clock: Clock = "cpu_seconds",
    *,
    tasks: Sequence[str] | None = None,
    complete: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Curve:
    """IQM of the scores (``y``) by seconds of training (``x``), of the processor or (``clock="seconds"``) by the clock.

    Each run's score is interpolated linearly between its measured points; a run that is over keeps its final score.

    Parameters
    ----------
    grid
        float64[points], ascending; by default :func:`seconds_grid` of this entry. Give one grid to all entries of a picture.

    Raises
    ------
    IncompleteEntryError
        As :func:`score_matrix`.
    """
    x = seconds_grid([entry], clock) if grid is None else np.asarray(grid, dtype=np.float64)

    def on_grid(run: ScoreRun) -> FloatArray:
        seconds, scores = [getattr(point, clock) for point in run.points], [point.score for point in run.points]
        return np.interp(x, seconds, scores).astype(np.float64)

    return _curve(x, _iqm, _scores(entry, on_grid, tasks, complete).values, resamples, seed)


def seconds_grid(entries: Iterable[Entry], clock: Clock = "cpu_seconds", points: int = 41) -> FloatArray:
    """float64[points], evenly from 0 to the seconds of the longest run of all entries."""
    return np.linspace(0.0, max(getattr(run.points[-1], clock) for entry in entries for run in entry.runs), points)


def tokens_to_reach(entry: Entry, score: float) -> Reached:
    """How many policy tokens each run took to a score."""
    tokens: dict[Cell, int | None] = {}
    for run in entry.runs:
        tokens[run.task, run.seed] = next((point.policy_tokens for point in run.points if point.score >= score), None)
    reached = [value for value in tokens.values() if value is not None]
    ordered = sorted(float(value) for value in reached) + [np.inf] * (len(tokens) - len(reached))
    middle = float(np.mean(ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]))
    return Reached(score, tokens, len(reached), len(tokens), middle if np.isfinite(middle) else None)


def collapses(entry: Entry) -> Collapses:
    """Which runs of an entry collapsed."""
    fallen = [run for run in entry.runs if collapsed(run)]
    return Collapses(
        tuple((run.task, run.seed) for run in fallen),
        tuple((run.task, run.seed) for run in fallen if run.status == "diverged"),
        len(entry.runs),
    )


# -- pairs -----------------------------------------------------------------------------------------------------------------------------------


def paired(entry: Entry, baseline: Entry, of: Measure = "final", *, resamples: int = RESAMPLES, seed: int = 0) -> Paired:
    """The entry minus the baseline, run by run with the same task and seed; runs that only one of them has are left out and told.

    Raises
    ------
    IncompleteEntryError
        If they have no task and seed in common.
    """
    measure = _of_a_run(of)
    mine, theirs = ({(run.task, run.seed): measure(run) for run in one.runs} for one in (entry, baseline))
    by_task: dict[str, list[float]] = {}
    for task, own_seed in sorted(mine.keys() & theirs.keys()):
        by_task.setdefault(task, []).append(mine[task, own_seed] - theirs[task, own_seed])
    if not by_task:
        raise IncompleteEntryError(
            f"{entry.label} and {baseline.label} have no run with the same task and seed, so no difference can be told pair by pair: "
            f"tasks {', '.join(entry.tasks)} with seeds {list(entry.seeds)}, and {', '.join(baseline.tasks)} with {list(baseline.seeds)}. "
            "Run both on the same."
        )
    columns = [np.array(differences) for differences in by_task.values()]
    tasks = {task: _of_task(column) for task, column in zip(by_task, columns, strict=True)}
    counts = {name: sum(getattr(task, name) for task in tasks.values()) for name in ("pairs", "wins", "losses", "ties")}
    value = float(np.mean([column.mean() for column in columns]))
    return Paired(
        difference=Estimate(value, _interval(_bootstrap_columns(columns, resamples, seed))),
        tasks=tasks,
        alone=tuple(sorted(mine.keys() - theirs.keys())),
        baseline_alone=tuple(sorted(theirs.keys() - mine.keys())),
        **counts,
    )


def _of_task(differences: FloatArray) -> TaskDifference:
    count, mean = len(differences), float(differences.mean())
    interval = None
    if count > 1:
        half = float(_library("scipy.stats").t.ppf((1 + CONFIDENCE) / 2, count - 1) * differences.std(ddof=1) / np.sqrt(count))
        interval = (mean - half, mean + half)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return TaskDifference(Estimate(mean, interval), count, wins, losses, count - wins - losses)


# -- bootstrap -------------------------------------------------------------------------------------------------------------------------------


def _iqm(drawn: FloatArray) -> FloatArray:
    """float64[R, seeds, tasks, ...] -> float64[R, ...]: the mean of the middle half (a quarter, rounded down, is cut off at each end)."""
    ordered = np.sort(drawn.reshape(len(drawn), -1, *drawn.shape[3:]), axis=1)
    cut = ordered.shape[1] // 4
    return np.asarray(ordered[:, cut : ordered.shape[1] - cut].mean(axis=1), dtype=np.float64)


def _mean(drawn: FloatArray) -> FloatArray:
    return np.asarray(drawn.mean(axis=(1, 2)), dtype=np.float64)


def _curve(x: FloatArray, statistic: Callable[[FloatArray], FloatArray], values: FloatArray, resamples: int, seed: int) -> Curve:
    band = _bootstrap(statistic, [values], resamples, seed)
    return Curve(x, statistic(values[None])[0], *((None, None) if band is None else band))


def _bootstrap(
    statistic: Callable[..., FloatArray], matrices: Sequence[FloatArray], resamples: int, seed: int
) -> tuple[FloatArray, FloatArray] | None:
    """Low and high of ``statistic(float64[R, seeds, tasks, ...] for each matrix) -> float64[R, ...]``; None where a matrix has a single seed.

    Of each task the seeds are drawn again by themselves: as in rliable's ``StratifiedBootstrap`` and ``StratifiedIndependentBootstrap``, in the same order.
    """
    if min(len(matrix) for matrix in matrices) < 2:
        return None
    random = np.random.RandomState(seed)
    step = max(1, _NUMBERS_AT_A_TIME // sum(matrix.size for matrix in matrices))
    parts = []
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        chosen = [[random.choice(len(matrix), matrix.shape[:2]) for matrix in matrices] for _ in range(count)]
        drawn = [matrix[np.stack([one[place] for one in chosen]), np.arange(matrix.shape[1])] for place, matrix in enumerate(matrices)]
        parts.append(statistic(*drawn))
    return _percentiles(np.concatenate(parts))


def _bootstrap_columns(columns: Sequence[FloatArray], resamples: int, seed: int) -> tuple[FloatArray, FloatArray] | None:
    """Low and high of the mean of the columns' means, where columns may be of several lengths."""
    if min(map(len, columns)) < 2:
        return None
    random = np.random.RandomState(seed)
    means = [column[random.choice(len(column), (resamples, len(column)))].mean(axis=1) for column in columns]
    return _percentiles(np.mean(means, axis=0))


def _percentiles(resampled: FloatArray) -> tuple[FloatArray, FloatArray]:
    low, high = np.percentile(resampled, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)], axis=0)
    return low, high


def _interval(bounds: tuple[FloatArray, FloatArray] | None, place: int | tuple[()] = ()) -> Interval | None:
    return None if bounds is None else (float(bounds[0][place]), float(bounds[1][place]))


def _library(name: str) -> Any:
    """A module of rliable, or of SciPy, which comes with it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"The statistics of the benchmark need rliable, and `import {name}` failed ({error}): pip install 'searchqa-gym[bench]'."
        ) from error
