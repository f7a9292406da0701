"""One episode: its tokens, its turns, and what a step gives.

The single and the vector environment are thin shells over this module, so that they cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchqa_envs.episode_types import Action, EpisodeView, Turn, restored_action
from searchqa_envs.errors import ConfigurationError, EpisodeStateError
from searchqa_envs.metrics import episode_metrics
from searchqa_envs.questions import Question
from searchqa_envs.rules import Rules
from searchqa_retrievers.types import Hit, Passage, SearchRequest

Step = tuple[NDArray[np.int32], float, bool, bool, dict[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class TurnRecord:
    """What is ragged about one call of ``reset`` or ``step``.

    Attributes
    ----------
    env_tokens
        int32[O], what the environment appended in this call: the prompt at ``reset``, the reply afterwards (empty at the end).
    segment_tokens_used
        How many ids of the segment were kept; 0 at ``reset``.
    loss_mask
        int8[T], aligned with the observation: 1 for ids the policy wrote, 0 for prompt and environment text.
    passages
        What was retrieved in this turn.
    seconds
        Time spent in the retriever; not part of equality.
    counters
        At the end of an episode that searched: what ``env.unwrapped.search_counters()`` gave after this call, else empty; not part of equality.
    scores
        The retriever's score of each of ``passages``, for agents that merge the results of several searches; not part of equality, because the last
        digits of a score can depend on what else was asked in the same call.
    """

    env_tokens: NDArray[np.int32]
    segment_tokens_used: int
    loss_mask: NDArray[np.int8]
    passages: tuple[Passage, ...]
    seconds: float
    counters: Mapping[str, float] = field(default_factory=dict)
    scores: tuple[float, ...] = ()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TurnRecord)
            and self.segment_tokens_used == other.segment_tokens_used
            and self.passages == other.passages
            and np.array_equal(self.env_tokens, other.env_tokens)
            and np.array_equal(self.loss_mask, other.loss_mask)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"TurnRecord(env_tokens=int32[{len(self.env_tokens)}], segment_tokens_used={self.segment_tokens_used}, "
            f"loss_mask=int8[{len(self.loss_mask)}], passages={len(self.passages)})"
        )


class Episode:
    """A running episode. ``submit`` takes a checked segment and may ask for a search; ``resolve`` then gives the step's result."""

    __slots__ = (
        "_length",
        "_mask",
        "_pending",
        "_tokens",
        "answer",
        "backend_error",
        "prompt",
        "question",
        "rules",
        "seed",
        "terminated",
        "truncated",
        "turns",
    )

    def __init__(self, rules: Rules, question: Question, seed: int) -> None:
        self.rules = rules
        self.question = question
        self.seed = seed
        self.prompt = ""
        self.turns: list[Turn] = []
        self.answer: str | None = None
        self.backend_error: str | None = None
        self.terminated = False
        self.truncated = False
        self._tokens: NDArray[np.int32] = np.empty(2048, dtype=np.int32)
        self._mask: NDArray[np.int8] = np.empty(2048, dtype=np.int8)
        self._length = 0
        self._pending: tuple[NDArray[np.int32], str, Action] | None = None

    @classmethod
    def begin(cls, rules: Rules, question: Question, seed: int, ended: Episode | None = None) -> Episode:
        """A fresh episode: the prompt is its context. It takes over the buffers of ``ended``, an episode that nobody continues."""
        episode = cls(rules, question, seed)
        if ended is not None:
            episode._tokens, episode._mask = ended._tokens, ended._mask
        episode.prompt = rules.prompt_text(question)
        ids = rules.encode(episode.prompt)
        if len(ids) + rules.max_segment_tokens > rules.max_context_tokens:
            raise ConfigurationError(
                f"The prompt of question {question.id!r} has {len(ids)} tokens; with max_segment_tokens={rules.max_segment_tokens} it exceeds "
                f"max_context_tokens={rules.max_context_tokens}. Raise max_context_tokens or lower max_segment_tokens."
            )
        episode._append(ids, 0)
        return episode

    @property
    def done(self) -> bool:
        """Whether the episode has ended, either way."""
        return self.terminated or self.truncated

    @property
    def context(self) -> NDArray[np.int32]:
        """int32[T], a fresh copy of the context."""
        return self._tokens[: self._length].copy()

    @property
    def loss_mask(self) -> NDArray[np.int8]:
        """int8[T], a fresh copy of the loss mask."""
        return self._mask[: self._length].copy()

    def _append(self, ids: Sequence[int] | NDArray[np.int32], mask: int) -> None:
        start, end = self._length, self._length + len(ids)
        if end > len(self._tokens):
            tokens, mask_so_far = self._tokens, self._mask
            capacity = max(2 * len(tokens), end)
            self._tokens, self._mask = np.empty(capacity, dtype=np.int32), np.empty(capacity, dtype=np.int8)
            self._tokens[:start], self._mask[:start] = tokens[:start], mask_so_far[:start]
        self._tokens[start:end] = ids
        self._mask[start:end] = mask
        self._length = end

    def opening(self) -> tuple[NDArray[np.int32], dict[str, Any]]:
        """Observation and info of ``reset``."""
        context = self.context
        record = TurnRecord(context.copy(), 0, self.loss_mask, (), 0.0)
        return context, {"question_id": self.question.id, "question": self.question.question, "turn": 0, "turn_record": record}

    def submit(self, ids: NDArray[np.int32]) -> SearchRequest | None:
        """Read a checked segment; the request to search with, if its action is a search that is to be executed.

        Nothing changes before ``resolve``, so that an error in between leaves the episode as it was.
        """
        if self.done:
            raise EpisodeStateError("The episode has ended; call reset() before the next step().")
        rules = self.rules
        used, text, action = rules.read_segment(ids)
        self._pending = (ids[:used], text, action)
        if action.kind != "search" or len(self.turns) + 1 >= rules.max_turns:
            return None
        filters, top_k = rules.source.filters(self.question), rules.top_k
        if action.controls is not None:
            top_k = action.controls.top_k or top_k
            filters = {**dict(action.controls.filters), **(filters or {})} or None
        return SearchRequest(
            query=action.text,
            top_k=top_k,
            question_id=self.question.id,
            question=self.question.question,
            turn=len(self.turns),
            seed=self.seed,
            golden_answers=self.question.golden_answers if rules.needs_gold else (),
            filters=filters,
        )

    def resolve(self, hits: Sequence[Hit] | None = None, backend_error: str | None = None, seconds: float = 0.0) -> Step:
        """Finish the step that ``submit`` began: reply or end, and on an end the reward."""
        if self._pending is None:
            raise EpisodeStateError("resolve() without submit().")
        segment, text, action = self._pending
        self._pending = None
        self._append(segment, 1)
        passages = tuple(hit.passage for hit in hits or ())
        scores = tuple(float(hit.score) for hit in hits or ())
        turn_number = len(self.turns) + 1
        observation, ids = "", np.empty(0, dtype=np.int32)
        if backend_error is not None:
            self.backend_error, self.truncated = backend_error, True
        elif action.kind == "answer":
            self.answer, self.terminated = action.text, True
        elif action.kind == "invalid" and self.rules.dialect.invalid_text is None:
            self.terminated = True
        elif turn_number >= self.rules.max_turns:
            self.truncated = True
        else:
            reply = self._reply(action, passages, last_turn_next=turn_number + 1 == self.rules.max_turns)
            if reply is None:
                self.truncated = True
            else:
                observation, ids = reply
                self._append(ids, 0)
        self.turns.append(Turn(text, action, hits is not None, passages, observation))
        counters: Mapping[str, float] = {}
        if self.done and (self.backend_error is not None or any(turn.searched for turn in self.turns)):
            counters = self.rules.search_counters()
        record = TurnRecord(ids, len(segment), self.loss_mask, passages, seconds, counters, scores)
        info: dict[str, Any] = {
            "question_id": self.question.id,
            "question": self.question.question,
            "turn": turn_number,
            "action": action.kind,
            "query": action.text if action.kind == "search" else None,
            "backend_error": self.backend_error,
            "turn_record": record,
        }
        reward = self._finish(info) if self.done else 0.0
        return self.context, reward, self.terminated, self.truncated, info

    def _reply(self, action: Action, passages: tuple[Passage, ...], last_turn_next: bool) -> tuple[str, NDArray[np.int32]] | None:
        rules = self.rules
        announcement = rules.dialect.last_turn_text if rules.forced_answer and last_turn_next else ""
        room = rules.max_context_tokens - self._length - rules.max_segment_tokens
        if action.kind == "search":
            return rules.information(passages, announcement, min(room, rules.max_observation_tokens))
        text = f"{rules.dialect.invalid_text}{announcement}"
        ids = rules.encode(text)
        return (text, ids) if len(ids) <= room else None

    def _finish(self, info: dict[str, Any]) -> float:
        info["answer"] = self.answer
        info["golden_answers"] = self.question.golden_answers
        if self.backend_error is not None:
            info["metrics"], info["reward_terms"] = {}, {}
            return 0.0
        view = self.view()
        info["metrics"] = episode_metrics(view)
        terms = self.rules.reward(view)
        info["reward_terms"] = terms
        return self.rules.reward.total(terms)

    def view(self) -> EpisodeView:
        """The episode as rewards and metrics see it."""
        return EpisodeView(
            question=self.question,
            prompt=self.prompt,
            turns=tuple(self.turns),
            answer=self.answer,
            dialect=self.rules.dialect.name,
            terminated=self.terminated,
            progress=self.rules.progress,
        )

    # -- saving --------------------------------------------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_state` continues identically."""
        return {
            "question_id": self.question.id,
            "seed": self.seed,
            "prompt": self.prompt,
            "tokens": self._tokens[: self._length].tolist(),
            "loss_mask": self._mask[: self._length].tolist(),
            "turns": [
                {
                    "segment": turn.segment,
                    "action": turn.action.saved(),
                    "searched": turn.searched,
                    "passages": [list(passage) for passage in turn.passages],
                    "observation": turn.observation,
                }
                for turn in self.turns
            ],
            "answer": self.answer,
            "backend_error": self.backend_error,
            "terminated": self.terminated,
            "truncated": self.truncated,
        }

    @classmethod
    def from_state(cls, rules: Rules, state: Mapping[str, Any]) -> Episode:
        """The episode that :meth:`get_state` described."""
        question = rules.source[rules.source.index_of(state["question_id"])]
        episode = cls(rules, question, state["seed"])
        episode.prompt = state["prompt"]
        episode._append(state["tokens"], 0)
        episode._mask[: episode._length] = state["loss_mask"]
        for turn in state["turns"]:
            passages = tuple(Passage(*passage) for passage in turn["passages"])
            episode.turns.append(Turn(turn["segment"], restored_action(turn["action"]), turn["searched"], passages, turn["observation"]))
        for name in ("answer", "backend_error", "terminated", "truncated"):
            setattr(episode, name, state[name])
        return episode
