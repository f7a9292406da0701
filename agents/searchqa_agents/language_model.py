"""What writes segments: the interface, which language models and scripted agents share. It is numpy only, so that it loads without torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
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


class Session(ABC):
    """Episodes under way. Row ``r`` is the ``r``-th seed given to :meth:`LanguageModel.start`, and its noise is a function of that seed.

    A row begins with its first :meth:`submit`, so that a few slots can play many episodes one after another. Backends implement ``submit`` and
    ``collect``; ``generate`` is both at once.
    """

    @abstractmethod
    def submit(self, rows: Sequence[int], contexts: Sequence[IntArray], infos: Sequence[Mapping[str, Any]]) -> None:
        """Ask for one segment of each of ``rows``, none of which is being written.

        Parameters
        ----------
        rows
            Rows that begin or go on.
        contexts
            int32[T], the whole context of each row, as the environment observed it.
        infos
            The environment's infos; scripted agents read them, language models do not.
        """

    @abstractmethod
    def collect(self) -> list[tuple[int, Segment]]:
        """Wait until some of the segments asked for are written; these, each with its row. Empty only if none was asked for."""

    def usage(self, row: int) -> Mapping[str, float]:
        """What the language model did for a row beyond its segments: ``calls``, ``prompt_tokens``, ``generated_tokens``.

        Asked once when the row's episode has ended, before :meth:`release`. Empty where the segments are all that was generated.
        """
        return {}

    def release(self, rows: Sequence[int]) -> None:
        """These rows have ended: what is kept for them may go."""
        return

    def generate(self, rows: Sequence[int], contexts: Sequence[IntArray], infos: Sequence[Mapping[str, Any]]) -> list[Segment]:
        """One segment for each of ``rows``, in their order."""
        self.submit(rows, contexts, infos)
        segments: dict[int, Segment] = {}
        while len(segments) < len(rows):
            segments.update(self.collect())
        return [segments[row] for row in rows]


class LanguageModel(Protocol):
    """Starts sessions. ``returns_ids``: segments are the sampled ids themselves, not encoded text. ``returns_logprobs``: they carry them."""

    returns_ids: bool
    returns_logprobs: bool

    def start(self, seeds: Sequence[int], sampling: Sampling) -> Session:
        """Be ready for as many episodes as there are seeds (each in [0, 2**63))."""
        ...
