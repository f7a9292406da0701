"""The rules by which a segment becomes an action, and the environment's reply to it."""

from __future__ import annotations

import logging
import operator
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from searchqa_envs.dialects import Dialect, neutralise, reserved_strings
from searchqa_envs.episode_types import Action
from searchqa_envs.errors import ConfigurationError, InvalidSegmentError
from searchqa_envs.questions import Question, QuestionSource
from searchqa_envs.rewards import WeightedReward
from searchqa_envs.tokenizers.base import Tokenizer
from searchqa_retrievers.counted import SearchCounters, merged_counters
from searchqa_retrievers.types import Hit, Passage, Retriever, RetrieverUnavailable, SearchRequest, default_cache_key, is_outage

logger = logging.getLogger(__name__)

_REMEMBERED_TOKENS = 1 << 20  # of observations: some megabytes
_FEW = 100  # up to so many ids Python looks at a list sooner than NumPy at an array


def positive_integer(name: str, value: object) -> int:
    """``value`` as a Python integer of at least 1; NumPy's integers count, booleans do not."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 1:
        raise ConfigurationError(f"{name} must be an integer of at least 1; got {value!r}.")
    return number


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
    _information: dict[tuple[tuple[Passage, ...], str, int], tuple[str, NDArray[np.int32]]] = field(
        init=False, repr=False, default_factory=dict
    )
    _searches: int = field(default=0, init=False)
    _distinct: int = field(default=0, init=False)
    _errors: int = field(default=0, init=False)
    _warned: bool = field(default=False, init=False, repr=False)
    _seconds: float = field(default=0.0, init=False)
    _counters: SearchCounters | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for name in ("top_k", "max_turns", "max_context_tokens", "max_segment_tokens", "max_observation_tokens"):
            setattr(self, name, positive_integer(name, getattr(self, name)))
        if not isinstance(self.forced_answer, bool):
            raise ConfigurationError(f"forced_answer must be True or False; got {self.forced_answer!r}.")
        self.dialect.template(self.prompt)
        self.reserved = reserved_strings(self.dialect.tags, self.tokenizer.reserved)
        self.quoted_titles = self.dialect.quoted_titles and self.prompt != "bare"
        self.needs_gold = bool(getattr(self.retriever, "needs_gold", False))
        self._closers = (self.dialect.search_close.encode(), self.dialect.answer_close.encode())
        frame = len(self.tokenizer.encode(self._frame("", self.dialect.last_turn_text if self.forced_answer else "")))
        if frame > self.max_observation_tokens:
            raise ConfigurationError(
                f"max_observation_tokens must hold at least what stands round passages, {frame} tokens here; got {self.max_observation_tokens}."
            )

    def set_progress(self, step: int, total: int) -> None:
        """Tell the schedules of reward and retriever how far training is."""
        if step < 0 or total < 0:
            raise ConfigurationError(f"set_progress(step, total) needs numbers of at least 0; got {step}, {total}.")
        self.progress = (int(step), int(total))
        schedule = getattr(self.retriever, "set_progress", None)
        if schedule is not None:
            schedule(int(step), int(total))

    def stamp(self) -> dict[str, Any]:
        """Data set, retriever, tokenizer, dialect, reward, budgets and package version, as plain values."""
        from importlib.metadata import version

        retriever = self.retriever
        described = retriever.stamp() if hasattr(retriever, "stamp") else {"name": getattr(retriever, "name", type(retriever).__name__)}
        return {
            **self.source.stamp(),
            "retriever": described,
            "top_k": self.top_k,
            "dialect": self.dialect.name,
            "prompt": self.prompt,
            "reward": self.reward.stamp(),
            "tokenizer": self.tokenizer.name,
            "max_turns": self.max_turns,
            "max_segment_tokens": self.max_segment_tokens,
            "max_observation_tokens": self.max_observation_tokens,
            "max_context_tokens": self.max_context_tokens,
            "forced_answer": self.forced_answer,
            **({} if self.dialect.controls is None else {"search_controls": self.dialect.controls.stamp()}),
            "searchqa_gym": version("searchqa-gym"),
        }

    # -- text from outside ---------------------------------------------------------------------------------------------------------------

    def prompt_text(self, question: Question) -> str:
        """The prompt as the policy sees it."""
        text = self.dialect.render_question(self.prompt, self.defused(question.question))
        if self.forced_answer and self.max_turns == 1:
            text += self.dialect.last_turn_text
        chat = getattr(self.tokenizer, "chat_prompt", None)
        if chat is not None and self.prompt in self.dialect.system_prompts:
            system, user, opening = self.dialect.messages(text)
            begun = chat(user, system)
            return text if begun is None else f"{begun}{opening}"
        if chat is not None and self.dialect.chat and self.prompt != "bare":
            return str(chat(text) or text)
        return text

    def defused(self, text: str, longest: int | None = None) -> str:
        """Text from outside without tags and control tokens, as the tokenizer will read it, cut to what ``longest`` ids can hold at most."""
        normalise = getattr(self.tokenizer, "normalise", None)
        if normalise is not None:
            text = normalise(text)
        longest_piece = getattr(self.tokenizer, "longest_piece", None)
        if longest is not None and longest_piece is not None:
            text = text[: longest * longest_piece]  # encoding a whole book, to learn that it does not fit, takes seconds
        return neutralise(text, self.reserved)

    def _frame(self, documents: str, announcement: str = "") -> str:
        dialect = self.dialect
        return f"\n\n{dialect.information_open}{dialect.before_documents}{documents}{dialect.information_close}\n\n{announcement}"

    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids of environment text, int32[n]."""
        encode_array = getattr(self.tokenizer, "encode_array", None)
        return encode_array(text) if encode_array is not None else np.array(self.tokenizer.encode(text), dtype=np.int32)

    def information(self, passages: tuple[Passage, ...], announcement: str, room: int) -> tuple[str, NDArray[np.int32]] | None:
        """Text and ids of retrieved passages in at most ``room`` ids. Passage text is cut to fit, tags never; None if not even they fit."""
        key = (passages, announcement, room)
        made = self._information.get(key)
        if made is None:
            made = self._make_information(*key)
            if made is None:
                return None
            if len(self._information) * room >= _REMEMBERED_TOKENS:
                self._information.clear()
            self._information[key] = made  # episodes of a group find the same passages again and again
        return made[0], made[1].copy()

    def _make_information(self, passages: Sequence[Passage], announcement: str, room: int) -> tuple[str, NDArray[np.int32]] | None:
        documents = "".join(self.dialect.document_text(i, passage, self.quoted_titles) for i, passage in enumerate(passages, start=1))
        documents = self.defused(documents, longest=room)
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
        """Ask the retriever once for all requests, equal ones once. Returns hits or None, the error or None, and seconds.

        ``RetrieverUnavailable``, ``OSError`` and ``RuntimeError`` are a lost back end; any other exception, ``NotImplementedError`` and
        ``RecursionError`` among them, is a fault in the retriever and passes through. The first ``OSError`` or ``RuntimeError`` is logged with its
        trace, since it may be a fault all the same.
        """
        started = time.perf_counter()
        asked, keys = list(requests), []
        if len(requests) > 1:
            cache_key = getattr(self.retriever, "cache_key", default_cache_key)
            keys = [cache_key(request) for request in requests]
            asked = list(dict(zip(reversed(keys), reversed(requests), strict=True)).values())  # the first request of each key
        self._counters = None
        self._searches += len(requests)
        self._distinct += len(asked)
        try:
            answers = self.retriever.search(asked)
        except Exception as error:
            if not is_outage(error):
                raise
            if not (isinstance(error, RetrieverUnavailable) or self._warned):
                self._warned = True
                logger.warning("An error of %r counts as a lost back end; the next ones are not logged.", self.retriever, exc_info=True)
            self._errors += len(requests)
            seconds = time.perf_counter() - started
            self._seconds += seconds
            return None, f"{type(error).__name__}: {error}", seconds
        if len(answers) != len(asked):
            raise ConfigurationError(
                f"{self.retriever!r} answered {len(answers)} of {len(asked)} requests; search must return one list per request."
            )
        if keys:
            by_key = dict(zip(dict.fromkeys(reversed(keys)), answers, strict=True))
            answers = [by_key[key] for key in keys]
        seconds = time.perf_counter() - started
        self._seconds += seconds
        return answers, None, seconds

    def search_counters(self) -> SearchCounters:
        """Searches so far, and what the retriever has counted since it was made; see ``searchqa_retrievers.counted``. Made once after each search."""
        if self._counters is None:
            counters = merged_counters(self.retriever)
            counters["search/searches"] = float(self._searches)
            counters["search/distinct"] = float(self._distinct)
            counters["search/errors"] = float(self._errors)
            counters["search/seconds"] = self._seconds
            self._counters = SearchCounters(counters)
        return self._counters


class HasRules:
    """What the single and the vector environment tell about their rules."""

    rules: Rules

    @property
    def tokenizer(self) -> Tokenizer:
        """``encode``, ``decode``, ``vocab_size``, ``pad_id``, ``eos_id``."""
        return self.rules.tokenizer

    @property
    def dialect(self) -> Dialect:
        """Tags, prompt and rules."""
        return self.rules.dialect

    @property
    def source(self) -> QuestionSource:
        """The questions."""
        return self.rules.source

    @property
    def max_segment_tokens(self) -> int:
        """The longest segment."""
        return self.rules.max_segment_tokens

    def set_progress(self, step: int, total: int) -> None:
        """Feed the schedules of reward and retriever; trainers call it before each rollout."""
        self.rules.set_progress(step, total)

    def stamp(self) -> dict[str, Any]:
        """What a number measured here needs to be comparable."""
        return self.rules.stamp()

    def search_counters(self) -> SearchCounters:
        """Totals since the environment was made: searches, share of duplicates, errors, seconds, and the retriever's own counters.

        Keys and figures: ``searchqa_retrievers.counted``. A retriever that several environments share counts for all of them. Not part of the state.
        """
        return self.rules.search_counters()
