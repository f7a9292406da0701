"""Spaces: sequences of token ids, contexts padded to one length, and unicode text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

_SAMPLE_LENGTH = 16


class TokenSequence(spaces.Space[NDArray[np.int32]]):
    """One-dimensional int32 arrays of ids in ``[0, vocab_size)``, of ``min_length`` to ``max_length`` ids.

    ``sample`` draws short arrays (at most 16 ids beyond the minimum) from the space's own generator. Batched, it becomes a ``Tuple`` of
    itself, so that vector environments carry ragged arrays. It cannot be flattened; ``PaddedTokens`` gives a view of fixed shape.
    """

    def __init__(self, vocab_size: int, min_length: int, max_length: int, seed: int | np.random.Generator | None = None) -> None:
        if not 0 <= min_length <= max_length or vocab_size < 1:
            raise ValueError(
                "TokenSequence needs vocab_size >= 1 and 0 <= min_length <= max_length; "
                f"got vocab_size={vocab_size}, min_length={min_length}, max_length={max_length}."
            )
        self.vocab_size = int(vocab_size)
        self.min_length = int(min_length)
        self.max_length = int(max_length)
        super().__init__(shape=None, dtype=np.int32, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        """False: lengths vary."""
        return False

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> NDArray[np.int32]:
        """Ids drawn uniformly, of a length drawn uniformly."""
        if mask is not None or probability is not None:
            raise ValueError("TokenSequence.sample takes neither mask nor probability.")
        longest = min(self.max_length, max(self.min_length, 1) + _SAMPLE_LENGTH)
        length = int(self.np_random.integers(max(self.min_length, min(1, self.max_length)), longest + 1))
        return self.np_random.integers(0, self.vocab_size, size=length, dtype=np.int32)

    def contains(self, x: Any) -> bool:
        """True for a 1-D integer array of allowed length whose ids are all in the vocabulary."""
        if not isinstance(x, np.ndarray) or x.ndim != 1 or not np.issubdtype(x.dtype, np.integer):
            return False
        if not self.min_length <= len(x) <= self.max_length:
            return False
        return len(x) == 0 or (int(x.min()) >= 0 and int(x.max()) < self.vocab_size)

    def to_jsonable(self, sample_n: Iterable[NDArray[np.int32]]) -> list[list[int]]:
        """Lists of ids."""
        return [sample.tolist() for sample in sample_n]

    def from_jsonable(self, sample_n: list[Any]) -> list[NDArray[np.int32]]:
        """The inverse of :meth:`to_jsonable`."""
        return [np.asarray(sample, dtype=np.int32) for sample in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenSequence) and (self.vocab_size, self.min_length, self.max_length) == (
            other.vocab_size,
            other.min_length,
            other.max_length,
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"TokenSequence({self.vocab_size}, {self.min_length}, {self.max_length})"


class PaddedContext(spaces.Dict):
    """Contexts of fixed shape: ``{"input_ids": int32[C], "attention_mask": int8[C]}``, padded on the left.

    Libraries that make policies from spaces alone (Stable-Baselines3) learn here whose ids these are and what ends a segment.

    Attributes
    ----------
    tokenizer
        The tokenizer's name.
    pad_id
        The id that pads contexts on the left and segments on the right; no policy may choose it.
    closers
        The tags that end a segment.
    """

    def __init__(self, vocab_size: int, length: int, *, tokenizer: str, pad_id: int, closers: tuple[str, ...]) -> None:
        super().__init__(
            {
                "input_ids": spaces.Box(0, vocab_size - 1, (length,), np.int32),
                "attention_mask": spaces.Box(0, 1, (length,), np.int8),
            }
        )
        self.tokenizer = tokenizer
        self.pad_id = int(pad_id)
        self.closers = closers

    def __eq__(self, other: object) -> bool:
        return (
            super().__eq__(other)
            and isinstance(other, PaddedContext)
            and (self.tokenizer, self.pad_id, self.closers) == (other.tokenizer, other.pad_id, other.closers)
        )

    __hash__ = None  # type: ignore[assignment]


class UnicodeText(spaces.Text):
    """Any str of at most ``max_length`` characters.

    Gymnasium's ``Text`` needs a character set and is alphanumeric unless given one, so that a natural question is outside it.
    """

    def __init__(self, max_length: int, min_length: int = 0, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(max_length=max_length, min_length=min_length, charset="abcdefghijklmnopqrstuvwxyz <>/?", seed=seed)

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> str:
        """A short text of lower-case letters, blanks and a few signs."""
        if mask is not None or probability is not None:
            raise ValueError("UnicodeText.sample takes neither mask nor probability.")
        longest = min(self.max_length, self.min_length + _SAMPLE_LENGTH)
        length = int(self.np_random.integers(self.min_length, longest + 1))
        return "".join(self.np_random.choice(list(self.character_list), size=length))

    def contains(self, x: Any) -> bool:
        """True for a str of allowed length."""
        return isinstance(x, str) and self.min_length <= len(x) <= self.max_length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnicodeText) and (self.min_length, self.max_length) == (other.min_length, other.max_length)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"UnicodeText({self.min_length}, {self.max_length})"
