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

from searchqa_agents.language_model import FloatArray, IntArray, LanguageModel, Sampling, Segment
from searchqa_agents.trajectory import Trajectory, TurnSpan
from searchqa_envs.errors import EpisodeStateError
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
        Called after each batch of ``num_envs`` episodes with the number of episodes finished so far.
    places
        Each question's place, where ``questions`` are a part of a longer list; default: as they stand here.

    Returns
    -------
    list of Trajectory
        In the order of ``questions``, members of a group next to each other. An episode that lost its search back end is among them, with
        ``backend_error``: training must leave it out.
    """
    base = venv.unwrapped
    sampling = Sampling(base.max_segment_tokens, tuple(base.dialect.closers), temperature, top_p, top_k)  # type: ignore[attr-defined]
    numbered = zip(range(len(questions)) if places is None else places, questions, strict=True)
    spots: _Places = _SubsetPlaces(venv) if hasattr(venv, "step_at") else _PlainPlaces(venv)
    jobs = [(question, episode_seed(seed, place, member)) for place, question in numbered for member in range(group_size)]
    trajectories: list[Trajectory] = []
    for start in range(0, len(jobs), venv.num_envs):
        wave = jobs[start : start + venv.num_envs]
        recorders = _play(spots, model, [question for question, _ in wave], [one_seed for _, one_seed in wave], sampling)
        tokenizer = base.tokenizer  # type: ignore[attr-defined]
        trajectories += [recorder.trajectory(tokenizer, model, stamp or {}) for recorder in recorders]
        if on_done is not None:
            on_done(len(trajectories))
    return trajectories


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


def _play(
    places: _Places, model: LanguageModel, questions: Sequence[int | str], seeds: Sequence[int], sampling: Sampling
) -> list[_Recorder]:
    """One wave of episodes, at most one per environment, each to its end."""
    session = model.start(seeds, sampling)
    started = time.perf_counter()
    observations, infos = places.reset(questions, [one_seed % 2**31 for one_seed in seeds])
    recorders = [_Recorder(observation, info) for observation, info in zip(observations, infos, strict=True)]
    _share(recorders, "environment", time.perf_counter() - started)
    live = list(range(len(questions)))
    while live:
        started = time.perf_counter()
        segments = session.generate(live, [recorders[i].context for i in live], [recorders[i].info for i in live])
        _share([recorders[i] for i in live], "model", time.perf_counter() - started)
        started = time.perf_counter()
        steps = places.step(live, [segment.ids for segment in segments])
        elapsed = time.perf_counter() - started
        for i, segment, *step in zip(live, segments, *steps, strict=True):
            recorders[i].add(segment, *step)
        searching = sum(recorders[i].info["turn_record"].seconds for i in live)
        _share([recorders[i] for i in live], "environment", elapsed - searching)
        live = [i for i in live if not recorders[i].ended]
    return recorders


def _share(recorders: Sequence[_Recorder], part: str, seconds: float) -> None:
    for recorder in recorders:
        recorder.seconds[part] += seconds / len(recorders)


class _Turn(NamedTuple):
    start: int
    segment_end: int
    end: int
    action: str
    content: str


class _Recorder:
    """What one episode has been so far."""

    def __init__(self, observation: IntArray, info: Info) -> None:
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
        self.turns.append(_Turn(start, start + used, len(observation), info["action"], content or ""))
        self.segments.append(Segment(segment.ids[:used], *(None if array is None else array[:used] for array in segment[1:])))
        self.context, self.info = observation, info
        self.reward += float(reward)
        self.terminated, self.truncated = bool(terminated), bool(truncated)
        self.seconds["search"] += info["turn_record"].seconds

    def trajectory(self, tokenizer: Any, model: LanguageModel, stamp: Info) -> Trajectory:
        loss_mask: NDArray[np.int8] = self.info["turn_record"].loss_mask

        def text(start: int, end: int) -> str:
            return str(tokenizer.decode(self.context[start:end].tolist()))

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
            turns=tuple(TurnSpan(*turn, text(turn.start, turn.segment_end), text(turn.segment_end, turn.end)) for turn in self.turns),
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
            seconds=self.seconds,
            stamp=stamp,
        )


def _question_options(questions: Sequence[int | str]) -> dict[str, list[Any]]:
    """Options of ``reset``: by index where all questions are numbers, by id where all are texts."""
    by_index = {isinstance(question, str) for question in questions}
    if len(by_index) > 1:
        raise ValueError("questions must be all indices (int) or all ids (str); got both.")
    return {"question_id" if by_index == {True} else "index": list(questions)}


class _Places(Protocol):
    """Environments 0 to n - 1 of a vector environment, stepped as far as they are needed."""

    def reset(self, questions: Sequence[int | str], seeds: Sequence[int]) -> tuple[Sequence[IntArray], Sequence[Info]]: ...

    def step(self, indices: Sequence[int], segments: Sequence[IntArray]) -> Steps: ...


class _SubsetPlaces:
    """By ``reset_at`` and ``step_at``."""

    def __init__(self, venv: Any) -> None:
        self._venv = venv

    def reset(self, questions: Sequence[int | str], seeds: Sequence[int]) -> tuple[Sequence[IntArray], Sequence[Info]]:
        observations, infos = self._venv.reset_at(range(len(questions)), seed=list(seeds), options=_question_options(questions))
        return observations, infos

    def step(self, indices: Sequence[int], segments: Sequence[IntArray]) -> Steps:
        steps: Steps = self._venv.step_at(indices, segments)
        return steps


class _PlainPlaces:
    """By ``reset`` and ``step`` of all: an environment that has nothing to do plays its last question with empty segments, unrecorded."""

    def __init__(self, venv: Any) -> None:
        mode = getattr(venv.metadata.get("autoreset_mode"), "name", None)
        if mode != "DISABLED":
            raise EpisodeStateError(
                f"rollout resets environments itself; make the vector environment with autoreset_mode DISABLED, not {mode}."
            )
        self._venv = venv
        self._questions: list[int | str] = []
        self._seeds: list[int] = []

    def reset(self, questions: Sequence[int | str], seeds: Sequence[int]) -> tuple[Sequence[IntArray], Sequence[Info]]:
        spare = self._venv.num_envs - len(questions)
        self._questions, self._seeds = [*questions, *[questions[-1]] * spare], [*seeds, *[seeds[-1]] * spare]
        self._ended = np.zeros(self._venv.num_envs, dtype=np.bool_)
        observations, infos = self._venv.reset(seed=list(self._seeds), options=_question_options(self._questions))
        return observations[: len(questions)], [_row(infos, i) for i in range(len(questions))]

    def step(self, indices: Sequence[int], segments: Sequence[IntArray]) -> Steps:
        if self._ended.any():
            self._venv.reset(options={**_question_options(self._questions), "reset_mask": self._ended})
        actions = [np.empty(0, dtype=np.int32)] * self._venv.num_envs
        for i, segment in zip(indices, segments, strict=True):
            actions[i] = segment
        observations, rewards, terminated, truncated, infos = self._venv.step(tuple(actions))
        self._ended = terminated | truncated
        return (
            [observations[i] for i in indices],
            [rewards[i] for i in indices],
            [terminated[i] for i in indices],
            [truncated[i] for i in indices],
            [_row(infos, i) for i in indices],
        )


def _row(infos: Mapping[str, Any], i: int) -> dict[str, Any]:
    """One environment's info out of Gymnasium's batched form."""
    row: dict[str, Any] = {}
    for key, column in infos.items():
        if not key.startswith("_") and infos[f"_{key}"][i]:
            row[key] = _row(column, i) if isinstance(column, Mapping) else column[i]
    return row
