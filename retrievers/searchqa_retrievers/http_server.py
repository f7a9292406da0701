"""Any retriever as a search server, for this package's client and for those of Search-R1, R1-Searcher and ZeroSearch.

| path | what |
|---|---|
| ``POST /search`` | this package's format |
| ``POST /retrieve`` | Search-R1's (``queries``) and ZeroSearch's wiki server's (``query``) |
| ``POST /queries`` | R1-Searcher's |
| ``GET /health`` | 200 while the process lives; the only path that asks for no token |
| ``GET /ready`` | 200 when a search has an answer now, else 503 |
| ``GET /stamp`` | ``{"stamp": {...}}``: what the retriever says that its answers depend on, with the hash of its corpus |
| ``GET /metrics`` | counters for Prometheus |

A search that made the server ready counts for :data:`READY_SECONDS`, and is always the same one, so that probing costs a back end little, and one behind a
cache nothing: then it tells of the cache only. ``/metrics`` also has what the retriever counts, as gauges ``searchqa_retriever_<name>``.

Searches that come at the same time go to the retriever in one call: while one call runs, in a thread, the next ones gather. Errors are answered as
``{"error": message}``: 400 no JSON, 401 no token, 408 a body that does not come, 413 too much, 422 not the format or a request that the retriever refuses,
503 when the back end is lost, too many searches wait, or too many bodies are held (with ``Retry-After``), or there are too many connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import importlib.util
import ipaddress
import json
import logging
import re
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from searchqa_retrievers.http_formats import DEFAULT_TOP_K, FORMATS, IDENTITY_HEADER, FormatError, format_of, from_json, to_json
from searchqa_retrievers.types import Hit, Retriever, RetrieverError, RetrieverUnavailable, SearchRequest
from searchqa_retrievers.wrapped import not_reached

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger(__name__)

BODY_SECONDS = 30.0
"""Longest time for the body of a request to come in."""
RETRY_SECONDS = 1
"""What ``Retry-After`` says."""
READY_SECONDS = 5.0
"""So long ``/ready`` takes a search that had an answer for a sign that the next one would have."""
HEAD_SECONDS = 30.0
"""A connection on which nothing is under way is closed after so many seconds, also in the middle of a request's head."""
CONNECTIONS = 1_000
"""With so many connections, requests get 503; fewer than the 1,024 open files that a process commonly may have."""
STOP_SECONDS = 30
"""At a stop, requests under way have so long to end."""
LATENCIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Upper bounds, in seconds, of the histogram of latencies."""


@dataclass(frozen=True)
class Limits:
    """What a server takes before it says 413 or 503."""

    window: float = 0.002
    """seconds in which further searches may join one that finds the retriever idle"""
    batch: int = 512
    """requests in one call of the retriever, beyond which the rest waits for the next; a body's requests stay together"""
    waiting: int = 16_384
    """requests that may wait"""
    passages: int = 100_000
    """passages that one body may ask for, over all its queries"""
    body_bytes: int = 2**24
    """length of a body"""
    held_bytes: int = 2**28
    """length of all bodies together that are coming in or being answered"""


@dataclass(frozen=True)
class _Job:
    requests: Sequence[SearchRequest]
    answer: asyncio.Future[list[list[Hit]]]


class _Busy(Exception):
    """Too many requests wait, or their bodies are too long together."""


class _Batcher:
    """Gathers the searches of many connections into few calls of a retriever, one call at a time."""

    def __init__(self, retriever: Retriever, limits: Limits) -> None:
        self._retriever = retriever
        self._limits = limits
        self._jobs: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self.waiting = 0
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0

    async def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        """Raises what the retriever raises, or :class:`_Busy`."""
        if not requests:
            return []
        if self._jobs and self.waiting + len(requests) > self._limits.waiting:
            raise _Busy(f"{self.waiting} searches wait; try again")
        job = _Job(requests, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self.waiting += len(requests)
        self._arrived.set()
        return await job.answer

    async def run(self) -> None:
        """Serve until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="searchqa-search") as thread:
            while True:
                if not self._jobs:
                    self._arrived.clear()
                    await self._arrived.wait()
                    await asyncio.sleep(self._limits.window)
                jobs = self._gather()
                if jobs:
                    started = time.perf_counter()
                    for job, result in zip(jobs, await loop.run_in_executor(thread, self._answers, jobs), strict=True):
                        if job.answer.cancelled():
                            continue
                        if isinstance(result, Exception):
                            job.answer.set_exception(result)
                        else:
                            job.answer.set_result(result)
                    self.seconds += time.perf_counter() - started
                    self.counts["batches"] += 1
                    self.counts["requests"] += sum(len(job.requests) for job in jobs)

    def _gather(self) -> list[_Job]:
        jobs: list[_Job] = []
        size = 0
        while self._jobs and (not jobs or size + len(self._jobs[0].requests) <= self._limits.batch):
            job = self._jobs.popleft()
            self.waiting -= len(job.requests)
            if not job.answer.cancelled():  # else its client has gone
                jobs.append(job)
                size += len(job.requests)
        return jobs

    def _answers(self, jobs: Sequence[_Job]) -> list[list[list[Hit]] | Exception]:
        """The answer or the error of each job. One that the retriever refuses must not spoil the others of its batch, so then each is asked by itself."""
        try:
            answers = iter(self._call([request for job in jobs for request in job.requests]))
            return [[next(answers) for _ in job.requests] for job in jobs]
        except Exception as error:  # noqa: BLE001 (whatever a retriever raises goes to the connections that wait)
            if len(jobs) == 1 or isinstance(error, RetrieverUnavailable):
                return [error] * len(jobs)
            return [self._answers([job])[0] for job in jobs]

    def _call(self, requests: list[SearchRequest]) -> list[list[Hit]]:
        answers = self._retriever.search(requests)
        if len(answers) != len(requests):
            raise RuntimeError(f"the retriever gave {len(answers)} answers to {len(requests)} requests; it must give one each")
        return answers


class SearchServer:
    """The state behind an application: a retriever, its batches, and what was counted; :func:`create_app` makes the application."""

    def __init__(
        self, retriever: Retriever, token: str | None, default_top_k: int, limits: Limits, ready_filters: Mapping[str, str] | None
    ) -> None:
        self._retriever = retriever
        self._token = None if token is None else token.encode()
        self._default_top_k = default_top_k
        self._limits = limits
        self._ready_filters = ready_filters
        self._batcher: _Batcher
        self._statuses: Counter[tuple[str, int]] = Counter()
        self._latencies = [0] * (len(LATENCIES) + 1)
        self._latency_sum = 0.0
        self._held = 0
        self._ready_until = 0.0
        self._identity: dict[str, str] = {}

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._batcher = _Batcher(self._retriever, self._limits)
        try:
            stamp = await asyncio.to_thread(self._stamp)
            if not not_reached(stamp):  # else its hash would be another one after the next start
                self._identity = {IDENTITY_HEADER: hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:32]}
        except Exception:  # a user's stamp may fail in any way; searches can be answered all the same
            logger.exception("The retriever's stamp failed; clients cannot see when another one takes its place")
        task = asyncio.create_task(self._batcher.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def answer(self, request: Request) -> Response:
        """``POST`` to a path of a format."""
        from starlette.responses import Response

        started = time.perf_counter()
        with self._holding() as hold:
            status, body = await self._answer(request, hold)
        headers = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        if status == 200:
            headers |= self._identity
        if status == 408:
            headers["Connection"] = "close"  # what is left of the body is not read
        response = Response(body, status, headers, "application/json")
        seconds = time.perf_counter() - started
        self._statuses[request.url.path, status] += 1
        self._latencies[sum(seconds > bound for bound in LATENCIES)] += 1
        self._latency_sum += seconds
        return response

    @contextlib.contextmanager
    def _holding(self) -> Iterator[Callable[[int], None]]:
        """Gives a function that counts bytes of a body, or raises :class:`_Busy`; at the end they count no more."""
        own = 0

        def hold(count: int) -> None:
            nonlocal own
            if self._held + count > self._limits.held_bytes:
                raise _Busy(f"the bodies of other requests have {self._held} bytes; try again")
            own += count
            self._held += count

        try:
            yield hold
        finally:
            self._held -= own

    async def _answer(self, request: Request, hold: Callable[[int], None]) -> tuple[int, bytes]:
        from starlette.requests import ClientDisconnect

        if not self._allowed(request):
            return 401, _error("a token is needed: Authorization: Bearer ...")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                content = await self._body(request, hold)
        except TimeoutError:
            return 408, _error(f"the body did not come within {BODY_SECONDS:g} s")
        except ClientDisconnect:
            return 499, b""  # nobody reads it; the status, a custom of nginx, tells in the metrics
        except _Busy as busy:
            return 503, _error(str(busy))
        if content is None:
            return 413, _error(f"a body may have {self._limits.body_bytes} bytes; ask in smaller batches")
        try:
            value = from_json(content)
        except FormatError as error:
            return 400, _error(str(error))
        try:
            format_ = format_of(request.url.path, value)
            question = format_.read_request(value, self._default_top_k)
            if sum(asked.top_k for asked in question.requests) > self._limits.passages:
                return 413, _error(f"a request may ask for {self._limits.passages} passages in all; ask in smaller batches")
            answers = await self._batcher.search(question.requests)
            return 200, to_json(format_.write_answer(question, answers))
        except _Busy as busy:
            return 503, _error(str(busy))
        except RetrieverUnavailable as error:
            logger.warning("The back end is lost: %s", error)
            return 503, _error(f"the back end is lost: {error}")
        except RetrieverError as error:
            return 422, _error(str(error))
        except Exception:  # a fault of the retriever: its trace goes to the log, this request fails, the server serves the others
            logger.exception("A search failed")
            return 500, _error("the search failed; the server's log has the trace")

    async def health(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        if not self._allowed(request):
            return JSONResponse({"error": "a token is needed"}, 401, {"WWW-Authenticate": "Bearer"})
        try:
            if time.monotonic() >= self._ready_until:
                await self._batcher.search([SearchRequest("ready", 1, filters=self._ready_filters)])
                self._ready_until = time.monotonic() + READY_SECONDS
        except Exception as error:  # noqa: BLE001 (whatever it is, a server that cannot search is not ready)
            return JSONResponse({"ready": False, "error": f"{type(error).__name__}: {error}"}, 503, {"Retry-After": str(RETRY_SECONDS)})
        return JSONResponse({"ready": True})

    async def stamp(self, request: Request) -> Response:
        from starlette.responses import JSONResponse, Response

        if not self._allowed(request):
            return JSONResponse({"error": "a token is needed"}, 401, {"WWW-Authenticate": "Bearer"})
        try:
            stamp = await asyncio.to_thread(self._stamp)  # the hash of a large corpus takes a while
            return Response(to_json({"stamp": stamp}), media_type="application/json")
        except Exception:  # a fault of the retriever: its trace goes to the log
            logger.exception("A stamp failed")
            return JSONResponse({"error": "the stamp failed; the server's log has the trace"}, 500)

    def _stamp(self) -> Mapping[str, object]:
        stamp: Callable[[], Mapping[str, object]] | None = getattr(self._retriever, "stamp", None)
        return {"retriever": getattr(self._retriever, "name", type(self._retriever).__name__)} if stamp is None else stamp()

    async def metrics(self, request: Request) -> Response:
        from starlette.responses import PlainTextResponse

        if not self._allowed(request):
            return PlainTextResponse("a token is needed\n", 401, {"WWW-Authenticate": "Bearer"})
        return PlainTextResponse(self._metrics(), media_type="text/plain; version=0.0.4")

    def _metrics(self) -> str:
        """https://prometheus.io/docs/instrumenting/exposition_formats/"""
        batcher = self._batcher
        lines = ["# TYPE searchqa_http_requests_total counter"]
        lines += [f'searchqa_http_requests_total{{path="{p}",status="{s}"}} {n}' for (p, s), n in sorted(self._statuses.items())]
        lines.append("# TYPE searchqa_http_request_seconds histogram")
        total = 0
        for bound, count in zip((*map(str, LATENCIES), "+Inf"), self._latencies, strict=True):
            total += count
            lines.append(f'searchqa_http_request_seconds_bucket{{le="{bound}"}} {total}')
        lines += [f"searchqa_http_request_seconds_sum {self._latency_sum}", f"searchqa_http_request_seconds_count {total}"]
        for name, kind, value in (
            ("searches_total", "counter", batcher.counts["requests"]),
            ("search_batches_total", "counter", batcher.counts["batches"]),
            ("search_seconds_total", "counter", batcher.seconds),
            ("searches_waiting", "gauge", batcher.waiting),
        ):
            lines += [f"# TYPE searchqa_{name} {kind}", f"searchqa_{name} {value}"]
        for key, number in sorted(self._counters().items()):
            name = f"searchqa_retriever_{re.sub('[^a-zA-Z0-9_]', '_', key)}"
            lines += [f"# TYPE {name} gauge", f"{name} {number}"]
        return "\n".join(lines) + "\n"

    def _counters(self) -> Mapping[str, float]:
        counters: Callable[[], Mapping[str, float]] | None = getattr(self._retriever, "counters", None)
        try:
            return {} if counters is None else counters()
        except Exception:  # a user's counters may fail in any way; the others are still worth having
            logger.exception("The retriever's counters failed")
            return {}

    def _allowed(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        right = self._token is None or hmac.compare_digest(given.strip().encode("latin-1"), self._token)
        return right and (self._token is None or scheme.lower() == "bearer")

    async def _body(self, request: Request, hold: Callable[[int], None]) -> bytes | None:
        """None: longer than allowed. Raises :class:`_Busy` and starlette's ``ClientDisconnect``."""
        length = request.headers.get("Content-Length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > self._limits.body_bytes):
            return None
        content = bytearray()
        async for part in request.stream():
            hold(len(part))
            content += part
            if len(content) > self._limits.body_bytes:
                return None
        return bytes(content)


def create_app(
    retriever: Retriever,
    *,
    token: str | None = None,
    default_top_k: int = DEFAULT_TOP_K,
    limits: Limits | None = None,
    ready_filters: Mapping[str, str] | None = None,
) -> Starlette:
    """An ASGI application that answers searches with ``retriever``, which one thread at a time calls.

    Parameters
    ----------
    token
        Demanded as ``Authorization: Bearer`` on all paths but ``/health``; None: nothing is demanded.
    default_top_k
        Passages for each query where a request of another format than ours leaves the number open.
    limits
        Default: :class:`Limits` as it is.
    ready_filters
        Filters of the search that ``/ready`` makes, for a retriever that demands some.

    Raises
    ------
    RetrieverError
        The extra ``serve`` is not installed.
    """
    check_installed()
    from starlette.applications import Starlette
    from starlette.routing import Route

    server = SearchServer(retriever, token, default_top_k, limits or Limits(), ready_filters)
    routes = [Route(path, server.answer, methods=["POST"]) for path in sorted({format_.path for format_ in FORMATS.values()})]
    others = {"/health": server.health, "/ready": server.ready, "/stamp": server.stamp, "/metrics": server.metrics}
    routes += [Route(path, end) for path, end in others.items()]
    return Starlette(routes=routes, lifespan=server.lifespan)


def serve(
    retriever: Retriever,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    token: str | None = None,
    default_top_k: int = DEFAULT_TOP_K,
    limits: Limits | None = None,
    ready_filters: Mapping[str, str] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are still answered. The arguments are those of :func:`create_app`.

    Beyond :data:`CONNECTIONS` requests get 503, and a connection that is silent for :data:`HEAD_SECONDS` is closed; with another ASGI server than this
    function's, that is for the other server to do.

    Raises
    ------
    RetrieverError
        ``host`` is not a loopback address and there is no token; or the extra ``serve`` is not installed.
    """
    check_exposure(host, token)
    check_installed()
    import uvicorn

    app = create_app(retriever, token=token, default_top_k=default_top_k, limits=limits, ready_filters=ready_filters)
    uvicorn.run(
        app,
        host=host,
        port=port,
        http=_protocol(),
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=int(HEAD_SECONDS),
        timeout_graceful_shutdown=STOP_SECONDS,
        access_log=False,
    )


def _protocol() -> type[asyncio.Protocol]:
    """HTTP/1.1 of uvicorn, which lets a client that has sent no whole head wait for ever, with an end to that."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Give a head that is due its time, which further bytes do not prolong."""
            idle = self.cycle is None or self.cycle.response_complete
            if not idle and self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
            elif idle and self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_SECONDS, self._end_if_idle)

        def _end_if_idle(self) -> None:
            self._head_timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Protocol


def check_installed() -> None:
    """Raise :class:`RetrieverError` where a library of the extra ``serve`` is missing."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise RetrieverError(f"a search server needs {' and '.join(missing)}; pip install 'searchqa-gym[serve]'")


def check_exposure(host: str, token: str | None) -> None:
    """Raise :class:`RetrieverError` for a host that can be reached from outside, without a token."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if token is None and not loopback:
        raise RetrieverError(
            f"a server on {host!r} can be reached from outside and needs a token (for `searchqa serve`: $SEARCHQA_RETRIEVER_TOKEN); "
            "give one, or serve on 127.0.0.1"
        )


def _error(message: str) -> bytes:
    return to_json({"error": message})
