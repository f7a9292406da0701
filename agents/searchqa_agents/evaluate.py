"""Evaluation: play given questions, every one of them, and report means with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from searchqa_agents.language_model import LanguageModel
from searchqa_agents.measures import sampled_tokens
from searchqa_agents.rollout import rollout
from searchqa_agents.trajectory import Trajectory
from searchqa_envs.scoring import is_unanswered

RESAMPLES = 1000
TOLD_THE_ANSWER = "The search engine was told the golden answers: these numbers measure no search. Measure with a real one."
"""Said, and put into the stamp as ``told_the_answer``, where the retriever of an evaluation has ``needs_gold``, as ZeroSearch's simulator has."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes
    ----------
    metrics
        Means over the episodes whose search back end answered: ``reward, em, f1, searches, invalid_turns, title_recall_all, ...``, ``answered`` (share
        that gave an answer, not a blank one), ``tokens`` (sampled per episode; absent for scripts). A metric that a question does not define is averaged
        over the others. And the counts ``questions, episodes, backend_errors``.
    intervals
        95 % interval of each mean: percentile bootstrap over questions (1,000 resamples), because samples of one question are not independent.
    groups
        ``metrics`` again for each value of the question's metadata by which the evaluation was asked to group, in order.
    trajectories
        All episodes, in the order of the questions.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    groups: dict[str, dict[str, float]]
    trajectories: list[Trajectory]


def evaluate(
    venv: VectorEnv[Any, Any, Any],
    model: LanguageModel,
    questions: Sequence[int | str] | None = None,
    *,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    group_by: str = "hops",
    stamp: Mapping[str, Any] | None = None,
    on_done: Callable[[int], object] | None = None,
    play: Callable[..., list[Trajectory]] = rollout,
) -> Evaluation:
    """Play ``samples`` episodes on each question and average.

    Parameters
    ----------
    questions
        Indices or ids; default: all questions of the environment.
    temperature
        0 is greedy; 1 samples from the policy as training does.
    group_by
        A key of the questions' metadata; questions without it are left out of ``groups``.
    stamp, on_done
        See :func:`~searchqa_agents.rollout.rollout`.
    play
        What plays: :func:`~searchqa_agents.rollout.rollout`, or something with its arguments, such as ``shared_rollout`` of several processes.
    """
    source = venv.unwrapped.source  # type: ignore[attr-defined]
    chosen = range(len(source)) if questions is None else questions
    trajectories = play(venv, model, chosen, group_size=samples, seed=seed, temperature=temperature, stamp=stamp, on_done=on_done)
    return summarise(trajectories, [source[source.index_of(t.question_id)].metadata.get(group_by) for t in trajectories], group_by)


def summarise(trajectories: Sequence[Trajectory], group_values: Sequence[Any], group_by: str = "hops") -> Evaluation:
    """The :class:`Evaluation` of trajectories already played; ``group_values`` has one value per trajectory, None for no group."""
    values = sorted({value for value in group_values if value is not None}, key=lambda value: (str(type(value)), value))
    members = {value: [t for t, own in zip(trajectories, group_values, strict=True) if own == value] for value in values}
    return Evaluation(
        metrics=_means(trajectories),
        intervals=_intervals(trajectories),
        groups={f"{group_by}={value}": _means(chosen) for value, chosen in members.items()},
        trajectories=list(trajectories),
    )


def _measures(trajectory: Trajectory) -> dict[str, float]:
    tokens = sampled_tokens(trajectory)
    return {
        "reward": trajectory.reward,
        **trajectory.metrics,
        "answered": float(not is_unanswered(trajectory.answer)),
        **({} if tokens is None else {"tokens": float(tokens)}),
    }


def _means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    whole = [_measures(t) for t in trajectories if t.backend_error is None]
    names = dict.fromkeys(name for measures in whole for name in measures)
    return {
        **{name: float(np.mean([measures[name] for measures in whole if name in measures])) for name in names},
        "questions": float(len({t.question_id for t in trajectories})),
        "episodes": float(len(trajectories)),
        "backend_errors": float(len(trajectories) - len(whole)),
    }


def _intervals(trajectories: Sequence[Trajectory]) -> dict[str, tuple[float, float]]:
    by_question: dict[str, list[dict[str, float]]] = {}
    for trajectory in trajectories:
        if trajectory.backend_error is None:
            by_question.setdefault(trajectory.question_id, []).append(_measures(trajectory))
    names = list(dict.fromkeys(name for rows in by_question.values() for row in rows for name in row))
    # [Q, M]: each question's sum of each measure, and in how many of its episodes it is defined
    sums = np.array([[sum(row.get(name, 0.0) for row in rows) for name in names] for rows in by_question.values()])
    counts = np.array([[sum(name in row for row in rows) for name in names] for rows in by_question.values()])
    if not names:
        return {}
    rng = np.random.default_rng(0)
    means = np.empty((RESAMPLES, len(names)))
    for i in range(RESAMPLES):
        weights = np.bincount(rng.integers(len(sums), size=len(sums)), minlength=len(sums))  # how often each question is drawn
        drawn = weights @ counts
        means[i] = np.divide(weights @ sums, drawn, out=np.full(len(names), np.nan), where=drawn > 0)
    low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
    return {name: (float(low[m]), float(high[m])) for m, name in enumerate(names)}
