"""Tokenizers whose every id has bytes of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from searchqa_envs.errors import InvalidSegmentError


def outside_vocabulary(token: object, vocab_size: int) -> InvalidSegmentError:
    """The error for an id that the vocabulary does not have."""
    return InvalidSegmentError(f"Token ids must be in [0, {vocab_size}); got {token}. Sample ids from this tokenizer's vocabulary.")


def look_up(table: Mapping[int, bytes], ids: Sequence[int], vocab_size: int) -> list[bytes]:
    """The bytes of each id; raises :class:`InvalidSegmentError` for one that the table does not have."""
    try:
        return [table[token] for token in ids]
    except KeyError as error:
        raise outside_vocabulary(error.args[0], vocab_size) from None


def longest_text(pieces: Sequence[bytes]) -> int:
    """The most characters that one of the pieces can stand for; a byte that is not UTF-8 stands for one."""
    return max(len(piece.decode("utf-8", "replace")) for piece in pieces)


class TableTokenizer:
    """What the embedded tokenizers share: the way from ids to text, by a table of the bytes of each id."""

    vocab_size: int

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = dict(enumerate(pieces))  # a dict, because a negative id must be an error and not the last token

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD, padding and end of sequence become nothing."""
        return b"".join(self.pieces(ids)).decode("utf-8", "replace")

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each id; ``b""`` for padding and end of sequence.

        Raises
        ------
        InvalidSegmentError
            If an id is outside the vocabulary.
        """
        return look_up(self._pieces, ids, self.vocab_size)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"
