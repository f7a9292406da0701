"""Asks services that answer in JSON, that charge and limit, and whose keys must show up nowhere."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

from searchqa_retrievers.http_client import retry_after_seconds
from searchqa_retrievers.http_formats import FormatError, from_json, to_json
from searchqa_retrievers.types import RetrieverError, RetrieverUnavailable

if TYPE_CHECKING:
    import ssl

    import httpx2

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
"""Seconds between tries: they double from the first to the longest, each shortened at random by up to a half."""
MOST_BYTES = 2**24
"""An answer longer than this is not read to its end."""
KEY_REFUSALS = ("API_KEY_INVALID", "SUBSCRIPTION_TOKEN_INVALID")
"""Google says with status 400 and Brave with 422 that a key is wrong, in these words."""
QUOTED = 300
"""Characters of an answer that a message quotes."""
_SPENT_WORDS = ("credit", "quota", "billing", "payment", "insufficient funds", "run out of")
_RATE = re.compile(r"\bper[ _-]?(second|sec|minute|min)\b", re.IGNORECASE)
_NAMED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&apos;"}


@dataclass(frozen=True)
class Call:
    """One HTTP request; what is secret goes out with it and is never part of an address that is logged.

    ``parameters`` are the query of a GET and the JSON body of a POST. ``confidential``: they tell what no message may show, so messages quote
    nothing of an answer, in which a server may repeat them, whole or cut, in whatever quoting.
    """

    method: str
    parameters: Mapping[str, Any]
    secret_headers: Mapping[str, str] = field(default_factory=dict)
    secret_parameters: Mapping[str, str] = field(default_factory=dict)
    confidential: bool = False


@dataclass(frozen=True)
class Service:
    """Who is asked, and how patiently.

    Attributes
    ----------
    label : str
        Prefix of its counters, and its name in messages.
    url : str
    key_variables : tuple of str
        Environment variables of its keys, for messages.
    timeout : float
        Longest time for one try, in seconds.
    deadline : float
        Longest time for all tries and pauses, in seconds.
    retries : int
        How often a try is repeated.
    """

    label: str
    url: str
    key_variables: tuple[str, ...]
    timeout: float
    deadline: float
    retries: int

    def __post_init__(self) -> None:
        if self.retries < 0 or not 0 < self.timeout < float("inf") or not 0 < self.deadline < float("inf"):
            raise RetrieverError(
                f"{self.label}: needed are timeout > 0, deadline > 0 and retries >= 0, all finite; "
                f"got {self.timeout}, {self.deadline}, {self.retries}"
            )


class Pace:
    """Lets through at most so many a second, evenly; all at once where ``per_second`` is None."""

    def __init__(self, per_second: float | None) -> None:
        if per_second is not None and not 0 < per_second < float("inf"):
            raise RetrieverError(f"requests_per_second must be above 0, or None for no limit, got {per_second}")
        self._interval = 0.0 if per_second is None else 1 / per_second
        self._next = 0.0

    async def wait(self) -> None:
        now = time.monotonic()
        turn = max(now, self._next)
        self._next = turn + self._interval
        if turn > now:
            await asyncio.sleep(turn - now)


class Asker:
    """Sends calls to one service, at most ``parallel`` at the same time.

    Lives in one event loop. ``counters`` gets ``<label>_calls`` (tries), ``<label>_answers`` (tries that got a status of 2xx, whatever came
    of the rest), ``<label>_retries`` and ``<label>_seconds``.
    """

    def __init__(self, client: httpx2.AsyncClient, service: Service, counters: defaultdict[str, float], parallel: int, pace: Pace) -> None:
        self._client = client
        self._service = service
        self._counters = counters
        self._free = asyncio.Semaphore(parallel)
        self._pace = pace

    async def ask(self, call: Call, read: Callable[[Any], T]) -> T:
        """What ``read`` makes of the answer's JSON; it raises :class:`FormatError` for one that is not as documented.

        A try is repeated after a failed connection, no answer in time, status 408, 429 or 5xx (a ``Retry-After`` is honoured), and a wrong answer.

        Raises
        ------
        RetrieverUnavailable
            The tries or the time are spent; or the service refuses this very request (400, 413, 414, 422), which says nothing about the next one.
        RetrieverError
            The service refuses the key or the address, or says that what was paid for is spent.
        """
        service = self._service
        started = time.monotonic()
        tries, cause = 0, "no answer"
        try:
            async with asyncio.timeout(service.deadline):
                for tries in range(1, service.retries + 2):
                    pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tries - 1)) * random.Random().uniform(0.5, 1.0)
                    try:
                        return await self._try(call, read, tries)
                    except _Again as again:
                        cause = again.cause
                        pause = max(pause, again.pause)
                    if time.monotonic() - started + pause > service.deadline:
                        cause += f"; another try would have to wait {pause:.1f} s, beyond the deadline of {service.deadline:g} s"
                        break
                    if tries <= service.retries:
                        await asyncio.sleep(pause)
        except TimeoutError:
            cause += f"; the deadline of {service.deadline:g} s is over"
        finally:
            self._counters[f"{service.label}_retries"] += max(tries - 1, 0)
        raise RetrieverUnavailable(
            f"{service.label} at {service.url} gave no usable answer in {time.monotonic() - started:.1f} s and {tries} tries: {cause}. "
            "Look at the service and at your plan's limits; for a slow one raise timeout and deadline, for a rate limit lower requests_per_second"
        )

    async def _try(self, call: Call, read: Callable[[Any], T], number: int) -> T:
        import httpx2

        service = self._service
        async with self._free:
            await self._pace.wait()
            self._counters[f"{service.label}_calls"] += 1
            started = time.monotonic()
            try:
                async with asyncio.timeout(service.timeout):
                    status, retry_after, body = await self._send(call)
            except TimeoutError:
                raise _Again(f"no answer in {service.timeout:g} s") from None
            except httpx2.RequestError as error:
                said = "" if call.confidential else f": {_without(str(error), call)[:QUOTED]}"
                raise _Again(f"{type(error).__name__}{said}") from None
            except FormatError as error:
                raise _Again(str(error)) from None
            finally:
                self._counters[f"{service.label}_seconds"] += time.monotonic() - started
        if status == 200:
            try:
                return read(from_json(body))
            except (FormatError, RecursionError):
                said = "" if call.confidential else f": {_fault(body, call, read)}"
                raise _Again(f"an answer that is not as documented{said}") from None
        cause = f"status {status}"
        if not call.confidential:
            cause += f": {_without(body.decode('utf-8', 'replace'), call)[:QUOTED]}"
        variables = " and ".join(f"${name}" for name in service.key_variables)
        if _is_spent(status, body, call):
            raise RetrieverError(
                f"{service.label} at {service.url} says that what was paid for is spent: {cause}. Top up the account of {variables}"
            )
        if status in (408, 429) or status >= 500:
            raise _Again(cause, retry_after_seconds(retry_after))
        if status in (401, 403) or _says(KEY_REFUSALS, body, call):
            raise RetrieverError(f"{service.label} at {service.url} does not accept the key in {variables}: {cause}")
        if status in (400, 413, 414, 422):
            raise RetrieverUnavailable(f"{service.label} at {service.url} refused a request: {cause}")
        raise RetrieverError(
            f"{service.label} at {service.url} refused with {cause}. Check the address, your plan, and the key in {variables}"
        )

    async def _send(self, call: Call) -> tuple[int, str | None, bytes]:
        import httpx2

        url = httpx2.URL(self._service.url)
        content, extensions = None, {}
        headers = {"Accept": "application/json", "Accept-Encoding": "gzip", **call.secret_headers}
        if call.method == "POST":
            content = to_json(dict(call.parameters))
            headers["Content-Type"] = "application/json"
        else:
            query = urlencode({key: _text(value) for key, value in call.parameters.items()})
            # The client logs the address that it is given; the one on the wire has the secrets.
            secrets = "".join(f"&{key}={quote(value, safe='')}" for key, value in call.secret_parameters.items())
            url = url.copy_with(query=query.encode())
            extensions = {"target": url.raw_path + secrets.encode()}
        parts, size = [], 0
        async with self._client.stream(call.method, url, content=content, headers=headers, extensions=extensions) as response:
            self._counters[f"{self._service.label}_answers"] += response.is_success
            async for part in response.aiter_bytes():
                parts.append(part)
                size += len(part)
                if size > MOST_BYTES:
                    raise FormatError(f"an answer of more than {MOST_BYTES} bytes")
            return response.status_code, response.headers.get("Retry-After"), b"".join(parts)


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The certificates that this process trusts; reading them takes longer than a search."""
    import httpx2

    return httpx2.create_ssl_context()


class _Again(Exception):
    """A try failed in a way that the next one may not."""

    def __init__(self, cause: str, pause: float = 0.0) -> None:
        super().__init__(cause)
        self.cause = cause
        self.pause = pause


class LoopThread:
    """An event loop in a thread of its own, so that plain code, and several threads of it, can use asynchronous clients."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="searchqa-online", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Cancel what is under way, do ``last``, and end the thread."""
        self.run(self._end(last)).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self, last: Coroutine[Any, Any, None]) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await last


def read_key(variable: str) -> str | None:
    """The value of an environment variable that holds a secret; None where it is unset or empty.

    Raises :class:`RetrieverError`, without the value, for one that cannot go into a header.
    """
    value = os.environ.get(variable)
    if not value:
        return None
    if not value.isascii() or not value.isprintable() or " " in value:
        raise RetrieverError(f"${variable} must be printable ASCII without blanks, since it goes into a header")
    return value


def check_service_url(url: object, what: str, secret: bool, allow_hosts: tuple[str, ...]) -> str:
    """The address of a service, which must hide no secret of its own, and is https where a key is sent out of this machine."""
    import httpx2

    try:
        parsed = httpx2.URL(url) if isinstance(url, str) else httpx2.URL("")
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query or parsed.fragment:
        raise RetrieverError(
            f"{what} must be like https://example.org/path, without user, query or fragment (keys are read from the environment); "
            + (f"the one given for {parsed.host!r} is not" if parsed.userinfo or parsed.query else f"got {url!r}")
        )
    if secret and parsed.scheme == "http" and not _is_loopback(parsed.host) and parsed.host not in allow_hosts:
        raise RetrieverError(
            f"{what} is {url!r}, over which the key would go unencrypted; use https, or name {parsed.host!r} in allow_hosts if its network is yours"
        )
    return str(url)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _without(text: str, call: Call) -> str:
    """The text with every secret of the call blotted out: servers repeat what they were sent.

    Must come before a text is cut, since half a key is a secret too.
    """
    for secret in (*call.secret_parameters.values(), *(part for value in call.secret_headers.values() for part in value.split())):
        if secret != "Bearer":
            text = _forms(secret).sub("[key]", text)
    return text


@functools.lru_cache(64)
def _forms(secret: str) -> re.Pattern[str]:
    """A secret as it is, or quoted for an address, JSON, HTML or Python, even where the quoting changes within it."""
    characters = []
    for character in secret:
        code = ord(character)
        forms = [re.escape(character), f"%(?:25)*{code:02x}", rf"\\+u00{code:02x}", rf"\\+x{code:02x}", f"&#0*{code};", f"&#x0*{code:x};"]
        forms += [re.escape(_NAMED[character])] if character in _NAMED else []
        characters.append(rf"(?:\\*{forms[0]}|{'|'.join(forms[1:])})")
    return re.compile("".join(characters), re.IGNORECASE)


def _fault(body: bytes, call: Call, read: Callable[[Any], Any]) -> str:
    """What is wrong with an answer, found once more without its secrets, since the messages of readers cut what they quote."""
    try:
        read(_blotted(from_json(_without(body.decode("utf-8", "replace"), call).encode("utf-8", "replace")), call))
    except FormatError as error:
        return str(error)
    except RecursionError:
        return "it is nested too deeply"
    return "it cannot be read, and quoting it might show a key"


def _blotted(value: Any, call: Call) -> Any:
    if isinstance(value, str):
        return _without(value, call)
    if isinstance(value, list):
        return [_blotted(one, call) for one in value]
    if isinstance(value, dict):
        return {_without(key, call): _blotted(one, call) for key, one in value.items()}
    return value


def _is_spent(status: int, body: bytes, call: Call) -> bool:
    """Whether a refusal says that credits or a quota are used up, and not only those of the last seconds."""
    if status not in (400, 402, 403, 429):
        return False
    return _says(_SPENT_WORDS, body, call) and not (status == 429 and _RATE.search(body.decode("utf-8", "replace")))


def _says(words: Sequence[str], body: bytes, call: Call) -> bool:
    """Whether a refusal has one of these words of its own.

    A word of the request says nothing, wherever in it it stands: servers repeat what they are sent, and a policy must not end a run by its words.
    """
    sent = [" ".join(text.lower().split()) for text in _strings(call.parameters)]
    own = [word for word in words if not any(word.lower() in text for text in sent)]
    answer = body.decode("utf-8", "replace")
    return any(re.search(rf"\b{word}s?\b", answer, re.IGNORECASE) for word in own)


def _strings(value: Any) -> Iterator[str]:
    """All strings of a request's parameters."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield str(key)
            yield from _strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
