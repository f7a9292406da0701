"""Scripted agents: baselines, the world's oracle, and the lazy and the shy oracle that demonstrate.

An agent is a generator function: it yields the text of a segment and gets back the environment's info, or yields an :class:`Ask` and gets back what
a language model wrote. It acts in rollouts like any language model; its text is encoded once, by itself, so the ids are its own.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from searchqa_agents.language_model import IntArray, Sampling, Segment, Session
from searchqa_envs.dialects import Dialect, get_dialect, neutralise, reserved_strings
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.questions import Question, QuestionSource
from searchqa_envs.search_controls import SEPARATOR
from searchqa_envs.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from searchqa_agents.writer import Writer

logger = logging.getLogger(__name__)

Info = Mapping[str, Any]
Message = tuple[str, str]
"""Role (system, user or assistant) and text."""


@dataclass(frozen=True)
class Ask:
    """What a script asks of its language model. A last message of the assistant's is the beginning of the reply, which the model goes on with."""

    messages: tuple[Message, ...]
    max_tokens: int
    """longest reply"""
    stop: tuple[str, ...] = ()
    """the reply ends before the first of these strings"""
    plain: bool = False
    """one user message, continued as text without a chat template"""
    temperature: float | None = None
    """None: the agent's own, for the three of these"""
    top_p: float | None = None
    top_k: int | None = None
    documents: tuple[str, ...] = ()
    """parts of the messages that are shortened, and at last left out, where the prompt is too long; the first ones first. Each must be told from the rest by
    its text: the first place where it stands is taken"""
    spare: bool = False
    """where the prompt is too long even without its documents, the reply is empty; else that is an error. Sessions say so where the model's own words, or an
    unusual question, can be at fault"""
    max_prompt_tokens: int | None = None
    """longest prompt, for models whose tokenizer is known; None: as long as the model's positions reach"""


class Reply(NamedTuple):
    """What the language model wrote. The counts are None where a server does not tell them."""

    text: str
    """without the stop string and what follows"""
    stop: str | None
    """the stop string that ended it, where it is known"""
    finished: bool
    """False: cut at ``max_tokens``"""
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    cut_tokens: int = 0
    """how many tokens of documents did not fit into the prompt"""
    cut_characters: int = 0
    """how many characters of documents a server did not take"""
    failed: bool = False
    """there is no reply: the prompt was too long, or a server refused this ask"""
    stop_known: bool = True
    """False: it may have ended with a stop string, which the server does not tell"""


class Task(NamedTuple):
    """What an agent has to act on: the question, the dialect to write in, and its own randomness.

    ``max_turns`` is the number of segments that the environment takes, the answer included. ``thinking``: the prompt ends with an opened thought.
    ``set_name`` is the name of the question's set, such as ``nq``.
    """

    question: Question
    dialect: Dialect
    rng: np.random.Generator
    max_turns: int
    max_segment_tokens: int
    tokenizer: Tokenizer
    thinking: bool
    set_name: str = ""

    def search(self, query: str) -> str:
        """Text that searches."""
        return f"{self.dialect.search_open}{query}{self.dialect.search_close}"

    def answer(self, text: str) -> str:
        """Text that answers."""
        return f"{self.dialect.answer_open}{text}{self.dialect.answer_close}"

    def think(self, text: str) -> str:
        """Text that reasons."""
        return f"{self.dialect.think_open}{text}{self.dialect.think_close}"

    def segment(self, kind: Literal["search", "answer"], text: str, thought: str = "") -> str:
        """A thought and an action, whatever they say.

        Tags and control tokens in them are defused, so that the segment means this action and no other. Where it is longer than a segment may be,
        the thought is cut, and then the text. Where the prompt opens a thought (R1-Searcher), searches stand inside it and the answer behind its end.
        A search for nothing is left as it is: R1-Searcher's rules take it for no action.

        Raises
        ------
        ConfigurationError
            If not even the tags fit into ``max_segment_tokens``.
        """
        if kind not in ("search", "answer"):
            raise ValueError(f"A segment searches or answers: kind must be 'search' or 'answer'; got {kind!r}.")
        dialect = self.dialect
        text, thought = self._defused(text), self._defused(thought)
        if kind == "search" and dialect.controls is not None:
            text = text.replace(SEPARATOR, " ")  # what follows it would be read as controls

        def written(thought: str, text: str) -> str:
            action = self.search(text) if kind == "search" else self.answer(text)
            if self.thinking:
                return f"{thought}{action}" if kind == "search" else f"{thought}{dialect.think_close}\n\n{action}"
            return f"{self.think(thought)}{action}" if thought else action

        def fits(segment: str) -> bool:
            return len(self.tokenizer.encode(segment)) <= self.max_segment_tokens

        if not fits(written("", "")):
            raise ConfigurationError(
                f"max_segment_tokens must hold at least the tags of {kind} in dialect {dialect.name!r}; got {self.max_segment_tokens}."
            )
        if fits(whole := written(thought, text)):
            return _Complete(whole)
        if fits(written("", text)):
            return _Complete(written(_longest(thought, lambda cut: fits(written(cut, text))), text))
        segment = _Complete(written("", _longest(text, lambda cut: fits(written("", cut)))))
        segment.cut = kind
        return segment

    def _defused(self, text: str) -> str:
        text = text.encode("utf-8", "replace").decode().strip()  # no halves of surrogate pairs
        normalise = getattr(self.tokenizer, "normalise", None)
        text = text if normalise is None else normalise(text)
        if text and unicodedata.combining(text[0]):
            text = f" {text}"  # it would combine with the end of the tag before it
        return neutralise(text, reserved_strings(self.dialect.tags, self.tokenizer.reserved))


class _Complete(str):
    """A segment that heeds how the prompt ends. ``cut``: what of it, query or answer, was too long to stand whole."""

    cut: str = ""


def _longest(text: str, fits: Callable[[str], bool]) -> str:
    """A beginning of ``text`` that fits and is as long as bisection finds; empty if none does."""
    best, shortest, longest = "", 1, len(text)
    while shortest <= longest:
        middle = (shortest + longest) // 2
        if fits(text[:middle]):
            best, shortest = text[:middle], middle + 1
        else:
            longest = middle - 1
    return best


Script = Callable[[Task], Generator[str | Ask, Any, None]]
"""Yields a segment and is sent the environment's :data:`Info`, or yields an :class:`Ask` and is sent its :class:`Reply`."""


def direct(guess: str = "") -> Script:
    """Answers at once, always the same."""

    def script(task: Task) -> Generator[str, Info, None]:
        yield task.answer(guess)

    return script


def gold_answer(task: Task) -> Generator[str, Info, None]:
    """Answers at once with the first golden answer: demonstrations for fine-tuning without search."""
    yield task.answer(task.question.golden_answers[0])


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
    "answer": gold_answer,
    "search_once": search_once,
    "oracle": oracle(),
    "lazy_oracle": oracle(lazy=0.6),
    "shy_oracle": shy_oracle(),
    "shyest_oracle": shy_oracle(shy=0.9),
}


LONG_QUESTION = 2000
"""Characters. Questions of the published sets are shorter."""

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
    tokenizer, dialect, max_turns
        The environment's.
    writer
        The language model, for scripts that ask one.
    """

    returns_ids = True
    returns_logprobs = False

    def __init__(
        self,
        script: str | Script,
        source: QuestionSource,
        tokenizer: Tokenizer,
        dialect: str | Dialect,
        *,
        max_turns: int = 5,
        writer: Writer | None = None,
    ) -> None:
        if isinstance(script, str):
            if script not in SCRIPTS:
                raise ConfigurationError(f"script must be one of {sorted(SCRIPTS)} or a generator function; got {script!r}.")
            script = SCRIPTS[script]
        self.script = script
        self.source = source
        self.tokenizer = tokenizer
        self.dialect = get_dialect(dialect)
        self.max_turns = max_turns
        self.writer = writer
        self.warned_of_cut = False

    @classmethod
    def for_env(cls, script: str | Script, env: Any, writer: Writer | None = None) -> ScriptedAgent:
        """The agent for a (vector) environment: its questions, tokenizer, dialect and turns."""
        base = env.unwrapped
        return cls(script, base.source, base.tokenizer, base.dialect, max_turns=base.rules.max_turns, writer=writer)

    def start(self, seeds: Sequence[int], sampling: Sampling) -> ScriptedSession:
        """Begin as many episodes as there are seeds."""
        return ScriptedSession(self, seeds, sampling)


class ScriptedSession(Session):
    """Scripts under way.

    What they ask of a model of this process waits until no segment is left to hand over, and is then generated for all rows at once, so that batches are
    large. What they ask of a server is sent at once, and each script goes on with its own reply.
    """

    def __init__(self, agent: ScriptedAgent, seeds: Sequence[int], sampling: Sampling) -> None:
        self._agent = agent
        self._sampling = sampling
        self._seeds = seeds
        self._running: dict[int, Generator[str | Ask, Any, None]] = {}
        self._thinking: set[int] = set()  # rows whose prompt opens a thought, until their first segment
        self._correspondence = None
        if agent.writer is not None:
            from searchqa_agents.writer import Correspondence

            self._correspondence = Correspondence(agent.writer)
        self._asking: set[int] = set()
        self._replies: dict[int, list[Reply]] = {}
        self._questions: dict[int, str] = {}
        self._written: list[tuple[int, Segment]] = []

    def submit(self, rows: Sequence[int], contexts: Sequence[IntArray], infos: Sequence[Info]) -> None:
        """Go on with each row's script; end of sequence from one that has nothing left to say."""
        for row, context, info in zip(rows, contexts, infos, strict=True):
            if row in self._running:
                self._go_on(row, info)
            else:
                self._begin(row, context, info)
                self._go_on(row, None)

    def collect(self) -> list[tuple[int, Segment]]:
        """The segments that are there; if none is, those of the scripts that have none left to ask for after the next batch of replies."""
        while self._correspondence is not None and self._asking and not self._written:
            for row, reply in self._correspondence.collect():
                self._asking.discard(row)
                self._replies[row].append(reply)
                self._go_on(row, reply)
        written, self._written = self._written, []
        return written

    def usage(self, row: int) -> Mapping[str, float]:
        """How often a row's script asked, and the tokens of that; a count that a server does not tell is left out.

        ``failed_calls``: how many of these asks got no reply. ``cut_tokens`` and ``cut_characters`` are there where documents did not fit into prompts.
        """
        replies = self._replies.get(row, [])
        if self._agent.writer is None:
            return {}
        counts = {"calls": float(len(replies)), "failed_calls": float(sum(reply.failed for reply in replies))}
        for name in ("prompt_tokens", "generated_tokens"):
            values: list[int | None] = [getattr(reply, name) for reply in replies]
            if None not in values:
                counts[name] = float(sum(value or 0 for value in values))
        cuts = {"cut_tokens": sum(reply.cut_tokens for reply in replies), "cut_characters": sum(reply.cut_characters for reply in replies)}
        return counts | {name: float(cut) for name, cut in cuts.items() if cut}

    def release(self, rows: Sequence[int]) -> None:
        """Forget the scripts of these rows."""
        for row in rows:
            self._running.pop(row, None)
            self._replies.pop(row, None)
            self._questions.pop(row, None)
            self._thinking.discard(row)
            self._asking.discard(row)
        if self._correspondence is not None:
            self._correspondence.release(rows)
        self._written = [(row, segment) for row, segment in self._written if row not in rows]

    def _begin(self, row: int, context: IntArray, info: Info) -> None:
        agent = self._agent
        question = agent.source[agent.source.index_of(info["question_id"])]
        thinking = agent.tokenizer.decode(context[-64:].tolist()).rstrip().endswith(agent.dialect.think_open)
        rng = np.random.default_rng(self._seeds[row])
        task = Task(
            question, agent.dialect, rng, agent.max_turns, self._sampling.max_new_tokens, agent.tokenizer, thinking, agent.source.name
        )
        self._running[row] = agent.script(task)
        self._replies[row] = []
        self._questions[row] = question.question
        if thinking:
            self._thinking.add(row)

    def _go_on(self, row: int, sent: Info | Reply | None) -> None:
        tokenizer = self._agent.tokenizer
        try:
            said = next(self._running[row]) if sent is None else self._running[row].send(sent)
        except StopIteration:
            said = None
        if isinstance(said, Ask):
            self._ask(row, said)
            return
        if isinstance(said, _Complete) and said.cut and not self._agent.warned_of_cut:
            self._agent.warned_of_cut = True
            logger.warning(
                "A %s was longer than a segment of %d tokens (env.max_segment_tokens) and was cut. This is said once.",
                {"search": "query"}.get(said.cut, said.cut),
                self._sampling.max_new_tokens,
            )
        ids = [tokenizer.eos_id] if said is None else tokenizer.encode(self._after_prompt(row, said))
        self._written.append((row, Segment(np.array(ids[: self._sampling.max_new_tokens], dtype=np.int32))))

    def _after_prompt(self, row: int, text: str) -> str:
        """The first segment behind a prompt that opens a thought, as R1-Searcher's does: goes on with the thought, or closes it."""
        if row not in self._thinking:
            return text
        self._thinking.discard(row)
        think_open, think_close = self._agent.dialect.think_open, self._agent.dialect.think_close
        if isinstance(text, _Complete):
            return text
        return text.removeprefix(think_open) if text.startswith(think_open) else think_close + text

    def _ask(self, row: int, ask: Ask) -> None:
        if self._correspondence is None:
            raise ConfigurationError(
                "This script asks a language model, and it was given none. Make the agent with writer=Writer(model, tokenizer)."
            )
        self._asking.add(row)
        ask = replace(ask, spare=bool(self._replies[row]) or len(self._questions[row]) > LONG_QUESTION)
        self._correspondence.submit([row], [ask], [ask_seed(self._seeds[row], len(self._replies[row]))])


def ask_seed(episode_seed: int, number: int) -> int:
    """The seed in [0, 2**31) of an episode's ``number``-th ask, counted from 0."""
    return int(np.random.SeedSequence((episode_seed, number)).generate_state(1)[0]) >> 1
