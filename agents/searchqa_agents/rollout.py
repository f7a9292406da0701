"""Play episodes: a language model (or a scripted agent) in a vector environment, trajectories out.

Only the public interface of the environment is used. The same in twelve lines, for an algorithm of your own, with one environment::

    observation, info = env.reset(options={"question_id": question_id})
    session = policy.start([seed], Sampling(env.unwrapped.max_segment_tokens, env.unwrapped.dialect.closers))
    logprobs, ended = [], False
    while not ended:
        [segment] = session.generate([0], [observation], [info])
        observation, reward, terminated, truncated, info = env.step(segment.ids)
        logprobs.append(segment.logprobs)
        ended = terminated or truncated
    token_ids, loss_mask = observation, info["turn_record"].loss_mask     # int32[T], int8[T]
    old_logprobs = np.concatenate(logprobs)                               # float32[loss_mask.sum()]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from searchqa_agents.language_model import FloatArray, IntArray, LanguageModel, Sampling, Segment, Session
from searchqa_agents.trajectory import Trajectory, TurnSpan
from searchqa_envs.errors import ConfigurationError, EpisodeStateError
from searchqa_envs.questions import QuestionSource

Info = Mapping[str, Any]
Steps = tuple[Sequence[IntArray], Sequence[float], Sequence[bool], Sequence[bool], Sequence[Info]]


def rollout(
    venv: VectorEnv[Any, Any, Any],
    model: LanguageModel,
    questions: Sequence[int | str],
    *,
    group_size: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stamp: Mapping[str, Any] | None = None,
    on_done: Callable[[int], object] | None = None,
    places: Sequence[int] | None = None,
    members: Sequence[int] | None = None,
    on_trajectory: Callable[[int, int, Trajectory], object] | None = None,
) -> list[Trajectory]:
    """Play ``group_size`` episodes on each question.

    Parameters
    ----------
    venv
        A ``SearchQAVectorEnv`` with autoreset disabled. By its ``reset_at`` and ``step_at`` only the episodes still going on are stepped; a wrapped one,
        which has only ``reset`` and ``step``, gives the same trajectories.
    model
        Any :class:`LanguageModel`: a policy, a backend, or a scripted agent.
    questions
        Index or id of each question; the same one may come twice.
    seed
        With a question's place in ``questions`` and its member of the group, it determines an episode's samples, whatever ``num_envs`` is.
    temperature, top_p, top_k
        See :class:`Sampling`.
    stamp
        Stored with each trajectory.
    on_done
        Called whenever episodes have ended, with the number of episodes that have.
    places
        Each question's place, where ``questions`` are a part of a longer list; default: as they stand here.
    members
        With ``group_size`` 1, where only some members of groups are played: which one each of ``questions`` stands for; default: the first, 0.
    on_trajectory
        Called as each episode ends, with the number of its question in ``questions`` (from 0), its number among that question's episodes here, and its
        trajectory.

    Returns
    -------
    list of Trajectory
        In the order of ``questions``, members of a group next to each other. An episode that lost its search back end is among them, with
        ``backend_error``: training must leave it out.
    """
    base: Any = venv.unwrapped
    sampling = Sampling(base.max_segment_tokens, tuple(base.dialect.closers), temperature, top_p, top_k)
    if members is not None and group_size != 1:
        raise ConfigurationError(
            f"members are single episodes of groups, each with its question; they need group_size 1, got {group_size}."
        )
    groups = [range(group_size)] * len(questions) if members is None else [[member] for member in members]
    numbered = zip(range(len(questions)) if places is None else places, questions, groups, strict=True)
    jobs = [_Job(question, episode_seed(seed, place, member)) for place, question, group in numbered for member in group]
    _question_options(questions)  # raises where they are of both kinds
    stage: _Stage = _SubsetStage(venv) if hasattr(venv, "step_at") else _WholeStage(venv)
    session = model.start([job.seed for job in jobs], sampling)
    trajectories: dict[int, Trajectory] = {}

    def keep(row: int, episode: _Episode) -> None:
        trajectories[row] = episode.trajectory(base.tokenizer, model, stamp or {}, session.usage(row))
        if on_trajectory is not None:
            on_trajectory(row // group_size, row % group_size, trajectories[row])

    under_way: dict[int, _Episode] = {}
    try:
        _play(stage, session, jobs, under_way, keep, on_done or (lambda finished: None))
    finally:  # also after an error or an interrupt: a session may hold connections and memory
        session.release(list(under_way))
    return [trajectories[row] for row in range(len(jobs))]


def episode_seed(*numbers: int) -> int:
    """One seed in [0, 2**63) from several numbers, each at least 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def draw_questions(source: QuestionSource, count: int, *, seed: int, num_worlds: int | None = None) -> list[int]:
    """Indices of ``count`` questions, uniformly at random; different ones as far as the source has as many.

    ``num_worlds`` takes all of them from so many worlds of a generated source, because making a world costs more than asking one more question.
    """
    rng = np.random.default_rng(seed)
    size = len(source)
    worlds = getattr(source, "num_worlds", None)
    if num_worlds is None or worlds is None:
        return [int(index) for index in rng.choice(size, count, replace=count > size)]
    per_world = size // worlds
    chosen = rng.choice(worlds, min(num_worlds, worlds), replace=False)
    places = rng.choice(per_world * len(chosen), count, replace=count > per_world * len(chosen))
    return [int(chosen[place // per_world] * per_world + place % per_world) for place in places]


class _Job(NamedTuple):
    question: int | str
    seed: int


def _play(
    stage: _Stage,
    session: Session,
    jobs: Sequence[_Job],
    episodes: dict[int, _Episode],
    on_end: Callable[[int, _Episode], object],
    on_done: Callable[[int], object],
) -> None:
    """Play all jobs: whatever is written is stepped at once, and a place is given to the next job when its episode ends.

    ``episodes`` holds those under way, by row; one that has ended is given to ``on_end``.
    """
    free = list(range(stage.size))
    place: dict[int, int] = {}  # of each row under way
    ready: list[int] = []  # rows under way that have been answered
    opened = 0  # how many rows have begun
    while opened < len(jobs) or place:
        begun = list(range(opened, min(len(jobs), opened + len(free))))
        if begun:
            opened += len(begun)
            place.update(zip(begun, free, strict=False))
            del free[: len(begun)]
            started = time.perf_counter()
            openings = stage.reset([place[row] for row in begun], [jobs[row] for row in begun])
            episodes.update((row, _Episode(*opening, started)) for row, opening in zip(begun, zip(*openings, strict=True), strict=True))
            _share([episodes[row] for row in begun], "environment", time.perf_counter() - started)
        started = time.perf_counter()
        asked = ready + begun
        session.submit(asked, [episodes[row].context for row in asked], [episodes[row].info for row in asked])
        written = dict(session.collect())
        while stage.steps_all_at_once and len(written) < len(place):
            written.update(session.collect())
        _share([episodes[row] for row in place], "model", time.perf_counter() - started)
        started = time.perf_counter()
        steps = stage.step([place[row] for row in written], [segment.ids for segment in written.values()])
        elapsed = time.perf_counter() - started
        stepped = [episodes[row] for row in written]
        for episode, segment, *step in zip(stepped, written.values(), *steps, strict=True):
            episode.add(segment, *step)
        _share(stepped, "environment", elapsed - sum(episode.info["turn_record"].seconds for episode in stepped))
        ended = [row for row in written if episodes[row].ended]
        ready = [row for row in written if not episodes[row].ended]
        free += [place.pop(row) for row in ended]
        for row in ended:
            on_end(row, episodes[row])
        session.release(ended)
        for row in ended:
            del episodes[row]
        if ended:
            on_done(opened - len(place))


def _share(episodes: Sequence[_Episode], part: str, seconds: float) -> None:
    for episode in episodes:
        episode.seconds[part] += seconds / len(episodes)


class _Turn(NamedTuple):
    start: int
    segment_end: int
    end: int
    action: str
    content: str
    passages: tuple[tuple[str, str], ...]


class _Episode:
    """What one episode has been so far."""

    def __init__(self, observation: IntArray, info: Info, started: float) -> None:
        self.started = started
        self.context = observation
        self.info = info
        self.prompt_length = len(observation)
        self.turns: list[_Turn] = []
        self.segments: list[Segment] = []
        self.reward = 0.0
        self.terminated = self.truncated = False
        self.seconds = {"model": 0.0, "search": 0.0, "environment": 0.0}

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated

    def add(self, segment: Segment, observation: IntArray, reward: float, terminated: bool, truncated: bool, info: Info) -> None:
        used = info["turn_record"].segment_tokens_used
        start = len(self.context)
        content = info["query"] if info["action"] == "search" else info.get("answer")
        passages = tuple((passage.id, passage.title) for passage in info["turn_record"].passages)
        self.turns.append(_Turn(start, start + used, len(observation), info["action"], content or "", passages))
        self.segments.append(Segment(segment.ids[:used], *(None if array is None else array[:used] for array in segment[1:])))
        self.context, self.info = observation, info
        self.reward += float(reward)
        self.terminated, self.truncated = bool(terminated), bool(truncated)
        self.seconds["search"] += info["turn_record"].seconds

    def trajectory(self, tokenizer: Any, model: LanguageModel, stamp: Info, usage: Mapping[str, float]) -> Trajectory:
        loss_mask: NDArray[np.int8] = self.info["turn_record"].loss_mask

        def text(start: int, end: int) -> str:
            return str(tokenizer.decode(self.context[start:end].tolist()))

        def span(turn: _Turn) -> TurnSpan:
            return TurnSpan(*turn[:5], text(turn.start, turn.segment_end), text(turn.segment_end, turn.end), turn.passages)

        def spread(arrays: Sequence[FloatArray | None]) -> FloatArray | None:
            if any(array is None for array in arrays):
                return None
            values = np.zeros(len(loss_mask), dtype=np.float32)
            values[loss_mask == 1] = np.concatenate([array for array in arrays if array is not None])
            return values

        return Trajectory(
            token_ids=self.context,
            loss_mask=loss_mask,
            logprobs=spread([segment.logprobs for segment in self.segments]) if model.returns_logprobs else None,
            sampling_logprobs=spread([segment.sampling_logprobs for segment in self.segments]) if model.returns_logprobs else None,
            turns=tuple(span(turn) for turn in self.turns),
            prompt=text(0, self.prompt_length),
            reward=self.reward,
            reward_terms={name: float(value) for name, value in self.info["reward_terms"].items()},
            metrics={name: float(value) for name, value in self.info["metrics"].items()},
            question_id=self.info["question_id"],
            question=self.info["question"],
            golden_answers=tuple(self.info["golden_answers"]),
            answer=self.info["answer"],
            terminated=self.terminated,
            truncated=self.truncated,
            backend_error=self.info["backend_error"],
            retokenized=not model.returns_ids,
            seconds=self.seconds | {"wall": time.perf_counter() - self.started},
            stamp=stamp,
            usage=dict(usage),
        )


def _question_options(questions: Sequence[int | str]) -> dict[str, list[Any]]:
    """Options of ``reset``: by index where all questions are numbers, by id where all are texts."""
    by_id = {isinstance(question, str) for question in questions}
    if len(by_id) > 1:
        raise ValueError("questions must be all indices (int) or all ids (str); got both.")
    return {"question_id" if by_id == {True} else "index": list(questions)}


class _Stage(Protocol):
    """Places 0 to ``size`` - 1 of a vector environment where episodes are played."""

    size: int
    steps_all_at_once: bool
    """whether :meth:`step` must be given all places whose episodes go on"""

    def reset(self, places: Sequence[int], jobs: Sequence[_Job]) -> tuple[Sequence[IntArray], Sequence[Info]]: ...

    def step(self, places: Sequence[int], segments: Sequence[IntArray]) -> Steps: ...


class _SubsetStage:
    """By ``reset_at`` and ``step_at``."""

    steps_all_at_once = False

    def __init__(self, venv: Any) -> None:
        self._venv = venv
        self.size: int = venv.num_envs

    def reset(self, places: Sequence[int], jobs: Sequence[_Job]) -> tuple[Sequence[IntArray], Sequence[Info]]:
        options = _question_options([job.question for job in jobs])
        observations, infos = self._venv.reset_at(places, seed=[job.seed % 2**31 for job in jobs], options=options)
        return observations, infos

    def step(self, places: Sequence[int], segments: Sequence[IntArray]) -> Steps:
        steps: Steps = self._venv.step_at(places, segments)
        return steps


class _WholeStage:
    """By ``reset`` and ``step`` of all: a place that has nothing to do plays its last question with empty segments, unrecorded."""

    steps_all_at_once = True

    def __init__(self, venv: Any) -> None:
        mode = getattr(venv.metadata.get("autoreset_mode"), "name", None)
        if mode != "DISABLED":
            raise EpisodeStateError(
                f"rollout resets environments itself; make the vector environment with autoreset_mode DISABLED, not {mode}."
            )
        self._venv = venv
        self.size: int = venv.num_envs
        self._jobs: list[_Job] = []
        self._ended = np.zeros(self.size, dtype=np.bool_)

    def reset(self, places: Sequence[int], jobs: Sequence[_Job]) -> tuple[Sequence[IntArray], Sequence[Info]]:
        mask = np.zeros(self.size, dtype=np.bool_)
        if not self._jobs:  # the first time, all places must begin
            self._jobs = [jobs[-1]] * self.size
            mask[:] = True
        mask[list(places)] = True
        for place, job in zip(places, jobs, strict=True):
            self._jobs[place] = job
        observations, infos = self._reset(mask)
        return [observations[place] for place in places], [_row(infos, place) for place in places]

    def _reset(self, mask: NDArray[np.bool_]) -> tuple[Sequence[IntArray], Info]:
        self._ended &= ~mask
        options = {**_question_options([job.question for job in self._jobs]), "reset_mask": mask}
        observations, infos = self._venv.reset(seed=[job.seed % 2**31 for job in self._jobs], options=options)
        return observations, infos

    def step(self, places: Sequence[int], segments: Sequence[IntArray]) -> Steps:
        if self._ended.any():
            self._reset(self._ended.copy())
        actions = [np.empty(0, dtype=np.int32)] * self.size
        for place, segment in zip(places, segments, strict=True):
            actions[place] = segment
        observations, rewards, terminated, truncated, infos = self._venv.step(tuple(actions))
        self._ended = terminated | truncated
        return (
            [observations[place] for place in places],
            [rewards[place] for place in places],
            [terminated[place] for place in places],
            [truncated[place] for place in places],
            [_row(infos, place) for place in places],
        )


def _row(infos: Mapping[str, Any], i: int) -> dict[str, Any]:
    """One environment's info out of Gymnasium's batched form."""
    row: dict[str, Any] = {}
    for key, column in infos.items():
        if not key.startswith("_") and infos[f"_{key}"][i]:
            row[key] = _row(column, i) if isinstance(column, Mapping) else column[i]
    return row
