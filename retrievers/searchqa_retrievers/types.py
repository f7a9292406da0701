"""What crosses the seam between an environment and a search back end."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

SERVER_NOT_REACHED = "not reached"
"""Under ``server`` in the stamp of a server's client: the server could not be asked what it is. None there is a server that does not tell."""


class RetrieverError(Exception):
    """Base of every error raised by this package."""


class RetrieverUnavailable(RetrieverError):
    """The back end is lost: its bounded budget of retries and seconds is spent.

    An environment answers it by truncating the episode with ``backend_error``; nothing about it is ever shown to the policy.
    """


class CorpusError(RetrieverError):
    """A corpus file is missing or malformed; the message names file, line and field."""


class Passage(NamedTuple):
    """One unit of text that a retriever can return."""

    id: str
    title: str
    text: str


class Hit(NamedTuple):
    """A passage and its score; within one result: score descending, then passage id ascending as strings."""

    passage: Passage
    score: float


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """One query, with what a simulator or a scoped index needs to answer it.

    ``golden_answers`` is filled in only for retrievers whose ``needs_gold`` is true (ZeroSearch's simulator).
    """

    query: str
    top_k: int
    question_id: str | None = None
    question: str | None = None
    turn: int = 0
    seed: int = 0
    golden_answers: tuple[str, ...] = ()
    filters: Mapping[str, str] | None = None


def default_cache_key(request: SearchRequest) -> Hashable:
    """``(query, top_k, filters)``: all that a stateless search engine's answer depends on."""
    filters = None if request.filters is None else tuple(sorted(request.filters.items()))
    return (request.query, request.top_k, filters)


def follows_progress(retriever: object) -> bool:
    """Whether answers depend on ``set_progress``: they do where there is such a method, unless an attribute ``follows_progress`` says otherwise."""
    return bool(getattr(retriever, "follows_progress", hasattr(retriever, "set_progress")))


def is_outage(error: BaseException) -> bool:
    """Whether an exception of ``search`` is a lost back end: ``RetrieverUnavailable``, ``OSError``, or ``RuntimeError`` but for the two of its kind
    that are faults of a program, ``NotImplementedError`` and ``RecursionError``."""
    return isinstance(error, RetrieverUnavailable | OSError | RuntimeError) and not isinstance(error, NotImplementedError | RecursionError)


@runtime_checkable
class Retriever(Protocol):
    """A search back end.

    ``search`` answers all requests of one environment step in one call. It returns, for each request, at most ``top_k`` hits ordered by
    score descending and then by passage id ascending, and raises :class:`RetrieverUnavailable` when it cannot answer.
    Optional attributes: ``needs_gold: bool`` (default False), ``name: str`` and ``stamp() -> dict`` (settings, for the record of a run),
    ``set_progress(step, total)`` (schedules; one that only passes it on has ``follows_progress``, see the function of that name),
    ``counters() -> dict[str, float]`` (see ``searchqa_retrievers.counted``; a retriever round others adds its own to theirs), and
    ``billed_calls: int`` (how often the back end was asked for money since the retriever was made, where that is not once for each request;
    read by any thread); ``filter_keys: tuple[str, ...]`` (the keys that ``filters`` may have), ``sources`` (the values of the filter
    ``source``) and ``max_top_k: int`` (the most passages it can give), by which environments check ``search_controls`` when they are made.
    """

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]: ...

    def cache_key(self, request: SearchRequest) -> Hashable: ...
