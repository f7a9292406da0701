"""How hard questions are for an agent: play each until it is right, count, and keep some of each difficulty.

The rule is that of R1-Searcher (arXiv 2503.05592, section 3.1): a question is easy if fewer than 10 rollouts are needed, medium from 10 to 20, hard beyond.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import VectorEnv

from searchqa_agents.language_model import LanguageModel
from searchqa_agents.lost_back_end import MAX_LOST_ROLLOUTS, LostRollouts, is_lost
from searchqa_agents.rollout import rollout
from searchqa_agents.trajectory import Trajectory
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.questions import Question, QuestionSource

DIFFICULTIES = ("easy", "medium", "hard")
UNKNOWN = "unknown"
"""Of a question whose search back end failed each time that it was asked: never kept."""
RIGHT, WRONG, LOST = "right", "wrong", "lost"
MAX_LOST_ATTEMPTS = 3
"""So many lost attempts in a row make a question's difficulty unknown, while others are answered."""


@dataclass(frozen=True)
class DifficultyRule:
    """When an attempt is right, and what the number of attempts until then says."""

    attempts: int = 20
    """most attempts on a question"""
    medium_from: int = 10
    """a question that is first right at this attempt is medium, one that is before is easy"""
    hard_from: int = 21
    """a question that is not right before this attempt is hard"""
    metric: str = "em"
    """what of an episode decides: one of its metrics, or ``reward``"""
    right_at: float = 1.0
    """an episode is right from this value on"""

    def __post_init__(self) -> None:
        if not 1 <= self.medium_from < self.hard_from:
            raise ConfigurationError(
                f"medium_from must be at least 1 and below hard_from; got medium_from={self.medium_from}, hard_from={self.hard_from}."
            )
        if self.attempts < self.hard_from - 1:
            raise ConfigurationError(
                f"attempts must be at least hard_from - 1 = {self.hard_from - 1}, or hard questions cannot be told from medium ones; "
                f"got {self.attempts}."
            )

        check_metric(self.metric)

    def is_right(self, trajectory: Trajectory) -> bool:
        """Whether an episode, which has not lost its search back end, is right. Raises ``ConfigurationError`` for an unknown metric."""
        return measure(trajectory, self.metric) >= self.right_at

    def difficulty(self, count: Count) -> str:
        """``easy``, ``medium``, ``hard``, or ``unknown``, of a finished question."""
        if count.right:
            return DIFFICULTIES[(count.attempts >= self.medium_from) + (count.attempts >= self.hard_from)]
        return "hard" if count.attempts >= self.attempts else UNKNOWN


METRICS = ("em", "f1", "cover_em", "sub_em", "searches", "invalid_turns", "title_recall_all", "title_recall_any", "title_recall_mean")
"""Those of :func:`searchqa_envs.metrics.episode_metrics`; the last three only where the set knows supporting titles."""


def check_metric(metric: str) -> None:
    """Raise ``ConfigurationError`` for a metric that no episode has; nothing has been played for it yet."""
    known = (*METRICS, "reward")
    if metric not in known:
        close = difflib.get_close_matches(str(metric), known, n=1)
        raise ConfigurationError(f"metric must be one of {list(known)}; got {metric!r}.{f' Did you mean {close[0]}?' if close else ''}")


def measure(trajectory: Trajectory, metric: str) -> float:
    """A metric of an episode, or its ``reward``. Raises ``ConfigurationError`` for one that it does not have."""
    values = {"reward": trajectory.reward, **trajectory.metrics}
    if metric not in values:
        raise ConfigurationError(
            f"metric must be one that every episode has; got {metric!r}, and that of question {trajectory.question_id!r} has {sorted(values)}."
        )
    return float(values[metric])


class Count(NamedTuple):
    """What is known of a question: ``attempts`` so far, whether the last one was right, and how many were lost since the last one that counts."""

    attempts: int = 0
    right: bool = False
    lost: int = 0


class Counts:
    """The count of each question, by id, built up from the outcomes of rounds."""

    def __init__(self, rule: DifficultyRule, rounds: Iterable[Mapping[str, str]] = ()) -> None:
        self.rule = rule
        self.by_id: dict[str, Count] = {}
        for outcomes in rounds:
            self.add(outcomes)

    def add(self, outcomes: Mapping[str, str]) -> None:
        """Take in a round: ``right``, ``wrong`` or ``lost`` for each question's id."""
        for question_id, outcome in outcomes.items():
            before = self[question_id]
            if outcome == LOST:
                self.by_id[question_id] = before._replace(lost=before.lost + 1)
            else:
                self.by_id[question_id] = Count(before.attempts + 1, outcome == RIGHT)

    def forget_lost(self) -> None:
        """Give questions that lost their search back end as many attempts as at first: it may be there again."""
        self.by_id = {question_id: count._replace(lost=0) for question_id, count in self.by_id.items()}

    def __getitem__(self, question_id: str) -> Count:
        return self.by_id.get(question_id, Count())

    def finished(self, question_id: str) -> bool:
        """Whether nothing more is to be learned of a question."""
        count = self[question_id]
        return count.right or count.attempts >= self.rule.attempts or count.lost >= MAX_LOST_ATTEMPTS


def play_until_right(
    venv: VectorEnv[Any, Any, Any],
    model: LanguageModel,
    questions: Sequence[int],
    counts: Counts,
    *,
    per_round: int = 256,
    seed: int = 0,
    temperature: float = 1.0,
    max_lost_rollouts: int = MAX_LOST_ROLLOUTS,
    on_round: Callable[[Mapping[str, str], int], object] | None = None,
) -> None:
    """Play each question until it is right or its attempts are used up, and count into ``counts``, which may hold earlier rounds.

    A round has one attempt on each of the first ``per_round`` unfinished questions, so that a question that is right makes room for the next. Which
    samples an attempt has is a function of ``seed``, the question's index and the attempt's number, whatever else is in the round.

    An attempt that lost its search back end is no attempt: it is made again. A round whose search back end is gone
    (:func:`~searchqa_agents.lost_back_end.is_lost`) counts for nothing and is played again.

    Parameters
    ----------
    venv, model, temperature
        See :func:`~searchqa_agents.rollout.rollout`.
    questions
        Indices, in order.
    max_lost_rollouts
        So many lost rounds in a row end it; 0: none do.
    on_round
        Called after each round with its outcomes, and with how many of ``questions`` are finished.

    Raises
    ------
    LostBackEndError
        See ``max_lost_rollouts``.
    """
    source: QuestionSource = venv.unwrapped.source  # type: ignore[attr-defined]
    lost = LostRollouts(max_lost_rollouts, max(max_lost_rollouts, 1))
    waiting = iter(questions)
    pool: dict[str, int] = {}  # unfinished questions, in order
    finished = 0
    while True:
        while len(pool) < per_round and (index := next(waiting, None)) is not None:
            question_id = source[index].id
            if counts.finished(question_id):
                finished += 1
            else:
                pool[question_id] = index
        if not pool:
            return
        places = [counts[question_id].attempts * 2**32 + index for question_id, index in pool.items()]
        played = rollout(venv, model, [*pool.values()], seed=seed, temperature=temperature, places=places)
        lost.add(played)
        lost.check()
        if is_lost(played):
            continue
        outcomes = {t.question_id: LOST if t.backend_error is not None else RIGHT if counts.rule.is_right(t) else WRONG for t in played}
        counts.add(outcomes)
        over = [question_id for question_id in pool if counts.finished(question_id)]
        for question_id in over:
            del pool[question_id]
        finished += len(over)
        if on_round is not None:
            on_round(outcomes, finished)


def difficulty_rows(source: QuestionSource, questions: Iterable[int], counts: Counts) -> list[dict[str, Any]]:
    """A row for each question, in order: id, question, attempts, right, difficulty, type and set.

    ``attempts`` is how many were played, the right one included. ``set`` is the part that the question had in a merge (``searchqa data merge``), else
    the name of the source.
    """
    rows = []
    for index in questions:
        question = source[index]
        count = counts[question.id]
        rows.append(
            {
                "id": question.id,
                "question": question.question,
                "attempts": count.attempts,
                "right": count.right,
                "difficulty": counts.rule.difficulty(count),
                "type": question.metadata.get("type"),
                "set": _set_of(question, source),
            }
        )
    return rows


class Quota(NamedTuple):
    """How many questions of a difficulty to keep; None: all. ``of_set`` None: of all sets together."""

    of_set: str | None
    difficulty: str
    most: int | None


def parse_keep(keep: Any) -> list[Quota]:
    """What ``keep`` asks for: None (every medium and hard question), numbers by difficulty, or such numbers by set.

    Raises
    ------
    ConfigurationError
        For an unknown difficulty, a number below 0, or anything else.
    """
    if keep is None:
        keep = {"medium": None, "hard": None}
    if not isinstance(keep, Mapping) or not keep:
        raise _bad_keep(keep)
    nested = [isinstance(value, Mapping) for value in keep.values()]
    if any(isinstance(value, Mapping) and not value for value in keep.values()):
        raise _bad_keep(keep)
    if not any(nested):
        return _quotas(None, keep)
    if not all(nested):
        raise _bad_keep(keep)
    return [quota for name, numbers in keep.items() for quota in _quotas(str(name), numbers)]


def _quotas(of_set: str | None, numbers: Mapping[str, Any]) -> list[Quota]:
    for difficulty, most in numbers.items():
        whole = isinstance(most, int) and not isinstance(most, bool) and most >= 0
        if difficulty not in DIFFICULTIES or not (most is None or whole):
            raise _bad_keep(numbers)
    return [Quota(of_set, difficulty, numbers[difficulty]) for difficulty in DIFFICULTIES if difficulty in numbers]


def _bad_keep(keep: Any) -> ConfigurationError:
    return ConfigurationError(
        f"keep must give for some of {list(DIFFICULTIES)} how many questions to keep, null for all, such as {{medium: 200, hard: null}}, or that "
        f"for each set, such as {{hotpotqa: {{medium: 200}}}}; got {keep!r}."
    )


def check_sets(quotas: Sequence[Quota], source: QuestionSource, questions: Iterable[int]) -> None:
    """Raise ``ConfigurationError`` for a quota of a set that none of the questions belongs to."""
    named = {quota.of_set for quota in quotas} - {None}
    if named:
        sets = {_set_of(source[index], source) for index in questions}
        if named - sets:
            raise ConfigurationError(f"keep names {sorted(map(str, named - sets))}; the sets of these questions are {sorted(sets)}.")


def _set_of(question: Question, source: QuestionSource) -> str:
    return str(question.metadata.get("origin", source.name))


def select(rows: Sequence[Mapping[str, Any]], quotas: Sequence[Quota], seed: int = 0) -> list[dict[str, Any]]:
    """The rows to keep, in order; where a quota has fewer places than there are questions, which ones is drawn by the seed.

    A smaller quota keeps some of those that a larger one keeps.
    """
    kept: set[int] = set()
    for quota in quotas:
        places = [place for place, row in enumerate(rows) if _belongs(row, quota)]
        name = f"{quota.of_set or ''}/{quota.difficulty}"
        order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(places))
        kept |= {places[i] for i in order[: quota.most]}
    return [dict(rows[place]) for place in sorted(kept)]


def _belongs(row: Mapping[str, Any], quota: Quota) -> bool:
    return row["difficulty"] == quota.difficulty and quota.of_set in (None, row["set"])


def count_table(
    rows: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]], quotas: Sequence[Quota]
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table: how many questions there are of each set and difficulty, were to be kept, and are."""
    table = []
    names = sorted({row["set"] for row in rows})
    for name in names:
        for difficulty in (*DIFFICULTIES, UNKNOWN):
            there, stayed = (sum(row["set"] == name and row["difficulty"] == difficulty for row in some) for some in (rows, kept))
            if there or difficulty != UNKNOWN:
                asked = [quota for quota in quotas if quota.of_set in (None, name) and quota.difficulty == difficulty]
                wanted = "none" if not asked else "all" if asked[0].most is None else str(asked[0].most)
                if len(names) > 1 and asked and asked[0].of_set is None and asked[0].most is not None:
                    wanted += " of all sets"
                table.append([name, difficulty, str(there), wanted, str(stayed)])
    return ["set", "difficulty", "questions", "asked for", "kept"], table
