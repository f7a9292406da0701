"""From what scripts ask of a language model to its replies, with any :class:`~searchqa_agents.language_model.LanguageModel`.

=============================== ====================================================== ==================================================================
model                           messages go out as                                     ``plain`` asks go out as
=============================== ====================================================== ==================================================================
with ids (transformers,         ids of the tokenizer's chat template; where it has     ids of the text
``vllm``, ``sglang``)           none, the texts with an empty line between them
protocol ``chat``               messages                                               one user message: the server puts its template round it
protocol ``completions``        the texts with an empty line between them              text
=============================== ====================================================== ==================================================================

A last message of the assistant's is continued: as ids and text it follows the rest; to ``chat`` servers ``continue_final_message`` says so (vLLM,
SGLang), and others refuse it.

A prompt longer than :attr:`Ask.max_prompt_tokens`, or than the model's positions less the reply, loses text of :attr:`Ask.documents`, and of nothing
else; one that is still too long is a :class:`PromptTooLong`. A reply gets what the positions leave behind the prompt, and for at least a quarter of them, or
what was asked for, prompts make room. That needs the model's tokenizer and, for positions, the model in this process.

Otherwise the server decides. Where it refuses an ask (status 400, 413, 422), a tiny ask of the same form is sent: if that is refused too, the fault is not
this ask's, and the error is raised. Else the documents are halved a few times. What is refused even without them gets an empty reply, as does a prompt that is
too long where :attr:`Ask.spare` allows it: one question must not end a run. Such replies are ``failed``; too many in a row are an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from searchqa_agents.language_model import IntArray, LanguageModel, Sampling, Segment
from searchqa_agents.scripted import Ask, Message, Reply
from searchqa_envs.dialects import neutralise
from searchqa_envs.errors import ConfigurationError, SearchQAError
from searchqa_envs.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from searchqa_agents.completion_protocols import Written
    from searchqa_agents.completion_server import CompletionServerLM, RequestRefused

logger = logging.getLogger(__name__)


HALVINGS = 5
"""How often documents are halved for a server that refuses an ask, before they are left out."""
MOST_FAILED = 20
"""Of so many asks of one form in a row none got a reply: then it is not one question's fault."""


class PromptTooLong(ConfigurationError):
    """A prompt does not fit, even without the documents in it."""


class Writer:
    """A language model that scripts ask.

    Parameters
    ----------
    model
        Any language model, a server of protocol ``tools`` excepted.
    tokenizer
        That of the environment, which models with ids share. Not used with text protocols.
    temperature, top_p, top_k
        For asks that say nothing of these; see :class:`Sampling`.

    Raises
    ------
    ConfigurationError
        For protocol ``tools``.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> None:
        from searchqa_agents.completion_server import CompletionServerLM

        self.model = model
        self.tokenizer = tokenizer
        self.server: CompletionServerLM | None = None
        if isinstance(model, CompletionServerLM):
            if model.tools:
                raise ConfigurationError(
                    "A baseline writes text, and protocol tools calls tools. Use protocol chat, completions, vllm or sglang."
                )
            self.server = model
        self._own = Sampling(1, (), temperature, top_p, top_k)
        self._warned: set[str] = set()
        self._failed: dict[Any, int] = {}  # by form: how many asks in a row got no reply
        self._control = _control_tokens(tokenizer)
        config = getattr(getattr(model, "model", None), "config", None)
        self._most_positions: int | None = getattr(config, "max_position_embeddings", None)

    def write(self, asks: Sequence[Ask], seeds: Sequence[int]) -> list[Reply]:
        """A reply to each ask, in their order; those of equal sampling are generated as one batch.

        Parameters
        ----------
        asks
            What to write.
        seeds
            One in [0, 2**31) for each: with the prompt it determines the reply, as far as the model's noise is a function of seeds.

        Raises
        ------
        PromptTooLong
            See the module; for asks without ``spare``, and where too many in a row are too long.
        ServerUnavailable, ServerAnswerError
            As :class:`~searchqa_agents.completion_server.CompletionServerLM` does.
        """
        if self.server is not None:
            return self._served(asks, seeds)
        replies: dict[int, Reply] = {}
        batches: dict[Sampling, list[tuple[int, IntArray, int]]] = {}
        for place, ask in enumerate(asks):
            try:
                ids, cut = self._encoded(ask)
            except PromptTooLong as error:
                replies[place] = self.without_reply(ask, error)
            else:
                self.replied(ask)
                batches.setdefault(self._sampling(ask, len(ids)), []).append((place, ids, cut))
        for sampling, batch in batches.items():
            session = self.model.start([seeds[place] for place, _, _ in batch], sampling)
            rows = range(len(batch))
            try:
                segments = session.generate(rows, [ids for _, ids, _ in batch], [{}] * len(batch))
            finally:  # a session may hold connections and memory
                session.release(rows)
            for (place, ids, cut), segment in zip(batch, segments, strict=True):
                replies[place] = self._reply(segment, sampling, len(ids), cut)
        return [replies[place] for place in range(len(asks))]

    def send(self, server: CompletionServerLM, ask: Ask, seed: int) -> tuple[Future[Any], Callable[[Any], Reply]]:
        """One ask on its way to a server: what it answers, and how a reply is made of that."""
        from searchqa_agents.completion_protocols import Prompt

        eos_id, pad_id = self.tokenizer.eos_id, self.tokenizer.pad_id
        if server.returns_ids:
            ids, cut = self._encoded(ask)
            sampling = self._sampling(ask, len(ids))
            prompt = Prompt(ids.tolist(), eos_id, pad_id)
            return server.ask(prompt, sampling, seed), lambda segment: self._reply(segment, sampling, len(ids), cut)
        sampling = self._sampling(ask)
        if sampling.top_k:
            self._warn("top_k", f"OpenAI-compatible servers know no top_k: {sampling.top_k} is left out.")
        prompt = Prompt(self._content(server, ask), eos_id, pad_id)
        return server.write(prompt, sampling, seed), lambda written: self._text_reply(written, sampling)

    def _served(self, asks: Sequence[Ask], seeds: Sequence[int]) -> list[Reply]:
        correspondence, numbers = Correspondence(self), range(len(asks))
        correspondence.submit(numbers, asks, seeds)
        replies: dict[int, Reply] = {}
        try:
            while len(replies) < len(asks):
                replies.update(correspondence.collect())
        finally:  # after an error the others are not waited for
            correspondence.release(numbers)
        return [replies[number] for number in numbers]

    def without_reply(self, ask: Ask, error: SearchQAError) -> Reply:
        """The empty reply to an ask that cannot be sent; raises ``error`` where the ask itself is not at fault."""
        if isinstance(error, PromptTooLong) and not ask.spare:
            raise error
        form = _form(ask)
        if self._failed.get(form, 0) >= MOST_FAILED:  # stays there: the error comes again
            raise type(error)(
                f"{error} That made {MOST_FAILED} asks of this form in a row without a reply, so the fault is not one question's."
            ) from error
        self._failed[form] = self._failed.get(form, 0) + 1
        self._warn("failed", f"A reply is left empty, and counted in failed_calls. The reason was: {error}")
        return Reply("", None, False, 0, 0, failed=True)

    def warn_of_cut(self, characters: int, refusal: SearchQAError) -> None:
        """A server refused a prompt, which goes out again with less of its documents."""
        self._warn(
            "halved", f"A prompt with {characters} characters of documents was refused, so that they were cut. The reason was: {refusal}"
        )

    def replied(self, ask: Ask) -> None:
        """An ask of this form got a reply."""
        self._failed.pop(_form(ask), None)

    def _sampling(self, ask: Ask, prompt_tokens: int | None = None) -> Sampling:
        own = self._own
        temperature = own.temperature if ask.temperature is None else ask.temperature
        top_p, top_k = own.top_p if ask.top_p is None else ask.top_p, own.top_k if ask.top_k is None else ask.top_k
        return Sampling(self._longest_reply(ask, prompt_tokens), ask.stop, temperature, top_p, top_k)

    def _least_reply(self, ask: Ask) -> int:
        """For so many tokens of reply prompts make room."""
        return ask.max_tokens if self._most_positions is None else min(ask.max_tokens, max(1, self._most_positions // 4))

    def _longest_reply(self, ask: Ask, prompt_tokens: int | None) -> int:
        if self._most_positions is None or prompt_tokens is None or ask.max_tokens <= self._most_positions - prompt_tokens:
            return ask.max_tokens
        self._warn(
            "reply",
            f"Replies of {ask.max_tokens} tokens are cut at what the model's {self._most_positions} positions leave behind the prompt.",
        )
        step = max(1, self._most_positions // 16)  # in steps, so that prompts of different lengths still make a batch
        return max(self._least_reply(ask), (self._most_positions - prompt_tokens) // step * step)

    def _warn(self, about: str, text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            logger.warning("%s This is said once.", text)

    # -- ids -----------------------------------------------------------------------------------------------------------------------------

    def _encoded(self, ask: Ask) -> tuple[IntArray, int]:
        """The prompt's ids, and how many tokens of documents did not fit."""
        reply = self._least_reply(ask)
        limits = [ask.max_prompt_tokens, None if self._most_positions is None else self._most_positions - reply]
        limit = min([given for given in limits if given is not None], default=None)
        messages = ask.messages
        ids = self.tokenizer.encode(self._text(ask, messages))
        whole = len(ids)
        for document in ask.documents:
            if limit is None or len(ids) <= limit:
                break
            kept, shortest, longest = "", 0, len(document)
            while shortest < longest:  # the longest beginning of the document with which the prompt fits is in [shortest, longest)
                middle = (shortest + longest) // 2
                if len(self.tokenizer.encode(self._text(ask, _with(messages, document, document[:middle])))) <= limit:
                    kept, shortest = document[:middle], middle + 1
                else:
                    longest = middle
            messages = _with(messages, document, kept)
            ids = self.tokenizer.encode(self._text(ask, messages))
        if limit is not None and len(ids) > limit:
            raise PromptTooLong(
                f"A prompt must have at most {limit} tokens here, beside the {reply} of the reply; got {len(ids)} without its documents. "
                "Choose a model with more positions, or lower agent.options.max_tokens; where the baseline has agent.options.max_prompt_tokens, raise that."
            )
        if len(ids) < whole:
            self._warn("documents", f"A prompt of {whole} tokens was longer than {limit}: documents in it were cut.")
        return np.array(ids, dtype=np.int32), whole - len(ids)

    def _text(self, ask: Ask, messages: Sequence[Message]) -> str:
        """The prompt as text; control tokens of the template that stand in messages are defused."""
        messages = [(role, self._defused(text)) for role, text in messages]
        if ask.plain:
            return _only_text(messages)
        chat = getattr(self.tokenizer, "chat_prompt", None)
        if chat is None or chat("") is None:
            return as_text(messages)
        begun = messages.pop()[1] if len(messages) > 1 and messages[-1][0] == "assistant" else ""
        system = messages.pop(0)[1] if messages[0][0] == "system" else None
        if [role for role, _ in messages] != ["user"]:
            raise ConfigurationError(
                "An ask to a chat template is one user message, with a system message before it and the reply's beginning behind it if need be; "
                f"got {[role for role, _ in ask.messages]}."
            )
        return f"{chat(messages[0][1], system)}{begun}"

    def _defused(self, text: str) -> str:
        normalise = getattr(self.tokenizer, "normalise", None)
        return neutralise(text if normalise is None else normalise(text), self._control) if self._control else text

    def _reply(self, segment: Segment, sampling: Sampling, prompt_tokens: int, cut: int) -> Reply:
        ids = segment.ids.tolist()
        written, stop = _before_stop(b"".join(self.tokenizer.pieces(ids)), sampling.stop)
        finished = stop is not None or len(ids) < sampling.max_new_tokens or ids[-1] == self.tokenizer.eos_id
        text = written.decode("utf-8", "replace")
        return Reply(text if finished else text.rstrip("\ufffd"), stop, finished, prompt_tokens, len(ids), cut)

    # -- text ----------------------------------------------------------------------------------------------------------------------------

    def _content(self, server: CompletionServerLM, ask: Ask) -> Any:
        """A prompt as the text protocols take it."""
        if server.chat:
            return [{"role": role, "content": text} for role, text in ask.messages]
        return _only_text(ask.messages) if ask.plain else as_text(ask.messages)

    def _text_reply(self, written: Written, sampling: Sampling) -> Reply:
        text, stop = _before_stop(written.text.encode("utf-8", "replace"), sampling.stop)
        if stop is None and written.stop in sampling.stop:
            stop = written.stop
        known = stop is not None or not written.ended or written.tells_stop
        finished = stop is not None or written.ended
        return Reply(text.decode(), stop, finished, written.prompt_tokens, written.generated_tokens, stop_known=known)


@dataclass
class _Sent:
    """An ask on its way to a server."""

    number: int
    ask: Ask
    seed: int
    read: Callable[[Any], Reply] | None = None
    halvings: int = 0
    refusal: RequestRefused | None = None
    """with which the server refused the ask as it was"""
    probe: bool = False
    """whether what is on its way is a tiny ask of the same form, which tells whose fault that was"""


class Correspondence:
    """Asks under way, each with a number of the caller's.

    Servers answer each ask on its own, so that a long reply holds up no other; other models generate what has been asked for since the last
    :meth:`collect`, those of equal sampling as one batch.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._server = writer.server if isinstance(writer, Writer) else None  # another object with ``write`` does as well
        self._asked: dict[int, tuple[Ask, int]] = {}
        self._sent: dict[Future[Any], _Sent] = {}
        self._ready: list[tuple[int, Reply]] = []

    def submit(self, numbers: Sequence[int], asks: Sequence[Ask], seeds: Sequence[int]) -> None:
        """Ask for replies. A number has one ask under way at a time; see :meth:`Writer.write` for the rest."""
        for number, ask, seed in zip(numbers, asks, seeds, strict=True):
            if self._server is None:
                self._asked[number] = ask, seed
            else:
                self._send(_Sent(number, ask, seed), ask)

    def collect(self) -> list[tuple[int, Reply]]:
        """Wait until some of the replies are there; these, each with its number. Empty only if none was asked for.

        After an error everything is as it was before; a server's error comes again.
        """
        while self._sent and not self._ready:
            done, _ = wait(self._sent, return_when=FIRST_COMPLETED)
            for future in done:
                self._receive(future)
        if self._ready:
            ready, self._ready = self._ready, []
            return ready
        asks, seeds = [ask for ask, _ in self._asked.values()], [seed for _, seed in self._asked.values()]
        replies = list(zip(self._asked, self._writer.write(asks, seeds), strict=True))
        self._asked.clear()
        return replies

    def release(self, numbers: Sequence[int]) -> None:
        """Drop what is under way for these numbers."""
        for number in numbers:
            self._asked.pop(number, None)
        self._ready = [(number, reply) for number, reply in self._ready if number not in numbers]
        for future in [future for future, sent in self._sent.items() if sent.number in numbers]:
            future.cancel()
            del self._sent[future]

    def _send(self, sent: _Sent, ask: Ask) -> None:
        """Send ``ask``, which is that of ``sent``, the same with shorter documents, or a tiny one."""
        assert self._server is not None
        try:
            future, sent.read = self._writer.send(self._server, ask, sent.seed)
        except PromptTooLong as error:
            self._ready.append((sent.number, self._writer.without_reply(sent.ask, error)))
        else:
            self._sent[future] = sent

    def _receive(self, future: Future[Any]) -> None:
        """Take what a server answered, or send what follows from its refusal. If it raises, the answer is still there."""
        from searchqa_agents.completion_server import RequestRefused

        sent, writer = self._sent[future], self._writer
        try:
            answer = _result(future, sent.ask)
        except RequestRefused as error:
            if sent.probe:
                assert sent.refusal is not None
                raise sent.refusal from error
            if sent.refusal is None:
                following, ask = replace(sent, refusal=error, probe=True), _tiny(sent.ask)
            else:
                self._shortened(future, sent)
                return
        else:
            if sent.probe:
                self._shortened(future, sent)
                return
            cut = _document_characters(sent.ask) - _kept_characters(sent) if sent.halvings else 0
            assert sent.read is not None
            self._ready.append((sent.number, sent.read(answer)._replace(cut_characters=cut)))
            writer.replied(sent.ask)
            del self._sent[future]
            return
        self._send(following, ask)
        del self._sent[future]

    def _shortened(self, future: Future[Any], sent: _Sent) -> None:
        """Send an ask with half of its documents; once nothing is left of them the reply is empty."""
        assert sent.refusal is not None
        if _kept_characters(sent):
            following = replace(sent, halvings=sent.halvings + 1, probe=False)
            kept = _kept_characters(following)
            self._writer.warn_of_cut(_document_characters(sent.ask), sent.refusal)
            self._send(following, _with_documents(sent.ask, kept))
        else:
            self._ready.append((sent.number, self._writer.without_reply(sent.ask, sent.refusal)))
        del self._sent[future]


def _form(ask: Ask) -> tuple[object, ...]:
    """What asks that a model or server takes in the same way have in common."""
    return tuple(role for role, _ in ask.messages), ask.stop, ask.plain, ask.max_tokens


def _tiny(ask: Ask) -> Ask:
    """An ask of the same form that cannot be too long, and says nothing that could be refused."""
    return replace(ask, messages=tuple((role, "Hello.") for role, _ in ask.messages), documents=())


def _document_characters(ask: Ask) -> int:
    return sum(map(len, ask.documents))


def _kept_characters(sent: _Sent) -> int:
    """How much of the documents goes out after so many halvings; nothing after the last."""
    return 0 if sent.halvings > HALVINGS else _document_characters(sent.ask) >> sent.halvings


def _with_documents(ask: Ask, kept: int) -> Ask:
    """The ask with so many characters of its documents; the first ones are shortened first."""
    messages, documents, surplus = ask.messages, [], _document_characters(ask) - kept
    for document in ask.documents:
        beginning = document[: max(0, len(document) - surplus)]
        surplus -= len(document) - len(beginning)
        messages = _with(messages, document, beginning)
        documents += [beginning] * bool(beginning)
    return replace(ask, messages=messages, documents=tuple(documents))


def _result(future: Future[Any], ask: Ask) -> Any:
    """What a server answered; where it refused the ask, the error also says what was asked for."""
    from searchqa_agents.completion_server import ServerAnswerError

    try:
        return future.result()
    except ServerAnswerError as error:
        size = sum(len(text) for _, text in ask.messages)
        going_on = (
            " The reply was to go on with a beginning, which protocol completions, vLLM and SGLang can." if _begun(ask.messages) else ""
        )
        raise type(error)(
            f"{error} A baseline asked for this, with {size} characters and at most {ask.max_tokens} tokens of reply; where that is too long for the server, "
            f"lower env.top_k or the baseline's options.{going_on}"
        ) from error


def _begun(messages: Sequence[Message]) -> str:
    """The reply's beginning, if there is one."""
    return messages[-1][1] if len(messages) > 1 and messages[-1][0] == "assistant" else ""


def sent_as(tokenizer: Tokenizer, protocol: str | None = None) -> dict[str, Any]:
    """How asks go out, for stamps: the form of prompts (``messages``, ``text``, ``chat template``), and whether top-k is left out.

    ``protocol`` is that of a server; None for a model of this process.
    """
    if protocol in ("chat", "completions"):
        return {"prompts": "messages" if protocol == "chat" else "text", "top_k_sent": False}
    chat = getattr(tokenizer, "chat_prompt", None)
    return {"prompts": "text" if chat is None or chat("") is None else "chat template"}


def as_text(messages: Sequence[Message]) -> str:
    """Messages for a model without a chat template: an empty line between them, as in FlashRAG's ``PromptTemplate``; the reply's beginning directly behind."""
    begun = [text for role, text in messages[-1:] if role == "assistant" and len(messages) > 1]
    return "\n\n".join(text for _, text in messages[: len(messages) - len(begun)]) + "".join(begun)


def _before_stop(written: bytes, stops: Sequence[str]) -> tuple[bytes, str | None]:
    """What stands before the stop string that is complete first, and that string; of several that end in the same place, the longest."""
    found = [(written.index(stop.encode()), stop) for stop in stops if stop.encode() in written]
    if not found:
        return written, None
    start, stop = min(found, key=lambda place: (place[0] + len(place[1].encode()), place[0]))
    return written[:start], stop


def _only_text(messages: Sequence[Message]) -> str:
    if [role for role, _ in messages] != ["user"]:
        raise ConfigurationError(f"A plain ask is one user message; got {[role for role, _ in messages]}.")
    return messages[0][1]


def _with(messages: Sequence[Message], document: str, kept: str) -> tuple[Message, ...]:
    """The messages with the first occurrence of a document shortened."""
    places = [place for place, (_, text) in enumerate(messages) if document in text]
    if not places:
        raise ValueError(f"Ask.documents are parts of the messages; this one is not: {document[:80]!r}.")
    return tuple((role, text.replace(document, kept, 1) if place == places[0] else text) for place, (role, text) in enumerate(messages))


def _control_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Control tokens that a message must not hold: those of the chat template, end of sequence and padding. Tags are a baseline's own to write."""
    chat = getattr(tokenizer, "chat_prompt", None)
    template = (chat("") if chat is not None else None) or ""
    ends = ([tokenizer.eos_id], [tokenizer.pad_id])
    return tuple(sorted(text for text in tokenizer.reserved if len(text) > 2 and (text in template or tokenizer.encode(text) in ends)))
