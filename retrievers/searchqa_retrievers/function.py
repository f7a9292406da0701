"""A retriever made of a plain function."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from searchqa_retrievers.checks import check_request
from searchqa_retrievers.types import Hit, Passage, RetrieverError, RetrieverUnavailable, SearchRequest, default_cache_key

SearchFunction = Callable[[list[str], int], Sequence[Sequence[tuple[str, str, str, float]]]]
"""``f(queries, top_k)`` gives for each query a list of ``(id, title, text, score)``, in any order."""


class FunctionRetriever:
    """Calls a :data:`SearchFunction`; made by :func:`from_function`."""

    def __init__(self, function: SearchFunction, name: str) -> None:
        self.function = function
        self.name = name

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        queries: dict[int, dict[str, list[Hit]]] = {}
        for request in requests:
            check_request(request, self.name)
            queries.setdefault(request.top_k, {})[request.query] = []
        for top_k, answers in queries.items():
            asked = list(answers)
            for query, rows in zip(asked, self._call(asked, top_k), strict=True):
                answers[query] = self._hits(rows, query)[:top_k]
        return [list(queries[request.top_k][request.query]) for request in requests]

    def cache_key(self, request: SearchRequest) -> Hashable:
        return default_cache_key(request)

    def stamp(self) -> dict[str, Any]:
        return {"retriever": self.name}

    def __deepcopy__(self, memo: dict[int, Any]) -> FunctionRetriever:
        return self

    def __repr__(self) -> str:
        return f"from_function({self.function!r}, name={self.name!r})"

    def _call(self, queries: list[str], top_k: int) -> Sequence[Any]:
        try:
            answers = self.function(queries, top_k)
        except RetrieverUnavailable:
            raise
        except Exception as error:
            raise RetrieverUnavailable(f"the search function of retriever {self.name!r} failed: {type(error).__name__}: {error}") from error
        if not isinstance(answers, list | tuple):
            raise RetrieverError(
                f"the search function of retriever {self.name!r} must return a list of lists, got {type(answers).__name__}"
            )
        if len(answers) != len(queries):
            raise RetrieverError(
                f"the search function of retriever {self.name!r} must return one list for each query: "
                f"{len(queries)} queries, {len(answers)} lists"
            )
        return answers

    def _hits(self, rows: object, query: str) -> list[Hit]:
        where = f"the search function of retriever {self.name!r}, query {query[:80]!r}"
        if not isinstance(rows, list | tuple):
            raise RetrieverError(f"{where}: must give a list of (id, title, text, score), got {type(rows).__name__}")
        hits = []
        for row in rows:
            if not (isinstance(row, list | tuple) and len(row) == 4 and all(isinstance(part, str) for part in row[:3])):
                raise RetrieverError(f"{where}: a result must be (id: str, title: str, text: str, score: float), got {row!r:.200}")
            try:
                score = float(row[3])
            except (TypeError, ValueError) as error:
                raise RetrieverError(f"{where}: the score of {row[0]!r} must be a number, got {row[3]!r:.80}") from error
            if math.isnan(score):
                raise RetrieverError(f"{where}: the score of {row[0]!r} is not a number; results need an order")
            hits.append(Hit(Passage(*row[:3]), score))
        return sorted(hits, key=lambda hit: (-hit.score, hit.passage.id))


def from_function(function: SearchFunction, name: str | None = None) -> FunctionRetriever:
    """Make a retriever from ``function(queries, top_k) -> lists of (id, title, text, score)``.

    The function is called once for each ``top_k`` of a step, with distinct queries. Its results may come in any order and number: they
    are sorted by score, then by id, and cut to ``top_k``. Results of a wrong shape raise :class:`RetrieverError`.

    Any exception inside the function becomes :class:`RetrieverUnavailable`, with the exception as its cause: environments then truncate
    the episode, as they must for a search back end that is lost. A function whose back end can fail for a moment should retry, within
    bounds, before it raises.

    Parameters
    ----------
    function : callable
    name : str, optional
        For stamps and messages; default: the function's own name.

    Examples
    --------
    >>> from searchqa_retrievers import SearchRequest, from_function
    >>> echo = from_function(lambda queries, top_k: [[("1", "Echo", query, 1.0)] for query in queries], name="echo")
    >>> echo.search([SearchRequest("who", top_k=1)])
    [[Hit(passage=Passage(id='1', title='Echo', text='who'), score=1.0)]]
    """
    return FunctionRetriever(function, name if name is not None else getattr(function, "__name__", "function"))
