"""The language model behind HTTP: vLLM, SGLang, or any OpenAI-compatible completion server.

The inference engines need other versions of torch and transformers than this package, so they run as processes of their own. Each segment is one
request with the whole context (the engines cache prefixes). Requests run at the same time, on keep-alive connections of an event loop in a background
thread; segments are handed over as they come.

How the server comes to the weights of the policy in training is not done here: restart it with the new checkpoint, or use the engine's own way (vLLM: sleep
mode and its weight transfer; SGLang: ``POST /update_weights_from_disk`` with a checkpoint's folder); the adapters for distributed engines do it
by themselves. :mod:`searchqa_agents.completion_protocols` says what is sent, and what becomes of log-probabilities.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

import httpx2
import numpy as np

from searchqa_agents.completion_protocols import PROTOCOLS, Messages, Prompt, Written
from searchqa_agents.language_model import FloatArray, IntArray, Sampling, Segment, Session
from searchqa_agents.tool_loop import Conversation, begin
from searchqa_envs.dialects import Dialect, get_dialect
from searchqa_envs.errors import ConfigurationError, SearchQAError
from searchqa_envs.tokenizers.base import Tokenizer
from searchqa_retrievers.http_client import retry_after_seconds

Made = TypeVar("Made")

CONNECT_SECONDS = 10.0
"""Longest wait for a connection."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds between tries: they double from the first to the longest, each shortened at random by up to a half."""
MOST_BYTES = 2**26
"""An answer longer than this is not read to its end."""


class ServerUnavailable(SearchQAError, ConnectionError):
    """A completion server gave no answer within the tries and the time allowed."""


class ServerAnswerError(SearchQAError, ValueError):
    """A completion server refused a request, or its answer is none that can be used. Asking again would not help."""


class RequestRefused(ServerAnswerError):
    """A completion server refused a request with a status that can be about this one alone: 400, 413 or 422."""


REFUSALS = (400, 413, 422)
"""The statuses of :class:`RequestRefused`; others (no such address or model, a wrong key) are about all requests."""


class CompletionServerLM:
    """A completion server as a :class:`~searchqa_agents.language_model.LanguageModel`.

    With ``vllm`` and ``sglang`` contexts go out as ids, and segments are the very ids that were sampled, up to the token that completes a closing
    tag; where the tag ends within that token's text, the token is kept whole.

    The other protocols exchange text, for evaluation and for collecting demonstrations: the text is encoded once, and trajectories are marked
    ``retokenized``. OpenAI's API leaves the stop string out, so it is put back: the one that the server names, else the closing tag of what was
    opened last, else end of sequence. (Where a model ends the sequence within an open tag, this closes it; text does not tell the difference.)
    The server's tokenizer must not have the tags as special tokens, which such servers hide. With ``tools`` the model calls tools and writes no tags
    (:mod:`searchqa_agents.tool_loop`).

    Parameters
    ----------
    url
        Where the server is, such as ``http://localhost:8000``, with or without ``/v1``.
    tokenizer
        The environment's. With ``vllm`` and ``sglang`` it must be that of the server's model.
    dialect
        The environment's: its tags are put back.
    protocol
        ``vllm``, ``sglang``, ``completions``, ``chat`` or ``tools``.
    model
        The model's name on the server, for servers that ask for one.
    logprobs
        Which log-probabilities the server was started to give, ``raw`` or ``processed``; default: as vLLM and SGLang do.
    concurrency
        Most requests at the same time.
    timeout
        Longest time for one answer, in seconds.
    retries
        How often a request is sent again after a failed connection, no answer in time, status 429 or 5xx.
    deadline
        Longest time for one segment with all its tries and pauses, in seconds.
    api_key
        Sent as ``Authorization: Bearer``.

    Notes
    -----
    A request's seed is a function of the episode's seed and the context's length, so the same request has the same noise in any batch, if the
    server's noise is a function of it (vLLM; SGLang under ``--enable-deterministic-inference``). Equal trajectories take equal arithmetic too,
    which engines do not promise across batches.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Tokenizer,
        dialect: str | Dialect,
        *,
        protocol: str = "vllm",
        model: str | None = None,
        logprobs: str | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        retries: int = 6,
        deadline: float = 1200.0,
        api_key: str | None = None,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise ConfigurationError(f"protocol must be one of {sorted(PROTOCOLS)}; got {protocol!r}.")
        if logprobs not in (None, "raw", "processed"):
            raise ConfigurationError(f"logprobs must be raw or processed, as the server was started; got {logprobs!r}.")
        if concurrency < 1 or retries < 0 or not timeout > 0 or not deadline > 0:
            raise ConfigurationError(
                "A completion server needs concurrency >= 1, retries >= 0, timeout > 0, deadline > 0; "
                f"got {concurrency}, {retries}, {timeout}, {deadline}."
            )
        self.protocol = PROTOCOLS[protocol]
        self.returns_ids = self.returns_logprobs = self.protocol.returns_ids
        self.logprobs_mode = logprobs or self.protocol.logprobs_mode
        self.url = _base(url) + self.protocol.path
        self.tokenizer = tokenizer
        self.dialect = get_dialect(dialect)
        self.chat, self.tools = protocol == "chat", protocol == "tools"
        self._model = model
        self._timeout, self._retries, self._deadline = timeout, retries, deadline
        self._free = asyncio.Semaphore(concurrency)
        self._client = httpx2.AsyncClient(
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )

    def start(self, seeds: Sequence[int], sampling: Sampling) -> CompletionServerSession:
        """Be ready for as many episodes as there are seeds. Nothing is sent yet."""
        if sampling.top_k and not self.returns_ids:
            raise ConfigurationError(
                f"OpenAI-compatible servers know no top_k; got {sampling.top_k}. Use top_p, or protocol vllm or sglang."
            )
        return CompletionServerSession(self, seeds, sampling)

    def close(self) -> None:
        """Close the connections; requests under way fail."""
        asyncio.run_coroutine_threadsafe(self._client.aclose(), _event_loop(os.getpid())).result()

    def ask(self, prompt: Prompt, sampling: Sampling, seed: int) -> Future[Segment]:
        """Send one request; the future raises :class:`ServerUnavailable` or :class:`ServerAnswerError`. Cancelling it drops the connection."""
        return asyncio.run_coroutine_threadsafe(self._ask(prompt, sampling, seed), _event_loop(os.getpid()))

    def write(self, prompt: Prompt, sampling: Sampling, seed: int) -> Future[Written]:
        """:meth:`ask` for what the server wrote, as it is: no segment is made of it."""
        return asyncio.run_coroutine_threadsafe(self._written(prompt, sampling, seed, lambda written: written), _event_loop(os.getpid()))

    def ask_counted(self, prompt: Prompt, sampling: Sampling, seed: int) -> Future[tuple[Segment, dict[str, float]]]:
        """:meth:`ask`, with the numbers of tokens as :meth:`CompletionServerSession.usage` names them: the server's own, where it tells them."""
        return asyncio.run_coroutine_threadsafe(self._counted(prompt, sampling, seed), _event_loop(os.getpid()))

    async def _ask(self, prompt: Prompt, sampling: Sampling, seed: int) -> Segment:
        segment, _ = await self._counted(prompt, sampling, seed)
        return segment

    async def _counted(self, prompt: Prompt, sampling: Sampling, seed: int) -> tuple[Segment, dict[str, float]]:
        made = self._id_segment if self.returns_ids else self._text_segment

        def counted(written: Written) -> tuple[Segment, dict[str, float]]:
            segment = made(written, sampling)
            told: dict[str, int | None] = {"prompt_tokens": written.prompt_tokens, "generated_tokens": written.generated_tokens}
            if self.returns_ids:
                assert isinstance(prompt.content, list)
                told = {"prompt_tokens": len(prompt.content), "generated_tokens": len(segment.ids), "sampled_tokens": len(segment.ids)}
            return segment, {name: float(count) for name, count in told.items() if count is not None}

        return await self._written(prompt, sampling, seed, counted)

    async def _written(self, prompt: Prompt, sampling: Sampling, seed: int, made: Callable[[Written], Made]) -> Made:
        """What is ``made`` of the server's answer."""
        body = self.protocol.body(prompt, sampling, seed) | ({"model": self._model} if self._model is not None else {})
        async with self._free:
            content = await self._post(json.dumps(body).encode())
        try:
            return made(self.protocol.read(json.loads(content), prompt))
        except ValueError as error:  # json.JSONDecodeError is one
            raise ServerAnswerError(
                f"The answer of {self.url} cannot be used: {error}. Choose the protocol that the server speaks "
                f"({', '.join(PROTOCOLS)}), and give the environment the tokenizer of its model."
            ) from error

    # -- HTTP --------------------------------------------------------------------------------------------------------------------------------

    async def _post(self, body: bytes) -> bytes:
        """The content of the answer with status 200."""
        loop = asyncio.get_running_loop()
        started, tries, cause = loop.time(), 0, "no answer"
        try:
            async with asyncio.timeout(self._deadline):
                while tries <= self._retries:
                    tries += 1
                    pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tries - 1)) * random.Random().uniform(0.5, 1.0)
                    try:
                        async with asyncio.timeout(self._timeout):
                            status, retry_after, content = await self._post_once(body)
                    except TimeoutError:
                        cause = f"no answer in {self._timeout:g} s"
                    except httpx2.RequestError as error:
                        cause = f"{type(error).__name__}: {error}"
                    else:
                        if status == 200:
                            return content
                        cause = f"status {status}: {content[:500].decode('utf-8', 'replace')}"
                        if status != 429 and status < 500:
                            raise (RequestRefused if status in REFUSALS else ServerAnswerError)(
                                f"{self.url} refused a request with {cause}. Check agent.protocol, agent.model, the key in "
                                "$SEARCHQA_SERVER_KEY, and that the server takes env.max_context_tokens + env.max_segment_tokens."
                            )
                        pause = max(pause, retry_after_seconds(retry_after))
                    if tries > self._retries or loop.time() - started + pause > self._deadline:
                        break
                    await asyncio.sleep(pause)
        except TimeoutError:
            cause += f"; the deadline of {self._deadline:g} s is over"
        raise ServerUnavailable(
            f"{self.url} did not answer in {loop.time() - started:.1f} s and {tries} tries: {cause}. "
            "Start the server or correct agent.url; for a slow one lower agent.concurrency or raise agent.timeout and agent.deadline."
        )

    async def _post_once(self, body: bytes) -> tuple[int, str | None, bytes]:
        parts, size = [], 0
        async with self._client.stream("POST", self.url, content=body) as response:
            async for part in response.aiter_bytes():
                parts.append(part)
                size += len(part)
                if size > MOST_BYTES:
                    raise ServerAnswerError(f"{self.url} answers with more than {MOST_BYTES} bytes. Is it a completion server?")
            return response.status_code, response.headers.get("Retry-After"), b"".join(parts)

    # -- segments ----------------------------------------------------------------------------------------------------------------------------

    def _id_segment(self, written: Written, sampling: Sampling) -> Segment:
        ids, logprobs = written.ids, written.logprobs
        assert ids is not None
        assert logprobs is not None
        if not 1 <= len(ids) <= sampling.max_new_tokens or len(logprobs) != len(ids):
            raise ValueError(
                f"1 to {sampling.max_new_tokens} tokens were asked for, each with its log-probability; got {len(ids)} and {len(logprobs)}"
            )
        if not 0 <= min(ids) <= max(ids) < self.tokenizer.vocab_size:
            outside = next(token for token in ids if not 0 <= token < self.tokenizer.vocab_size)
            raise ValueError(f"token id {outside} is outside the vocabulary of {self.tokenizer.name!r} ({self.tokenizer.vocab_size} ids)")
        ours = self.tokenizer.decode(ids)
        if not _same_text(ours, written.text):
            raise ValueError(f"the server reads its ids as {written.text[:80]!r}, tokenizer {self.tokenizer.name!r} as {ours[:80]!r}")
        count = _used(ids, sampling, self.tokenizer)
        kept = np.array(logprobs[:count], dtype=np.float32)
        return Segment(np.array(ids[:count], dtype=np.int32), *self._placed(kept, sampling))

    def _placed(self, values: FloatArray, sampling: Sampling) -> tuple[FloatArray | None, FloatArray | None]:
        """``logprobs`` and ``sampling_logprobs`` of a segment; see :mod:`searchqa_agents.completion_protocols`."""
        if self.logprobs_mode == "raw":
            return (values if sampling.temperature in (0, 1) and not sampling.truncated else None), None
        if not sampling.truncated:
            return values, None
        return None, (values if self.protocol.processed_is_truncated else None)

    def _text_segment(self, written: Written, sampling: Sampling) -> Segment:
        if written.ids is not None:
            return Segment(np.array(written.ids, dtype=np.int32))
        text, control = written.text, []
        ends = [text.find(stop) + len(stop) for stop in sampling.stop if stop in text]
        if ends:
            text = text[: min(ends)]
        elif written.ended:
            closer = written.stop if written.stop in sampling.stop else self._open_tag(text)
            if closer is not None:
                text += closer
            else:
                control = [self.tokenizer.eos_id]
        ids = self.tokenizer.encode(text) + control
        return Segment(np.array(ids[: sampling.max_new_tokens], dtype=np.int32))

    def _open_tag(self, text: str) -> str | None:
        """The closing tag of what was opened last, if anything was."""
        dialect = self.dialect
        pairs = ((dialect.search_open, dialect.search_close), (dialect.answer_open, dialect.answer_close))
        opened, closer = max((text.rfind(opener), closer) for opener, closer in pairs)
        return closer if opened >= 0 else None


class CompletionServerSession(Session):
    """Episodes under way on a :class:`CompletionServerLM`.

    A failed request ends the session: the segments that came together with the failure are handed over first, the next ``collect`` withdraws the other requests
    and raises.
    """

    def __init__(self, lm: CompletionServerLM, seeds: Sequence[int], sampling: Sampling) -> None:
        self._lm = lm
        self._seeds = seeds
        self._sampling = sampling
        self._waiting: dict[Future[tuple[Segment, dict[str, float]]], int] = {}
        self._failing = False
        self._told: dict[int, list[dict[str, float]]] = {}  # by row: the numbers of tokens of each request
        self._seen: dict[int, IntArray] = {}  # by row: the last context, for protocols of text
        self._messages: dict[int, Messages] = {}
        self._conversations: dict[int, Conversation] = {}

    def submit(self, rows: Sequence[int], contexts: Sequence[IntArray], infos: Sequence[Mapping[str, Any]]) -> None:
        """See :meth:`Session.submit`. ``infos`` are read by ``chat``, where they say where a segment ends, and by ``tools``."""
        if set(rows) & set(self._waiting.values()) or len(set(rows)) != len(rows):
            raise ValueError(f"Each row writes one segment at a time; collect those of {list(rows)} before asking for more.")
        tokenizer = self._lm.tokenizer
        for row, context, info in zip(rows, contexts, infos, strict=True):
            prompt = Prompt(self._content(row, context, info), tokenizer.eos_id, tokenizer.pad_id)
            seed = int(np.random.SeedSequence((self._seeds[row], len(context))).generate_state(1)[0]) >> 1
            self._waiting[self._lm.ask_counted(prompt, self._sampling, seed)] = row

    def collect(self) -> list[tuple[int, Segment]]:
        """See :meth:`Session.collect`. Raises :class:`ServerUnavailable` or :class:`ServerAnswerError`."""
        if not self._waiting:
            return []
        done, _ = wait(self._waiting, return_when=FIRST_COMPLETED)
        failed = [future for future in done if future.exception() is not None]
        if failed and (self._failing or len(failed) == len(done)):
            for future in self._waiting:
                future.cancel()
            self._waiting.clear()
            failed[0].result()
        self._failing = bool(failed)
        segments = []
        for future in done:
            if future not in failed:
                row, (segment, told) = self._waiting.pop(future), future.result()
                self._told.setdefault(row, []).append(told)
                segments.append((row, segment))
        return segments

    def usage(self, row: int) -> Mapping[str, float]:
        """``calls``, and ``prompt_tokens`` and ``generated_tokens`` where every answer told them: with text protocols they are the server's own counts.

        ``sampled_tokens``, with ids alone, are those that were sampled into the context.
        """
        told = self._told.get(row, [])
        names = ("prompt_tokens", "generated_tokens", "sampled_tokens")
        sums = {name: sum(each[name] for each in told) for name in names if told and all(name in each for each in told)}
        return {"calls": float(len(told))} | sums

    def release(self, rows: Sequence[int]) -> None:
        """Forget the conversations of these rows."""
        for row in rows:
            self._seen.pop(row, None)
            self._told.pop(row, None)
            self._messages.pop(row, None)
            self._conversations.pop(row, None)

    def _content(self, row: int, context: IntArray, info: Mapping[str, Any]) -> list[int] | str | Messages | Conversation:
        if self._lm.returns_ids:
            return [int(token) for token in context]
        tokenizer = self._lm.tokenizer
        if self._lm.tools:
            conversation = self._conversations.get(row)
            if conversation is None:
                conversation = begin(tokenizer, self._lm.dialect, self._sampling.max_new_tokens, info)
                self._conversations[row] = conversation
            else:
                conversation.observe(tokenizer.decode(info["turn_record"].env_tokens.tolist()), info["action"])
            return conversation
        before = self._seen.get(row)
        self._seen[row] = context
        if not self._lm.chat:
            if before is None and (context == tokenizer.eos_id).any():
                raise ConfigurationError(
                    f"The prompt holds end-of-sequence tokens of {tokenizer.name!r}, which text cannot carry. Use protocol chat, vllm or sglang, "
                    "or a tokenizer without a chat template."
                )
            return tokenizer.decode(context.tolist())
        if before is None:
            self._messages[row] = _first_messages(tokenizer, self._lm.dialect, tokenizer.decode(context.tolist()))
        else:
            middle = len(before) + info["turn_record"].segment_tokens_used
            self._messages[row] += [
                {"role": "assistant", "content": tokenizer.decode(context[len(before) : middle].tolist())},
                {"role": "user", "content": tokenizer.decode(context[middle:].tolist())},
            ]
        return list(self._messages[row])


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of this process, in a thread that ends with it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="completion-server", daemon=True).start()
    return loop


def _base(url: str) -> str:
    """The address without ``/v1``."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigurationError(f"The address of a completion server is like http://localhost:8000; got {url!r}.")
    return url.rstrip("/").removesuffix("/v1")


def _used(ids: Sequence[int], sampling: Sampling, tokenizer: Tokenizer) -> int:
    """How many ids count: up to the one that completes a stop string or is end of sequence; an engine may have sampled a few more."""
    stops = [stop.encode() for stop in sampling.stop]
    tail, length = b"", max(map(len, stops), default=1) - 1  # bytes that may be the beginning of a stop string
    for place, (token, piece) in enumerate(zip(ids, tokenizer.pieces(ids), strict=True), start=1):
        text = tail + piece
        if token == tokenizer.eos_id or any(stop in text for stop in stops):
            return place
        tail = text[-length:] if length else b""
    return len(ids)


def _same_text(ours: str, theirs: str) -> bool:
    """Whether one is the beginning of the other: servers cut at the stop string, and hold unfinished characters back. Blanks are theirs to choose."""
    ours, theirs = ("".join(text.replace("\ufffd", "").split()) for text in (ours, theirs))
    return ours.startswith(theirs) or theirs.startswith(ours)


def _first_messages(tokenizer: Tokenizer, dialect: Dialect, text: str) -> Messages:
    """The messages of a prompt: the environment has put them into the tokenizer's chat template, where there is one, and the server has its own.

    What a prompt lets the reply begin with ("<think>" of R1-Searcher's for instruct models) is left out: OpenAI's API cannot say it.
    """
    chat_prompt = getattr(tokenizer, "chat_prompt", None)
    if chat_prompt is not None and chat_prompt("") is not None:
        read = _filled(tokenizer, chat_prompt("\0"), text)
        if read is None and dialect.system_prompts:
            read = _filled(tokenizer, chat_prompt("\0", "\0"), text.removesuffix(dialect.think_open))
        *system, user = read or [text]
    else:
        labels = (dialect.prompts[name].partition(dialect.question_label) for name in dialect.system_prompts)
        in_parts = any(text.startswith(rules + label) for rules, label, _ in labels)
        *system, user = dialect.messages(text)[:2] if in_parts else (text,)
    return [*({"role": "system", "content": rules} for rules in system), {"role": "user", "content": user}]


def _filled(tokenizer: Tokenizer, template: str, text: str) -> list[str] | None:
    """What stands in a text for each zero character of a template; None if the text does not follow it."""
    first, *others, last = (tokenizer.decode(tokenizer.encode(part)) for part in template.split("\0"))  # as far as ids have text
    if not (text.startswith(first) and text.endswith(last)):
        return None
    found, rest = [], text[len(first) : len(text) - len(last)]
    for between in others:
        value, separator, rest = rest.partition(between)
        if not separator:
            return None
        found.append(value)
    return [*found, rest]
