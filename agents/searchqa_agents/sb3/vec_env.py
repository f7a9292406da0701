"""A vector environment for Stable-Baselines3, with one retriever call per step for all."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from searchqa_envs.errors import ConfigurationError
from searchqa_envs.rules import positive_integer
from searchqa_envs.spaces import PaddedContext
from searchqa_envs.vector import SearchQAVectorEnv
from searchqa_retrievers.types import RetrieverUnavailable

logger = logging.getLogger(__name__)

Level = Literal["segment", "token"]
Observation = dict[str, NDArray[Any]]

MONITORED = ("em", "searches")


def make_vec_env(
    env_id: str,
    n_envs: int = 1,
    *,
    seed: int | None = None,
    level: Level = "segment",
    monitor_dir: str | os.PathLike[str] | None = None,
    max_backend_errors: int = 10,
    **arguments: Any,
) -> VecMonitor:
    """A :class:`SearchQAVecEnv` under Stable-Baselines3's ``VecMonitor``.

    Parameters
    ----------
    env_id
        Of an environment of ours, such as ``SearchQA-World-v0``.
    seed
        Of the first reset; environment ``i`` gets ``seed + i``. An algorithm's own ``seed`` does the same.
    level, max_backend_errors
        See :class:`SearchQAVecEnv`.
    monitor_dir
        Where to write ``monitor.csv``: return, length, ``em`` and ``searches`` of each episode.
    **arguments
        Arguments of the environment, as of ``gymnasium.make``.

    Raises
    ------
    ConfigurationError
        For arguments that cannot be.
    """
    import searchqa_envs  # registers the ids

    if env_id not in searchqa_envs.ENV_IDS or "autoreset_mode" in arguments:
        raise ConfigurationError(
            f"make_vec_env makes {', '.join(searchqa_envs.ENV_IDS)}, and resets them itself (no autoreset_mode); got {env_id!r} with {sorted(arguments)}."
        )
    venv: Any = gym.make_vec(env_id, num_envs=n_envs, autoreset_mode="DISABLED", **arguments)
    made = SearchQAVecEnv(venv, level=level, max_backend_errors=max_backend_errors)
    if seed is not None:
        made.seed(seed)
    if monitor_dir is not None:
        Path(monitor_dir).mkdir(parents=True, exist_ok=True)
    return VecMonitor(made, None if monitor_dir is None else os.fspath(monitor_dir), info_keywords=MONITORED)


class SearchQAVecEnv(VecEnv):
    """Stable-Baselines3's view of a :class:`~searchqa_envs.vector.SearchQAVectorEnv`.

    Observations, actions and their spaces are those of :class:`~searchqa_envs.wrappers.PaddedTokens`, over ``TokenLevel`` with ``level="token"``.
    The info of an episode's last step has ``metrics, reward_terms, answer, golden_answers, is_success`` (exact match), each metric once more under its
    own name, and ``terminal_observation``. ``TimeLimit.truncated`` is always False: budgets belong to the task, and a policy that does not answer in
    time has failed, so that nothing is to be bootstrapped from beyond them.

    A lost search back end says nothing about the policy, but Stable-Baselines3 cannot drop a sample. So the episode begins again with the same
    question: reward 0, not done, ``backend_error`` in the info.

    Parameters
    ----------
    venv
        With autoreset disabled.
    level
        ``segment``: a step is a whole segment. ``token``: a step is a token; an environment is stepped at the token that ends its segment.
    max_backend_errors
        At so many steps in a row that lose their search :class:`~searchqa_retrievers.types.RetrieverUnavailable` is raised.

    Attributes
    ----------
    backend_errors
        How many episodes began again because their search back end was lost.
    """

    def __init__(self, venv: gym.vector.VectorEnv[Any, Any, Any], *, level: Level = "segment", max_backend_errors: int = 10) -> None:
        base = venv.unwrapped
        if not isinstance(base, SearchQAVectorEnv) or base.autoreset_mode is not gym.vector.AutoresetMode.DISABLED:
            raise ConfigurationError(
                f"SearchQAVecEnv needs a SearchQAVectorEnv whose autoreset_mode is DISABLED; got {base!r}. Use make_vec_env(id, n_envs)."
            )
        if level not in ("segment", "token"):
            raise ConfigurationError(f"level must be 'segment' or 'token'; got {level!r}.")
        self.venv = base
        self.spec = base.spec
        self.level = level
        self.max_backend_errors = positive_integer("max_backend_errors", max_backend_errors)
        self.backend_errors = 0
        self._lost_in_a_row = 0
        self._contexts: list[NDArray[np.int32]] = []
        self._segments: list[list[int]] = []
        """ids of the segment under way; only of tokens"""
        self._turns: list[dict[str, Any]] = []
        """question_id, question and turn of each episode"""
        self._actions: NDArray[Any] = np.empty(0, dtype=np.int64)
        rules = base.rules
        self._pad_id, self._length = rules.tokenizer.pad_id, rules.max_context_tokens
        vocab_size, closers = rules.tokenizer.vocab_size, tuple(rules.dialect.closers)
        observations = PaddedContext(vocab_size, self._length, tokenizer=rules.tokenizer.name, pad_id=self._pad_id, closers=closers)
        actions = spaces.Discrete(vocab_size) if level == "token" else spaces.MultiDiscrete([vocab_size] * rules.max_segment_tokens)
        super().__init__(base.num_envs, observations, actions)

    def reset(self) -> Observation:
        """Begin episodes in all environments, with the seeds and options given before."""
        names = dict.fromkeys(name for options in self._options for name in options)
        options = {name: [one.get(name) for one in self._options] for name in names}
        contexts, infos = self.venv.reset_at(range(self.num_envs), seed=self._seeds, options=options)
        self._contexts, self._segments = list(contexts), [[] for _ in contexts]
        self.reset_infos = [_plain(info) for info in infos]
        self._turns = [_turn(info) for info in infos]
        self._reset_seeds()
        self._reset_options()
        return self._padded(self._contexts)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Take int64[n_envs, L] padded segments, or int64[n_envs] tokens."""
        self._actions = actions

    def step_wait(self) -> tuple[Observation, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Step all environments whose segment is complete, with one retriever call."""
        rewards, dones = np.zeros(self.num_envs, dtype=np.float32), np.zeros(self.num_envs, dtype=np.bool_)
        infos = [dict(turn) for turn in self._turns]
        written = self._written()
        contexts, step_rewards, terminated, truncated, step_infos = self.venv.step_at(list(written), list(written.values()))
        lost: list[int] = []
        answered = False
        for i, context, reward, end, budget, info in zip(written, contexts, step_rewards, terminated, truncated, step_infos, strict=True):
            infos[i] = _plain(info)
            self._contexts[i], self._segments[i] = context, []
            self._turns[i] = _turn(info)
            answered |= info["action"] == "search" and not (end or budget)
            if info["backend_error"] is not None:
                lost.append(i)
            elif end or budget:
                rewards[i], dones[i] = reward, True
                infos[i]["terminal_observation"] = {name: column[0] for name, column in self._padded([context]).items()}
        self._count(lost, [infos[i]["backend_error"] for i in lost], answered)
        self._begin([*lost, *np.flatnonzero(dones).tolist()], [infos[i]["question_id"] for i in lost])
        for info in infos:
            info["TimeLimit.truncated"] = False
        observations = [
            np.append(context, np.array(segment, dtype=np.int32)) if segment else context
            for context, segment in zip(self._contexts, self._segments, strict=True)
        ]
        return self._padded(observations), rewards, dones, infos

    def _written(self) -> dict[int, Sequence[int] | NDArray[Any]]:
        """The complete segments of this step, by environment."""
        if self.level == "segment":
            return {i: _without_padding(action, self._pad_id) for i, action in enumerate(self._actions)}
        rules = self.venv.rules
        tokens = [int(rules.check_segment([int(token)])[0]) for token in self._actions]
        for segment, token in zip(self._segments, tokens, strict=True):
            segment.append(token)
        return {
            i: segment for i, segment in enumerate(self._segments) if len(segment) == rules.max_segment_tokens or rules.is_complete(segment)
        }

    def _count(self, lost: Sequence[int], errors: Sequence[str], answered: bool) -> None:
        if answered:
            self._lost_in_a_row = 0
        if not lost:
            return
        self.backend_errors += len(lost)
        self._lost_in_a_row += 1
        logger.warning("The search back end was lost (%s): %d episodes begin again.", errors[0], len(lost))
        if self._lost_in_a_row >= self.max_backend_errors:
            raise RetrieverUnavailable(
                f"The search back end was lost in {self._lost_in_a_row} steps in a row, last with {errors[0]}. max_backend_errors is "
                f"{self.max_backend_errors}. Bring it back and go on from the last checkpoint, or allow more."
            )

    def _begin(self, indices: Sequence[int], question_ids: Sequence[str]) -> None:
        """New episodes: the first ones with these questions, the others with the next of their orders."""
        options = {"question_id": [*question_ids, *(None for _ in indices[len(question_ids) :])]}
        contexts, infos = self.venv.reset_at(indices, options=options)
        for i, context, info in zip(indices, contexts, infos, strict=True):
            self._contexts[i], self.reset_infos[i], self._turns[i] = context, _plain(info), _turn(info)

    def _padded(self, contexts: Sequence[NDArray[np.int32]]) -> Observation:
        input_ids = np.full((len(contexts), self._length), self._pad_id, dtype=np.int32)
        attention_mask = np.zeros(input_ids.shape, dtype=np.int8)
        for row, mask, context in zip(input_ids, attention_mask, contexts, strict=True):
            row[self._length - len(context) :] = context
            mask[self._length - len(context) :] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def close(self) -> None:
        """Free what the environment holds."""
        self.venv.close()

    # -- what Stable-Baselines3 asks of single environments: here they share all but their episodes ---------------------------------------------

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """The attribute of the vector environment (or of this adapter), once for each index."""
        owner = self.venv if hasattr(self.venv, attr_name) else self
        return [getattr(owner, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        """Set an attribute of the vector environment. Raises ``ConfigurationError`` for some of the environments only."""
        self._check_all(attr_name, indices)
        setattr(self.venv, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: int | Iterable[int] | None = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the vector environment once; its result for each index."""
        self._check_all(method_name, indices)
        return [getattr(self.venv, method_name)(*method_args, **method_kwargs)] * self.num_envs

    def _check_all(self, name: str, indices: int | Iterable[int] | None) -> None:
        if len(set(self._get_indices(indices))) != self.num_envs:
            raise ConfigurationError(
                f"All {self.num_envs} environments share their rules, so that {name} is for all of them; got indices={indices!r}. Leave indices out, "
                "or make environments of their own in DummyVecEnv, each under PaddedTokens."
            )

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: int | Iterable[int] | None = None
    ) -> list[bool]:
        """False: no single environment, no wrapper round it."""
        return [False for _ in self._get_indices(indices)]


def _turn(info: dict[str, Any]) -> dict[str, Any]:
    return {name: info[name] for name in ("question_id", "question", "turn")}


def _plain(info: dict[str, Any]) -> dict[str, Any]:
    """The info without arrays; metrics once more under their own names, where ``VecMonitor`` looks for them."""
    plain = {name: value for name, value in info.items() if name != "turn_record"}
    metrics = info.get("metrics", {})
    return {**plain, **metrics, **({"is_success": metrics["em"] == 1.0} if metrics else {})}


def _without_padding(action: NDArray[Any], pad_id: int) -> NDArray[Any]:
    written = np.flatnonzero(action != pad_id)
    return action[: written[-1] + 1 if len(written) else 0]
