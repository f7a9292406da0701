"""The environment: multi-turn question answering with a search engine, in tokens."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray

from searchqa_envs.configuration import UnknownArgumentError, build_rules
from searchqa_envs.episode import Step
from searchqa_envs.episode_types import EpisodeView
from searchqa_envs.rendering import render_episode
from searchqa_envs.rules import HasRules, Rules
from searchqa_envs.slot import EpisodeSlot
from searchqa_envs.spaces import TokenSequence


class SearchQAEnv(HasRules, gym.Env[NDArray[np.int32], ArrayLike]):
    """A policy answers a question in several turns, searching as often as it likes within its budget.

    ## Description
    In each turn the policy writes a *segment*: reasoning, then either a query or an answer between the tags of the *dialect*. A query is
    answered with retrieved passages, an answer ends the episode. Everything passes as token ids: ids that the policy sampled are never
    decoded and encoded again. Text from a retriever can never act as the policy's: tags in it are defused before it is encoded.

    ## Action Space
    ``TokenSequence(vocab_size, 0, max_segment_tokens)``: a 1-D integer array or list. What counts of it ends at the token that completes the
    dialect's first closing tag; ids behind it are dropped (an end-of-sequence id directly behind it is kept). A longer segment is cut.

    ## Observation Space
    ``TokenSequence(vocab_size, 1, max_context_tokens)``: the whole context so far, int32[T]: prompt, then segments and replies in turn.

    ## Starting State
    The prompt with the next question: one chosen by ``options={"question_id": ...}`` or ``{"index": ...}``, or else the next of an order
    drawn from ``np_random``.

    ## Rewards
    0.0 until the episode ends, then the weighted sum of the reward's named terms (default: exact match, 1 or 0).

    ## Episode End
    Terminated: an answer, or the dialect's own ending (R1-Searcher: a segment that is no action). Truncated: ``max_turns`` segments without
    an answer (a search in the last one is recorded, not executed), no room in the context for another full segment, or a lost search back
    end (reward 0, no terms, ``info["backend_error"]``).

    ## Information
    ``reset``: ``question_id, question, turn, turn_record``. ``step`` adds ``action`` ("search", "answer" or "invalid"), ``query`` (None unless a
    search), ``backend_error`` (None unless lost), and at the end ``answer, golden_answers, metrics, reward_terms``. ``turn_record`` is a
    ``TurnRecord`` with the environment's new ids, how many ids of the segment counted, the loss mask, and the passages.

    ## Arguments
    - ``dataset``, ``split``:
      The data set and its part: train, dev, test, ``all`` (every row) or ``extra``. The registered ids fix the data set.
    - ``retriever``:
      A name ("bm25", "none", "random"), a mapping ``{"name": "bm25", "k1": 0.9, ...}``, or any ``searchqa_retrievers.Retriever``.
    - ``top_k``:
      Passages per search (default 3; the world: its preset's).
    - ``max_turns``, ``max_segment_tokens``, ``max_observation_tokens``, ``max_context_tokens``:
      Budgets; a turn is one segment. Passage text is cut to fit, tags never.
    - ``tokenizer``:
      "byte", "world", a path, a hub name, or a transformers, tokenizers or own object.
    - ``dialect``, ``prompt``:
      "search-r1", "r1-searcher" or "zerosearch"; the prompt is "published", "bare", another of the dialect's, or a template with ``{question}``.
    - ``reward``, ``reward_weights``:
      A preset's name, a mapping, or a callable of an ``EpisodeView``; weights by term name.
    - ``forced_answer``:
      Announce the last turn in environment text.
    - ``search_controls``:
      What a search may say behind its query and ``||``: ``{"top_k": 10, "sources": ["wiki", "news"], "filters": ["title"]}`` (any of
      them) allows ``query || k=5; source=news; title=Lisbon``. Anything else behind ``||`` is an invalid action. The published prompt
      gets a sentence about it, the bare one and your own templates do not. Default: None, searches are plain.
    - ``data_dir``:
      Where data sets lie; otherwise ``$SEARCHQA_DATA``, the user's cache, or a download.
    - ``render_mode``:
      "ansi" (``render`` returns the episode as text) or "human" (written to the terminal as it goes).
    - ``preset``, ``world_seed``, ``num_worlds``, ``hops``, ``style``, ``entities``:
      Only the world.
    - ``questions``, ``corpus``:
      Only the custom set.

    ## Version History
    - v0: first version.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium declares it as an instance variable
        "render_modes": ["ansi", "human"],
        "render_fps": 1,
    }

    def __init__(self, dataset: str, *, render_mode: str | None = None, **arguments: Any) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            # a TypeError too: by that Stable-Baselines3's make_vec_env learns that it must not ask for pictures
            raise UnknownArgumentError(f"render_mode must be one of {self.metadata['render_modes']} or None; got {render_mode!r}.")
        self.render_mode = render_mode
        self.rules = build_rules(dataset, **arguments)
        self._slot = EpisodeSlot(self.rules)
        self.observation_space, self.action_space = token_spaces(self.rules)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[NDArray[np.int32], dict[str, Any]]:
        """Begin an episode; see the class for ``options``."""
        super().reset(seed=seed)
        observation, info = self._slot.reset(self.np_random, fresh_order=seed is not None, options=options)
        self._show()
        return observation, info

    def step(self, action: ArrayLike) -> Step:
        """Take a segment. Raises ``InvalidSegmentError`` (the episode is left as it was) for anything but ids of the vocabulary."""
        episode = self._slot.current()
        request = episode.submit(self.rules.check_segment(action))
        if request is None:
            result = episode.resolve()
        else:
            answers, error, seconds = self.rules.search([request])
            result = episode.resolve(answers[0] if answers is not None else None, error, seconds)
        self._show()
        return result

    def get_state(self) -> dict[str, Any]:
        """The whole state as plain values: question, tokens, turns, order, RNG, progress. :meth:`set_state` continues from it identically."""
        return self._slot.get_state(self.np_random)

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of :meth:`get_state`, also one made in another process."""
        self._slot.set_state(self.np_random, state)

    def episode_view(self) -> EpisodeView:
        """The current episode as text and typed data."""
        return self._slot.current().view()

    def render(self) -> str | None:
        """The episode so far as text ("ansi"); nothing in "human" mode, which writes as it goes."""
        if self.render_mode == "ansi":
            return render_episode(self._slot.current().view(), colour=False)
        return None

    def _show(self) -> None:
        if self.render_mode == "human":
            view = self._slot.current().view()
            sys.stdout.write(render_episode(view, colour=sys.stdout.isatty(), last_only=True) + "\n")
            sys.stdout.flush()


def token_spaces(rules: Rules) -> tuple[TokenSequence, TokenSequence]:
    """Observation and action space."""
    vocab_size = rules.tokenizer.vocab_size
    return TokenSequence(vocab_size, 1, rules.max_context_tokens), TokenSequence(vocab_size, 0, rules.max_segment_tokens)
