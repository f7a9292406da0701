"""How five search engines are asked, and what their answers say, as pure functions.

==========  =========================================  ==================================================================
name        keys, from the environment                 request (version of the documentation that these follow: 2025)
==========  =========================================  ==================================================================
serper      ``SERPER_API_KEY``                         ``POST`` JSON, header ``X-API-KEY``; ``organic``
serpapi     ``SERPAPI_API_KEY``                        ``GET``, parameter ``api_key``; ``organic_results``
google_cse  ``GOOGLE_CSE_API_KEY``, ``GOOGLE_CSE_ID``  ``GET``, parameters ``key`` and ``cx``; ``items``
brave       ``BRAVE_API_KEY``                          ``GET``, header ``X-Subscription-Token``; ``web.results``
tavily      ``TAVILY_API_KEY``                         ``POST`` JSON, header ``Authorization: Bearer``; ``results``
==========  =========================================  ==================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit, urlunsplit

from searchqa_retrievers.http_formats import FormatError
from searchqa_retrievers.polite_http import Call
from searchqa_retrievers.readable_text import plain_text


class Found(NamedTuple):
    """One result of an engine: canonical address, title and snippet, as plain text."""

    url: str
    title: str
    text: str


class ResultPage(NamedTuple):
    """What one call brought, in the engine's order; ``answers`` and ``related`` are the extras round the plain results."""

    found: list[Found]
    more: bool
    answers: Sequence[Found] = ()
    related: Sequence[Found] = ()


class Reader(Protocol):
    """A function that reads an engine's answer."""

    def __call__(self, body: Any, *, extras: bool = False) -> ResultPage: ...


@dataclass(frozen=True)
class Provider:
    """A search engine.

    Attributes
    ----------
    url : str
        Where it is, unless a configuration says another place.
    key_variables : tuple of str
        Environment variables of what it needs to let one in; the first is the key.
    per_call, most : int
        Results that one call asks for, and that can be had at all for one query.
    most_characters, most_words : int
        Of a query; the engine refuses longer ones or passes over the rest.
    write
        The call for a query, a site or None, the number of the result page from 0, and the values of ``key_variables``.
    read
        What an answer says, with the answer box and the related questions where ``extras`` is true; odd ones of these are passed over.
        Raises :class:`~searchqa_retrievers.http_formats.FormatError`.
    answer_box : bool
        Whether it has an answer box and related questions.
    """

    name: str
    url: str
    key_variables: tuple[str, ...]
    per_call: int
    most: int
    most_characters: int
    most_words: int
    write: Callable[[str, str | None, int, Sequence[str]], Call]
    read: Reader
    answer_box: bool = False


def canonical_url(url: str) -> str | None:
    """One form for addresses of the same page: scheme and host in lower case, no default port, no fragment. None where it is no web address."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        return None
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host or parts.username is not None or not url.isprintable():
        return None
    host = f"[{host}]" if ":" in host else host
    if port is not None and port != (443 if parts.scheme == "https" else 80):
        host = f"{host}:{port}"
    return urlunsplit((parts.scheme, host, parts.path or "/", parts.query, ""))


def clean_query(query: str, provider: Provider, site: str | None = None) -> str:
    """The query as the engine takes it: on one line, without control characters, no longer than its limits, with room for ``site``."""
    words = plain_text(query, markup=False).split()[: provider.most_words - 1]
    return " ".join(words)[: provider.most_characters - len(_with_site("", site))].strip()


# -- Serper ------------------------------------------------------------------------------------------------------------------------------------


def _write_serper(query: str, site: str | None, page: int, keys: Sequence[str]) -> Call:
    return Call("POST", {"q": _with_site(query, site), "num": 10, "page": page + 1}, secret_headers={"X-API-KEY": keys[0]})


def _read_serper(body: Any, *, extras: bool = False) -> ResultPage:
    answer = _answer(body, "organic", "searchParameters", "credits")
    rows = _rows(answer, "organic")
    page = ResultPage(_found(rows, "link", "title", "snippet"), bool(rows))
    return _with_extras(page, answer, "answerBox", "peopleAlsoAsk") if extras else page


# -- SerpAPI -----------------------------------------------------------------------------------------------------------------------------------


def _write_serpapi(query: str, site: str | None, page: int, keys: Sequence[str]) -> Call:
    parameters = {"engine": "google", "q": _with_site(query, site), "num": 10, "start": 10 * page}
    return Call("GET", parameters, secret_parameters={"api_key": keys[0]})


def _read_serpapi(body: Any, *, extras: bool = False) -> ResultPage:
    if isinstance(body, dict) and "hasn't returned any results" in str(body.get("error")):
        body = {key: value for key, value in body.items() if key != "error"} | {"organic_results": []}
    answer = _answer(body, "organic_results", "search_metadata", "search_parameters", "search_information")
    pagination = answer.get("serpapi_pagination")
    more = isinstance(pagination, dict) and bool(pagination.get("next"))
    page = ResultPage(_found(_rows(answer, "organic_results"), "link", "title", "snippet"), more)
    return _with_extras(page, answer, "answer_box", "related_questions") if extras else page


# -- Google's Custom Search --------------------------------------------------------------------------------------------------------------------


def _write_google_cse(query: str, site: str | None, page: int, keys: Sequence[str]) -> Call:
    parameters = {"q": _with_site(query, site), "num": 10, "start": 10 * page + 1}
    return Call("GET", parameters, secret_parameters={"key": keys[0], "cx": keys[1]})


def _read_google_cse(body: Any, *, extras: bool = False) -> ResultPage:
    answer = _answer(body, "items", "kind", "searchInformation")
    queries = answer.get("queries")
    more = isinstance(queries, dict) and bool(queries.get("nextPage"))
    return ResultPage(_found(_rows(answer, "items"), "link", "title", "snippet"), more)


# -- Brave -------------------------------------------------------------------------------------------------------------------------------------


def _write_brave(query: str, site: str | None, page: int, keys: Sequence[str]) -> Call:
    parameters = {"q": _with_site(query, site), "count": 20, "offset": page, "result_filter": "web", "text_decorations": False}
    return Call("GET", parameters, secret_headers={"X-Subscription-Token": keys[0]})


def _read_brave(body: Any, *, extras: bool = False) -> ResultPage:
    answer = _answer(body, "web", "query")
    query, web = answer.get("query"), answer.get("web")
    rows = [] if web is None else _rows(_object(web), "results")
    more = bool(query.get("more_results_available")) if isinstance(query, dict) else False
    return ResultPage(_found(rows, "url", "title", "description"), more)


# -- Tavily ------------------------------------------------------------------------------------------------------------------------------------


def _write_tavily(query: str, site: str | None, page: int, keys: Sequence[str]) -> Call:
    parameters: dict[str, Any] = {"query": query, "max_results": 20}
    if site is not None:
        parameters["include_domains"] = [site]
    return Call("POST", parameters, secret_headers={"Authorization": f"Bearer {keys[0]}"})


def _read_tavily(body: Any, *, extras: bool = False) -> ResultPage:
    answer = _answer(body, "results", "query", "response_time")
    return ResultPage(_found(_rows(answer, "results"), "url", "title", "content"), more=False)


PROVIDERS = MappingProxyType(
    {
        provider.name: provider
        for provider in (
            Provider(
                "serper", "https://google.serper.dev/search", ("SERPER_API_KEY",), 10, 100, 2048, 32, _write_serper, _read_serper, True
            ),
            Provider("serpapi", "https://serpapi.com/search", ("SERPAPI_API_KEY",), 10, 100, 2048, 32, _write_serpapi, _read_serpapi, True),
            Provider(
                "google_cse",
                "https://customsearch.googleapis.com/customsearch/v1",
                ("GOOGLE_CSE_API_KEY", "GOOGLE_CSE_ID"),
                10,
                100,
                2048,
                32,
                _write_google_cse,
                _read_google_cse,
            ),
            Provider(
                "brave", "https://api.search.brave.com/res/v1/web/search", ("BRAVE_API_KEY",), 20, 200, 400, 50, _write_brave, _read_brave
            ),
            Provider("tavily", "https://api.tavily.com/search", ("TAVILY_API_KEY",), 20, 20, 400, 400, _write_tavily, _read_tavily),
        )
    }
)
"""The engines by name."""


def _with_site(query: str, site: str | None) -> str:
    return query if site is None else f"{query} site:{site}"


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"an object was due, got {value!r:.80}")
    return value


def _answer(body: Any, *marks: str) -> dict[str, Any]:
    """An answer of the engine: it has one of these fields, and no error. One without results found none."""
    answer = _object(body)
    if answer.get("error") is not None:
        raise FormatError(f"the engine reports an error: {answer['error']!r:.200}")
    if not any(answer.get(mark) is not None for mark in marks):
        raise FormatError(f"an object with {' or '.join(map(repr, marks))} was due, got one with {sorted(answer)!r:.200}")
    return answer


def _rows(answer: dict[str, Any], field: str) -> list[Any]:
    rows = answer.get(field)
    if rows is None:
        return []
    if not isinstance(rows, list):
        raise FormatError(f"{field!r} must be a list of objects, got {rows!r:.80} in an answer with {sorted(answer)!r:.200}")
    return rows


def _found(rows: list[Any], url: str, title: str, text: str) -> list[Found]:
    """The rows that have a web address; a title or a text may be missing, and an odd row is passed over unless all are odd."""
    sound = [row for row in rows if isinstance(row, dict) and all(isinstance(row.get(field), str | None) for field in (url, title, text))]
    if rows and not sound:
        raise FormatError(f"results must be objects in which {url!r}, {title!r} and {text!r} are strings, got {rows[0]!r:.200}")
    found = []
    for row in sound:
        address = canonical_url(row.get(url) or "")
        if address is not None:
            found.append(Found(address, plain_text(row.get(title) or ""), plain_text(row.get(text) or "")))
    return found


def _with_extras(page: ResultPage, answer: dict[str, Any], box: str, related: str) -> ResultPage:
    """The page with its answer box, the first where there are several, and its related questions; no odd one spoils a search that is paid for."""
    answers = _extras(answer.get(box), "title", ("answer", "snippet"))
    return page._replace(answers=answers[:1], related=_extras(answer.get(related), "question", ("snippet",)))


def _extras(value: Any, title: str, texts: tuple[str, ...]) -> list[Found]:
    found = []
    for row in value if isinstance(value, list) else [value]:
        if not isinstance(row, dict) or not isinstance(row.get("link"), str) or not isinstance(row.get(title), str | None):
            continue
        text = next((row[field] for field in texts if isinstance(row.get(field), str) and row[field].strip()), None)
        address = canonical_url(row["link"])
        if text is not None and address is not None:
            found.append(Found(address, plain_text(row.get(title) or ""), plain_text(text)))
    return found


_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(/[^\s\"]*)?")


def is_site(site: object) -> bool:
    """Whether it is a host, perhaps with a path, that a search can be limited to."""
    return isinstance(site, str) and _SITE.fullmatch(site) is not None
