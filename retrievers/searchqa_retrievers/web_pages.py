"""Reads pages of the open web for their text, and never one that a search result should not be able to reach."""

from __future__ import annotations

import asyncio
import socket
import time
import weakref
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from email.message import Message
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast
from urllib.parse import urljoin
from urllib.robotparser import RobotFileParser

from searchqa_retrievers.extraction_worker import Extractor
from searchqa_retrievers.polite_http import tls_context
from searchqa_retrievers.readable_text import UnreadablePage, decode, text_of_lines

if TYPE_CHECKING:
    import httpcore2
    import httpx2

T = TypeVar("T")
Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Gives the addresses of a host name and port."""

MOST_REDIRECTS = 5
MOST_ROBOTS_BYTES = 500 * 1024
"""As much of a robots.txt counts, as Google's documentation has it."""
ROBOTS_SECONDS, LOST_ROBOTS_SECONDS = 24 * 3600.0, 600.0
"""How long a robots.txt is believed; and that there was none to be had."""
PAGES_KEPT = 1000
PARALLEL_PER_HOST = 4

_REFUSED_IPV4 = tuple(
    ip_network(network)
    for network in [
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    ]
)
"""IANA's registry of special-purpose IPv4 addresses, and multicast. (Python's own ``is_global`` differs between its releases.)"""
_GLOBAL_IPV6 = ip_network("2000::/3")
_REFUSED_IPV6 = tuple(ip_network(network) for network in ["2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"])
_NAT64 = ip_network("64:ff9b::/96")


class PageRefused(Exception):
    """A page that must not be asked for; says why."""


class PageFailed(Exception):
    """A page that could not be had; says why."""


class RobotsRefused(Exception):
    """The site does not want robots on the page."""


def is_public(address: str) -> bool:
    """Whether it is an address of the open internet: not loopback, private, link-local, shared (CGNAT), multicast or reserved, nor one that wraps such an
    IPv4 address."""
    try:
        parsed: IPv4Address | IPv6Address | None = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address):
        if parsed in _NAT64:
            parsed = IPv4Address(int(parsed) & 0xFFFFFFFF)
        else:
            return parsed.scope_id is None and parsed in _GLOBAL_IPV6 and not any(parsed in network for network in _REFUSED_IPV6)
    return not any(parsed in network for network in _REFUSED_IPV4)


async def resolve(host: str, port: int) -> list[str]:
    """The addresses that the system's resolver gives."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise PageFailed(f"{host} has no address: {error}") from error
    return list(dict.fromkeys(str(row[4][0]) for row in found))


class PageReader:
    """The readable text of pages, within limits of size and time, where the site's robots.txt allows it.

    Every connection, of the first address and of each redirect, goes to an address that was checked, with no second look-up in between: the
    name is resolved when the connection is opened, each of its addresses must be public, and the socket is connected to one of these very
    addresses, while the ``Host`` header, and the name that the certificate must have, stay those of the page. Proxies of the environment are
    not used, since they would resolve names themselves. What was read is kept in memory, and a page asked for several times at once is
    fetched once. Lives in one event loop.

    Parameters
    ----------
    user_agent : str
        Sent with each request; the part before the slash is what robots.txt may name.
    timeout : float
        Longest time for one page with its redirects and robots.txt, in seconds, once its turn has come;
        finding its text has :data:`~searchqa_retrievers.extraction_worker.EXTRACTION_SECONDS` more.
    most_bytes : int
        Reading stops there, counted after decompression; what was read counts.
    most_characters : int
        The text is cut there.
    allow_hosts : iterable of str
        Hosts, or ``host:port``, that may have private addresses and any port.
    parallel : int
        Pages at the same time; of one host at most :data:`PARALLEL_PER_HOST`.
    counters : defaultdict
        Gets ``page_fetches`` (requests, without those for robots.txt), ``page_refused``, ``page_robots_refused``, ``page_failed``, ``page_seconds``.
    resolve : callable
        In place of the system's resolver.
    """

    def __init__(
        self,
        *,
        user_agent: str,
        timeout: float,
        most_bytes: int,
        most_characters: int,
        allow_hosts: Iterable[str],
        parallel: int,
        counters: defaultdict[str, float],
        resolve: Resolver = resolve,
    ) -> None:
        import httpcore2

        self._headers: dict[bytes | str, bytes | str] = {
            "User-Agent": user_agent,
            "Accept": "text/html, text/plain;q=0.5",
            "Accept-Encoding": "gzip",
            "Accept-Language": "en, *;q=0.5",
        }
        self._agent = user_agent.split("/")[0]
        self._timeout = timeout
        self._most_bytes = most_bytes
        self._most_characters = most_characters
        self._allowed_hosts = frozenset(allow_hosts)
        self._counters = counters
        self._free = asyncio.Semaphore(parallel)
        self._free_of_host: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()
        self._pages = _Shared[str | None](PAGES_KEPT, lambda text: 0.0 if text is None else float("inf"))
        self._robots = _Shared[RobotFileParser | bool | None](PAGES_KEPT, lambda robots: ROBOTS_SECONDS if robots else LOST_ROBOTS_SECONDS)
        self._extractor = Extractor()
        checked = _CheckedConnections(resolve, self._is_allowed)
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls_context(),
            max_connections=2 * parallel,  # a page may wait for its robots.txt
            max_keepalive_connections=parallel,
            keepalive_expiry=5.0,
            network_backend=cast("httpcore2.AsyncNetworkBackend", checked),
        )
        self._errors = (
            httpcore2.NetworkError,
            httpcore2.TimeoutException,
            httpcore2.ProtocolError,
            httpcore2.ProxyError,
            httpcore2.UnsupportedProtocol,
            OSError,
            ValueError,  # h11 and the URL classes, of what a hostile redirect says
            zlib.error,
        )

    async def read(self, url: str) -> str | None:
        """The text of a page; None where it cannot, or must not, be had."""
        return await self._pages.get(url, lambda: self._read(url))

    async def close(self) -> None:
        await self._pool.aclose()
        await self._extractor.close()

    async def _read(self, url: str) -> str | None:
        started = None
        try:
            target = self._checked(url)
            async with self._free, self._free_of_host.setdefault(target.host, asyncio.Semaphore(PARALLEL_PER_HOST)):
                started = time.monotonic()
                async with asyncio.timeout(self._timeout):
                    body = await self._get(target, self._most_bytes, page=True)
            text = await self._text(body)
        except RobotsRefused:
            self._counters["page_robots_refused"] += 1
        except PageRefused:
            self._counters["page_refused"] += 1
        except (PageFailed, UnreadablePage, TimeoutError):
            self._counters["page_failed"] += 1
        else:
            return text[: self._most_characters]
        finally:
            if started is not None:
                self._counters["page_seconds"] += time.monotonic() - started
        return None

    async def _text(self, body: _Body) -> str:
        if body.status != 200:
            raise PageFailed(f"status {body.status}")
        kind, charset = _content_type(body.content_type)
        if kind not in ("text/html", "text/plain"):
            raise PageFailed(f"its content type is {kind!r}")
        if b"\0" in body.content[:1024] and body.content[:2] not in (b"\xff\xfe", b"\xfe\xff"):
            raise PageFailed("it is binary")
        page = decode(body.content, charset)
        return text_of_lines(page) if kind == "text/plain" else await self._extractor.text_of_html(page)

    def _checked(self, url: str) -> httpx2.URL:
        """The address, which must be one of the web and of a usual port. Where it leads is checked when the connection is opened."""
        import httpx2

        try:
            target = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise PageRefused(f"not an address: {error}") from None
        if target.scheme not in ("http", "https") or not target.host or target.userinfo:
            raise PageRefused("only http and https, without user")
        if target.port not in (None, 80, 443) and not self._is_allowed(target.raw_host.decode("ascii"), target.port):
            raise PageRefused(f"port {target.port}")
        return target

    def _is_allowed(self, host: str, port: int | None) -> bool:
        return host in self._allowed_hosts or f"{host}:{port}" in self._allowed_hosts

    async def _get(self, target: httpx2.URL, most_bytes: int, page: bool) -> _Body:
        """What the address says in the end. For a page, robots.txt is asked at each step."""
        import httpcore2

        for _ in range(MOST_REDIRECTS + 1):
            if page and not await self._robots_allow(target):
                raise RobotsRefused
            if page:
                self._counters["page_fetches"] += 1
            url = httpcore2.URL(scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path)
            try:
                async with self._pool.stream("GET", url, headers={"Host": target.netloc.decode("ascii"), **self._headers}) as response:
                    headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
                    if response.status not in (301, 302, 303, 307, 308):
                        content = await _content(response.aiter_stream(), headers.get(b"content-encoding", ""), most_bytes)
                        return _Body(response.status, headers.get(b"content-type", ""), content)
                next_url = urljoin(str(target), headers.get(b"location", ""))
            except self._errors as error:
                if isinstance(error, TimeoutError):
                    raise
                raise PageFailed(f"{type(error).__name__}: {error}") from error
            target = self._checked(next_url)
        raise PageFailed(f"more than {MOST_REDIRECTS} redirects")

    async def _robots_allow(self, target: httpx2.URL) -> bool:
        origin = target.copy_with(raw_path=b"/robots.txt", fragment=None)
        robots = await self._robots.get(str(origin), lambda: self._read_robots(origin))
        if robots is None:
            raise PageFailed(f"{origin} was not reached")
        return robots if isinstance(robots, bool) else robots.can_fetch(self._agent, str(target))

    async def _read_robots(self, origin: httpx2.URL) -> RobotFileParser | bool | None:
        """The rules of a site; True where it has none (status 4xx but 429), False where it cannot say now (5xx, 429), None where it is not reached.

        Only True lets pages be read: so Google's documentation of robots.txt has it.
        """
        try:
            async with asyncio.timeout(self._timeout):
                body = await self._get(origin, MOST_ROBOTS_BYTES, page=False)
        except (PageFailed, TimeoutError):
            return None
        if body.status == 429 or body.status >= 500:
            return False
        if body.status != 200:
            return True
        rules = RobotFileParser()
        rules.parse(body.content.decode("utf-8-sig", "replace").splitlines())
        return rules


class _Body(NamedTuple):
    status: int
    content_type: str
    content: bytes


class _CheckedConnections:
    """The network as the connection pool sees it: names are resolved here, and only addresses that pass are connected to."""

    def __init__(self, resolve: Resolver, is_allowed: Callable[[str, int], bool]) -> None:
        import httpcore2

        self._network = httpcore2.AnyIOBackend()
        self._resolve = resolve
        self._is_allowed = is_allowed

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None, socket_options: Any = None
    ) -> httpcore2.AsyncNetworkStream:
        import httpcore2

        addresses = await self._resolve(host.strip("[]"), port)
        if not self._is_allowed(host.strip("[]"), port):
            refused = [address for address in addresses if not is_public(address)]
            if refused:
                raise PageRefused(f"{host} is at {refused[0]}, which is not a public address")
        for address in addresses[:4]:
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise PageFailed(f"{host} has no address" if not addresses else f"no connection to {host}: {failure}")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Shared(Generic[T]):
    """Work that is done once for all who ask at the same time, and whose result is remembered as long as ``keep`` says of it, in seconds."""

    def __init__(self, most: int, keep: Callable[[T], float]) -> None:
        self._most = most
        self._keep = keep
        self._tasks: dict[str, asyncio.Task[T]] = {}
        self._results: OrderedDict[str, tuple[float, T]] = OrderedDict()

    async def get(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        kept = self._results.get(key)
        if kept is not None and time.monotonic() < kept[0]:
            self._results.move_to_end(key)
            return kept[1]
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(work())
            task.add_done_callback(lambda done: self._done(key, done))
        return await asyncio.shield(task)  # one who gives up does not take it from the others

    def _done(self, key: str, task: asyncio.Task[T]) -> None:
        del self._tasks[key]
        if task.cancelled() or task.exception() is not None:
            return
        seconds = self._keep(task.result())
        if seconds > 0:
            self._results[key] = (time.monotonic() + seconds, task.result())
            self._results.move_to_end(key)
            while len(self._results) > self._most:
                self._results.popitem(last=False)


async def _content(parts: Any, encoding: str, most_bytes: int) -> bytes:
    """The body, unpacked, up to ``most_bytes``: no more is ever unpacked, however much a few bytes may stand for."""
    encoding = encoding.strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise PageFailed(f"its encoding {encoding!r} was not asked for")
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS) if "gzip" in encoding else None
    content = bytearray()
    async for part in parts:
        room = most_bytes - len(content)
        content += part[:room] if unpacker is None else unpacker.decompress(part, room)
        if len(content) >= most_bytes or (unpacker is not None and unpacker.eof):
            break
    return bytes(content)


def _content_type(header: str) -> tuple[str, str | None]:
    message = Message()
    message["Content-Type"] = header.replace("\r", " ").replace("\n", " ")
    return (message.get_content_type() if header else ""), message.get_content_charset()
