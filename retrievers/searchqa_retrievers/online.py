"""A search engine of the open web as a retriever: snippets, whole pages, or what a model extracts from them."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import math
import os
from collections import defaultdict
from collections.abc import Callable, Coroutine, Hashable, Mapping, Sequence
from concurrent.futures import CancelledError
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from searchqa_retrievers.checks import check_request
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.online_providers import PROVIDERS, Found, clean_query, is_site
from searchqa_retrievers.polite_http import Asker, Call, LoopThread, Pace, Service, check_service_url, read_key, tls_context
from searchqa_retrievers.summariser import Summariser
from searchqa_retrievers.types import Hit, Passage, Retriever, RetrieverError, RetrieverUnavailable, SearchRequest, default_cache_key
from searchqa_retrievers.web_pages import PageReader, Resolver, resolve

T = TypeVar("T")

PAGES = ("snippet", "page")
COUNTERS = (
    *("engine_calls", "engine_answers", "engine_retries", "engine_seconds"),
    *("page_fetches", "page_refused", "page_robots_refused", "page_failed", "page_late", "page_seconds"),
    *("summariser_calls", "summariser_answers", "summariser_retries", "summariser_seconds"),
    *("summariser_prompt_tokens", "summariser_completion_tokens"),
)
"""What :meth:`Online.counters` counts, each under ``online/``."""


class Online:
    """Asks a search engine of the web, and may read the pages that it finds.

    The engine's order is kept: the result of rank ``r`` has the score ``1/r``. A passage's id is the address of its page; its text is the engine's
    snippet, or the readable text of the page, or what a model extracts from either. Where a page cannot be had, the snippet takes its place; a
    result without any text is left out. A query without any word finds nothing and asks nobody; one beyond the engine's limits is cut.

    Equal requests of a call are asked once, all of a call at the same time. The engine's answer ends within ``deadline``, reading pages within
    twice ``page_timeout`` after that, each extract within the summariser's own deadline. Can be shared by threads, pickled, and used on both sides of a
    fork. Keys are read from the environment whenever they are needed and kept nowhere.

    Parameters
    ----------
    provider : str
        ``serper``, ``serpapi``, ``google_cse``, ``brave`` or ``tavily``; see :mod:`searchqa_retrievers.online_providers`.
    url : str, optional
        Where the engine is, if not at its usual address.
    site : str, optional
        Only results of that host, such as ``en.wikipedia.org`` (R1-Searcher).
    parameters : mapping, optional
        Further parameters of the engine, sent as they are (``gl``, ``hl``, ``search_depth``, ...).
    answer_box : bool
        Put the engine's answer box before the results and related questions after them, as Search-R1's SerpAPI server does; ``top_k`` limits them all.
    pages : str
        ``snippet`` or ``page``.
    page_timeout, page_bytes, page_characters, allow_hosts, user_agent, resolve
        See :class:`~searchqa_retrievers.web_pages.PageReader`. The key may go over plain http to ``allow_hosts``.
    summariser : Summariser, optional
    timeout, deadline : float
        Longest time for one try, and for all tries and pauses of one result page of the engine, in seconds.
    retries : int
        How often a try is repeated.
    parallel : int
        Most requests at the same time, each: to the engine, for pages, to the summariser.
    requests_per_second : float, optional
        Of the engine.

    Raises
    ------
    RetrieverError
        An argument is out of its range, a key is not set. ``search``: the service does not accept the key, or there is nothing at the address.
    RetrieverUnavailable
        ``search``: the tries or the time for the engine or the summariser are spent.
    """

    name = "online"

    def __init__(
        self,
        provider: str = "serper",
        *,
        url: str | None = None,
        site: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        answer_box: bool = False,
        pages: str = "snippet",
        page_timeout: float = 10.0,
        page_bytes: int = 2_000_000,
        page_characters: int = 35_000,
        allow_hosts: Sequence[str] = (),
        user_agent: str | None = None,
        summariser: Summariser | None = None,
        timeout: float = 15.0,
        deadline: float = 60.0,
        retries: int = 3,
        parallel: int = 16,
        requests_per_second: float | None = None,
        resolve: Resolver = resolve,
    ) -> None:
        if provider not in PROVIDERS:
            raise RetrieverError(f"provider must be one of {', '.join(PROVIDERS)}, got {provider!r}")
        self.provider = PROVIDERS[provider]
        if pages not in PAGES:
            raise RetrieverError(f"pages must be one of {', '.join(PAGES)}, got {pages!r}")
        _import_libraries(pages)
        if site is not None and not is_site(site):
            raise RetrieverError(f"site must be a host such as 'en.wikipedia.org', without scheme and blanks, got {site!r}")
        if answer_box and not self.provider.answer_box:
            raise RetrieverError(f"provider {provider!r} has no answer box; leave answer_box out")
        if isinstance(allow_hosts, str) or not all(isinstance(host, str) for host in allow_hosts):
            raise RetrieverError(f"allow_hosts must be a list of hosts, got {allow_hosts!r}")
        counts = {"page_bytes": page_bytes, "page_characters": page_characters, "parallel": parallel}
        wrong = {name: value for name, value in counts.items() if isinstance(value, bool) or not isinstance(value, int) or value < 1}
        if wrong or not 0 < page_timeout < math.inf:
            raise RetrieverError(f"needed are whole numbers of at least 1 and page_timeout > 0, got {wrong or page_timeout}")
        self._allow_hosts = tuple(allow_hosts)
        self._url = check_service_url(url or self.provider.url, "url", True, self._allow_hosts)
        self._site = site
        self._parameters = dict(parameters or {})
        self._answer_box = answer_box
        self._pages = pages
        self._page_timeout, self._page_bytes, self._page_characters = page_timeout, page_bytes, page_characters
        self._user_agent = user_agent or f"searchqa-gym/{_version()}"
        self._summariser = summariser
        self._service = Service("engine", self._url, self.provider.key_variables, timeout, deadline, retries)
        self._parallel = parallel
        self._requests_per_second = requests_per_second
        Pace(requests_per_second)  # raises for a wrong number
        self._resolve = resolve
        base = self.provider.write("", site, 0, self._keys())
        taken = sorted({*base.parameters, *base.secret_parameters} & set(self._parameters))
        if taken:
            raise RetrieverError(f"parameters may not set {', '.join(taken)}: this retriever sets them for {provider!r}")
        self._processes: dict[int, _Process] = {}
        self._counters: dict[int, defaultdict[str, float]] = {}

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        asked: dict[Hashable, SearchRequest] = {}
        for request in requests:
            check_request(request, self.name)
            asked.setdefault(default_cache_key(request), request)
        if not asked:
            return []
        process = self._process()
        future = process.thread.run(self._answer_all(process, list(asked.values())))
        try:
            answers = dict(zip(asked, future.result(), strict=True))
        except CancelledError:
            raise RetrieverUnavailable(f"the retriever of {self._url} was closed during a search") from None
        finally:
            future.cancel()  # an interrupt of the caller drops the connections
        return [list(answers[default_cache_key(request)]) for request in requests]

    def cache_key(self, request: SearchRequest) -> Hashable:
        return default_cache_key(request)

    def stamp(self) -> dict[str, Any]:
        """The settings that an answer depends on. The web changes all the same: only a recording repeats a run."""
        stamp: dict[str, Any] = {
            "retriever": self.name,
            "provider": self.provider.name,
            "url": self._url,
            "site": self._site,
            "parameters": self._parameters,
            "answer_box": self._answer_box,
            "pages": self._pages,
        }
        if len(self.provider.key_variables) > 1:  # a search engine put together by the user, known by its id
            stamp["engine_id_sha256"] = hashlib.sha256("".join(self._keys()[1:]).encode()).hexdigest()[:16]
        if self._pages == "page":
            stamp |= {
                "page_bytes": self._page_bytes,
                "page_characters": self._page_characters,
                "user_agent": self._user_agent,
                "trafilatura": version("trafilatura"),
            }
        if self._summariser is not None:
            stamp["summariser"] = self._summariser.stamp()
        return stamp

    def counters(self) -> dict[str, float]:
        """What this process has asked for: :data:`COUNTERS`, as sums; seconds are those of all requests, which may overlap."""
        return {f"online/{name}": float(value) for name, value in self._counted().items()}

    @property
    def billed_calls(self) -> int:
        """Calls of the engine that may be billed, in this process so far: those that got an HTTP status of 2xx, however the rest of the answer was.

        A result page is one call, so that a search with a large ``top_k`` has several; a repeated try counts again. An engine may also bill a call
        whose answer did not come in time, which nobody here can know.
        """
        return int(self._counted()["engine_answers"])

    def close(self) -> None:
        """Close this process's connections; calls under way fail. The next call opens new ones."""
        process = self._processes.pop(os.getpid(), None)
        if process is not None:
            process.thread.close(process.close())

    def __deepcopy__(self, memo: dict[int, Any]) -> Online:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"provider": self.provider.name, "_processes": {}, "_counters": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"provider": PROVIDERS[state["provider"]]})

    def __repr__(self) -> str:
        return f"Online({self.provider.name!r}, url={self._url!r}, site={self._site!r}, pages={self._pages!r})"

    def _keys(self) -> list[str]:
        keys = []
        for variable in self.provider.key_variables:
            key = read_key(variable)
            if key is None:
                raise RetrieverError(
                    f"provider {self.provider.name!r} needs ${variable}, which is not set; keys are read from the environment only"
                )
            keys.append(key)
        return keys

    def _counted(self) -> defaultdict[str, float]:
        return self._counters.setdefault(os.getpid(), defaultdict(float, dict.fromkeys(COUNTERS, 0.0)))

    def _process(self) -> _Process:
        """Loop and connections of this process: those of the parent do not survive a fork."""
        pid = os.getpid()
        process = self._processes.get(pid)
        if process is None:
            made = _Process(self)
            process = self._processes.setdefault(pid, made)
            if process is not made:  # another thread was first
                made.thread.close(made.close())
        return process

    async def _answer_all(self, process: _Process, requests: list[SearchRequest]) -> list[list[Hit]]:
        return await _together([self._answer(process, request) for request in requests])

    async def _answer(self, process: _Process, request: SearchRequest) -> list[Hit]:
        found = await self._found(process, request)
        if self._pages == "page":
            texts = await _together([self._page(process, one) for one in found])
            found = [one._replace(text=text) for one, text in zip(found, texts, strict=True)]
        hits = [Hit(Passage(*one), 1 / rank) for rank, one in enumerate(found, start=1) if one.text]
        return hits if self._summariser is None else await self._extracts(process, self._summariser, request.query, hits)

    async def _found(self, process: _Process, request: SearchRequest) -> list[Found]:
        """The engine's results, each address once."""
        provider = self.provider
        query = clean_query(request.query, provider, self._site)
        if not query:
            return []
        wanted = min(request.top_k, provider.most)
        found: dict[str, Found] = {}
        related: list[Found] = []
        for number in range(math.ceil(provider.most / provider.per_call)):
            base = provider.write(query, self._site, number, self._keys())
            call = Call(base.method, {**base.parameters, **self._parameters}, base.secret_headers, base.secret_parameters)
            page = await process.engine.ask(call, functools.partial(provider.read, extras=self._answer_box))
            before = len(found)
            for one in (*(page.answers if number == 0 else ()), *page.found):
                found.setdefault(one.url, one)
            related += page.related
            if len(found) >= wanted or not page.more or len(found) == before:
                break
        for one in related:
            found.setdefault(one.url, one)
        return list(found.values())[:wanted]

    async def _page(self, process: _Process, found: Found) -> str:
        try:
            async with asyncio.timeout(2 * self._page_timeout):
                text = await process.pages.read(found.url)
        except TimeoutError:
            process.counters["page_late"] += 1
            text = None
        return found.text if text is None else text

    async def _extracts(self, process: _Process, summariser: Summariser, query: str, hits: list[Hit]) -> list[Hit]:
        async def extract(hit: Hit) -> Hit | None:
            passage = hit.passage
            answer = await process.summariser.ask(
                summariser.write(query, passage.title, passage.text[: self._page_characters]), summariser.read
            )
            process.counters["summariser_prompt_tokens"] += answer.prompt_tokens
            process.counters["summariser_completion_tokens"] += answer.completion_tokens
            return None if answer.text is None else Hit(passage._replace(text=answer.text), hit.score)

        if summariser.mode == "all":
            return [hit for hit in await _together([extract(hit) for hit in hits]) if hit is not None]
        for hit in hits:
            extracted = await extract(hit)
            if extracted is not None:
                return [extracted]
        return []


class _Process:
    """What :class:`Online` has once in each process."""

    def __init__(self, online: Online) -> None:
        import httpx2

        self.counters = online._counted()
        limits = httpx2.Limits(max_connections=2 * online._parallel)
        # `Asker` keeps the time. No proxy sees what is not encrypted: plain http goes to services of one's own, keys and all.
        self.client = httpx2.AsyncClient(verify=tls_context(), timeout=None, limits=limits, mounts={"http://": None})
        self.engine = Asker(self.client, online._service, self.counters, online._parallel, Pace(online._requests_per_second))
        summariser = online._summariser
        if summariser is not None:
            self.summariser = Asker(self.client, summariser.service, self.counters, online._parallel, Pace(None))
        if online._pages == "page":
            self.pages = PageReader(
                user_agent=online._user_agent,
                timeout=online._page_timeout,
                most_bytes=online._page_bytes,
                most_characters=online._page_characters,
                allow_hosts=online._allow_hosts,
                parallel=online._parallel,
                counters=self.counters,
                resolve=online._resolve,
            )
        self.thread = LoopThread()

    async def close(self) -> None:
        await self.client.aclose()
        if hasattr(self, "pages"):
            await self.pages.close()


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all; at the first failure the others are cancelled, since they cost money."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def make(
    corpus: Callable[[], Corpus],
    provider: str = "serper",
    url: str | None = None,
    site: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    answer_box: bool = False,
    pages: str = "snippet",
    page_timeout: float = 10.0,
    page_bytes: int = 2_000_000,
    page_characters: int = 35_000,
    allow_hosts: Sequence[str] = (),
    user_agent: str | None = None,
    summariser: Mapping[str, Any] | None = None,
    timeout: float = 15.0,
    deadline: float = 60.0,
    retries: int = 3,
    parallel: int = 16,
    requests_per_second: float | None = None,
) -> Retriever:
    """The retriever ``"online"`` of a configuration; ``summariser`` has the arguments of :class:`~searchqa_retrievers.summariser.Summariser`."""
    return Online(
        provider,
        url=url,
        site=site,
        parameters=parameters,
        answer_box=answer_box,
        pages=pages,
        page_timeout=page_timeout,
        page_bytes=page_bytes,
        page_characters=page_characters,
        allow_hosts=allow_hosts,
        user_agent=user_agent,
        summariser=None if summariser is None else _summariser(summariser, tuple(allow_hosts)),
        timeout=timeout,
        deadline=deadline,
        retries=retries,
        parallel=parallel,
        requests_per_second=requests_per_second,
    )


def _summariser(config: Mapping[str, Any], allow_hosts: tuple[str, ...]) -> Summariser:
    if not isinstance(config, Mapping):
        raise RetrieverError(f"summariser must be a mapping with url and model, got {config!r:.80}")
    known = set(inspect.signature(Summariser).parameters) - {"allow_hosts"}
    if not {"url", "model"} <= set(config) <= known:
        raise RetrieverError(
            f"summariser needs url and model and may have {', '.join(sorted(known - {'url', 'model'}))}; got {sorted(config)}"
        )
    _import_libraries("snippet")
    return Summariser(**config, allow_hosts=allow_hosts)


def _import_libraries(pages: str) -> None:
    try:
        import httpx2  # noqa: F401

        if pages == "page":
            import trafilatura  # noqa: F401
    except ImportError as error:
        raise RetrieverError(f"retriever 'online' needs a library that is missing ({error}); pip install 'searchqa-gym[online]'") from error


def _version() -> str:
    try:
        return version("searchqa-gym")
    except PackageNotFoundError:
        return "0"
