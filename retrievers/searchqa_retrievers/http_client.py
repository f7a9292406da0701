"""A search server behind HTTP as a retriever."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from searchqa_retrievers.checks import check_request
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.http_formats import FORMATS, FormatError, from_json, to_json
from searchqa_retrievers.types import Hit, Retriever, RetrieverError, RetrieverUnavailable, SearchRequest, default_cache_key

if TYPE_CHECKING:
    import httpx2

CONNECTIONS = 16
"""Most requests to the server at the same time, and connections kept open."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between tries: they double from the first to the longest, each shortened at random by up to a half."""
BREAK_AFTER, BREAK_SECONDS = 3, 10.0
"""After so many calls of ``search`` in a row that failed, calls fail at once for so many seconds; then a single one tries the server again."""
MOST_BYTES = 2**28
"""An answer longer than this is not read to its end."""


class Http:
    """Asks a search server: one of this package's (``searchqa serve``), or Search-R1's, R1-Searcher's, ZeroSearch's wiki server.

    Equal requests of a call are asked once, the others in as few HTTP requests as the format allows, at the same time on kept connections. A try is
    repeated after a failed connection, no answer in time, status 408, 429 or 5xx (a ``Retry-After`` is honoured), and after an answer that is
    not what the format says: such a server is broken, and nothing it says may pass for a passage. ``search`` ends within ``deadline``, with
    all its answers or none.

    Can be shared by threads, pickled, and used on both sides of a fork; each process has connections of its own.

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
    token : str or None
        Sent as ``Authorization: Bearer``.

    Raises
    ------
    RetrieverError
        An argument is out of its range. ``search``: the server refuses a request with another status, and asking again would not help.
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
        token: str | None = None,
    ) -> None:
        if format not in FORMATS:
            raise RetrieverError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        if retries < 0 or not 0 < timeout < float("inf") or not 0 < deadline < float("inf"):
            raise RetrieverError(f"needed are timeout > 0, deadline > 0 and retries >= 0, all finite; got {timeout}, {deadline}, {retries}")
        if token is not None and (not token.isascii() or not token.isprintable() or " " in token or not token):
            raise RetrieverError("token must be printable ASCII without blanks, since it goes into a header; leave it out for none")
        self.format = FORMATS[format]
        self.url = _address(url, self.format.path)
        self.timeout, self.deadline, self.retries = timeout, deadline, retries
        self._token = token
        self._processes: dict[int, _Process] = {}

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
        process.breaker.enter(self.url)
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
        return {"retriever": self.name, "format": self.format.name, "url": self.url}

    def close(self) -> None:
        """Close this process's connections; calls under way fail. The next call opens new ones."""
        process = self._processes.pop(os.getpid(), None)
        if process is not None:
            process.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Http:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"format": self.format.name, "_processes": {}}

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
        return self._processes.setdefault(pid, _Process(self._token)) if process is None else process

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
            try:
                async with process.free, asyncio.timeout(self.timeout):
                    reply = await _post(process.client, self.url, body)
                if reply.status == 200:
                    return self.format.read_answer(from_json(reply.content), batch)
                record.cause = f"status {reply.status}: {reply.content[:300].decode('utf-8', 'replace')}"
                if reply.status not in (408, 429) and reply.status < 500:
                    raise RetrieverError(
                        f"{self.url} refused a request with {record.cause}. Check the address, the token, and that the server speaks "
                        f"the format {self.format.name!r} (choices: {', '.join(FORMATS)})"
                    )
                pause = max(pause, retry_after_seconds(reply.retry_after))
            except TimeoutError:
                record.cause = f"no answer in {self.timeout:g} s"
            except FormatError as error:
                record.cause = f"an answer that is not of the format {self.format.name!r}: {error}"
            except process.errors as error:
                record.cause = f"{type(error).__name__}: {error}"
            if number == self.retries or time.monotonic() - started + pause > self.deadline:
                break
            await asyncio.sleep(pause)
        raise self._unavailable(record, started)

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
) -> Retriever:
    """The retriever ``"http"`` of a configuration."""
    token = os.environ.get("SEARCHQA_RETRIEVER_TOKEN") or None  # no option: configurations are saved with runs
    return Http(url, format, timeout=timeout, deadline=deadline, retries=retries, token=token)


class _Record:
    """What a message of failure tells about one call of ``search``."""

    tries = 0
    cause = "no answer"


class _Reply(NamedTuple):
    status: int
    retry_after: str | None
    content: bytes


async def _post(client: httpx2.AsyncClient, url: str, body: bytes) -> _Reply:
    parts, size = [], 0
    async with client.stream("POST", url, content=body) as response:
        async for part in response.aiter_bytes():
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                raise FormatError(f"more than {MOST_BYTES} bytes")
        return _Reply(response.status_code, response.headers.get("Retry-After"), b"".join(parts))


class _Process:
    """What :class:`Http` has once in each process: an event loop in a thread, the connections, the breaker."""

    def __init__(self, token: str | None) -> None:
        self._token = token
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
                self.client = httpx2.AsyncClient(headers=headers, timeout=None, limits=limits)  # the time is kept by `_ask_batch`
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
        raise RetrieverError("retriever 'http' needs httpx2; pip install \"searchqa-gym[agents]\"") from error
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
