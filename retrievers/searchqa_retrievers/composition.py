"""What retrievers that are made of other retrievers have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.types import Hit, Retriever, RetrieverError, SearchRequest


class Composition:
    """Base of a retriever round others: it passes on what they need and tell."""

    name: str

    def __init__(self, inner: Sequence[Retriever]) -> None:
        for retriever in inner:
            if not isinstance(retriever, Retriever):
                raise RetrieverError(
                    f"retriever {self.name!r} is made of retrievers, objects with `search` and `cache_key`, got {type(retriever).__name__}"
                )
        self._inner = tuple(inner)
        self.needs_gold: bool = any(getattr(retriever, "needs_gold", False) for retriever in self._inner)

    def set_progress(self, step: int, total: int) -> None:
        """Pass the progress of training on."""
        for retriever in self._inner:
            follow = getattr(retriever, "set_progress", None)
            if follow is not None:
                follow(step, total)

    def counters(self) -> dict[str, float]:
        """The counters of the inner retrievers; where several count the same, the sum."""
        total: dict[str, float] = {}
        for retriever in self._inner:
            counters: Callable[[], Mapping[str, float]] | None = getattr(retriever, "counters", None)
            for key, value in (counters() if counters is not None else {}).items():
                total[key] = total.get(key, 0.0) + value
        return total

    def __deepcopy__(self, memo: dict[int, Any]) -> Composition:
        return self


def ask(retriever: Retriever, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
    """The answers of an inner retriever. Raises :class:`RetrieverError` unless there is one for each request."""
    answers = retriever.search(requests)
    if len(answers) != len(requests):
        raise RetrieverError(
            f"retriever {name_of(retriever)!r} gave {len(answers)} answers to {len(requests)} requests; it must give one each"
        )
    return answers


def name_of(retriever: Retriever) -> str:
    """The retriever's name, or its type's."""
    return str(getattr(retriever, "name", type(retriever).__name__))


def stamp_of(retriever: Retriever) -> dict[str, Any]:
    """The retriever's stamp, or its name where it has none."""
    stamp = getattr(retriever, "stamp", None)
    return {"retriever": name_of(retriever)} if stamp is None else dict(stamp())


def filter_keys_of(retriever: Retriever) -> tuple[str, ...]:
    """The keys that ``filters`` of a request may have; none where the retriever does not say. A cache is looked through."""
    keys: tuple[str, ...] | None = getattr(retriever, "filter_keys", None)
    if keys is None:
        inner = getattr(retriever, "retriever", None)
        return () if inner is None else filter_keys_of(inner)
    return tuple(keys)


def build_inner(config: Any, corpus: Callable[[], Corpus], composition: str) -> Retriever:
    """The retriever of a configuration inside another one, without a cache of its own unless it asks for one."""
    from searchqa_retrievers.build import build_retriever

    if config is None:
        raise RetrieverError(
            f'retriever {composition!r} needs the retriever that it is made of, such as {{"name": {composition!r}, "retriever": "bm25"}}'
        )
    return build_retriever(config, corpus, cache_entries=0)


def whole_number(name: str, value: object) -> int:
    """``value``, which must be an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RetrieverError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value
