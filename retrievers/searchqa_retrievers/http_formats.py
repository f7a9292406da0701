r"""What search servers and their clients say to each other, as pure functions between JSON values and this package's types.

=============  ==============  ======================================================  ==================================================
format         path            request                                                 answer
=============  ==============  ======================================================  ==================================================
searchqa       ``/search``     ``{"requests": [{"query", "top_k", "filters"?}]}``      ``{"answers": [[{"id", "title", "text", "score"}]]}``
search-r1      ``/retrieve``   ``{"queries": [str], "topk": int or null,               ``{"result": [[{"document": {"id", "contents"},
                               "return_scores": bool}``                                "score"}]]}``, or documents bare, without scores
r1-searcher    ``/queries``    ``{"queries": [str], "k": int}``                        ``{"queries": [str], "answers": [[str]]}``
zerosearch     ``/retrieve``   ``{"query": str, "top_k": int}``                        ``[{"text": str}]``
=============  ==============  ======================================================  ==================================================

``searchqa`` is ours and loses nothing. The others are those of the released code of Search-R1, R1-Searcher and ZeroSearch's wiki server, whose clients send
fields that vary, so fields unknown to them are passed over. Search-R1's ``contents`` is ``"Title"\ntext``; in ``r1-searcher`` and
``zerosearch`` a passage is one text, title before the rest. A passage that comes without id gets a hash of its text as id, so that the same text has the same
id everywhere; one without score gets 1/rank.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from searchqa_retrievers.types import Hit, Passage, RetrieverError, SearchRequest

IDENTITY_HEADER = "X-Searchqa-Retriever"
"""In every answer of a server of this package: a hash of the retriever's stamp, by which a client sees that another one answers."""
DEFAULT_TOP_K = 3
"""Passages for each query where a request leaves the number open, out or null; the own default of Search-R1's and R1-Searcher's servers."""


class FormatError(RetrieverError, ValueError):
    """A body is not JSON, or not what its format says."""


@dataclass(frozen=True)
class Question:
    """A request as a server understands it: the searches, and what the form of the answer depends on."""

    requests: list[SearchRequest]
    return_scores: bool = True


@dataclass(frozen=True)
class WireFormat:
    """One protocol in both directions.

    Attributes
    ----------
    write_request
        The body that asks these requests, at most ``most_queries``, all with one ``top_k`` unless ``mixed``.
    read_request
        What a body asks, given the ``top_k`` to use where it is left open. Raises :class:`FormatError`.
    write_answer
        The body that answers a question with one list of hits for each request.
    read_answer
        The hits for these requests, at most ``top_k`` each, by score descending and id ascending. Raises :class:`FormatError`.
    most_queries
        Queries in one request, as a client of this package sends it.
    mixed
        Whether requests of one body may differ in ``top_k`` and have filters.
    scored
        Whether an answer can have scores.
    has_scores
        Whether this answer, which ``read_answer`` could read, has them.
    """

    name: str
    path: str
    write_request: Callable[[Sequence[SearchRequest]], dict[str, Any]]
    read_request: Callable[[Mapping[str, Any], int], Question]
    write_answer: Callable[[Question, Sequence[Sequence[Hit]]], Any]
    read_answer: Callable[[Any, Sequence[SearchRequest]], list[list[Hit]]]
    most_queries: int = 512
    mixed: bool = False
    scored: bool = True
    has_scores: Callable[[Any], bool] = lambda answer: True


def to_json(value: Any) -> bytes:
    """ASCII only, since lone surrogates, which a policy may write, have no UTF-8."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def from_json(body: bytes) -> Any:
    """The value of a JSON text; :class:`FormatError` for anything else, and for numbers that JSON does not have."""
    try:
        return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the body must be JSON: {error or type(error).__name__}; it begins with {body[:80]!r}") from error


def format_of(path: str, body: Any) -> WireFormat:
    """The format of a request that came to ``path``; :class:`FormatError` where none fits. Two formats share ``/retrieve``."""
    if not isinstance(body, dict):
        raise FormatError(f"a request must be a JSON object, got {_kind(body)}")
    if path != "/retrieve":
        found = [format_ for format_ in FORMATS.values() if format_.path == path]
        if not found:
            raise FormatError(f"no format has the path {path!r}; there are {', '.join(sorted({f.path for f in FORMATS.values()}))}")
        return found[0]
    if ("queries" in body) == ("query" in body):
        raise FormatError(
            f"a request to /retrieve must have either 'queries' (Search-R1) or 'query' (ZeroSearch), got {sorted(body)!r:.200}"
        )
    return FORMATS["search-r1" if "queries" in body else "zerosearch"]


# -- searchqa ----------------------------------------------------------------------------------------------------------------------------------


def _write_searchqa_request(requests: Sequence[SearchRequest]) -> dict[str, Any]:
    rows = []
    for request in requests:
        row: dict[str, Any] = {"query": request.query, "top_k": request.top_k}
        rows.append(row | {"filters": dict(request.filters)} if request.filters is not None else row)
    return {"requests": rows}


def _read_searchqa_request(body: Mapping[str, Any], default_top_k: int) -> Question:
    _only(body, {"requests"}, "the request")
    requests = []
    for place, row in enumerate(_list(body, "requests")):
        where = f"requests[{place}]"
        if not isinstance(row, dict):
            raise FormatError(f"{where} must be an object with 'query' and 'top_k', got {_kind(row)}")
        _only(row, {"query", "top_k", "filters"}, where)
        filters = row.get("filters")
        if filters is not None and not (isinstance(filters, dict) and all(isinstance(value, str) for value in filters.values())):
            raise FormatError(f"{where}.filters must be an object of strings, got {filters!r:.200}")
        requests.append(SearchRequest(_text(row, "query", where), _count(row, "top_k", where), filters=filters))
    return Question(requests)


def _write_searchqa_answer(question: Question, answers: Sequence[Sequence[Hit]]) -> Any:
    return {"answers": [[hit.passage._asdict() | {"score": hit.score} for hit in hits] for hits in answers]}


def _read_searchqa_answer(body: Any, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
    answers = []
    for request, rows in zip(requests, _rows(body, "answers", len(requests)), strict=True):
        hits = []
        for rank, row in enumerate(rows):
            where = f"answer {rank} to {request.query[:40]!r}"
            if not isinstance(row, dict):
                raise FormatError(f"{where} must be an object with id, title, text and score, got {_kind(row)}")
            passage = Passage(*(_text(row, field, where) for field in Passage._fields))
            hits.append(Hit(passage, _score(row, where)))
        answers.append(_ordered(hits, request.top_k))
    return answers


# -- Search-R1 ---------------------------------------------------------------------------------------------------------------------------------


def _write_search_r1_request(requests: Sequence[SearchRequest]) -> dict[str, Any]:
    return {"queries": [request.query for request in requests], "topk": requests[0].top_k, "return_scores": True}


def _read_search_r1_request(body: Mapping[str, Any], default_top_k: int) -> Question:
    top_k = default_top_k if body.get("topk") is None else _count(body, "topk", "the request")
    scores = False if body.get("return_scores") is None else body["return_scores"]
    if not isinstance(scores, bool):
        raise FormatError(f"return_scores must be true or false, got {scores!r:.80}")
    return Question([SearchRequest(query, top_k) for query in _queries(body)], scores)


def _write_search_r1_answer(question: Question, answers: Sequence[Sequence[Hit]]) -> Any:
    def row(hit: Hit) -> dict[str, Any]:
        document = {"id": hit.passage.id, "contents": f'"{hit.passage.title}"\n{hit.passage.text}'}
        return {"document": document, "score": hit.score} if question.return_scores else document

    return {"result": [[row(hit) for hit in hits] for hits in answers]}


def _read_search_r1_answer(body: Any, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
    answers = []
    for request, rows in zip(requests, _rows(body, "result", len(requests)), strict=True):
        hits = []
        scored = any(isinstance(row, dict) and "score" in row for row in rows)
        for rank, row in enumerate(rows):
            where = f"result {rank} to {request.query[:40]!r}"
            document = row.get("document", row) if isinstance(row, dict) else row
            if not isinstance(document, dict):
                raise FormatError(f"{where} must have a document with id and contents, got {_kind(document)}")
            score = _score(row, where) if scored else 1 / (rank + 1)
            hits.append(Hit(_passage_of_contents(document, where), score))
        answers.append(_ordered(hits, request.top_k))
    return answers


def _search_r1_has_scores(body: Any) -> bool:
    return all("score" in row for rows in body["result"] for row in rows)


def _passage_of_contents(document: Mapping[str, Any], where: str) -> Passage:
    contents = _text(document, "contents", where)
    id_ = document.get("id")
    if id_ is not None and (isinstance(id_, bool) or not isinstance(id_, str | int)):
        raise FormatError(f"{where}: the id must be a string or an integer, got {id_!r:.80}")
    title, newline, text = contents.partition("\n")
    if len(title) >= 2 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return Passage(_hash(contents) if id_ is None else str(id_), title if newline else "", text if newline else contents)


# -- R1-Searcher and ZeroSearch: texts without id or score -------------------------------------------------------------------------------------


def _write_r1_searcher_request(requests: Sequence[SearchRequest]) -> dict[str, Any]:
    return {"queries": [request.query for request in requests], "k": requests[0].top_k}


def _read_r1_searcher_request(body: Mapping[str, Any], default_top_k: int) -> Question:
    top_k = default_top_k if body.get("k") is None else _count(body, "k", "the request")
    return Question([SearchRequest(query, top_k) for query in _queries(body)])


def _write_r1_searcher_answer(question: Question, answers: Sequence[Sequence[Hit]]) -> Any:
    return {"queries": [request.query for request in question.requests], "answers": [[_line(hit) for hit in hits] for hits in answers]}


def _read_r1_searcher_answer(body: Any, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
    rows = _rows(body, "answers", len(requests))
    said = body.get("queries")
    if said is not None and said != [request.query for request in requests]:
        raise FormatError(f"the answer must repeat the queries that were asked, got {said!r:.200}")
    return [_of_texts(texts, request) for texts, request in zip(rows, requests, strict=True)]


def _write_zerosearch_request(requests: Sequence[SearchRequest]) -> dict[str, Any]:
    [request] = requests
    return {"query": request.query, "top_k": request.top_k}


def _read_zerosearch_request(body: Mapping[str, Any], default_top_k: int) -> Question:
    top_k = default_top_k if body.get("top_k") is None else _count(body, "top_k", "the request")
    return Question([SearchRequest(_text(body, "query", "the request"), top_k)])


def _write_zerosearch_answer(question: Question, answers: Sequence[Sequence[Hit]]) -> Any:
    [hits] = answers
    return [{"text": _line(hit)} for hit in hits]


def _read_zerosearch_answer(body: Any, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
    [request] = requests
    if not isinstance(body, list):
        raise FormatError(f"the answer must be a list of objects with text, got {_kind(body)}")
    return [_of_texts([row.get("text") if isinstance(row, dict) else None for row in body], request)]


def _line(hit: Hit) -> str:
    """A passage as one text, as those systems' prompts show it."""
    return f"{hit.passage.title} {hit.passage.text}" if hit.passage.title else hit.passage.text


def _of_texts(texts: Sequence[Any], request: SearchRequest) -> list[Hit]:
    for rank, text in enumerate(texts):
        if not isinstance(text, str):
            raise FormatError(f"passage {rank} for {request.query[:40]!r} must be a text, got {_kind(text)}")
    return [Hit(Passage(_hash(text), "", text), 1 / (rank + 1)) for rank, text in enumerate(texts[: request.top_k])]


# -- fields ------------------------------------------------------------------------------------------------------------------------------------


def _ordered(hits: list[Hit], top_k: int) -> list[Hit]:
    return sorted(hits, key=lambda hit: (-hit.score, hit.passage.id))[:top_k]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _kind(value: object) -> str:
    return f"{type(value).__name__} {value!r:.80}"


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")


def _only(body: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(body) - known)
    if unknown:
        raise FormatError(f"{where} has no field {', '.join(unknown)!r:.200}; it has {', '.join(sorted(known))}")


def _list(body: Mapping[str, Any], field: str) -> list[Any]:
    value = body.get(field)
    if not isinstance(value, list):
        raise FormatError(f"{field!r} must be a list, got {_kind(value)}")
    return value


def _queries(body: Mapping[str, Any]) -> list[str]:
    queries = _list(body, "queries")
    for query in queries:
        if not isinstance(query, str):
            raise FormatError(f"'queries' must be a list of strings, but one is {_kind(query)}")
    return queries


def _text(body: Mapping[str, Any], field: str, where: str) -> str:
    value = body.get(field)
    if not isinstance(value, str):
        raise FormatError(f"{where}: {field!r} must be a string, got {_kind(value)}")
    return value


def _count(body: Mapping[str, Any], field: str, where: str) -> int:
    value = body.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FormatError(f"{where}: {field!r} must be a whole number of at least 1, got {_kind(value)}")
    return value


def _score(row: Mapping[str, Any], where: str) -> float:
    value = row.get("score")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise FormatError(f"{where}: the score must be a finite number, got {_kind(value)}")
    return float(value)


def _rows(body: Any, field: str, count: int) -> list[list[Any]]:
    """The lists of an answer, one for each query."""
    if not isinstance(body, dict):
        raise FormatError(f"the answer must be an object with {field!r}, got {_kind(body)}")
    rows = _list(body, field)
    if len(rows) != count or not all(isinstance(row, list) for row in rows):
        raise FormatError(f"{field!r} must have one list for each of {count} queries, got {len(rows)}: {rows!r:.120}")
    return rows


FORMATS: Mapping[str, WireFormat] = MappingProxyType(
    {
        format_.name: format_
        for format_ in (
            WireFormat(
                "searchqa",
                "/search",
                _write_searchqa_request,
                _read_searchqa_request,
                _write_searchqa_answer,
                _read_searchqa_answer,
                mixed=True,
            ),
            WireFormat(
                "search-r1",
                "/retrieve",
                _write_search_r1_request,
                _read_search_r1_request,
                _write_search_r1_answer,
                _read_search_r1_answer,
                has_scores=_search_r1_has_scores,
            ),
            WireFormat(
                "r1-searcher",
                "/queries",
                _write_r1_searcher_request,
                _read_r1_searcher_request,
                _write_r1_searcher_answer,
                _read_r1_searcher_answer,
                scored=False,
            ),
            WireFormat(
                "zerosearch",
                "/retrieve",
                _write_zerosearch_request,
                _read_zerosearch_request,
                _write_zerosearch_answer,
                _read_zerosearch_answer,
                most_queries=1,
                scored=False,
            ),
        )
    }
)
"""By name."""
