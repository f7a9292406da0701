"""Tokenizers of local text models: those of ``transformers``, and those that another package brings for its own checkpoints."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from searchqa_retrievers.types import RetrieverError


class TextTokenizer(Protocol):
    """Text to ids and back; padding and end of sequence are no text."""

    name: str
    vocab_size: int
    pad_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


TokenizerLoader = Callable[[Path], TextTokenizer | None]
"""The tokenizer of a checkpoint's folder, or None where it is not one of the loader's."""

_LOADERS: list[TokenizerLoader] = []


def register_tokenizer_loader(loader: TokenizerLoader) -> None:
    """Ask ``loader`` for the tokenizers of checkpoints before ``transformers``; loaders are asked in the order of their registration."""
    if loader not in _LOADERS:
        _LOADERS.append(loader)


def load_text_tokenizer(checkpoint: str | os.PathLike[str], system: str | None = "") -> TextTokenizer:
    """The tokenizer of a folder or of a name on the hub.

    Parameters
    ----------
    checkpoint
    system
        System message of prompts in a chat template; None: there is none.

    Raises
    ------
    RetrieverError
        No registered loader knows it, and ``transformers`` cannot load it.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        for loader in _LOADERS:
            tokenizer = loader(folder)
            if tokenizer is not None:
                return tokenizer
    from transformers import AutoTokenizer

    try:
        source = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RetrieverError(
            f"cannot load the tokenizer of {str(checkpoint)!r}: {error}; give a folder with model and tokenizer, or a name on the hub. "
            "The tokenizers of this project's own checkpoints are known once `searchqa_envs` is imported"
        ) from error
    return ChatTokenizer(source, system)


class ChatTokenizer:
    """A tokenizer of ``transformers`` that writes a prompt as a user's message, where it has a chat template, as an endpoint for chat does.

    Without a template, a prompt is encoded as the tokenizer does by default, with its begin of sequence if it has one.

    Parameters
    ----------
    source
        The tokenizer.
    system
        The system message (ZeroSearch: empty); None: there is none.
    """

    def __init__(self, source: Any, system: str | None = "") -> None:
        self._source = source
        self._system = system
        described = repr([sorted(source.get_vocab().items()), getattr(source, "chat_template", None)])
        self.name = f"{type(source).__name__}@{hashlib.sha256(described.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
        controls = sorted({token.content for token in source.added_tokens_decoder.values() if token.special}, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, controls)) or r"(?!)")
        self.vocab_size = len(source)
        if source.eos_token_id is None:
            raise RetrieverError(f"the tokenizer {self.name} of a text model has no end of sequence; give a causal language model's")
        self.eos_id = int(source.eos_token_id)
        self.pad_id = self.eos_id if source.pad_token_id is None else int(source.pad_token_id)

    def encode(self, text: str) -> list[int]:
        """Ids of the prompt. What looks like a control token in it is broken up by a blank: a policy's query must not end the user's message."""
        text = self._controls.sub(lambda match: f"{match[0][:1]} {match[0][1:]}", text)
        if getattr(self._source, "chat_template", None) is None:
            return list(self._source(text)["input_ids"])
        messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        messages.append({"role": "user", "content": text})
        rendered = self._source.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self._source(rendered, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, without control tokens."""
        return str(self._source.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
