"""What writes segments: the interface, which language models and scripted agents share. It is numpy only, so that it loads without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from searchqa_envs.errors import ConfigurationError

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How segments are sampled."""

    max_new_tokens: int
    """longest segment"""
    stop: tuple[str, ...]
    """a segment ends with the token that completes one of these strings, or with end of sequence"""
    temperature: float = 1.0
    """0 takes the most likely token"""
    top_p: float = 1.0
    """keep the most likely tokens up to this probability mass; 1 keeps all"""
    top_k: int = 0
    """keep this many of the most likely tokens; 0 keeps all"""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigurationError(f"Sampling needs max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1, top_k >= 0; got {self}.")

    @property
    def truncated(self) -> bool:
        """Whether the distribution sampled from is not the full softmax."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)


class Segment(NamedTuple):
    """One generated segment: int32[L] ids, float32[L] log-probabilities (see ``Trajectory``); None where the backend gives none."""

    ids: IntArray
    logprobs: FloatArray | None = None
    sampling_logprobs: FloatArray | None = None


class Session(Protocol):
    """A batch of episodes under way; row ``r`` is the ``r``-th episode, for whose noise ``seeds[r]`` stands."""

    def generate(self, rows: Sequence[int], contexts: Sequence[IntArray], infos: Sequence[Mapping[str, Any]]) -> list[Segment]:
        """One segment for each of ``rows``.

        Parameters
        ----------
        rows
            Episodes that go on; all of them in the first call. A row left out has ended, and its cache is dropped.
        contexts
            int32[T], the whole context of each row, as the environment observed it.
        infos
            The environment's infos; scripted agents read them, language models do not.
        """
        ...


class LanguageModel(Protocol):
    """Starts sessions. ``returns_ids``: segments are the sampled ids themselves, not encoded text. ``returns_logprobs``: they carry them."""

    returns_ids: bool
    returns_logprobs: bool

    def start(self, seeds: Sequence[int], sampling: Sampling) -> Session:
        """Begin as many episodes as there are seeds."""
        ...
