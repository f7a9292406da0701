"""A simulator behind OpenAI-compatible endpoints: prompts out as chat completions, texts back."""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

from searchqa_retrievers.http_formats import FormatError
from searchqa_retrievers.polite_http import Asker, Call, LoopThread, Pace, Service, check_service_url, read_key, tls_context
from searchqa_retrievers.text_model import TextJob, without_thoughts
from searchqa_retrievers.types import RetrieverError, RetrieverUnavailable

KEY_VARIABLE = "SEARCHQA_SIMULATOR_KEY"
COUNTERS = ("simulator_calls", "simulator_answers", "simulator_retries", "simulator_seconds")
_SET_HERE = ("model", "messages", "max_tokens", "temperature", "seed", "n", "stream")
_KEPT = 1024
"""Most texts of failed calls of :meth:`TextEndpoint.write` that are kept for the next one."""


class TextEndpoint:
    """Asks endpoints for texts: chat completions of one user message, with its text as a list of one part (ZeroSearch).

    Which endpoint a prompt goes to follows from its seed, as the published client draws one at random. Can be shared by threads, pickled, and used
    on both sides of a fork.

    Parameters
    ----------
    urls : sequence of str
        Such as ``http://127.0.0.1:6001``, with or without ``/v1`` and ``/chat/completions``.
    model : str
        Name sent along (published: empty).
    temperature : float
    system : str or None
        System message (published: empty); None: there is none.
    extra : mapping
        Further fields of the request's body.
    timeout, deadline, retries
        Seconds of one try, seconds of one :meth:`write` with all its prompts, and how often a try is repeated.
    concurrency : int
        Most requests under way at each endpoint.
    allow_hosts : sequence of str
        Hosts to which the key may go over plain http.

    Raises
    ------
    RetrieverError
        An argument is out of its range.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str = "",
        *,
        temperature: float = 0.8,
        system: str | None = "",
        extra: Mapping[str, Any] | None = None,
        timeout: float = 120.0,
        deadline: float = 600.0,
        retries: int = 3,
        concurrency: int = 16,
        allow_hosts: Sequence[str] = (),
    ) -> None:
        if not urls or len(set(urls)) < len(urls):
            raise RetrieverError(f"url must name at least one endpoint, each once, got {list(urls)!r}")
        if not 0 <= temperature < float("inf") or concurrency < 1:
            raise RetrieverError(
                f"an endpoint needs a temperature of at least 0 and a concurrency of at least 1, got {temperature}, {concurrency}"
            )
        taken = sorted(set(_SET_HERE) & set(extra or {}))
        if taken:
            raise RetrieverError(f"extra fields may not set {', '.join(taken)}; these follow from the other options")
        secret = read_key(KEY_VARIABLE) is not None
        self.urls = tuple(_address(check_service_url(url, "url", secret, tuple(allow_hosts))) for url in urls)
        self.model = model
        self.temperature = float(temperature)
        self.system = system
        self.extra = dict(extra or {})
        self._services = [Service("simulator", url, (KEY_VARIABLE,), timeout, deadline, retries) for url in self.urls]
        self._concurrency = concurrency
        self._processes: dict[int, _Process] = {}
        self._counted: dict[int, defaultdict[str, float]] = {}

    def write(self, jobs: Sequence[TextJob]) -> tuple[list[str], int]:
        """The texts, without thoughts; and 0, since endpoints refuse what they cannot take in, and cut nothing.

        Where one text cannot be had the others are still waited for and kept, the last 1,024, so that the next call that asks for them need not
        pay for them again. No message quotes an answer, since an endpoint may repeat the prompt, and that tells what is right.

        Raises
        ------
        RetrieverUnavailable
            The tries or the time for one of the texts are spent, or an endpoint refuses its prompt (400, 413, 414, 422).
        RetrieverError
            An endpoint refuses the key or the address.
        """
        process = self._process()
        future = process.thread.run(self._ask_all(process, jobs))
        try:
            return future.result(), 0
        except CancelledError:
            raise RetrieverUnavailable(f"the client of {', '.join(self.urls)} was closed during a search") from None
        finally:
            future.cancel()  # an interrupt of the caller drops the connections

    def stamp(self) -> dict[str, Any]:
        """What a text depends on."""
        return {"url": list(self.urls), "model": self.model, "system": self.system, "temperature": self.temperature, "extra": self.extra}

    def counters(self) -> dict[str, float]:
        """This process's tries, those that were answered, repeated ones, and their seconds."""
        counted = self._counts()
        return {f"search/{name}": float(counted[name]) for name in COUNTERS}

    def close(self) -> None:
        """Close this process's connections; calls under way fail. The next call opens new ones."""
        process = self._processes.pop(os.getpid(), None)
        if process is not None:
            process.thread.close(process.client.aclose())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_processes": {}, "_counted": {}}

    def _counts(self) -> defaultdict[str, float]:
        return self._counted.setdefault(os.getpid(), defaultdict(float, dict.fromkeys(COUNTERS, 0.0)))

    def _process(self) -> _Process:
        """Loop and connections of this process: those of the parent do not survive a fork."""
        pid = os.getpid()
        process = self._processes.get(pid)
        if process is None:
            made = _Process(self._services, self._counts(), self._concurrency)
            process = self._processes.setdefault(pid, made)
            if process is not made:  # another thread was first
                made.thread.close(made.client.aclose())
        return process

    async def _ask_all(self, process: _Process, jobs: Sequence[TextJob]) -> list[str]:
        texts = {job: process.kept.pop(job) for job in dict.fromkeys(jobs) if job in process.kept}
        tasks = {
            job: asyncio.ensure_future(process.askers[job.seed % len(self.urls)].ask(self._call(job), _read))
            for job in dict.fromkeys(jobs)
            if job not in texts
        }
        lost: list[RetrieverUnavailable] = []
        try:
            waiting = set(tasks.values())
            while waiting:
                ended, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
                errors = [error for error in (task.exception() for task in ended) if error is not None]
                for error in errors:
                    if not isinstance(error, RetrieverUnavailable):
                        raise error  # of the key or the address, so the others would fail too
                    lost.append(error)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            texts |= {job: task.result() for job, task in tasks.items() if not task.cancelled() and task.exception() is None}
            if len(texts) < len(set(jobs)):
                process.keep(texts)
        if lost:
            raise RetrieverUnavailable(f"{len(lost)} of the {len(set(jobs))} texts of a search are lost; the first: {lost[0]}")
        return [texts[job] for job in jobs]

    def _call(self, job: TextJob) -> Call:
        messages: list[dict[str, Any]] = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": [{"type": "text", "text": job.prompt}]})
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": job.max_tokens,
            "temperature": self.temperature,
            "seed": job.seed % 2**31,  # servers differ in how large a seed they take
            **self.extra,
        }
        key = read_key(KEY_VARIABLE)
        return Call("POST", body, secret_headers={"Authorization": f"Bearer {key}"} if key else {}, confidential=True)


class _Process:
    """What :class:`TextEndpoint` has once in each process."""

    def __init__(self, services: Sequence[Service], counters: defaultdict[str, float], concurrency: int) -> None:
        import httpx2

        limits = httpx2.Limits(max_connections=concurrency * len(services), max_keepalive_connections=concurrency * len(services))
        # `Asker` keeps the time. No proxy sees what is not encrypted: plain http goes to services of one's own, keys and all.
        self.client = httpx2.AsyncClient(verify=tls_context(), timeout=None, limits=limits, mounts={"http://": None})
        self.askers = [Asker(self.client, service, counters, concurrency, Pace(None)) for service in services]
        self.thread = LoopThread()
        self.kept: OrderedDict[TextJob, str] = OrderedDict()  # only read and written in the thread

    def keep(self, texts: Mapping[TextJob, str]) -> None:
        """Keep texts of a call that failed; the oldest go."""
        self.kept.update(texts)
        while len(self.kept) > _KEPT:
            self.kept.popitem(last=False)


def _address(url: str) -> str:
    """Of chat completions, which are below ``/v1`` where the address has no path."""
    url = url.rstrip("/")
    if url.endswith("/chat/completions"):
        return url
    return f"{url}/chat/completions" if "/" in url.partition("://")[2] else f"{url}/v1/chat/completions"


def _read(body: Any) -> str:
    """The text of an answer, without a model's thoughts."""
    try:
        content = body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise FormatError(f"no choices[0].message.content in {body!r:.200}") from None
    if not isinstance(content, str):
        raise FormatError(f"the content must be a string, got {content!r:.80}")
    return without_thoughts(content)
