"""ZeroSearch's simulated search engine: a language model writes the documents that a search finds, useful or noisy ones."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.curriculum import Curriculum
from searchqa_retrievers.simulated_endpoint import TextEndpoint
from searchqa_retrievers.simulation_prompts import PROMPTS, SimulationPrompt, simulation_prompt
from searchqa_retrievers.stored_answers import digest
from searchqa_retrievers.text_model import TextJob, TextModel, without_thoughts
from searchqa_retrievers.types import Hit, Passage, Retriever, RetrieverError, SearchRequest
from searchqa_retrievers.wrapped import begin_in_forks

NAMESPACE = "searchqa-simulated-1"
"""Begins every ``cache_key``: no answer of a simulator, which was told what is right, may pass for one of a real search."""
MAX_TOKENS = 600
"""Of the answer of five documents or fewer (ZeroSearch); more documents have as many more."""
COUNTERS = ("answers", "noisy", "expected_noisy", "empty", "documents", "cut_prompts")
_WORLD_FILTERS = ("world", "split", "recipe")
# All repetitions in the patterns of heads are bounded, so that the time to read a text is proportional to its length, whatever it says.
_MARKER = re.compile(r"(?P<line>^[^\w\n]{0,12})?(?:\*\*)?\bDoc\s{1,9}(?P<number>\d{1,8})(?!\d)", re.MULTILINE)
_FIRST = re.compile(r"^[^\w\n]{0,12}Doc\s{1,9}1(?!\d)", re.MULTILINE)
_TITLE = re.compile(r"\s{0,9}\(Title:[ \t]{0,9}([^\n]{0,300}?)\)(?=[\s:*]|\Z):?(?:\*\*)?")
_OPEN_TITLE = re.compile(r"\s{0,9}\(Title:[ \t]{0,9}([^\n]{0,300})(?=\n|\Z)")
_MARK = re.compile(r"\s{0,9}(?:\(Title:|[:.](?:\*\*)?)")
_LOOSE_MARK = re.compile(r"[ \t]{0,9}(?:\*\*)?[ \t]{0,9}(?:[:.]|-(?=\s))?(?:\*\*)?")
_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)+(?=\n)")


class TextWriter(Protocol):
    """What writes: :class:`~searchqa_retrievers.simulated_endpoint.TextEndpoint` or :class:`LocalWriter`."""

    def write(self, jobs: Sequence[TextJob]) -> tuple[list[str], int]:
        """A text for each job, and how many prompts were cut."""
        ...

    def stamp(self) -> dict[str, Any]: ...

    def counters(self) -> dict[str, float]: ...

    def close(self) -> None: ...


class LocalWriter:
    """Writes with a :class:`~searchqa_retrievers.text_model.TextModel`; the arguments are its own. A pickled copy loads the model again."""

    def __init__(
        self, checkpoint: str, temperature: float, batch_size: int, device: str | None, dtype: str | None, system: str | None
    ) -> None:
        self._arguments = (checkpoint, temperature, batch_size, device, dtype, system)
        self.system = system
        self.model = TextModel(*self._arguments)

    def write(self, jobs: Sequence[TextJob]) -> tuple[list[str], int]:
        """See :meth:`TextModel.write`."""
        return self.model.write(jobs)

    def stamp(self) -> dict[str, Any]:
        """The model by its weights, wherever it lies."""
        return {
            "model_sha256": self.model.sha256,
            "tokenizer": self.model.tokenizer.name,
            "dtype": self.model.dtype,
            "system": self.system,
            "temperature": self.model.temperature,
        }

    def counters(self) -> dict[str, float]:
        """Nothing of its own."""
        return {}

    def close(self) -> None:
        """The model goes with the last retriever that uses it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalWriter, self._arguments


class Simulated:
    """Answers a query with documents that a language model writes; for the time of training only, since the model is told what is right.

    For each request a uniform draw decides whether its documents are useful or noisy, by the probability of the curriculum at the present step. The
    prompt has the request's own question and the first of its golden answers (as published), where the template asks for them. Draw and sampling
    noise are functions of (``seed``, and the request's ``seed``, ``question_id``, ``turn``, ``query``), whatever else is in the call: repeated
    equal requests have equal answers, as far as the writer keeps to the seeds that it is given (a local model does).

    The written text is cut before ``Doc <top_k + 1>``, and read as ``Doc 1: text``, ``Doc 2: text``, ... or ``Doc 1(Title: title) text``; at the
    beginning of a line any ``Doc 1`` will do, and a title without its bracket is the rest of the line. What comes before the first document is left
    out, and so are thoughts (:func:`~searchqa_retrievers.text_model.without_thoughts`). A text without documents is one passage, an empty text
    none. The id of a passage is a hash of its words, the one at rank r has the score 1/r. A blank query finds nothing and asks nobody.

    ``filters`` may name a generated world, which changes nothing.

    Parameters
    ----------
    writer : TextWriter
    prompt : str
        See :func:`~searchqa_retrievers.simulation_prompts.simulation_prompt`.
    noise : Curriculum
    max_tokens : int or None
        Most tokens of one answer; None: :data:`MAX_TOKENS`.
    seed : int

    Raises
    ------
    RetrieverError
        An argument is out of its range. ``search``: the prompt tells question or answer, and a request lacks it.
    RetrieverUnavailable
        ``search``: the writer is lost.
    """

    name = "simulated"
    filter_keys = _WORLD_FILTERS

    def __init__(
        self,
        writer: TextWriter,
        prompt: str | SimulationPrompt = "sft",
        noise: Curriculum | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise RetrieverError(f"max_tokens must be at least 1, got {max_tokens}")
        self.writer = writer
        self.prompt = prompt if isinstance(prompt, SimulationPrompt) else simulation_prompt(prompt)
        self.noise = noise or Curriculum()
        self.max_tokens = max_tokens
        self.seed = seed
        self.needs_gold = "answer" in self.prompt.fields
        self.follows_progress = not self.noise.fixed
        self._progress = (0, 0)
        self._counts = dict.fromkeys(COUNTERS, 0.0)
        begin_in_forks(self)

    def begin_process(self) -> None:
        """A lock is that of one process."""
        self._lock = threading.Lock()

    @property
    def noise_probability(self) -> float:
        """Of a noisy answer, at the present step."""
        return self.noise.probability(*self._progress)

    def set_progress(self, step: int, total: int) -> None:
        """Follow the curriculum to a step, counted from 1; before the first call the noise is that of its start."""
        self.noise.probability(step, total)  # raises here, and not in the middle of an episode
        self._progress = (step, total)

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        probability = self.noise_probability
        asked = {self._key(request, probability): request for request in reversed(requests)}
        jobs: dict[Hashable, TextJob] = {}
        noisy = 0
        for key, request in reversed(asked.items()):
            self._check(request)
            if request.query.strip():
                is_noisy = self._is_noisy(request, probability)
                noisy += is_noisy
                jobs[key] = self._job(request, is_noisy)
        texts, cut = self.writer.write(list(jobs.values())) if jobs else ([], 0)
        answers: dict[Hashable, list[Hit]] = {key: [] for key in asked}
        for key, text in zip(jobs, texts, strict=True):
            answers[key] = read_documents(text, asked[key].top_k)
        with self._lock:
            self._counts["answers"] += len(jobs)
            self._counts["noisy"] += noisy
            self._counts["expected_noisy"] += probability * len(jobs)
            self._counts["empty"] += sum(not answers[key] for key in jobs)
            self._counts["documents"] += sum(len(answers[key]) for key in jobs)
            self._counts["cut_prompts"] += cut
        return [list(answers[self._key(request, probability)]) for request in requests]

    def cache_key(self, request: SearchRequest) -> Hashable:
        """All that the answer depends on, with whether it is noisy at the present step; never equal to the key of a real search."""
        return self._key(request, self.noise_probability)

    def stamp(self) -> dict[str, Any]:
        """The settings that an answer depends on."""
        return {
            "retriever": self.name,
            "prompt": self.prompt.name,
            "prompt_sha256": self.prompt.sha256,
            "noise": {"start": self.noise.start, "end": self.noise.end, "base": self.noise.base},
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            **self.writer.stamp(),
        }

    def counters(self) -> dict[str, float]:
        """What this process had written, as sums.

        ``search/simulated_answers``, of which ``simulated_noisy`` are noisy (by the curriculum, ``simulated_expected_noisy`` on average: the
        sum of their probabilities) and ``simulated_empty`` have no text; ``simulated_documents`` in them; ``simulated_cut_prompts``: prompts that
        were too long for a local model. An endpoint's tries are in ``search/simulator_calls``, ``_answers``, ``_retries``, ``_seconds``.
        """
        with self._lock:
            counted = {f"search/simulated_{name}": count for name, count in self._counts.items()}
        return {**counted, **self.writer.counters()}

    def close(self) -> None:
        """Close an endpoint's connections."""
        self.writer.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Simulated:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.writer, self.prompt, self.noise, self.max_tokens, self.seed, self._progress)

    def __repr__(self) -> str:
        return f"Simulated({self.writer!r}, prompt={self.prompt.name!r}, noise={self.noise!r})"

    def _check(self, request: SearchRequest) -> None:
        if request.top_k < 1:
            raise RetrieverError(f"top_k must be at least 1, but the request for {request.query[:80]!r} has {request.top_k}")
        other = sorted(set(request.filters or {}) - set(_WORLD_FILTERS))
        if other:
            raise RetrieverError(f"retriever {self.name!r} has no filter {', '.join(other)}; leave it out of `filters`")
        lacking = [
            field
            for field, value in (("question", request.question), ("answer", request.golden_answers))
            if field in self.prompt.fields and not value
        ]
        if lacking:
            raise RetrieverError(
                f"the prompt {self.prompt.name!r} of the simulator tells {' and '.join(lacking)}, which the request for {request.query[:80]!r} lacks. "
                "Search through an environment, on questions with known answers, or give a prompt without it"
            )

    def _key(self, request: SearchRequest, probability: float) -> Hashable:
        told = request.golden_answers[:1] if self.needs_gold else ()
        question = request.question if "question" in self.prompt.fields else None
        origin = (request.query, request.top_k, request.question_id, question, told, request.turn, request.seed)
        return (NAMESPACE, self._settings, origin, self._is_noisy(request, probability))

    @cached_property
    def _settings(self) -> bytes:
        """Stands for all settings but the noise, of which a key has what came of it."""
        return digest(_plain({**self.stamp(), "noise": None}))

    def _draw(self, request: SearchRequest, purpose: str) -> int:
        """A number in [0, 2**63) of the request alone."""
        parts = (NAMESPACE, purpose, self.seed, request.seed, request.question_id, request.turn, request.query)
        return int.from_bytes(digest(*parts)[:8], "little") >> 1

    def _is_noisy(self, request: SearchRequest, probability: float) -> bool:
        """A uniform draw in (0, 1] above the probability gives a useful answer: 0 is never noisy, and 1 always."""
        return (self._draw(request, "quality") + 1) / 2**63 <= probability

    def _job(self, request: SearchRequest, noisy: bool) -> TextJob:
        answer = request.golden_answers[0] if self.needs_gold else ""
        prompt = self.prompt.write(noisy, request.top_k, request.query, request.question or "", answer)
        most = max(MAX_TOKENS, MAX_TOKENS // 5 * request.top_k) if self.max_tokens is None else self.max_tokens
        return TextJob(prompt, self._draw(request, "text"), most, f"Doc {request.top_k + 1}")


def _again(
    writer: TextWriter, prompt: SimulationPrompt, noise: Curriculum, max_tokens: int | None, seed: int, progress: tuple[int, int]
) -> Simulated:
    """A pickled one."""
    retriever = Simulated(writer, prompt, noise, max_tokens, seed)
    retriever._progress = progress
    return retriever


def _plain(value: Any) -> Hashable:
    """Settings as what a cache file takes for a key."""
    if isinstance(value, Mapping):
        return tuple((str(key), _plain(one)) for key, one in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value  # type: ignore[no-any-return]


def read_documents(text: str, top_k: int) -> list[Hit]:
    """The documents of a simulator's text, at most ``top_k``; see :class:`Simulated`."""
    text = without_thoughts(text)
    first = _FIRST.search(text)
    text = text[first.start() :] if first else text
    text = _BLANK_LINES.sub("\n", text.split(f"Doc {top_k + 1}", 1)[0])
    written = [document for document in _documents(text) if any(document)][:top_k]
    return [Hit(Passage(_passage_id(*document), *document), 1 / rank) for rank, document in enumerate(written, start=1)]


def _documents(text: str) -> list[tuple[str, str]]:
    """Title and text of each; the whole text where there is no head."""
    heads: list[tuple[int, int, str | None]] = []  # where a head begins and ends, and its title, where that is closed
    position = 0
    while (marker := _MARKER.search(text, position)) is not None:
        position = marker.end()
        if int(marker["number"]) != len(heads) + 1:  # "as Doc 2 says" within a document begins none
            continue
        title = _TITLE.match(text, position)
        if title is not None and "(Title:" in title[1]:  # the bracket of the next one
            title = None
        if title is None and marker["line"] is None and _MARK.match(text, position) is None:
            continue
        position = title.end() if title else position
        heads.append((marker.start(), position, title[1] if title else None))
    if not heads:
        return [("", text.strip())]
    documents = []
    ends = [*(start for start, _, _ in heads[1:]), len(text)]
    for (_, start, title_text), end in zip(heads, ends, strict=True):
        body = text[start:end]
        if title_text is None:
            mark = _OPEN_TITLE.match(body) or _MARK.match(body) or _LOOSE_MARK.match(body)
            title_text = mark[1] if mark is not None and mark.re is _OPEN_TITLE else ""
            body = body[mark.end() :] if mark is not None else body
        documents.append((title_text.strip().strip('"'), body.strip()))
    return documents


def _passage_id(title: str, text: str) -> str:
    words = f"{title}\n{text}".encode("utf-8", "surrogatepass")
    return f"simulated-{hashlib.sha256(words).hexdigest()[:16]}"


def make(
    corpus: Callable[[], Corpus],
    url: str | Sequence[str] | None = None,
    checkpoint: str | None = None,
    model: str = "",
    prompt: str = "sft",
    noise: Mapping[str, float] | None = None,
    temperature: float = 0.8,
    max_tokens: int | None = None,
    system: str | None = "",
    extra: Mapping[str, Any] | None = None,
    timeout: float = 120.0,
    deadline: float = 600.0,
    retries: int = 3,
    concurrency: int = 16,
    allow_hosts: Sequence[str] = (),
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> Retriever:
    """The retriever ``"simulated"`` of a configuration; it reads no corpus."""
    if (url is None) == (checkpoint is None):
        raise RetrieverError(
            "a simulator is either behind an endpoint, `url`, or a model of transformers, `checkpoint`: give one of the two. "
            f"Prompts: {', '.join(PROMPTS)}, or a template"
        )
    writer: TextWriter
    if url is not None:
        urls = [str(one) for one in ([url] if isinstance(url, str) or not isinstance(url, Sequence) else url)]
        writer = TextEndpoint(
            urls,
            model,
            temperature=temperature,
            system=system,
            extra=extra,
            timeout=timeout,
            deadline=deadline,
            retries=retries,
            concurrency=concurrency,
            allow_hosts=allow_hosts,
        )
    else:
        writer = LocalWriter(str(checkpoint), temperature, batch_size, device, dtype, system)
    return Simulated(writer, prompt, Curriculum.of(noise), max_tokens, seed)
