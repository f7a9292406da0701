"""What completion servers are asked, and how their answers are read.

=============== ========================= ====================================== ==============================================================
protocol        path                      answers with                           documentation
=============== ========================= ====================================== ==============================================================
``vllm``        ``/v1/completions``       the sampled ids and log-probabilities  vLLM, "OpenAI-Compatible Server", extra parameters of the
                                                                                 Completions API (``CompletionRequest``)
``sglang``      ``/generate``             the sampled ids and log-probabilities  SGLang, "Sampling Parameters", the ``/generate`` endpoint
``completions`` ``/v1/completions``       text                                   OpenAI, "Completions" (legacy)
``chat``        ``/v1/chat/completions``  text                                   OpenAI, "Chat Completions"
``tools``       ``/v1/chat/completions``  text and calls of tools                OpenAI, "Function calling"; see :mod:`searchqa_agents.tool_loop`
=============== ========================= ====================================== ==============================================================

Engines take defaults from a model's ``generation_config.json`` (Qwen's has a repetition penalty and top-k), so every parameter that changes the
distribution is sent.

Which log-probability is which:

- ``raw``: under the full softmax of the model's logits, whatever was sampled with. vLLM's default (``--logprobs-mode raw_logprobs``); SGLang with
  ``SGLANG_RETURN_ORIGINAL_LOGPROB``.
- ``processed``: under the distribution after the temperature. In vLLM (``--logprobs-mode processed_logprobs``) also after top-p and top-k; in
  SGLang, whose default it is, before them.

A trajectory's ``logprobs`` are under the full softmax at the sampling temperature, its ``sampling_logprobs`` under the truncated one. Raw ones are
the former at temperature 1 (and at 0, by definition) without truncation; processed ones are the former without truncation, and vLLM's the latter
with it. Where a server's are neither, a segment has none, and trainers refuse it. All are by the engine's own arithmetic: a trainer that wants its own
sets ``recompute_logprobs``, and then these are what its importance weights correct for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from searchqa_agents.language_model import Sampling
from searchqa_agents.tool_loop import TOOLS, Conversation

LogprobsMode = Literal["raw", "processed"]
Messages = list[dict[str, str]]
Kind = TypeVar("Kind")


class Prompt(NamedTuple):
    """What a segment is to follow, in the form that the protocol takes, and the ids that stand for control."""

    content: list[int] | str | Messages | Conversation
    eos_id: int
    pad_id: int


class Written(NamedTuple):
    """What a server wrote.

    ``ids`` and ``logprobs`` are None where it gives text only; with ``tools`` the ids are ours, made of its calls. ``ended``: it stopped by itself, not
    at the longest length; ``stop`` is the stop string that it names as the reason, and ``tells_stop`` whether
    it would have named one. The numbers of tokens are those that a server of text tells.
    """

    text: str
    ended: bool
    stop: str | None = None
    ids: list[int] | None = None
    logprobs: list[float] | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    tells_stop: bool = True


@dataclass(frozen=True)
class ServerProtocol:
    """One way of talking to a server. ``read`` raises ``ValueError`` for an answer that is not in the protocol's form."""

    path: str
    body: Callable[[Prompt, Sampling, int], dict[str, Any]]
    read: Callable[[Any, Prompt], Written]
    returns_ids: bool
    logprobs_mode: LogprobsMode = "raw"
    processed_is_truncated: bool = False


# -- vLLM ------------------------------------------------------------------------------------------------------------------------------------


def _vllm_body(prompt: Prompt, sampling: Sampling, seed: int) -> dict[str, Any]:
    return {
        "prompt": prompt.content,
        "add_special_tokens": False,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {str(prompt.pad_id): -100.0},  # padding is never sampled: trainers evaluate it as impossible
        "seed": seed,
        "stop": list(sampling.stop),
        "stop_token_ids": [prompt.eos_id],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # tags may be control tokens
        "spaces_between_special_tokens": False,
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # how versions without the parameter above say the ids
    }


def _vllm_read(answer: Any, prompt: Prompt) -> Written:
    choice = _get(answer, dict, "choices", 0)
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and echoed != prompt.content:
        raise ValueError("the server put other ids into the prompt than it was sent; it must use them as they are")
    ended = _ended(_get(choice, str, "finish_reason"))
    logprobs = _floats(_get(choice, list, "logprobs", "token_logprobs"))
    if choice.get("token_ids") is not None:
        ids = _ids(_get(choice, list, "token_ids"))
    else:
        tokens = _get(choice, list, "logprobs", "tokens")
        if not all(isinstance(token, str) and token.startswith("token_id:") and token[9:].isdecimal() for token in tokens):
            raise ValueError("choices[0] has no token_ids, nor tokens written as 'token_id:<number>'; vLLM 0.10.2 and later give them")
        ids = [int(token[9:]) for token in tokens]
    stop = choice.get("stop_reason")
    return Written(_get(choice, str, "text"), ended, stop if isinstance(stop, str) else None, ids, logprobs)


# -- SGLang ----------------------------------------------------------------------------------------------------------------------------------


def _sglang_body(prompt: Prompt, sampling: Sampling, seed: int) -> dict[str, Any]:
    return {
        "input_ids": prompt.content,
        "sampling_params": {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": {str(prompt.pad_id): -100.0},
            "sampling_seed": seed,  # heeded under --enable-deterministic-inference
            "stop": list(sampling.stop),
            "stop_token_ids": [prompt.eos_id],
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        },
        "return_logprob": True,
        "return_text_in_logprobs": False,
    }


def _sglang_read(answer: Any, prompt: Prompt) -> Written:
    reason = _get(answer, dict, "meta_info", "finish_reason")
    ended = _ended(_get(reason, str, "type"))
    tokens = _get(answer, list, "meta_info", "output_token_logprobs")  # [log-probability, id, text or null] each
    if not all(isinstance(token, list) and len(token) >= 2 for token in tokens):
        raise ValueError("meta_info.output_token_logprobs must hold [log-probability, id, text] for each token")
    matched = reason.get("matched")
    stop = matched if isinstance(matched, str) else None
    return Written(_get(answer, str, "text"), ended, stop, _ids([token[1] for token in tokens]), _floats([token[0] for token in tokens]))


# -- OpenAI-compatible servers ---------------------------------------------------------------------------------------------------------------


def _text_sampling(sampling: Sampling, seed: int) -> dict[str, Any]:
    body = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed}
    return body | ({"stop": list(sampling.stop)} if sampling.stop else {})  # OpenAI refuses an empty list


def _completions_body(prompt: Prompt, sampling: Sampling, seed: int) -> dict[str, Any]:
    return {"prompt": prompt.content, **_text_sampling(sampling, seed)}


def _chat_body(prompt: Prompt, sampling: Sampling, seed: int) -> dict[str, Any]:
    body = {"messages": prompt.content, **_text_sampling(sampling, seed)}
    assert isinstance(prompt.content, list)
    last = prompt.content[-1]
    if isinstance(last, dict) and last["role"] == "assistant":  # vLLM's and SGLang's; servers that cannot go on with a reply refuse it
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return body


def _completions_read(answer: Any, prompt: Prompt) -> Written:
    return _text_choice(answer, "text")


def _chat_read(answer: Any, prompt: Prompt) -> Written:
    return _text_choice(answer, "message", "content")


def _tools_body(prompt: Prompt, sampling: Sampling, seed: int) -> dict[str, Any]:
    assert isinstance(prompt.content, Conversation)
    body = _text_sampling(sampling, seed)
    body.pop("stop", None)  # what ends a message is the server's and the chat template's: no tags are written
    return {"messages": prompt.content.messages, "tools": TOOLS, **body}


def _tools_read(answer: Any, prompt: Prompt) -> Written:
    assert isinstance(prompt.content, Conversation)
    choice = _get(answer, dict, "choices", 0)
    reason = choice.get("finish_reason")
    ids = prompt.content.act(_get(choice, dict, "message"), reason if isinstance(reason, str) else None)
    prompt_tokens, generated_tokens = _token_counts(answer)
    return Written("", ended=True, ids=ids, prompt_tokens=prompt_tokens, generated_tokens=generated_tokens)


def _text_choice(answer: Any, *path: str) -> Written:
    choice = _get(answer, dict, "choices", 0)
    naming = [
        name for name in ("stop_reason", "matched_stop") if name in choice
    ]  # not OpenAI's: vLLM's and SGLang's name of the stop string
    stop = next((choice[name] for name in naming if isinstance(choice[name], str)), None)
    reason = _get(choice, str, "finish_reason")
    *before, last = path
    holder = _get(choice, dict, *before) if before else choice
    # null: nothing but hidden reasoning was written before the limit, or a filter took the text away
    text = "" if last in holder and holder[last] is None else _get(choice, str, *path)
    ended = reason == "content_filter" or _ended(reason)
    return Written(text, ended, stop, None, None, *_token_counts(answer), tells_stop=bool(naming))


def _token_counts(answer: Any) -> tuple[int | None, int | None]:
    usage = answer.get("usage")
    prompt, generated = (usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens"))
    return _count(prompt), _count(generated)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


PROTOCOLS = {
    "vllm": ServerProtocol("/v1/completions", _vllm_body, _vllm_read, returns_ids=True, processed_is_truncated=True),
    "sglang": ServerProtocol("/generate", _sglang_body, _sglang_read, returns_ids=True, logprobs_mode="processed"),
    "completions": ServerProtocol("/v1/completions", _completions_body, _completions_read, returns_ids=False),
    "chat": ServerProtocol("/v1/chat/completions", _chat_body, _chat_read, returns_ids=False),
    "tools": ServerProtocol("/v1/chat/completions", _tools_body, _tools_read, returns_ids=False),
}
"""The protocols by name."""


# -- reading ---------------------------------------------------------------------------------------------------------------------------------


def _get(answer: Any, kind: type[Kind], *path: str | int) -> Kind:
    value = answer
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            value = None
            break
    if not isinstance(value, kind):
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
        raise ValueError(f"{place} must be a {kind.__name__}; got {_short(value)}")
    return value


def _ended(finish_reason: str) -> bool:
    if finish_reason not in ("stop", "length"):
        raise ValueError(f"a segment ends with finish_reason 'stop' or 'length'; this one ended with {finish_reason!r}")
    return finish_reason == "stop"


def _ids(values: Sequence[Any]) -> list[int]:
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise ValueError(f"token ids must be integers; got {_short(values)}")
    return list(values)


def _floats(values: Sequence[Any]) -> list[float]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value > 1e-3:
            raise ValueError(f"log-probabilities must be finite numbers of at most 0; got {_short(value)}")
    return [min(float(value), 0.0) for value in values]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
