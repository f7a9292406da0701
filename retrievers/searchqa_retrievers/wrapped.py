"""What retrievers round one other retriever have in common: they answer as it does."""

from __future__ import annotations

import os
import weakref
from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from searchqa_retrievers.types import SERVER_NOT_REACHED, Retriever, RetrieverError, RetrieverUnavailable, SearchRequest, follows_progress


class Wrapped:
    """Base of a retriever round another one that changes none of its answers."""

    def __init__(self, retriever: Retriever) -> None:
        self.retriever = retriever
        self.name: str = getattr(retriever, "name", type(retriever).__name__)
        self.needs_gold: bool = getattr(retriever, "needs_gold", False)
        self.follows_progress = follows_progress(retriever)

    def cache_key(self, request: SearchRequest) -> Hashable:
        return self.retriever.cache_key(request)

    def set_progress(self, step: int, total: int) -> None:
        """Pass the progress of training on."""
        follow = getattr(self.retriever, "set_progress", None)
        if follow is not None:
            follow(step, total)

    def stamp(self) -> dict[str, Any]:
        """The stamp of the inner retriever."""
        stamp = getattr(self.retriever, "stamp", None)
        return {"retriever": self.name} if stamp is None else dict(stamp())

    @property
    def billed_calls(self) -> int:
        """Those of the inner retriever; an ``AttributeError`` where it has none."""
        billed: int = self.retriever.billed_calls  # type: ignore[attr-defined] # optional, see Retriever
        return billed

    def close(self) -> None:
        """Close the inner retriever, where it can be closed."""
        close = getattr(self.retriever, "close", None)
        if close is not None:
            close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapped:
        return self


def known_stamp(name: str, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """``stamp`` of retriever ``name``. Raises :class:`RetrieverUnavailable` where a server in it could not be asked what it searches."""
    if not_reached(stamp):
        raise RetrieverUnavailable(
            f"the server of retriever {name!r} could not be asked what it searches, so it is not known which stored answers are its own"
        )
    return dict(stamp)


def not_reached(stamp: Any) -> bool:
    """Whether a server could not be asked, anywhere in a stamp: those of inner retrievers, and of servers behind servers."""
    if isinstance(stamp, Mapping):
        return stamp.get("server") == SERVER_NOT_REACHED or any(map(not_reached, stamp.values()))
    return isinstance(stamp, list | tuple) and any(map(not_reached, stamp))


def check_answers(name: str, answers: int, requests: int) -> None:
    """Raise :class:`RetrieverError` unless there is one answer for each request."""
    if answers != requests:
        raise RetrieverError(f"retriever {name!r} gave {answers} answers to {requests} requests; it must give one each")


# Threads do not survive a fork, and what they hold at that moment stays held in the forked process for ever.


class Forkable(Protocol):
    """An object with locks, or calls under way, of its process."""

    def begin_process(self) -> None:
        """Replace the locks, and forget the calls under way: they are those of the parent's threads."""


_FORKABLE: weakref.WeakSet[Forkable] = weakref.WeakSet()


def begin_in_forks(forkable: Forkable) -> None:
    """Call ``begin_process`` now, and in each process that is forked from this one."""
    forkable.begin_process()
    _FORKABLE.add(forkable)


def _begin_all() -> None:
    for forkable in list(_FORKABLE):
        forkable.begin_process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_all)
