"""Label each document of a search useful or noisy: by the episode's outcome, by supporting titles, or by a judge."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from searchqa_agents.simulator.rows import Label, RowsError, SearchRow
from searchqa_retrievers.text_model import TextJob
from searchqa_retrievers.types import Passage, RetrieverError

RULES = ("outcome", "titles", "judge")
MAX_UNREADABLE = 0.05
"""The largest share of documents that a judge may leave without a verdict."""

JUDGE_PROMPT = """A person looks for the answer to a question with a search engine. Decide whether one of the documents that it found helps.

Question: {question}
Correct answer: {answer}
Search query: {query}
Document: {document}

A document helps if it states the answer, or a fact that one needs on the way to it. A document that only shares words with the query does not help.
Does this document help? Reply with one word, yes or no."""
AGAIN = "\n\nYour last reply was neither. Write yes or no, and nothing else."
"""Behind the prompt where an earlier reply could not be read."""
_VERDICT = re.compile(r"\W*(yes|no)\W*\Z", re.IGNORECASE)


class JudgeError(RetrieverError):
    """A judge's replies cannot be read."""


class TextWriter(Protocol):
    """Writes a text for each prompt, such as ``searchqa_retrievers.simulated_endpoint.TextEndpoint``."""

    def write(self, jobs: Sequence[TextJob]) -> tuple[list[str], int]: ...


def label_by_outcome(row: SearchRow) -> SearchRow:
    """Every document of an episode that answered rightly is useful, all others are noisy (version 1 of the paper)."""
    label: Label = "useful" if row.right else "noisy"
    return replace(row, labels=(label,) * len(row.documents))


def label_by_titles(row: SearchRow) -> SearchRow:
    """Documents with a supporting title of the question are useful. Raises :class:`RowsError` for a question that has none."""
    if not row.supporting_titles:
        raise RowsError(f"by=titles needs questions with supporting titles, which {row.question_id!r} has not. Use by=outcome or by=judge.")
    return replace(row, labels=tuple("useful" if document.title in row.supporting_titles else "noisy" for document in row.documents))


def read_verdict(reply: str) -> Label | None:
    """``useful`` for a reply that is the word yes, ``noisy`` for no; None for anything else, such as a sentence."""
    found = _VERDICT.match(reply)
    return None if found is None else "useful" if found[1].lower() == "yes" else "noisy"


class Judge:
    """Asks a language model of each document whether it helps to answer the question (later versions of the paper).

    Parameters
    ----------
    writer
        Asks the endpoint, with bounded retries of its own.
    tries
        How often a document is asked about until the reply is yes or no; from the second time on with :data:`AGAIN` behind the prompt.
    again
        Asks from the second time on; None: ``writer``. Give one with a temperature above 0: else the third reply is the second once more.
    judge
        Who is asked, such as addresses and model; the verdicts of another are not taken from ``known``.
    known
        Verdicts of earlier calls, by key; None for a document that was given up.
    on_verdicts
        Called with the verdicts of each batch once they are known, to keep them.
    batch_size
        Documents of one call of ``writer``.
    max_tokens
        Of a reply.
    """

    def __init__(
        self,
        writer: TextWriter,
        *,
        tries: int = 3,
        again: TextWriter | None = None,
        judge: Mapping[str, Any] | None = None,
        known: Mapping[str, Label | None] | None = None,
        on_verdicts: Callable[[Mapping[str, Label | None]], object] | None = None,
        batch_size: int = 64,
        max_tokens: int = 8,
    ) -> None:
        if tries < 1 or batch_size < 1 or max_tokens < 1:
            raise RowsError(f"a judge needs tries, batch_size and max_tokens of at least 1; got {tries}, {batch_size}, {max_tokens}.")
        self.writer = writer
        self.again = writer if again is None else again
        self.tries = tries
        self.judge = dict(judge or {})
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.verdicts: dict[str, Label | None] = dict(known or {})
        self._on_verdicts = on_verdicts or (lambda verdicts: None)

    def label(self, rows: Sequence[SearchRow]) -> list[SearchRow]:
        """The rows with their labels.

        Raises
        ------
        JudgeError
            More than :data:`MAX_UNREADABLE` of the documents have no readable verdict.
        RetrieverUnavailable
            The endpoint is lost. Verdicts up to then were handed to ``on_verdicts``.
        """
        prompts = {}
        for row in rows:
            for document in row.documents:
                prompt = judge_prompt(row, document)
                prompts[judge_key(prompt, self.judge)] = prompt
        asked = [key for key in prompts if key not in self.verdicts]
        for start in range(0, len(asked), self.batch_size):
            batch = asked[start : start + self.batch_size]
            verdicts = self._judged({key: prompts[key] for key in batch})
            self.verdicts |= verdicts
            self._on_verdicts(verdicts)
        lost = [key for key in prompts if self.verdicts[key] is None]
        if len(lost) > MAX_UNREADABLE * len(prompts):
            raise JudgeError(
                f"the judge's replies on {len(lost)} of {len(prompts)} documents are neither yes nor no after {self.tries} tries each; at most "
                f"{MAX_UNREADABLE:.0%} may be left out. Ask a model that follows instructions, or raise judge.tries or judge.max_tokens"
            )
        return [
            replace(row, labels=tuple(self.verdicts[judge_key(judge_prompt(row, d), self.judge)] for d in row.documents)) for row in rows
        ]

    def _judged(self, prompts: Mapping[str, str]) -> dict[str, Label | None]:
        verdicts: dict[str, Label | None] = dict.fromkeys(prompts)
        for attempt in range(self.tries):
            open_keys = [key for key, verdict in verdicts.items() if verdict is None]
            if not open_keys:
                break
            ending = AGAIN if attempt else ""
            jobs = [TextJob(prompts[key] + ending, _seed(key, attempt), self.max_tokens, "\n\n") for key in open_keys]
            replies, _ = (self.again if attempt else self.writer).write(jobs)
            verdicts.update((key, read_verdict(reply)) for key, reply in zip(open_keys, replies, strict=True))
        return verdicts


def judge_prompt(row: SearchRow, document: Passage) -> str:
    """What a judge is asked about one document."""
    text = f"{document.title}\n{document.text}" if document.title else document.text
    return JUDGE_PROMPT.format(question=row.question, answer=row.golden_answer, query=row.query, document=text)


def judge_key(prompt: str, judge: Mapping[str, Any]) -> str:
    """Names a question to a judge; equal ones are asked once."""
    asked = f"{json.dumps(judge, sort_keys=True)}\n{prompt}"
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _seed(key: str, attempt: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{key} {attempt}".encode()).digest()[:8], "little") >> 1


def label_counts(rows: Iterable[SearchRow]) -> dict[str, int]:
    """How many documents have each label; ``left_out``: none."""
    counts = {"useful": 0, "noisy": 0, "left_out": 0}
    for row in rows:
        for label in row.labels or ():
            counts[label or "left_out"] += 1
    return counts


def verdict_lines(verdicts: Mapping[str, Any]) -> str:
    """Verdicts as lines of JSON, to be appended to a file."""
    return "".join(json.dumps({"key": key, "verdict": verdict}) + "\n" for key, verdict in verdicts.items())
