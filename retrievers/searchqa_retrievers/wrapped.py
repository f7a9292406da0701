"""What retrievers round one other retriever have in common: they answer as it does."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from searchqa_retrievers.types import Retriever, RetrieverError, SearchRequest, follows_progress


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

    def close(self) -> None:
        """Close the inner retriever, where it can be closed."""
        close = getattr(self.retriever, "close", None)
        if close is not None:
            close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapped:
        return self


def check_answers(name: str, answers: int, requests: int) -> None:
    """Raise :class:`RetrieverError` unless there is one answer for each request."""
    if answers != requests:
        raise RetrieverError(f"retriever {name!r} gave {answers} answers to {requests} requests; it must give one each")
