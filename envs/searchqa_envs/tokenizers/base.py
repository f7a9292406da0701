"""The interface of a tokenizer, as environments need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back, without loss.

    ``reserved`` are the strings that encode to control tokens (chat-template markers, end of sequence, the dialects' tags where they are single
    tokens): the environment neutralises them in passages and questions before it encodes environment text.

    Optional methods: ``encode_array(text) -> int32[n]``, the same ids without the detour by a list; ``chat_prompt(text, system=None) -> str | None``,
    the text in the tokenizer's chat template as one user message, behind a system message if given, ready for the assistant's turn;
    ``normalise(text) -> str``, the text as ``encode`` changes it before it cuts it into tokens (NFKC, lower case, ...), which must be done before text
    from outside is neutralised.
    Optional attribute: ``longest_piece: int | None``, the most characters that one id stands for, so that text of more than
    ``n * longest_piece`` characters never fits into ``n`` ids; None where that is not known.
    """

    name: str
    vocab_size: int
    pad_id: int
    eos_id: int
    reserved: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without adding begin or end of sequence."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD. ``decode(encode(text)) == text``."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The UTF-8 bytes that each id contributes, in order; padding and end of sequence contribute ``b""``."""
        ...
