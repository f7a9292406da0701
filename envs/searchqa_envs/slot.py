"""Where episodes are played one after another: the order of the questions, and the state that can be saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchqa_envs.episode import Episode
from searchqa_envs.errors import ConfigurationError, EpisodeStateError
from searchqa_envs.questions import checked_index
from searchqa_envs.rules import Rules

STATE_VERSION = 1
_STATE_KEYS = {"rng", "order_key", "position", "progress", "episode"}


class EpisodeSlot:
    """A place where one episode after another is played: the random order of questions, and the current episode."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.episode: Episode | None = None
        self._order_key: int | None = None
        self._position = 0

    def reset(
        self, rng: np.random.Generator, fresh_order: bool, options: Mapping[str, Any] | None
    ) -> tuple[NDArray[np.int32], dict[str, Any]]:
        """Begin the next episode; ``fresh_order`` after a seed was given."""
        if fresh_order:
            self._order_key = None
        index = self.chosen_index(options)
        if index is None:
            index = self._next_index(rng)
        self.episode = Episode.begin(self.rules, self.rules.source[index], seed=int(rng.integers(2**31)), ended=self.episode)
        return self.episode.opening()

    def chosen_index(self, options: Mapping[str, Any] | None) -> int | None:
        """The index that ``options`` choose, None where they choose none; an error for options that cannot be."""
        if not options:
            return None
        unknown = set(options) - {"question_id", "index"}
        if unknown or len(options) > 1:
            raise ConfigurationError(f"reset takes the options question_id or index, one of them; got {sorted(options)}.")
        source = self.rules.source
        if "question_id" in options:
            return source.index_of(str(options["question_id"]))
        return checked_index(source, options["index"])

    def _next_index(self, rng: np.random.Generator) -> int:
        size = len(self.rules.source)
        if self._order_key is None or self._position >= size:
            self._order_key, self._position = int(rng.integers(2**62)), 0
        index = shuffled(self._position, size, self._order_key)
        self._position += 1
        return index

    def current(self) -> Episode:
        """The current episode; an error before the first reset."""
        if self.episode is None:
            raise EpisodeStateError("step() before reset(): call reset() first.")
        return self.episode

    def _environment(self) -> dict[str, Any]:
        rules = self.rules
        return {
            "data set": rules.source.name,
            "tokenizer": rules.tokenizer.name,
            "dialect": rules.dialect.name,
            "prompt": rules.prompt,
            "max_turns": rules.max_turns,
            "max_context_tokens": rules.max_context_tokens,
            **({} if rules.dialect.controls is None else {"search_controls": rules.dialect.controls.stamp()}),
        }

    def get_state(self, rng: np.random.Generator) -> dict[str, Any]:
        """Everything about this place, as plain values (JSON can hold them)."""
        return {
            "version": STATE_VERSION,
            "environment": self._environment(),
            "rng": rng.bit_generator.state,
            "order_key": self._order_key,
            "position": self._position,
            "progress": list(self.rules.progress),
            "episode": None if self.episode is None else self.episode.get_state(),
        }

    def set_state(self, rng: np.random.Generator, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`get_state`, also in another process."""
        here = {"version": STATE_VERSION, **self._environment()}
        there = {"version": state.get("version"), **dict(state.get("environment", {}))}
        if there != here or not set(state) >= _STATE_KEYS:
            raise EpisodeStateError(
                f"This state was saved by another environment or version: {there}; this one is {here}. Make the environment with the same arguments."
            )
        episode = None if state["episode"] is None else Episode.from_state(self.rules, state["episode"])
        rng.bit_generator.state = state["rng"]
        self._order_key, self._position = state["order_key"], state["position"]
        self.rules.set_progress(*state["progress"])
        self.episode = episode


def shuffled(position: int, size: int, key: int) -> int:
    """Image of ``position`` under a permutation of ``range(size)`` that ``key`` chooses, in constant memory.

    An eight-round Feistel network on the next even number of bits, walked until it lands inside the range (Black and Rogaway 2002).
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    while True:
        left, right = position >> half, position & low
        for round_number in range(8):
            mixed = (right + round_number * 0x9E3779B97F4A7C15 + key) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ (mixed >> 29)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 32)) & low)
        position = left << half | right
        if position < size:
            return position
