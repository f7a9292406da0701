"""A search server behind HTTP as a retriever."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple

from searchqa_retrievers.checks import check_request
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.http_formats import FORMATS, IDENTITY_HEADER, FormatError, from_json, to_json
from searchqa_retrievers.types import (
    SERVER_NOT_REACHED,
    Hit,
    Retriever,
    RetrieverError,
    RetrieverUnavailable,
    SearchRequest,
    default_cache_key,
)
from searchqa_retrievers.wrapped import not_reached

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger(__name__)

CONNECTIONS = 16
"""Most requests to the server at the same time, and connections kept open."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between tries: they double from the first to the longest, each shortened at random by up to a half."""
BREAK_AFTER, BREAK_SECONDS = 3, 10.0
"""After so many calls of ``search`` in a row that failed, calls fail at once for so many seconds; then a single one tries the server again."""
MOST_BYTES = 2**28
"""An answer longer than this is not read to its end."""
STAMP_SECONDS = 5.0
"""Longest time for asking the server what it is."""
COUNTERS = (
    "search/http_calls",
    "search/http_tries",
    "search/http_retries",
    "search/http_hedges",
    "search/http_timeouts",
    "search/http_status_failures",
    "search/http_format_failures",
    "search/http_connection_failures",
    "search/http_breaker_refusals",
)
"""The keys of :meth:`Http.counters`."""


class Http:
    """Asks a search server: one of this package's (``searchqa serve``), or Search-R1's, R1-Searcher's, ZeroSearch's wiki server.

    Equal requests of a call are asked once, the others in as few HTTP requests as the format allows, at the same time on kept connections. A try is
    repeated after a failed connection, no answer in time, status 408, 429 or 5xx (a ``Retry-After`` is honoured), and after an answer that is
    not what the format says: such a server is broken, and nothing it says may pass for a passage. ``search`` ends within ``deadline``, with
    all its answers or none.

    With ``hedge_after``, a try that has no answer by then is sent a second time, where a connection is free; the first usable answer counts and the
    other request is given up. This shortens the longest waits for servers of which a few answers are slow, and adds to their load.

    Can be shared by threads, pickled, and used on both sides of a fork; each process has connections of its own. They go straight to the server: the
    proxies of the environment (``HTTP_PROXY``, ...) are not used.

    Parameters
    ----------
    url : str
        Where the server is, such as ``http://127.0.0.1:8000``, with or without the path of the format.
    format : str
        ``searchqa``, ``search-r1``, ``r1-searcher`` or ``zerosearch``; see :mod:`searchqa_retrievers.http_formats`. Only ``searchqa`` has filters.
    timeout : float
        Longest time for one try, in seconds.
    deadline : float
        Longest time for one call of ``search`` with all its tries and pauses, in seconds.
    retries : int
        How often a try is repeated.
    hedge_after : float or None
        Seconds without an answer after which a try is sent a second time; None: never.
    require_scores : bool
        Take an answer without scores for one that is not of the format, where passages otherwise get 1/rank. ``r1-searcher`` and ``zerosearch`` have none.
    token : str or None
        Sent as ``Authorization: Bearer``. A warning is logged where it leaves a network of one's own over plain http.

    Raises
    ------
    RetrieverError
        An argument is out of its range. ``search``: the server refuses a request with another status, and asking again would not help; or a
        server of this package answers with another corpus or other settings than before.
    RetrieverUnavailable
        ``search``: the tries or the time are spent, or they were for the last calls and the server is given a rest.
    """

    name = "http"

    def __init__(
        self,
        url: str,
        format: str = "searchqa",
        *,
        timeout: float = 10.0,
        deadline: float = 30.0,
        retries: int = 4,
        hedge_after: float | None = None,
        require_scores: bool = False,
        token: str | None = None,
    ) -> None:
        if format not in FORMATS:
            raise RetrieverError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        if retries < 0 or not 0 < timeout < float("inf") or not 0 < deadline < float("inf"):
            raise RetrieverError(f"needed are timeout > 0, deadline > 0 and retries >= 0, all finite; got {timeout}, {deadline}, {retries}")
        if hedge_after is not None and not 0 <= hedge_after < float("inf"):
            raise RetrieverError(f"hedge_after must be a number of seconds of at least 0, or None for no second request; got {hedge_after}")
        if require_scores and not FORMATS[format].scored:
            scored = [name for name, known in FORMATS.items() if known.scored]
            raise RetrieverError(f"answers of the format {format!r} have no scores, which are needed here; use {' or '.join(scored)}")
        if token is not None and (not token.isascii() or not token.isprintable() or " " in token or not token):
            raise RetrieverError("token must be printable ASCII without blanks, since it goes into a header; leave it out for none")
        self.format = FORMATS[format]
        self.url = _address(url, self.format.path)
        self.timeout, self.deadline, self.retries, self.hedge_after = timeout, deadline, retries, hedge_after
        self.require_scores = require_scores
        if token is not None:
            _warn_of_plain_http(self.url)
        self._token = token
        self._processes: dict[int, _Process] = {}
        self._counts: dict[int, _Counts] = {}
        self._server: dict[str, Any] | str | None = None
        self._knows_server = False
        self._identity: str | None = None

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        asked: dict[Hashable, SearchRequest] = {}
        for request in requests:
            if request.top_k < 1 or not self.format.mixed:
                check_request(request, self.name)
            asked.setdefault(default_cache_key(request), request)
        if not asked:
            return []
        batches = self._batches(list(asked.values()))
        process = self._process()
        process.counts.add("search/http_calls")
        try:
            process.breaker.enter(self.url)
        except RetrieverUnavailable:
            process.counts.add("search/http_breaker_refusals")
            raise
        try:
            future = process.run(self._ask(process, batches))
            try:
                answers = future.result()
            finally:
                future.cancel()  # an interrupt of the caller drops the connections
        except RetrieverUnavailable:
            process.breaker.leave(failed=True)
            raise
        except RetrieverError:
            process.breaker.leave(failed=False)
            raise
        except CancelledError:
            process.breaker.leave(failed=None)
            raise RetrieverUnavailable(f"the client of {self.url} was closed during a search") from None
        except BaseException:
            process.breaker.leave(failed=None)
            raise
        process.breaker.leave(failed=False)
        found = {
            default_cache_key(request): hits
            for batch, lists in zip(batches, answers, strict=True)
            for request, hits in zip(batch, lists, strict=True)
        }
        return [list(found[default_cache_key(request)]) for request in requests]

    def cache_key(self, request: SearchRequest) -> Hashable:
        return default_cache_key(request)

    def stamp(self) -> dict[str, Any]:
        """The settings, and under ``server`` the stamp of the retriever behind a server of this package, with the hash of its corpus.

        The server is asked until it has answered once, each time for at most :data:`STAMP_SECONDS`. None stands for a server that does not
        tell, as those of other makers do, and :data:`~searchqa_retrievers.types.SERVER_NOT_REACHED` for one that could not be asked; nothing is
        known then of what it searches.
        """
        if not self._knows_server:
            process = self._process()
            try:
                self._server = process.run(self._ask_stamp(process)).result()
                self._knows_server = not not_reached(self._server)  # the server may itself have one behind it
            except (TimeoutError, CancelledError, RetrieverUnavailable):
                self._server = SERVER_NOT_REACHED  # asked again at the next stamp
        return {"retriever": self.name, "format": self.format.name, "url": self.url, "server": self._server}

    def counters(self) -> dict[str, float]:
        """What this process has counted, by the names of :data:`COUNTERS`, each after ``search/``.

        ``http_calls`` of ``search``; ``http_tries``: HTTP requests sent, of which ``http_retries`` after a failure and ``http_hedges`` beside a
        slow one; tries that failed: ``http_timeouts``, ``http_status_failures`` (a status other than 200), ``http_format_failures`` (not what the
        format says) and ``http_connection_failures``; ``http_breaker_refusals``: calls that failed at once since the server was given a rest.
        """
        return self._counts_here().copy()

    def close(self) -> None:
        """Close this process's connections; calls under way fail. The next call opens new ones."""
        process = self._processes.pop(os.getpid(), None)
        if process is not None:
            process.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Http:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"format": self.format.name, "_processes": {}, "_counts": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"format": FORMATS[state["format"]]})

    def __repr__(self) -> str:
        return f"Http({self.url!r}, format={self.format.name!r})"

    def _batches(self, requests: list[SearchRequest]) -> list[list[SearchRequest]]:
        """What goes into one HTTP request each."""
        groups: dict[int | None, list[SearchRequest]] = {}
        for request in requests:
            groups.setdefault(None if self.format.mixed else request.top_k, []).append(request)
        most = self.format.most_queries
        return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]

    def _process(self) -> _Process:
        """Loop, connections and state of the breaker in this process: those of the parent do not survive a fork."""
        pid = os.getpid()
        process = self._processes.get(pid)
        return self._processes.setdefault(pid, _Process(self._token, self._counts_here())) if process is None else process

    def _counts_here(self) -> _Counts:
        return self._counts.setdefault(os.getpid(), _Counts())

    async def _ask(self, process: _Process, batches: list[list[SearchRequest]]) -> list[list[list[Hit]]]:
        started = time.monotonic()
        record = _Record()
        try:
            async with asyncio.timeout(self.deadline), asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._ask_batch(process, batch, record, started)) for batch in batches]
        except TimeoutError:
            raise self._unavailable(record, started, f"; the deadline of {self.deadline:g} s is over") from None
        except BaseExceptionGroup as errors:  # the others are cancelled; the first tells enough
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask_batch(self, process: _Process, batch: list[SearchRequest], record: _Record, started: float) -> list[list[Hit]]:
        body = to_json(self.format.write_request(batch))
        for number in range(self.retries + 1):
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**number) * random.Random().uniform(0.5, 1.0)
            record.tries += 1
            if number:
                process.counts.add("search/http_retries")
            try:
                async with process.free:
                    return await self._hedged(process, body, batch)
            except _TryFailed as error:
                record.cause = error.cause
                pause = max(pause, error.pause)
            if number == self.retries or time.monotonic() - started + pause > self.deadline:
                break
            await _sleep(pause)
        raise self._unavailable(record, started)

    async def _hedged(self, process: _Process, body: bytes, batch: list[SearchRequest]) -> list[list[Hit]]:
        """A try, and beside it a second one where the first is slow; the failure is that of the first."""
        if self.hedge_after is None:
            return await self._try(process, body, batch)
        first = asyncio.create_task(self._try(process, body, batch))
        tasks = [first]
        try:
            await asyncio.wait(tasks, timeout=self.hedge_after)
            if first.done() or process.free.locked():
                return await first
            async with process.free:
                process.counts.add("search/http_hedges")
                tasks.append(asyncio.create_task(self._try(process, body, batch)))
                pending = set(tasks)
                while pending:
                    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        if task.exception() is None:
                            return task.result()
            return await first
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _try(self, process: _Process, body: bytes, batch: list[SearchRequest]) -> list[list[Hit]]:
        """One HTTP request; :class:`_TryFailed` where another may have more luck."""
        process.counts.add("search/http_tries")
        try:
            async with asyncio.timeout(self.timeout):
                reply = await _send(process.client, "POST", self.url, body)
            if reply.status == 200:
                answer = from_json(reply.content)
                hits = self.format.read_answer(answer, batch)
                if self.require_scores and not self.format.has_scores(answer):
                    raise FormatError("it has no scores")
                self._check_identity(reply.identity)
                return hits
        except TimeoutError:
            process.counts.add("search/http_timeouts")
            raise _TryFailed(f"no answer in {self.timeout:g} s") from None
        except FormatError as error:
            process.counts.add("search/http_format_failures")
            raise _TryFailed(f"an answer that is not of the format {self.format.name!r}: {error}") from error
        except process.errors as error:
            process.counts.add("search/http_connection_failures")
            raise _TryFailed(f"{type(error).__name__}: {error}") from error
        process.counts.add("search/http_status_failures")
        cause = f"status {reply.status}: {reply.content[:1_000].decode('utf-8', 'replace')}"
        if reply.status not in (408, 429) and reply.status < 500:
            raise RetrieverError(
                f"{self.url} refused a request with {cause}. Check the address, the token, and that the server speaks "
                f"the format {self.format.name!r} (choices: {', '.join(FORMATS)})"
            )
        raise _TryFailed(cause, retry_after_seconds(reply.retry_after))

    def _check_identity(self, identity: str | None) -> None:
        """Refuse the answer of another retriever than the one that answered first."""
        self._identity = self._identity or identity
        if identity is not None and identity != self._identity:
            raise RetrieverError(
                f"{self.url} now answers with another corpus or other settings than at the first search, so that the numbers of this run would "
                "mean nothing. Serve what was served before, or start a new run"
            )

    async def _ask_stamp(self, process: _Process) -> dict[str, Any] | None:
        """What the server says it is; None where it does not say. Raises ``TimeoutError`` and :class:`RetrieverUnavailable`."""
        try:
            async with asyncio.timeout(STAMP_SECONDS):
                reply = await _send(process.client, "GET", self.url.removesuffix(self.format.path) + "/stamp")
        except process.errors as error:
            raise RetrieverUnavailable(f"{type(error).__name__}: {error}") from error
        except FormatError:
            return None
        if reply.status in (408, 429, 502, 503, 504):
            raise RetrieverUnavailable(f"status {reply.status}")
        try:
            stamp = from_json(reply.content).get("stamp") if reply.status == 200 else None
        except (FormatError, AttributeError):
            return None
        return stamp if isinstance(stamp, dict) else None

    def _unavailable(self, record: _Record, started: float, more: str = "") -> RetrieverUnavailable:
        return RetrieverUnavailable(
            f"{self.url} gave no usable answer in {time.monotonic() - started:.1f} s and {record.tries} tries: {record.cause}{more}. "
            "Start the server or correct the address and the format; for a slow one raise timeout and deadline"
        )


def make(
    corpus: Callable[[], Corpus],
    url: str = "http://127.0.0.1:8000",
    format: str = "searchqa",
    timeout: float = 10.0,
    deadline: float = 30.0,
    retries: int = 4,
    hedge_after: float | None = None,
) -> Retriever:
    """The retriever ``"http"`` of a configuration."""
    token = os.environ.get("SEARCHQA_RETRIEVER_TOKEN") or None  # no option: configurations are saved with runs
    return Http(url, format, timeout=timeout, deadline=deadline, retries=retries, hedge_after=hedge_after, token=token)


class _TryFailed(Exception):
    """A try without a usable answer, and how long the server wants to be left alone."""

    def __init__(self, cause: str, pause: float = 0.0) -> None:
        super().__init__(cause)
        self.cause, self.pause = cause, pause


class _Counts:
    """Counters that threads share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[str] = Counter()

    def add(self, name: str) -> None:
        with self._lock:
            self._values[name] += 1

    def copy(self) -> dict[str, float]:
        with self._lock:
            return {name: float(self._values[name]) for name in COUNTERS}


class _Record:
    """What a message of failure tells about one call of ``search``."""

    tries = 0
    cause = "no answer"


class _Reply(NamedTuple):
    status: int
    retry_after: str | None
    identity: str | None
    content: bytes


async def _sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def _send(client: httpx2.AsyncClient, method: str, url: str, body: bytes | None = None) -> _Reply:
    parts, size = [], 0
    async with client.stream(method, url, content=body) as response:
        async for part in response.aiter_bytes():
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                raise FormatError(f"more than {MOST_BYTES} bytes")
        return _Reply(response.status_code, response.headers.get("Retry-After"), response.headers.get(IDENTITY_HEADER), b"".join(parts))


class _Process:
    """What :class:`Http` has once in each process: an event loop in a thread, the connections, the breaker."""

    def __init__(self, token: str | None, counts: _Counts) -> None:
        self._token = token
        self.counts = counts
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.client: httpx2.AsyncClient
        self.errors: type[Exception]
        self.free = asyncio.Semaphore(CONNECTIONS)
        self.breaker = _Breaker()

    def run(self, work: Any) -> Future[Any]:
        with self._lock:
            if self._loop is None:
                import httpx2

                headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._token}"} if self._token else {})
                limits = httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
                # `_ask_batch` keeps the time. Certificates that the environment names are trusted, but no proxy is used: it could not reach a
                # server on the loopback, and over plain http it would see the token.
                verify = httpx2.create_ssl_context()
                self.client = httpx2.AsyncClient(headers=headers, timeout=None, limits=limits, verify=verify, trust_env=False)
                self.errors = httpx2.RequestError
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="searchqa-http", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.client.aclose()


class _Breaker:
    """Spares a lost server, and the episodes that wait for it, the full budget of every call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures = 0
        self._closed_until = 0.0

    def enter(self, url: str) -> None:
        """Let a call pass, or raise :class:`RetrieverUnavailable`."""
        with self._lock:
            if self._failures < BREAK_AFTER:
                return
            now = time.monotonic()
            if now < self._closed_until:
                raise RetrieverUnavailable(
                    f"{url} failed {self._failures} times in a row and is not asked for {self._closed_until - now:.1f} s. Look at the server"
                )
            self._closed_until = now + BREAK_SECONDS  # this call tries it; the others go on failing meanwhile

    def leave(self, failed: bool | None) -> None:
        """A call has ended; None: by the caller's doing, which says nothing about the server."""
        with self._lock:
            if failed:
                self._failures += 1
                self._closed_until = time.monotonic() + BREAK_SECONDS
            elif failed is False:
                self._failures = 0
            else:
                self._closed_until = 0.0


def _address(url: str, path: str) -> str:
    """The address with the path of the format."""
    try:
        import httpx2
    except ModuleNotFoundError as error:
        raise RetrieverError("retriever 'http' needs httpx2; pip install 'searchqa-gym[serve]'") from error
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError):
        parsed = httpx2.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query or parsed.fragment:
        raise RetrieverError(
            "the address of a search server is like http://127.0.0.1:8000, without query or fragment, and without user (use `token`), got "
            + (repr(url) if not parsed.userinfo else f"one for {parsed.host!r} with a user")
        )
    base = url.rstrip("/")
    return base if base.endswith(path) else base + path


@functools.cache
def _warn_of_plain_http(url: str) -> None:
    """Say once for each address that a token goes there unencrypted, unless its network is likely one's own."""
    import httpx2

    parsed = httpx2.URL(url)
    if parsed.scheme == "http" and not _is_own_network(parsed.host):
        logger.warning("The token goes to %s unencrypted; use https", url)


def _is_own_network(host: str) -> bool:
    """Loopback and private addresses; of names, those that no public server can have."""
    try:
        return ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".localhost"))


def retry_after_seconds(retry_after: str | None) -> float:
    """What the header ``Retry-After`` asks for: a number of seconds, or a date."""
    if retry_after is None:
        return 0.0
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
        return max(0.0, (date.astimezone(UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return 0.0
