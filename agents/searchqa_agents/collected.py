"""Trajectories that runs have left behind, as demonstrations: which of them to learn from, and whether they fit a run."""

from __future__ import annotations

import glob
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from searchqa_agents.select_questions import measure
from searchqa_agents.trajectory import Trajectory, iterate_trajectories
from searchqa_envs.errors import ConfigurationError, UnknownQuestionError
from searchqa_envs.questions import QuestionSource

Keep = Literal["all", "right"]
_HELD_OUT = ("before", "after")
"""How the names begin of a training run's evaluations, on questions that it never trains on: also ``after-<stage>``."""


@dataclass(frozen=True)
class Collected:
    """Trajectories to learn from, and how they came about.

    Attributes
    ----------
    trajectories
        In the order of the files.
    counts
        To be logged: ``collected/read`` and ``collected/lost`` (episodes read, and those of them that lost their search back end), ``collected/right``, and
        of those kept ``collected/trajectories``, ``collected/questions``, ``collected/with_search``, ``collected/tokens`` (sampled).
    sha256
        Of the tokens and masks, in order.
    """

    trajectories: tuple[Trajectory, ...]
    counts: dict[str, float]
    sha256: str

    def steps(self, epochs: float, batch_size: int) -> int:
        """Updates in so many epochs, rounded up: the last batch runs on into another epoch."""
        return math.ceil(epochs * len(self.trajectories) / batch_size)


def trajectory_files(given: Any) -> list[Path]:
    """The files that ``given`` names: a trajectory file, a run's folder, a pattern of either, or a list of such.

    Of a run's folder: the episodes of ``searchqa eval`` and the rollouts of ``searchqa train``, not those of its evaluations.

    Raises
    ------
    ConfigurationError
        Where there is none.
    """
    names = [given] if isinstance(given, (str, Path)) else given
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, (str, Path)) for name in names):
        raise ConfigurationError(f"trajectories must be a run's folder, a trajectory file, a pattern of such, or a list; got {given!r}.")
    files: list[Path] = []
    for name in map(str, names):
        found = [file for path in _matching(name) for file in _files_of(path)]
        if not found:
            raise ConfigurationError(
                f"There are no trajectories at {name}. Name a run's folder, such as runs/<run> of `searchqa eval env.split=train save=null ...`, "
                "or a file: runs/<run>/trajectories/eval.jsonl.gz."
            )
        files += found
    return list(dict.fromkeys(files))


def _matching(name: str) -> list[Path]:
    path = Path(name).expanduser()
    return [path] if path.exists() else [Path(found) for found in sorted(glob.glob(str(path)))]


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted([*path.glob("trajectories/*.jsonl.gz"), *path.glob("trajectories/*.jsonl")])
    return [file for file in files if not file.name.startswith(_HELD_OUT)]


def collect(
    given: Any, *, keep: Keep = "right", metric: str = "em", right_at: float = 1.0, max_per_question: int | None = None
) -> Collected:
    """Read trajectories and choose among them.

    Parameters
    ----------
    given
        See :func:`trajectory_files`.
    keep
        ``right``: those whose ``metric`` (or ``reward``) is at least ``right_at``, which is rejection sampling; ``all``: every one. Episodes that lost
        their search back end, or in which nothing was sampled, are never kept.
    max_per_question
        The first so many that are kept of each question; None: all.

    Raises
    ------
    ConfigurationError
        If there are no files, a trajectory does not have the metric, or none is kept.
    TrajectoryFileError
        If a file cannot be read.
    """
    files = tuple(trajectory_files(given))
    return _collect(
        files, tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files), keep, metric, right_at, max_per_question
    )


@lru_cache(maxsize=2)  # asked several times by one run; the times and sizes tell when files have changed
def _collect(
    files: tuple[Path, ...],
    versions: tuple[tuple[int, int], ...],
    keep: Keep,
    metric: str,
    right_at: float,
    max_per_question: int | None,
) -> Collected:
    read = lost = right = 0
    kept: list[Trajectory] = []
    of_question: Counter[tuple[str, str]] = Counter()
    digest = hashlib.sha256()
    for file in files:
        for trajectory in iterate_trajectories(file):
            read += 1
            if trajectory.backend_error is not None:
                lost += 1
                continue
            is_right = measure(trajectory, metric) >= right_at
            right += is_right
            question = (trajectory.question_id, trajectory.question)
            full = max_per_question is not None and of_question[question] >= max_per_question
            if (is_right or keep == "all") and trajectory.loss_mask.any() and not full:
                of_question[question] += 1
                kept.append(trajectory)
                digest.update(trajectory.token_ids.tobytes() + trajectory.loss_mask.tobytes())
    if not kept:
        raise ConfigurationError(
            f"None of the {read} trajectories in {', '.join(map(str, files))} is kept: {lost} lost their search back end, {right} have {metric} of at "
            f"least {right_at:g}. Collect more, or learn from all of them: keep=all."
        )
    counts = {
        "read": read,
        "lost": lost,
        "right": right,
        "trajectories": len(kept),
        "questions": len(of_question),
        "with_search": sum(any(turn.action == "search" for turn in trajectory.turns) for trajectory in kept),
        "tokens": sum(int(trajectory.loss_mask.sum()) for trajectory in kept),
    }
    return Collected(tuple(kept), {f"collected/{name}": float(value) for name, value in counts.items()}, digest.hexdigest())


def fitting(collected: Collected, venv: Any) -> Collected:
    """The same for a run in the environment ``venv``: checked, ready to be trained on, and with counts by hops where its questions have them.

    Text that had to be encoded (``retokenized``) is allowed, other than for reinforcement learning: it is what this tokenizer makes of the demonstrator's
    words, and no log-probability is used.

    Raises
    ------
    ConfigurationError
        If a trajectory has other token ids, another dialect or prompt than the run, or a question that the run does not train on, such as a held-out one.
    """
    rules = venv.unwrapped.stamp()
    source: QuestionSource = venv.unwrapped.source
    hops: Counter[str] = Counter()
    for trajectory in collected.trajectories:
        stamp = trajectory.stamp
        where = f"the trajectory of question {trajectory.question_id!r}"
        if vocabulary(stamp.get("tokenizer")) != vocabulary(rules["tokenizer"]):
            raise ConfigurationError(
                f"Token ids mean something only to their own tokenizer: {where} was made with {stamp.get('tokenizer')!r}, and this run has "
                f"{rules['tokenizer']!r}. Collect with env.tokenizer=<this run's>; a server of another model gives text by agent.protocol=completions or chat."
            )
        for name in ("dialect", "prompt"):
            if stamp.get(name) != rules[name]:
                raise ConfigurationError(
                    f"What is shown must be what is asked for later: {where} has the {name} {stamp.get(name)!r}, and this run has {rules[name]!r}. "
                    f"Collect with the run's env.{name}, or train with env.{name}={stamp.get(name)}."
                )
        hops[str(_own_question(source, trajectory, where).get("hops"))] += 1
    by_hops = {f"collected/hops={key}": float(value) for key, value in sorted(hops.items()) if key != "None"}
    ready = tuple(replace(trajectory, retokenized=False) for trajectory in collected.trajectories)
    return replace(collected, trajectories=ready, counts=collected.counts | by_hops)


def vocabulary(tokenizer: Any) -> Any:
    """What of a tokenizer's name says which ids it gives: of one of a library the hash of its tokens, so that base and instruct models agree."""
    return tokenizer.rpartition("@")[2] if isinstance(tokenizer, str) else tokenizer


def _own_question(source: QuestionSource, trajectory: Trajectory, where: str) -> Any:
    """The metadata of a trajectory's question."""
    try:
        question = source[source.index_of(trajectory.question_id)]
    except UnknownQuestionError as error:
        raise _other_question(source, where) from error
    if question.question != trajectory.question:  # sets number their questions alike
        raise _other_question(source, where)
    return question.metadata


def _other_question(source: QuestionSource, where: str) -> ConfigurationError:
    stamp = source.stamp()
    return ConfigurationError(
        f"A run learns only from questions that it trains on, never from held-out ones: {where} is none of {stamp['dataset']}, split {stamp['split']}. "
        "Collect with the env of the training run; `searchqa eval` takes its questions with env.split=train."
    )
