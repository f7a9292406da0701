"""One episode: its tokens, its turns, and the rules by which a segment becomes an action and the environment's reply.

The single and the vector environment are thin shells over this module, so that they cannot differ.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from searchqa_envs.dialects import Dialect, neutralise, reserved_strings
from searchqa_envs.episode_types import Action, EpisodeView, Turn
from searchqa_envs.errors import ConfigurationError, EpisodeStateError, InvalidSegmentError
from searchqa_envs.metrics import episode_metrics
from searchqa_envs.questions import Question, QuestionSource
from searchqa_envs.rewards import WeightedReward
from searchqa_envs.tokenizers.base import Tokenizer
from searchqa_retrievers.types import Hit, Passage, Retriever, RetrieverUnavailable, SearchRequest

STATE_VERSION = 1
Step = tuple[NDArray[np.int32], float, bool, bool, dict[str, Any]]
_FEW = 100  # up to so many ids Python looks at a list sooner than NumPy at an array


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
    """

    env_tokens: NDArray[np.int32]
    segment_tokens_used: int
    loss_mask: NDArray[np.int8]
    passages: tuple[Passage, ...]
    seconds: float

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


@dataclass(slots=True)
class Rules:
    """Everything that is the same for all episodes of an environment."""

    source: QuestionSource
    retriever: Retriever
    tokenizer: Tokenizer
    dialect: Dialect
    prompt: str
    reward: WeightedReward
    top_k: int
    max_turns: int
    max_context_tokens: int
    max_segment_tokens: int
    max_observation_tokens: int
    forced_answer: bool = False
    progress: tuple[int, int] = (0, 0)
    reserved: tuple[str, ...] = field(init=False)
    quoted_titles: bool = field(init=False)
    needs_gold: bool = field(init=False)
    _closers: tuple[bytes, bytes] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("top_k", "max_turns", "max_context_tokens", "max_segment_tokens", "max_observation_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name} must be an integer of at least 1; got {value!r}.")
        self.dialect.template(self.prompt)
        self.reserved = reserved_strings(self.dialect.tags, self.tokenizer.reserved)
        self.quoted_titles = self.dialect.quoted_titles and self.prompt != "bare"
        self.needs_gold = bool(getattr(self.retriever, "needs_gold", False))
        self._closers = (self.dialect.search_close.encode(), self.dialect.answer_close.encode())
        frame = len(self.tokenizer.encode(self._frame("")))
        if frame > self.max_observation_tokens:
            raise ConfigurationError(
                f"max_observation_tokens must hold at least the tags round passages, {frame} tokens here; got {self.max_observation_tokens}."
            )

    def set_progress(self, step: int, total: int) -> None:
        """Tell the schedules of reward and retriever how far training is."""
        if step < 0 or total < 0:
            raise ConfigurationError(f"set_progress(step, total) needs numbers of at least 0; got {step}, {total}.")
        self.progress = (int(step), int(total))
        schedule = getattr(self.retriever, "set_progress", None)
        if schedule is not None:
            schedule(int(step), int(total))

    # -- text from outside ---------------------------------------------------------------------------------------------------------------

    def prompt_text(self, question: Question) -> str:
        """The prompt as the policy sees it."""
        text = self.dialect.render_question(self.prompt, neutralise(question.question, self.reserved))
        if self.forced_answer and self.max_turns == 1:
            text += self.dialect.last_turn_text
        chat = getattr(self.tokenizer, "chat_prompt", None)
        if chat is not None and self.dialect.chat and self.prompt != "bare":
            return str(chat(text) or text)
        return text

    def _frame(self, documents: str, announcement: str = "") -> str:
        dialect = self.dialect
        return f"\n\n{dialect.information_open}{dialect.before_documents}{documents}{dialect.information_close}\n\n{announcement}"

    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids of environment text, int32[n]."""
        encode_array = getattr(self.tokenizer, "encode_array", None)
        return encode_array(text) if encode_array is not None else np.array(self.tokenizer.encode(text), dtype=np.int32)

    def information(self, passages: Sequence[Passage], announcement: str, room: int) -> tuple[str, NDArray[np.int32]] | None:
        """Text and ids of retrieved passages in at most ``room`` ids. Passage text is cut to fit, tags never; None if not even they fit."""
        documents = "".join(self.dialect.document_text(i, passage, self.quoted_titles) for i, passage in enumerate(passages, start=1))
        documents = neutralise(documents, self.reserved)
        if not self.dialect.before_documents:
            documents = documents.strip()  # as Search-R1 does; R1-Searcher keeps the last line break
        text = self._frame(documents, announcement)
        ids = self.encode(text)
        if len(ids) <= room:
            return text, ids
        shortest, longest = 0, len(documents)  # the longest prefix of the documents that fits lies in [shortest, longest)
        best = None
        while shortest < longest:
            middle = (shortest + longest) // 2
            text = self._frame(documents[:middle], announcement)
            ids = self.encode(text)
            if len(ids) <= room:
                best, shortest = (text, ids), middle + 1
            else:
                longest = middle
        return best

    # -- the policy's text ---------------------------------------------------------------------------------------------------------------

    def check_segment(self, segment: ArrayLike) -> NDArray[np.int32]:
        """The segment as int32 ids, cut to ``max_segment_tokens``; raises ``InvalidSegmentError`` for anything but ids of the vocabulary."""
        if isinstance(segment, (str, bytes)):
            raise InvalidSegmentError(
                f"A segment is token ids, not text: got {type(segment).__name__}. Wrap the environment in TextView to act with text."
            )
        try:
            ids = np.asarray(segment)
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidSegmentError(f"A segment must be a 1-D sequence of integers; got {type(segment).__name__}: {error}.") from error
        if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size > 0):
            raise InvalidSegmentError(f"A segment must be a 1-D sequence of integers; got shape {ids.shape}, dtype {ids.dtype}.")
        if ids.size == 0:
            return np.empty(0, dtype=np.int32)
        lowest, highest = (ids.min(), ids.max()) if ids.size > _FEW else (min(listed := ids.tolist()), max(listed))
        if lowest < 0 or highest >= self.tokenizer.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise InvalidSegmentError(f"Token ids must lie in [0, {self.tokenizer.vocab_size}), the tokenizer's vocabulary; got {wrong}.")
        return ids[: self.max_segment_tokens].astype(np.int32, copy=False)

    def read_segment(self, ids: NDArray[np.int32]) -> tuple[int, str, Action]:
        """How many ids count, their text, and the action they mean.

        What counts ends at the token that completes the first closing tag (with an end-of-sequence id directly behind it), or at an
        end-of-sequence id.
        """
        listed: list[int] = ids.tolist()
        eos = self.tokenizer.eos_id
        used = listed.index(eos) + 1 if eos in listed else len(listed)
        pieces = self.tokenizer.pieces(listed[:used])
        raw = b"".join(pieces)
        search_close, answer_close = self._closers
        end, answer_end = raw.find(search_close), raw.find(answer_close)
        closer = search_close
        if end < 0 or 0 <= answer_end < end:
            end, closer = answer_end, answer_close
        if 0 <= end == len(raw) - len(closer) and pieces[-1]:
            pass  # the policy stopped at the token that completes the tag
        elif end >= 0:
            lengths = list(accumulate(map(len, pieces)))
            last = bisect_left(lengths, end + len(closer))  # the token that completes the first closing tag
            raw = raw[: lengths[last]]
            used = last + 2 if listed[last + 1 : last + 2] == [eos] else last + 1
        text = raw.decode("utf-8", errors="replace")
        return used, text, self.dialect.parse(text)

    def is_complete(self, ids: Sequence[int]) -> bool:
        """Whether a segment under way is at its end: its last id is end of sequence, or a closing tag is complete."""
        raw = b"".join(self.tokenizer.pieces(ids))
        return bool(ids) and (ids[-1] == self.tokenizer.eos_id or any(closer in raw for closer in self._closers))

    # -- search --------------------------------------------------------------------------------------------------------------------------

    def search(self, requests: Sequence[SearchRequest]) -> tuple[list[list[Hit]] | None, str | None, float]:
        """Ask the retriever once for all requests, equal ones once. Returns hits or None, the error or None, and seconds."""
        started = time.perf_counter()
        asked, keys = list(requests), []
        if len(requests) > 1:
            keys = [self.retriever.cache_key(request) for request in requests]
            asked = list(dict(zip(reversed(keys), reversed(requests), strict=True)).values())  # the first request of each key
        try:
            answers = self.retriever.search(asked)
        except (RetrieverUnavailable, OSError) as error:
            return None, f"{type(error).__name__}: {error}", time.perf_counter() - started
        if len(answers) != len(asked):
            raise ConfigurationError(
                f"{self.retriever!r} answered {len(answers)} of {len(asked)} requests; search must return one list per request."
            )
        if not keys:
            return answers, None, time.perf_counter() - started
        by_key = dict(zip(dict.fromkeys(reversed(keys)), answers, strict=True))
        return [by_key[key] for key in keys], None, time.perf_counter() - started


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
    def begin(cls, rules: Rules, question: Question, seed: int) -> Episode:
        """A fresh episode: the prompt is its context."""
        episode = cls(rules, question, seed)
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
        return SearchRequest(
            query=action.text,
            top_k=rules.top_k,
            question_id=self.question.id,
            question=self.question.question,
            turn=len(self.turns),
            seed=self.seed,
            golden_answers=self.question.golden_answers if rules.needs_gold else (),
            filters=rules.source.filters(self.question),
        )

    def resolve(self, hits: Sequence[Hit] | None = None, backend_error: str | None = None, seconds: float = 0.0) -> Step:
        """Finish the step that ``submit`` began: reply or end, and on an end the reward."""
        if self._pending is None:
            raise EpisodeStateError("resolve() without submit().")
        segment, text, action = self._pending
        self._pending = None
        self._append(segment, 1)
        passages = tuple(hit.passage for hit in hits) if hits is not None else ()
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
        record = TurnRecord(ids, len(segment), self.loss_mask, passages, seconds)
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
                    "action": list(turn.action),
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
            episode.turns.append(Turn(turn["segment"], Action(*turn["action"]), turn["searched"], passages, turn["observation"]))
        for name in ("answer", "backend_error", "terminated", "truncated"):
            setattr(episode, name, state[name])
        return episode


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
        index = self._chosen_index(options)
        if index is None:
            index = self._next_index(rng)
        self.episode = Episode.begin(self.rules, self.rules.source[index], seed=int(rng.integers(2**31)))
        return self.episode.opening()

    def _chosen_index(self, options: Mapping[str, Any] | None) -> int | None:
        if not options:
            return None
        unknown = set(options) - {"question_id", "index"}
        if unknown or len(options) > 1:
            raise ConfigurationError(f"reset takes the options question_id or index, one of them; got {sorted(options)}.")
        source = self.rules.source
        if "question_id" in options:
            return source.index_of(str(options["question_id"]))
        index = options["index"]
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < len(source):
            raise ConfigurationError(f"index must be an integer in [0, {len(source)}), the number of questions; got {index!r}.")
        return int(index)

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

    def get_state(self, rng: np.random.Generator) -> dict[str, Any]:
        """Everything about this place, as plain values (JSON can hold them)."""
        return {
            "version": STATE_VERSION,
            "source": self.rules.source.name,
            "rng": rng.bit_generator.state,
            "order_key": self._order_key,
            "position": self._position,
            "progress": list(self.rules.progress),
            "episode": None if self.episode is None else self.episode.get_state(),
        }

    def set_state(self, rng: np.random.Generator, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`get_state`, also in another process."""
        if state.get("version") != STATE_VERSION or state.get("source") != self.rules.source.name:
            raise EpisodeStateError(
                f"This state is of version {state.get('version')!r} and data set {state.get('source')!r}; "
                f"this environment needs version {STATE_VERSION} and {self.rules.source.name!r}."
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
