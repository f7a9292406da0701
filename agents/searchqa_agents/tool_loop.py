"""An environment as tools of an OpenAI-compatible chat model, so that models with native tool calling are evaluated without tags.

With the ``openai`` client, in full::

    loop = ToolLoop(gym.make("SearchQA-HotpotQA-v0"))
    messages, ended = loop.reset(seed=0), False
    while not ended:
        [choice] = client.chat.completions.create(model=model, messages=messages, tools=loop.tools).choices
        new_messages, reward, terminated, truncated, info = loop.step(choice.message, choice.finish_reason)
        messages += new_messages
        ended = terminated or truncated
    info["metrics"]  # em, f1, searches, ...

``searchqa eval agent=tools agent.url=...`` does the same with many questions at once, by the same :class:`Conversation`.

Each message of the model is one turn of the environment, which knows nothing of tools: budgets, rewards, metrics and a lost search back end are
its own. What a message means:

| message | turn |
|---|---|
| a call of ``search`` | a search; the tool's result is the environment's text between its information tags |
| a call of ``answer`` | the answer |
| text and no call | the answer: the text behind ``</think>``, if there is any |
| text and a call | the call's; the text is kept in the segment as far as there is room for it |
| several calls | the first one's; the others are told that they were not executed |
| no such tool, or arguments that are none | invalid, and the result says what is wrong |
| neither text nor call, or a refusal | invalid, and a user message says what is expected |
| text cut short or filtered; thoughts alone | invalid, likewise |

An invalid turn is what the dialect makes of it: Search-R1's goes on, R1-Searcher's ends the episode. Tags in queries, answers and text are defused,
so that a call never acts as another action. A malformed call goes back to the model without its arguments, because servers and chat templates read
the arguments of earlier calls as JSON and refuse a conversation where they are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym

from searchqa_envs.dialects import Dialect, neutralise, reserved_strings
from searchqa_envs.env import SearchQAEnv
from searchqa_envs.errors import ConfigurationError, EpisodeStateError, InvalidSegmentError
from searchqa_envs.spaces import TokenSequence, UnicodeText
from searchqa_envs.tokenizers.base import Tokenizer

Message = dict[str, Any]

INSTRUCTIONS = (
    "Find the answer to the user's question. Use the tool `search` to look facts up, as often as you need, one call at a time; "
    "search for one fact after another where the question needs several. When you know the answer, call the tool `answer` with the answer alone: "
    "a name, a number, a date, or yes or no, without a sentence around it."
)
"""The system message."""
LAST_TURN = "No search is left. Give the final answer now."
"""What announces the last turn, in environments with ``forced_answer``."""
NO_PASSAGES = "Nothing was found."
NOT_EXECUTED = "Not executed: only the first call of a message is. Make one call at a time."
ENDED = "The episode has ended."
EXPECTED = "Call the tool `search` with a query, or the tool `answer` with the final answer."


def _tool(name: str, about: str, argument: str, meaning: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string", "description": meaning}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


TOOLS = [
    _tool("search", "Search for passages. Returns the passages that fit the query best.", "query", "What to search for."),
    _tool("answer", "Give the final answer. This ends the task.", "answer", "The answer alone, as short as it can be."),
]
"""The tools, as OpenAI's chat completions take them ("Function calling": name, description, and a JSON schema of the arguments)."""
_ARGUMENTS = {"search": "query", "answer": "answer"}
_CUT_SHORT = ("length", "content_filter")
_LONGEST_ID = 200
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # what OpenAI's API takes for the name of a function


class _Call(NamedTuple):
    """One call as it is told back to the model: ``fault`` says why it is no action."""

    id: str
    name: str
    text: str
    fault: str | None

    def message(self) -> dict[str, Any]:
        arguments = {} if self.fault is not None else {_ARGUMENTS[self.name]: self.text}
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": json.dumps(arguments)}}


class Conversation:
    """The messages of one episode: from a model's message to the ids of a segment, and from the environment's reply to messages.

    Parameters
    ----------
    tokenizer, dialect
        The environment's.
    max_segment_tokens
        The longest segment. Text beside a call is cut so that the call fits; a call that does not fit by itself is invalid.
    question
        The question's text.
    last_turn
        Whether the first turn is announced to be the last.

    Attributes
    ----------
    messages
        All messages so far.
    """

    def __init__(self, tokenizer: Tokenizer, dialect: Dialect, max_segment_tokens: int, question: str, last_turn: bool) -> None:
        self._tokenizer = tokenizer
        self._dialect = dialect
        self._max_segment_tokens = max_segment_tokens
        self._reserved = reserved_strings(dialect.tags, tokenizer.reserved)
        self._ids = 0
        self._said: Message = {}
        self._calls: list[_Call] = []
        user = self._defused(question) + (f"\n\n{LAST_TURN}" if last_turn else "")
        self.messages: list[Message] = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": user}]

    def act(self, message: Mapping[str, Any], finish_reason: str | None) -> list[int]:
        """The ids of the segment that says what an assistant's message means; call :meth:`observe` with the environment's reply.

        A message can hold anything: what is no action becomes a segment that is none.
        """
        text = _text(message.get("content"))
        calls = message.get("tool_calls")
        self._calls = []
        for call in calls if isinstance(calls, list) else ():
            self._calls.append(self._call(call))
        self._said = {"role": "assistant", "content": _sound(text or _text(message.get("refusal")))}
        action = ""
        if self._calls:
            first = self._calls[0]
            if first.fault is None:
                action = self._segment(first.name, first.text)
        elif finish_reason not in _CUT_SHORT:
            thoughts, closed, answer = text.rpartition("</think>")
            text = thoughts + closed
            if answer.strip() and "<think>" not in answer:
                action = self._segment("answer", answer)
            else:
                text += answer
        action_ids = self._tokenizer.encode(action)
        room = max(0, self._max_segment_tokens - len(action_ids))
        if len(action_ids) > self._max_segment_tokens and self._calls:
            fault = f"Invalid call: the {_ARGUMENTS[self._calls[0].name]} is too long. Shorten it."
            self._calls[0] = self._calls[0]._replace(fault=fault)
        return self._tokenizer.encode(self._defused(text))[:room] + action_ids[: self._max_segment_tokens]

    def observe(self, reply: str, action: str, ended: bool = False) -> list[Message]:
        """The new messages: the model's own, as it goes back to it, and the replies to it.

        Parameters
        ----------
        reply
            What the environment appended, as text.
        action
            ``info["action"]``: search, answer or invalid.
        ended
            Whether the episode has ended, so that there is no reply.
        """
        dialect = self._dialect
        if ended:
            content, announcement = ENDED, ""
        elif action == "search":
            information, _, announcement = reply.partition(dialect.information_open)[2].rpartition(dialect.information_close)
            content = information.strip() or NO_PASSAGES
        else:
            fault = self._calls[0].fault if self._calls else None
            content, announcement = fault or EXPECTED, reply.removeprefix(_as_read(self._tokenizer, dialect.invalid_text or ""))
        if announcement.strip():
            content += f"\n\n{LAST_TURN}"
        said = self._said
        if self._calls:
            said["tool_calls"] = [call.message() for call in self._calls]
            contents = [content, *[ENDED if ended else call.fault or NOT_EXECUTED for call in self._calls[1:]]]
            replies = [{"role": "tool", "tool_call_id": call.id, "content": text} for call, text in zip(self._calls, contents, strict=True)]
        else:
            replies = [] if ended else [{"role": "user", "content": content}]
        new = [said, *replies]
        self.messages += new
        return new

    def _segment(self, kind: str, text: str) -> str:
        dialect = self._dialect
        tags = (dialect.search_open, dialect.search_close) if kind == "search" else (dialect.answer_open, dialect.answer_close)
        return f"{tags[0]}{self._defused(text)}{tags[1]}"

    def _defused(self, text: str) -> str:
        """Text without tags and control tokens, as the tokenizer will read it."""
        text = _sound(text)
        normalise = getattr(self._tokenizer, "normalise", None)
        return neutralise(normalise(text) if normalise is not None else text, self._reserved)

    def _call(self, call: Any) -> _Call:
        call = call if isinstance(call, Mapping) else {}
        function = call.get("function")
        function = function if isinstance(function, Mapping) else {}
        name, arguments = function.get("name"), function.get("arguments")
        self._ids += 1
        given = call.get("id")
        usable = isinstance(given, str) and 0 < len(given) <= _LONGEST_ID and given.isprintable()
        call_id = given if usable and given not in {other.id for other in self._calls} else f"call_{self._ids}"
        if not isinstance(name, str) or name not in _ARGUMENTS:
            shown = name if isinstance(name, str) and _NAME.fullmatch(name) else "unknown"
            return _Call(call_id, shown, "", f"Invalid call: there is no such tool. {EXPECTED}")
        value = _parsed(arguments)
        text = value.get(_ARGUMENTS[name]) if isinstance(value, Mapping) else None
        if isinstance(text, str):
            return _Call(call_id, name, _sound(text), None)
        return _Call(call_id, name, "", f"Invalid call: the arguments must be a JSON object with the string `{_ARGUMENTS[name]}`.")


class ToolLoop:
    """An environment, for a chat model that calls tools.

    Parameters
    ----------
    env
        A ``SearchQAEnv`` or ``TextView`` of one, with any wrappers that leave observations and actions as they are. Its dialect decides what an
        invalid turn costs; its prompt is not shown, :data:`INSTRUCTIONS` and the question are.

    Attributes
    ----------
    tools
        :data:`TOOLS`.
    info
        The environment's info of the last call.

    Raises
    ------
    ConfigurationError
        For an environment of another kind.
    """

    tools = TOOLS

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        inner = env.unwrapped
        if not isinstance(inner, SearchQAEnv) or not isinstance(env.action_space, TokenSequence | UnicodeText):
            raise ConfigurationError(f"ToolLoop takes a SearchQAEnv, plain or as TextView; got {env}. Leave other views out.")
        self.env = env
        self.info: dict[str, Any] = {}
        self._inner = inner
        self._conversation: Conversation | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> list[Message]:
        """Begin an episode; the messages to send, system and user. ``options`` are the environment's."""
        _, self.info = self.env.reset(seed=seed, options=options)
        self._conversation = begin(self._inner.tokenizer, self._inner.dialect, self._inner.max_segment_tokens, self.info)
        return list(self._conversation.messages)

    def step(self, message: Any, finish_reason: str | None = None) -> tuple[list[Message], float, bool, bool, dict[str, Any]]:
        """Take the model's message.

        Parameters
        ----------
        message
            ``choices[0].message`` as the API returns it: a mapping, or the client's object (with ``model_dump``).
        finish_reason
            ``choices[0].finish_reason``. Text that was cut short (``length``) or filtered is no answer.

        Returns
        -------
        new_messages, reward, terminated, truncated, info
            The messages to append: the model's own and the replies to it. The rest is the environment's.

        Raises
        ------
        InvalidSegmentError
            If ``message`` is neither; the episode is left as it was.
        """
        dump = getattr(message, "model_dump", None)
        message = dump() if dump is not None else message
        if not isinstance(message, Mapping):
            raise InvalidSegmentError(f"step takes an assistant message, as choices[0].message is; got {type(message).__name__}.")
        tokenizer = self._inner.tokenizer
        conversation = self._conversation
        if conversation is None:
            raise EpisodeStateError("step() before reset(): call reset() first.")
        ids = conversation.act(message, finish_reason)
        action = tokenizer.decode(ids) if isinstance(self.env.action_space, UnicodeText) else ids
        _, reward, terminated, truncated, self.info = self.env.step(action)
        reply = tokenizer.decode(self.info["turn_record"].env_tokens.tolist())
        new_messages = conversation.observe(reply, self.info["action"], terminated or truncated)
        return new_messages, float(reward), terminated, truncated, self.info


def begin(tokenizer: Tokenizer, dialect: Dialect, max_segment_tokens: int, info: Mapping[str, Any]) -> Conversation:
    """The conversation of an episode that begins with ``info``, as ``reset`` gave it."""
    prompt = tokenizer.decode(info["turn_record"].env_tokens.tolist())
    last_turn = _as_read(tokenizer, dialect.last_turn_text) in prompt
    return Conversation(tokenizer, dialect, max_segment_tokens, info["question"], last_turn)


def _as_read(tokenizer: Tokenizer, text: str) -> str:
    """Environment text as it comes back from ids: some tokenizers change letters."""
    return tokenizer.decode(tokenizer.encode(text))


def _text(content: Any) -> str:
    """The text of a message's content: a string, or a list of parts."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _sound(text: str) -> str:
    """Text that UTF-8 can carry: JSON can hold halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()


def _parsed(arguments: Any) -> Any:
    """The arguments of a call, which OpenAI writes as JSON text and some servers as an object; None for what is neither."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return None
