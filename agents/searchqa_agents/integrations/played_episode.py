"""One episode played with an engine's asynchronous ``generate``: ids in, ids out, and the loss mask and log-probabilities aligned with them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from searchqa_agents.integrations.episode_pool import EpisodePool, PooledEpisode
from searchqa_envs.errors import SearchQAError

logger = logging.getLogger(__name__)


class EpisodeLostError(SearchQAError, RuntimeError):
    """An episode was lost to its search back end or to the engine, again and again: it says nothing about the policy and must not be trained on."""


class Generated(NamedTuple):
    """What an engine wrote behind a context.

    ``ids`` may go on behind a closing tag: the environment drops the rest, and its log-probabilities go with it. ``logprobs`` has one value for each
    id, or is None. ``aborted``: the engine broke off, so that this is no segment of the policy's.
    """

    ids: Sequence[int]
    logprobs: Sequence[float] | None
    aborted: bool = False


Generate = Callable[[list[int]], Awaitable[Generated]]


@dataclass(frozen=True)
class PlayedEpisode:
    """A finished episode.

    Attributes
    ----------
    token_ids, loss_mask
        int32[T] and int8[T], as the environment has them: 1 for ids that the policy sampled, 0 for prompt and environment text.
    prompt_length
        Ids of the prompt, at the beginning.
    logprobs
        float32[T], 0 where the mask is 0; None where the engine gave none.
    reward, info
        Of the last step.
    truncated
        Whether a budget ended it, not the policy.
    segments
        How many segments the policy wrote.
    seconds
        Waiting for the engine (``model``) and for the environment, search included (``environment``).
    """

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.int8]
    prompt_length: int
    logprobs: NDArray[np.float32] | None
    reward: float
    info: Mapping[str, Any]
    truncated: bool
    segments: int
    seconds: Mapping[str, float]

    @property
    def action_ranges(self) -> list[tuple[int, int]]:
        """Begin and end of each run of ids that the policy sampled."""
        edges = np.flatnonzero(np.diff(self.loss_mask, prepend=0, append=0)).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass
class _Play:
    """What is known of an episode under way beside what the environment knows."""

    logprobs: list[float] | None = field(default_factory=list)
    segments: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"model": 0.0, "environment": 0.0})


async def play_episode(pool: EpisodePool, question_id: str, generate: Generate, *, retries: int) -> PlayedEpisode:
    """Play an episode on a question; one that is lost is played again from its beginning, up to ``retries`` times.

    Raises
    ------
    EpisodeLostError
        If the last try is lost too: the search back end failed, the engine broke off, or it gave log-probabilities that do not fit its ids or are not numbers.
    """
    for attempt in range(1 + retries):
        try:
            return await _play_once(pool, question_id, generate)
        except EpisodeLostError as error:
            if attempt == retries:
                raise
            logger.warning("Question %s: %s Played again (%d of %d).", question_id, error, attempt + 1, retries)
    raise AssertionError("unreachable")


async def _play_once(pool: EpisodePool, question_id: str, generate: Generate) -> PlayedEpisode:
    play = _Play()
    started = time.perf_counter()
    async with pool.episode({"question_id": question_id}) as episode:
        prompt_length = len(episode.observation)
        play.seconds["environment"] += time.perf_counter() - started
        while not episode.ended:
            await _one_turn(pool, episode, generate, play)
    if episode.info["backend_error"] is not None:
        raise EpisodeLostError(f"The search back end was lost: {episode.info['backend_error']}.")
    mask: NDArray[np.int8] = episode.info["turn_record"].loss_mask
    logprobs = None
    if play.logprobs is not None:
        logprobs = np.zeros(len(mask), dtype=np.float32)
        logprobs[mask == 1] = play.logprobs
    return PlayedEpisode(
        episode.observation, mask, prompt_length, logprobs, episode.reward, episode.info, episode.truncated, play.segments, play.seconds
    )


async def _one_turn(pool: EpisodePool, episode: PooledEpisode, generate: Generate, play: _Play) -> None:
    started = time.perf_counter()
    written = await generate(episode.observation.tolist())
    generated = time.perf_counter()
    if written.aborted:
        raise EpisodeLostError("The engine broke off in the middle of a segment.")
    if written.logprobs is not None and len(written.logprobs) != len(written.ids):
        raise EpisodeLostError(f"The engine gave {len(written.logprobs)} log-probabilities for {len(written.ids)} ids.")
    if written.logprobs is not None and not all(value is not None and math.isfinite(value) for value in written.logprobs):
        raise EpisodeLostError("The engine gave log-probabilities that are not finite numbers.")
    await episode.step(_known_ids(written.ids, pool.venv.tokenizer.vocab_size))
    used = episode.info["turn_record"].segment_tokens_used
    if used and written.logprobs is None:
        play.logprobs = None
    elif used and play.logprobs is not None and written.logprobs is not None:
        play.logprobs += map(float, written.logprobs[:used])
    play.segments += 1
    play.seconds["model"] += generated - started
    play.seconds["environment"] += time.perf_counter() - generated


def _known_ids(ids: Sequence[int], vocab_size: int) -> Sequence[int]:
    """The ids up to the first one that the tokenizer does not have: models know more ids than their tokenizers, to round their number up."""
    for place, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            logger.warning("The model sampled id %d, which is not among the tokenizer's %d; the segment ends before it.", token, vocab_size)
            return ids[:place]
    return ids
