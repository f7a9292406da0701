"""What rows of scores say together: means with intervals, pass@k, majority votes, and the difference between two runs.

The unit is the question: samples of one question are not independent, so they are averaged (or voted) first, and it is questions that are drawn again
for an interval or change sides in a test. Pure functions of rows (:func:`~searchqa_agents.measures.score_row`); everything random is seeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from searchqa_envs.errors import ConfigurationError
from searchqa_envs.normalise import normalise_squad

RESAMPLES = 1000
PERMUTATIONS = 10_000
ZERO_ONE_MEASURES = ("em", "sub_em", "cover_em", "em_r1_searcher", "sub_em_r1_searcher", "cover_em_squad", "judge")
"""Measures by which an answer is right or wrong: those that have a pass@k."""
ANSWER_MEASURES = (*ZERO_ONE_MEASURES, "f1", "f1_r1_searcher")
"""Measures of an answer: those that a majority's answer has."""
_NUMBERS_AT_A_TIME = 2_000_000

Row = Mapping[str, Any]
Interval = tuple[float, float]
FloatArray = NDArray[np.float64]
Column = tuple[str, str, int]
"""What a column of numbers, one for each question, is: kind (``mean``, ``pass``, ``majority``), metric, and k."""


class DifferentQuestionsError(ConfigurationError):
    """Two runs that are to be compared question by question have different questions."""


class Group(NamedTuple):
    """What :class:`Summary` says, of the questions with one value of their metadata."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]
    questions: int
    episodes: int


@dataclass(frozen=True)
class Summary:
    """What the rows of an evaluation say.

    All means are over questions, of which each is first averaged over its samples; a metric that a question does not define is averaged over the
    others. All intervals are 95 % percentile bootstrap intervals over questions.

    Attributes
    ----------
    metrics, intervals
        By the metric's name.
    defined
        For each metric, how many questions define it.
    groups
        By ``<key>=<value>`` of the questions' metadata, such as ``hops=2``; a question without the key is in none.
    counts
        ``questions``; ``episodes``; and ``samples``, the fewest that a question has.
    title_recall_by_turn
        Mean share of the supporting titles found up to and with turn 1, 2, ...; an episode that has ended keeps what it had found. Empty where no
        question knows its supporting titles.
    pass_at, pass_at_intervals
        For each measure that is 0 or 1, by k = 1, 2, 4, ... and the number of samples: see :func:`pass_at_k`; the last is the share of questions of which
        any sample is right. Empty where each question has one sample.
    majority, majority_intervals
        The measures of the answer that most samples gave (:func:`majority_vote`). Empty where each question has one sample.
    latency
        Of whole episodes in seconds: ``mean``, and the percentiles ``p50, p90, p99`` (linear between neighbours); and the mean of each part as
        ``mean_model, mean_search, mean_environment``. A batched call's time is shared equally by its episodes, so these are an episode's share of the batch:
        what it costs, not how long it takes. That is in ``mean_wall, p50_wall, p90_wall, p99_wall``: from an episode's reset to its end, beside the others
        that were played at the same time; only where it is known. Empty without times.
    """

    metrics: dict[str, float]
    intervals: dict[str, Interval]
    defined: dict[str, int]
    groups: dict[str, Group]
    counts: dict[str, int]
    title_recall_by_turn: tuple[float, ...]
    pass_at: dict[str, dict[int, float]]
    pass_at_intervals: dict[str, dict[int, Interval]]
    majority: dict[str, float]
    majority_intervals: dict[str, Interval]
    latency: dict[str, float]


# -- summary ---------------------------------------------------------------------------------------------------------------------------------


def summarise_rows(
    rows: Sequence[Row],
    times: Sequence[Row] | None = None,
    group_by: Sequence[str] = ("type", "hops"),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Summary:
    """The :class:`Summary` of rows; of several sets together, all questions alike (:func:`mean_over_sets` weighs sets alike).

    Parameters
    ----------
    rows
        Rows of scores.
    times
        Rows of times; those of other episodes are left out.
    group_by
        Keys of the rows' ``groups``.

    Raises
    ------
    ConfigurationError
        If there are no rows.
    """
    questions = _by_question(rows)
    columns, values = _table(questions)
    means, low, high = _means(values), *_percentiles(_resampled_means(values, resamples, seed))
    groups = {name: _group(members, resamples, seed) for key in group_by for name, members in _grouped(questions, key).items()}
    return Summary(
        **_by_kind(columns, means, low, high),
        defined={
            column[1]: int(count) for column, count in zip(columns, (~np.isnan(values)).sum(axis=0), strict=True) if column[0] == "mean"
        },
        groups=groups,
        counts=_counts(questions),
        title_recall_by_turn=_title_recall_by_turn(questions),
        latency=_latency(rows, times or ()),
    )


def by_set(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of scores or of times by their set, sets in their order."""
    sets: dict[str, list[Row]] = {}
    for row in rows:
        sets.setdefault(row["set"], []).append(row)
    return sets


def mean_over_sets(rows: Sequence[Row], times: Sequence[Row] | None = None, *, resamples: int = RESAMPLES, seed: int = 0) -> Summary:
    """The mean of the sets' means, each set counting alike: what the papers' tables call "Avg.".

    Only what every set defines has such a mean. For its intervals, the questions of each set are drawn again by themselves. ``defined``, ``counts`` and
    ``latency`` are of all sets together; ``groups`` and ``title_recall_by_turn`` are empty.

    Raises
    ------
    ConfigurationError
        If there are no rows.
    """
    tables = [_table(_by_question(own)) for own in by_set(rows).values()] or [_table(_by_question(rows))]
    common = [column for column in tables[0][0] if all(column in columns for columns, _ in tables)]
    chosen = [values[:, [columns.index(column) for column in common]] for columns, values in tables]
    means = np.mean([_means(values) for values in chosen], axis=0)
    drawn = np.mean([_resampled_means(values, resamples, (seed, place)) for place, values in enumerate(chosen)], axis=0)
    defined = np.sum([(~np.isnan(values)).sum(axis=0) for values in chosen], axis=0)
    return Summary(
        **_by_kind(common, means, *_percentiles(drawn)),
        defined={column[1]: int(count) for column, count in zip(common, defined, strict=True) if column[0] == "mean"},
        groups={},
        counts=_counts(_by_question(rows)),
        title_recall_by_turn=(),
        latency=_latency(rows, times or ()),
    )


def _by_question(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each question, by sample."""
    if not rows:
        raise ConfigurationError("there must be at least one row of scores to summarise; got none.")
    questions: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        questions.setdefault((row["set"], row["id"]), []).append(row)
    return [sorted(own, key=lambda row: int(row["sample"])) for own in questions.values()]


def _counts(questions: Sequence[Sequence[Row]]) -> dict[str, int]:
    sizes = [len(own) for own in questions]
    return {"questions": len(sizes), "episodes": sum(sizes), "samples": min(sizes)}


def _table(questions: Sequence[Sequence[Row]]) -> tuple[list[Column], FloatArray]:
    """All that is averaged over questions: float64[Q, columns], NaN where a question does not define it."""
    names, means = _question_means(questions)
    columns: list[Column] = [("mean", name, 0) for name in names]
    parts = [means]
    if any(len(own) > 1 for own in questions):
        everywhere = [name for name in ANSWER_MEASURES if all(name in row["metrics"] for own in questions for row in own)]
        winners = [own[majority_vote([row["answer"] for row in own])]["metrics"] for own in questions]
        columns += [("majority", name, 0) for name in everywhere]
        parts.append(
            np.array([[metrics[name] for name in everywhere] for metrics in winners], dtype=np.float64).reshape(len(questions), -1)
        )
        for name in everywhere:
            if name in ZERO_ONE_MEASURES:
                counts = [(len(own), sum(row["metrics"][name] >= 1 for row in own)) for own in questions]
                for k in _ks(min(len(own) for own in questions)):
                    chances = {count: pass_at_k(*count, k) for count in set(counts)}
                    columns.append(("pass", name, k))
                    parts.append(np.array([[chances[count]] for count in counts]))
    return columns, np.concatenate(parts, axis=1)


def _question_means(questions: Sequence[Sequence[Row]]) -> tuple[list[str], FloatArray]:
    """Names of all metrics, and each question's mean over its samples: float64[Q, M], NaN where none of them defines the metric."""
    names = list(dict.fromkeys(name for own in questions for row in own for name in row["metrics"]))
    place = np.repeat(np.arange(len(questions)), [len(own) for own in questions])
    values = np.array([[row["metrics"].get(name, math.nan) for name in names] for own in questions for row in own], dtype=np.float64)
    values = values.reshape(len(place), len(names))
    known = ~np.isnan(values)
    means = np.full((len(questions), len(names)), np.nan)
    for m in range(len(names)):
        count = np.bincount(place, weights=known[:, m], minlength=len(questions))
        total = np.bincount(place, weights=np.where(known[:, m], values[:, m], 0.0), minlength=len(questions))
        np.divide(total, count, out=means[:, m], where=count > 0)
    return names, means


def _ks(samples: int) -> list[int]:
    """1, 2, 4, ... up to the number of samples, and that number."""
    return sorted({samples, *(2**power for power in range(samples.bit_length()))})


def _by_kind(columns: Sequence[Column], means: FloatArray, low: FloatArray, high: FloatArray) -> dict[str, Any]:
    """The fields of a :class:`Summary` that are means over questions."""
    fields: dict[str, Any] = {
        name: {} for name in ("metrics", "intervals", "majority", "majority_intervals", "pass_at", "pass_at_intervals")
    }
    for (kind, name, k), mean, *interval in zip(columns, means.tolist(), low.tolist(), high.tolist(), strict=True):
        if kind == "pass":
            fields["pass_at"].setdefault(name, {})[k] = mean
            fields["pass_at_intervals"].setdefault(name, {})[k] = tuple(interval)
        else:
            fields["metrics" if kind == "mean" else "majority"][name] = mean
            fields["intervals" if kind == "mean" else "majority_intervals"][name] = tuple(interval)
    return fields


def _grouped(questions: Sequence[Sequence[Row]], key: str) -> dict[str, list[Sequence[Row]]]:
    values = [own[0]["groups"].get(key) for own in questions]
    ordered = sorted({value for value in values if value is not None}, key=lambda value: (str(type(value)), value))
    groups: dict[str, list[Sequence[Row]]] = {f"{key}={value}": [] for value in ordered}
    for own, value in zip(questions, values, strict=True):
        if value is not None:
            groups[f"{key}={value}"].append(own)
    return groups


def _group(questions: Sequence[Sequence[Row]], resamples: int, seed: int) -> Group:
    names, values = _question_means(questions)
    low, high = _percentiles(_resampled_means(values, resamples, seed))
    intervals = dict(zip(names, zip(low.tolist(), high.tolist(), strict=True), strict=True))
    return Group(dict(zip(names, _means(values).tolist(), strict=True)), intervals, len(questions), sum(map(len, questions)))


def _title_recall_by_turn(questions: Sequence[Sequence[Row]]) -> tuple[float, ...]:
    found = [[[turn["title_recall"] for turn in row["turns"] if "title_recall" in turn] for row in own] for own in questions]
    known = [kept for own in found if (kept := [recalls for recalls in own if recalls])]
    last = max((len(recalls) for own in known for recalls in own), default=0)
    curves = [np.mean([recalls + recalls[-1:] * (last - len(recalls)) for recalls in own], axis=0) for own in known]
    return tuple(np.mean(curves, axis=0).tolist()) if curves else ()


def _latency(rows: Sequence[Row], times: Sequence[Row]) -> dict[str, float]:
    episodes = {(row["set"], row["id"], row["sample"]) for row in rows}
    seconds = [row["seconds"] for row in times if (row["set"], row["id"], row["sample"]) in episodes]
    if not seconds:
        return {}
    totals = np.array([math.fsum(value for name, value in parts.items() if name != "wall") for parts in seconds])
    p50, p90, p99 = np.percentile(totals, [50, 90, 99]).tolist()
    names = dict.fromkeys(name for parts in seconds for name in parts if name != "wall")
    parts = {f"mean_{name}": math.fsum(own.get(name, 0.0) for own in seconds) / len(seconds) for name in names}
    latency = {"mean": float(totals.mean()), "p50": p50, "p90": p90, "p99": p99, **parts}
    walls = [own["wall"] for own in seconds if "wall" in own]
    if walls:
        latency["mean_wall"] = math.fsum(walls) / len(walls)
        latency |= dict(zip(("p50_wall", "p90_wall", "p99_wall"), np.percentile(walls, [50, 90, 99]).tolist(), strict=True))
    return latency


# -- samples ---------------------------------------------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that of ``k`` samples, drawn without putting back from ``n`` of which ``c`` are right, at least one is right.

    ``1 - C(n - c, k) / C(n, k)``: the unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Raises
    ------
    ConfigurationError
        Unless ``0 <= c <= n`` and ``1 <= k <= n``.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ConfigurationError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n; got n={n}, c={c}, k={k}.")
    whole = math.comb(n, k)
    return (whole - math.comb(n - c, k)) / whole


def majority_vote(answers: Sequence[str | None], normalise: Callable[[str], str] = normalise_squad) -> int:
    """Which answer stands for the majority: the first that has the form that most answers have.

    Answers that are equal after ``normalise`` have one form. Of forms with equally many votes, the one that was given first wins. No answer (None) has no
    vote, nor has one of which ``normalise`` leaves nothing, unless there is no other; where nobody votes, it is the first.

    Raises
    ------
    ConfigurationError
        If there are no answers.
    """
    if not answers:
        raise ConfigurationError("a majority vote needs at least one answer; got none.")
    votes: dict[str, list[int]] = {}
    for place, answer in enumerate(answers):
        if answer is not None and answer.strip():
            votes.setdefault(normalise(answer), []).append(place)
    if len(votes) > 1:
        votes.pop("", None)
    return max(votes.values(), key=len)[0] if votes else 0  # max takes the first of equals


# -- intervals -------------------------------------------------------------------------------------------------------------------------------


def _means(values: FloatArray) -> FloatArray:
    """Of each column of float64[Q, M] over the questions that define it."""
    known = ~np.isnan(values)
    means: FloatArray = np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)
    return means


def _resampled_means(values: FloatArray, resamples: int, seed: int | tuple[int, ...]) -> FloatArray:
    """Means of each column when questions are drawn again with putting back: float64[resamples, M], NaN where no question drawn defines it.

    A resample is how often each question is drawn, so that its means are two products of matrices; so many resamples are drawn at a time as memory
    allows, which changes no draw.
    """
    rng = np.random.default_rng(seed)
    size, width = values.shape
    known = ~np.isnan(values)
    partly = not known.all()
    filled, defined = np.where(known, values, 0.0), known.astype(np.float64)
    means = np.full((resamples, width), np.nan)
    step = max(1, _NUMBERS_AT_A_TIME // size)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = rng.integers(size, size=(count, size)) + np.arange(count)[:, None] * size
        weights = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size).astype(np.float64)
        here = means[start : start + count]
        if partly:
            questions = weights @ defined
            np.divide(weights @ filled, questions, out=here, where=questions > 0)
        else:
            np.divide(weights @ filled, size, out=here)
    return means


def _percentiles(means: FloatArray) -> tuple[FloatArray, FloatArray]:
    low, high = (np.nanpercentile if np.isnan(means).any() else np.percentile)(means, [2.5, 97.5], axis=0)
    return low, high


# -- two runs --------------------------------------------------------------------------------------------------------------------------------


class Paired(NamedTuple):
    """How a second run differs from a first one on the same questions.

    ``difference`` is the mean over ``questions`` of the second's value minus the first's, ``interval`` its 95 % bootstrap interval over questions.
    ``p_value`` is that of a two-sided sign-flip permutation test (:func:`sign_flip_p_value`). ``better``, ``worse`` and ``equal`` are numbers of questions
    where the second run's value is higher, lower and the same: for a measure such as ``tokens`` a lower one may be what is wanted.
    """

    metric: str
    questions: int
    first: float
    second: float
    difference: float
    interval: Interval
    p_value: float
    better: int
    worse: int
    equal: int


def paired(
    rows_a: Sequence[Row],
    rows_b: Sequence[Row],
    metric: str,
    *,
    common: bool = False,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Paired:
    """How run B differs from run A in a metric, question by question.

    Questions are the same if set, id, text and golden answers are. Samples of a question are averaged first. A question for which neither run defines the
    metric is left out.

    Parameters
    ----------
    common
        Compare on the questions that both runs have, where they have different ones.

    Raises
    ------
    DifferentQuestionsError
        If the runs have different questions, or one defines the metric for a question and the other does not, unless ``common``; and if they have no
        question in common.
    ConfigurationError
        If there are no rows, or a run does not have the metric.
    """
    a, b = _values_by_question(rows_a, metric, "the first run"), _values_by_question(rows_b, metric, "the second run")
    both = [key for key in a if key in b]
    if len(both) < max(len(a), len(b)) and not common:
        only_a, only_b = len(a) - len(both), len(b) - len(both)
        example = next(key for key in (*a, *b) if key not in a or key not in b)
        raise DifferentQuestionsError(
            f"Two runs are compared on the same questions; {only_a} of {len(a)} questions with {metric} are the first run's only and {only_b} of {len(b)} "
            f"the second's, such as {example[1]!r} of {example[0]}. Evaluate both on one list of questions, or compare on the {len(both)} in common."
        )
    first = np.array([a[key] for key in both])
    second = np.array([b[key] for key in both])
    known = ~(np.isnan(first) | np.isnan(second))
    if not common and (np.isnan(first) != np.isnan(second)).any():
        differing = int((np.isnan(first) != np.isnan(second)).sum())
        raise DifferentQuestionsError(
            f"{metric} must be defined for the same questions in both runs; for {differing} of {len(both)} questions only one of them defines it. "
            "Compare on the questions in common."
        )
    first, second = first[known], second[known]
    if not len(first):
        raise DifferentQuestionsError(f"The two runs have no question in common for which both define {metric}.")
    differences = second - first
    low, high = _percentiles(_resampled_means(differences[:, None], resamples, seed))
    return Paired(
        metric=metric,
        questions=len(differences),
        first=float(first.mean()),
        second=float(second.mean()),
        difference=float(differences.mean()),
        interval=(float(low[0]), float(high[0])),
        p_value=sign_flip_p_value(differences, permutations=permutations, seed=seed),
        better=int((differences > 0).sum()),
        worse=int((differences < 0).sum()),
        equal=int((differences == 0).sum()),
    )


QuestionKey = tuple[str, str, str, tuple[str, ...]]


def _values_by_question(rows: Sequence[Row], metric: str, which: str) -> dict[QuestionKey, float]:
    """Each question's mean of a metric; NaN where none of its samples defines it."""
    values: dict[QuestionKey, float] = {}
    for own in _by_question(rows):
        known = [row["metrics"][metric] for row in own if metric in row["metrics"]]
        key = (own[0]["set"], own[0]["id"], own[0]["question"], tuple(own[0]["golden_answers"]))
        values[key] = math.fsum(known) / len(known) if known else math.nan
    if all(map(math.isnan, values.values())):
        names = sorted({name for row in rows for name in row["metrics"]})
        raise ConfigurationError(f"metric must be one that both runs have; {which} has no {metric!r}, only {', '.join(names)}.")
    return values


def sign_flip_p_value(differences: FloatArray, *, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """How likely a mean at least as far from 0 is if each difference were as likely to have the other sign: two-sided.

    Differences of 0 have no sign and change nothing. If there are so few others that they have no more than ``permutations`` assignments of signs, all
    are counted and the value is exact. Otherwise so many are drawn, and the observed one is counted among them: ``(1 + as far) / (1 + drawn)``
    (Phipson and Smyth 2010), which is never 0.

    Parameters
    ----------
    differences
        float64[questions].
    """
    sizes = np.abs(differences[differences != 0]).astype(np.float64)
    whole = float(sizes.sum())
    least = abs(float(differences.sum())) - 1e-12 * whole  # sums of the same numbers in another order may differ by rounding
    if not len(sizes):
        return 1.0
    if len(sizes) < permutations.bit_length():
        signs = (np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes))) & 1
        return float(np.mean(np.abs(2 * (signs @ sizes) - whole) >= least))
    rng = np.random.default_rng(seed)
    step = max(1, _NUMBERS_AT_A_TIME // len(sizes))
    as_far = 0
    for start in range(0, permutations, step):
        count = min(step, permutations - start)
        drawn = np.unpackbits(rng.integers(256, size=(count, -(-len(sizes) // 8)), dtype=np.uint8), axis=1)[:, : len(sizes)]
        as_far += int((np.abs(2 * (drawn.astype(np.float64) @ sizes) - whole) >= least).sum())
    return (1 + as_far) / (1 + permutations)
