"""Scripted agents: baselines, the world's oracle, and the lazy and the shy oracle that demonstrate.

An agent is a generator function: it yields the text of a segment and gets back the environment's info. It acts in rollouts like any language
model; its text is encoded once, by itself, so the ids are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from searchqa_agents.language_model import IntArray, Sampling, Segment, Session
from searchqa_envs.dialects import Dialect, get_dialect
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.questions import Question, QuestionSource
from searchqa_envs.tokenizers.base import Tokenizer

Info = Mapping[str, Any]


class Task(NamedTuple):
    """What an agent has to act on: the question, the dialect to write in, and its own randomness."""

    question: Question
    dialect: Dialect
    rng: np.random.Generator

    def search(self, query: str) -> str:
        """Text that searches."""
        return f"{self.dialect.search_open}{query}{self.dialect.search_close}"

    def answer(self, text: str) -> str:
        """Text that answers."""
        return f"{self.dialect.answer_open}{text}{self.dialect.answer_close}"

    def think(self, text: str) -> str:
        """Text that reasons."""
        return f"{self.dialect.think_open}{text}{self.dialect.think_close}"


Script = Callable[[Task], Generator[str, Info, None]]


def direct(guess: str = "") -> Script:
    """Answers at once, always the same."""

    def script(task: Task) -> Generator[str, Info, None]:
        yield task.answer(guess)

    return script


def search_once(task: Task) -> Generator[str, Info, None]:
    """Searches for the question as it stands and answers with the title of the first passage."""
    info = yield task.search(task.question.question)
    passages = info["turn_record"].passages
    yield task.answer(passages[0].title if passages else "")


def oracle(lazy: float = 0.0) -> Script:
    """Follows the question's gold chain: searches for each link, notes what the page says, answers at the end.

    At each link that asks for another search it answers early, with what it has just read, with probability ``lazy``: demonstrations that
    show every depth of search and leave it to reinforcement learning to find that searching on pays.
    """
    if not 0 <= lazy <= 1:
        raise ConfigurationError(f"lazy is a probability; got {lazy}.")

    def script(task: Task) -> Generator[str, Info, None]:
        chain = gold_chain(task)
        notes = ""
        for link, following in zip(chain, [*chain[1:], None], strict=True):
            yield notes + task.search(link["query"])
            notes = task.think(noted(link))
            if following is not None and task.rng.random() < lazy:
                yield notes + task.answer(_guess(task, link["object"]))
        yield notes + task.answer(task.question.golden_answers[0])

    return script


def shy_oracle(shy: float = 0.7, lazy: float = 0.6) -> Script:
    """The oracle as R1-Searcher writes: all searches inside one stretch of reasoning, which closes before the answer.

    With probability ``shy`` it answers at once, without a search, with the name that the question is about, which is wrong: a start that searches too
    seldom, like the Llama of R1-Searcher's paper (arXiv 2503.05592), so that a first stage that rewards searching has something to raise.
    ``lazy`` is that of :func:`oracle`.
    """
    for name, value in (("shy", shy), ("lazy", lazy)):
        if not 0 <= value <= 1:
            raise ConfigurationError(f"{name} is a probability; got {value}.")

    def script(task: Task) -> Generator[str, Info, None]:
        dialect, chain = task.dialect, gold_chain(task)
        if task.rng.random() < shy:
            yield dialect.think_open + dialect.think_close + task.answer(_guess(task, chain[0]["query"]))
            return
        notes = dialect.think_open
        for link, following in zip(chain, [*chain[1:], None], strict=True):
            yield notes + task.search(link["query"])
            notes = noted(link)
            if following is not None and task.rng.random() < lazy:
                yield notes + dialect.think_close + task.answer(_guess(task, link["object"]))
        yield notes + dialect.think_close + task.answer(task.question.golden_answers[0])

    return script


def gold_chain(task: Task) -> Sequence[Mapping[str, Any]]:
    """The question's gold chain. Raises ``ConfigurationError`` where it has none."""
    chain: Sequence[Mapping[str, Any]] | None = task.question.metadata.get("chain")
    if not chain:
        raise ConfigurationError(f"The oracle needs a gold chain, which question {task.question.id!r} has not; use SearchQA-World-v0.")
    return chain


def noted(link: Mapping[str, Any]) -> str:
    """What the page of a link says about the question.

    "Rava 's country Tuzo ." repeats the question's own words: which relation to read can be copied, and is learned in far fewer steps.
    """
    read = [link, *([link["also"]] if "also" in link else [])]
    return "".join(f" {link['query']} 's {fact['relation']} {fact['object']} ." for fact in read)


def _guess(task: Task, last_read: str) -> str:
    return str(task.rng.choice(["yes", "no"])) if task.question.metadata.get("type") == "yes_no" else last_read


SCRIPTS: dict[str, Script] = {
    "direct": direct(),
    "search_once": search_once,
    "oracle": oracle(),
    "lazy_oracle": oracle(lazy=0.6),
    "shy_oracle": shy_oracle(),
    "shyest_oracle": shy_oracle(shy=0.9),
}


NEED_CHAIN = ("oracle", "lazy_oracle", "shy_oracle", "shyest_oracle")
"""The scripts that play only questions with a gold chain."""


class ScriptedAgent:
    """A script as a :class:`~searchqa_agents.language_model.LanguageModel`.

    Parameters
    ----------
    script
        A name of ``SCRIPTS`` or a generator function from a :class:`Task`.
    source
        Where the questions come from (``venv.unwrapped.source``).
    tokenizer, dialect
        The environment's.
    """

    returns_ids = True
    returns_logprobs = False

    def __init__(self, script: str | Script, source: QuestionSource, tokenizer: Tokenizer, dialect: str | Dialect) -> None:
        if isinstance(script, str):
            if script not in SCRIPTS:
                raise ConfigurationError(f"script must be one of {sorted(SCRIPTS)} or a generator function; got {script!r}.")
            script = SCRIPTS[script]
        self.script = script
        self.source = source
        self.tokenizer = tokenizer
        self.dialect = get_dialect(dialect)

    @classmethod
    def for_env(cls, script: str | Script, env: Any) -> ScriptedAgent:
        """The agent for a (vector) environment: its questions, tokenizer and dialect."""
        base = env.unwrapped
        return cls(script, base.source, base.tokenizer, base.dialect)

    def start(self, seeds: Sequence[int], sampling: Sampling) -> ScriptedSession:
        """Begin as many episodes as there are seeds."""
        return ScriptedSession(self, seeds, sampling)


class ScriptedSession(Session):
    """Scripts under way."""

    def __init__(self, agent: ScriptedAgent, seeds: Sequence[int], sampling: Sampling) -> None:
        self._agent = agent
        self._sampling = sampling
        self._seeds = seeds
        self._running: dict[int, Generator[str, Info, None]] = {}
        self._written: list[tuple[int, Segment]] = []

    def submit(self, rows: Sequence[int], contexts: Sequence[IntArray], infos: Sequence[Info]) -> None:
        """Write the next segment of each row's script; end of sequence from one that has nothing left to say."""
        for row, context, info in zip(rows, contexts, infos, strict=True):
            text = self._first(row, context, info) if row not in self._running else self._next(row, info)
            ids = [self._agent.tokenizer.eos_id] if text is None else self._agent.tokenizer.encode(text)
            self._written.append((row, Segment(np.array(ids[: self._sampling.max_new_tokens], dtype=np.int32))))

    def collect(self) -> list[tuple[int, Segment]]:
        """All segments asked for."""
        written, self._written = self._written, []
        return written

    def release(self, rows: Sequence[int]) -> None:
        """Forget the scripts of these rows."""
        for row in rows:
            self._running.pop(row, None)

    def _first(self, row: int, context: IntArray, info: Info) -> str:
        agent = self._agent
        question = agent.source[agent.source.index_of(info["question_id"])]
        self._running[row] = agent.script(Task(question, agent.dialect, np.random.default_rng(self._seeds[row])))
        text = next(self._running[row])
        prompt_end = agent.tokenizer.decode(context[-64:].tolist()).rstrip()
        if prompt_end.endswith(agent.dialect.think_open):  # R1-Searcher's prompt leaves reasoning open
            opens = text.startswith(agent.dialect.think_open)
            text = text.removeprefix(agent.dialect.think_open) if opens else agent.dialect.think_close + text
        return text

    def _next(self, row: int, info: Info) -> str | None:
        try:
            return self._running[row].send(info)
        except StopIteration:
            return None
