"""Other views of the environment: fixed shapes, text, and one token per step."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

from searchqa_envs.env import SearchQAEnv
from searchqa_envs.errors import ConfigurationError, EpisodeStateError
from searchqa_envs.spaces import PaddedContext, TokenSequence, UnicodeText

_CHARACTERS_PER_TOKEN = 256  # no token of a published tokenizer is longer


def _inner(env: gym.Env[Any, Any], wrapper: str) -> SearchQAEnv:
    inner = env.unwrapped
    if not isinstance(inner, SearchQAEnv):
        raise ConfigurationError(f"{wrapper} wraps a SearchQAEnv; got {type(inner).__name__}.")
    return inner


class PaddedTokens(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Arrays of fixed shape, for Stable-Baselines3 and any library that needs them.

    Observation: ``{"input_ids": int32[C], "attention_mask": int8[C]}``, padded on the left with ``pad_id`` to ``C = max_context_tokens``; its space is a
    :class:`~searchqa_envs.spaces.PaddedContext`.
    Action: ``int64[L]`` of ``MultiDiscrete([vocab_size] * L)``, ``L = max_segment_tokens``, padded on the right with ``pad_id``; padding at the
    end is removed before the environment sees it. Over ``TokenLevel`` the action stays one token.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        inner = _inner(env, "PaddedTokens")
        self._pad_id = inner.tokenizer.pad_id
        self._length = inner.rules.max_context_tokens
        self.observation_space = PaddedContext(
            inner.tokenizer.vocab_size,
            self._length,
            tokenizer=inner.tokenizer.name,
            pad_id=self._pad_id,
            closers=tuple(inner.rules.dialect.closers),
        )
        self._whole_segments = isinstance(env.action_space, TokenSequence)
        if self._whole_segments:
            self.action_space = spaces.MultiDiscrete([inner.tokenizer.vocab_size] * inner.max_segment_tokens)

    def _padded(self, context: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
        input_ids = np.full(self._length, self._pad_id, dtype=np.int32)
        attention_mask = np.zeros(self._length, dtype=np.int8)
        input_ids[self._length - len(context) :] = context
        attention_mask[self._length - len(context) :] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Begin an episode."""
        context, info = self.env.reset(seed=seed, options=options)
        return self._padded(context), info

    def step(self, action: NDArray[np.int64]) -> tuple[dict[str, NDArray[Any]], float, bool, bool, dict[str, Any]]:
        """Take a padded segment (over ``TokenLevel``: one token)."""
        if self._whole_segments:
            ids = np.asarray(action)
            written = np.flatnonzero(ids != self._pad_id)
            action = ids[: written[-1] + 1 if len(written) else 0]
        context, reward, terminated, truncated, info = self.env.step(action)
        return self._padded(context), float(reward), terminated, truncated, info


class TextView(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Text in, text out, for API models and people.

    Observation: the whole context as text. Action: the segment as text, encoded once. A model whose text passes through here has no token ids, so
    its trajectories are for evaluation and demonstrations, not for policy gradients.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        inner = _inner(env, "TextView")
        self._tokenizer = inner.tokenizer
        self.observation_space = UnicodeText(inner.rules.max_context_tokens * _CHARACTERS_PER_TOKEN)
        self.action_space = UnicodeText(inner.max_segment_tokens * _CHARACTERS_PER_TOKEN)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode."""
        context, info = self.env.reset(seed=seed, options=options)
        return self._tokenizer.decode(context.tolist()), info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take a segment of text; what does not fit into ``max_segment_tokens`` is cut."""
        context, reward, terminated, truncated, info = self.env.step(self._tokenizer.encode(action))
        return self._tokenizer.decode(context.tolist()), float(reward), terminated, truncated, info


class TokenLevel(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """One token per step, for teaching and for algorithms with small discrete actions.

    Action: ``Discrete(vocab_size)``. The segment goes to the environment at the token that completes a closing tag, at end of sequence, or when it is
    full; before that a step only lengthens the observation, with reward 0.0 and ``question_id, question, turn`` in its info.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        inner = _inner(env, "TokenLevel")
        self._rules = inner.rules
        self.action_space = spaces.Discrete(inner.tokenizer.vocab_size)
        self._context: NDArray[np.int32] | None = None
        self._segment: list[int] = []
        self._info: dict[str, Any] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[NDArray[np.int32], dict[str, Any]]:
        """Begin an episode."""
        context, info = self.env.reset(seed=seed, options=options)
        self._begin_segment(context, info)
        return context, info

    def _begin_segment(self, context: NDArray[np.int32], info: dict[str, Any]) -> None:
        self._context, self._segment = context.copy(), []
        self._info = {name: info[name] for name in ("question_id", "question", "turn")}

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.int32], float, bool, bool, dict[str, Any]]:
        """Write one token."""
        if self._context is None:
            raise EpisodeStateError("step() before reset(): call reset() first.")
        token = int(self._rules.check_segment([int(action)])[0])
        self._segment.append(token)
        if len(self._segment) < self._rules.max_segment_tokens and not self._rules.is_complete(self._segment):
            return np.append(self._context, np.array(self._segment, dtype=np.int32)), 0.0, False, False, dict(self._info)
        context, reward, terminated, truncated, info = self.env.step(self._segment)
        self._begin_segment(context, info)
        return context, float(reward), terminated, truncated, info
