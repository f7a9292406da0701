"""Random draws that never change, and the names of the generated world."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SYLLABLES: tuple[str, ...] = (*(consonant + vowel for consonant in "bdkmnrsvz" for vowel in "aiou"), "ta", "to", "tu", "la")
"""The 40 syllables of all names. Chosen so that no name is a word of the templates, and so that stemming leaves every name alone."""

SPLITS: tuple[str, ...] = ("train", "dev", "test")
_SPLIT_BOUNDS = (0.6, 0.8, 1.0)  # a name belongs to train, dev or test by a hash of its syllables
_SMALLEST_SHARE = 0.2


class Draws:
    """Whole numbers from PCG64's raw output.

    NumPy keeps the raw output of a bit generator the same for ever, but not what ``Generator`` methods make of it; so a seed gives the same world
    with every version of NumPy and on every platform.
    """

    def __init__(self, *entropy: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(entropy))
        self._single: list[int] = []

    def raw(self, size: int) -> NDArray[np.uint64]:
        """``size`` numbers of 64 bits, uint64[size]."""
        return np.atleast_1d(np.asarray(self._bits.random_raw(size), dtype=np.uint64))

    def below(self, high: int, size: int) -> NDArray[np.int64]:
        """``size`` numbers in [0, high), int64[size]; ``high`` at most 2**31."""
        return (((self.raw(size) >> np.uint64(32)) * np.uint64(high)) >> np.uint64(32)).astype(np.int64)

    def one(self, high: int) -> int:
        """One number in [0, high)."""
        if not self._single:
            self._single = (self.raw(512) >> np.uint64(32)).tolist()
        return (self._single.pop() * high) >> 32

    def order(self, size: int) -> NDArray[np.int64]:
        """The numbers below ``size`` in random order, int64[size]."""
        return np.argsort(self.raw(size), kind="stable")


def _hash01(codes: NDArray[np.int64], syllables: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each name (splitmix64 of its code), the same everywhere and for ever."""
    mixed = codes.astype(np.uint64) + np.uint64(syllables << 48)
    mixed = (mixed + np.uint64(0x9E3779B97F4A7C15)) & np.uint64(0xFFFFFFFFFFFFFFFF)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


def _split_of_codes(codes: NDArray[np.int64], syllables: int) -> NDArray[np.int64]:
    return np.searchsorted(np.array(_SPLIT_BOUNDS), _hash01(codes, syllables), side="right")


def split_of(name: str) -> str:
    """The only split in which a name occurs."""
    positions = [SYLLABLES.index(name[start : start + 2].lower()) for start in range(0, len(name), 2)]
    code = 0
    for position in positions:
        code = code * len(SYLLABLES) + position
    return SPLITS[int(_split_of_codes(np.array([code]), len(positions))[0])]


def syllables_needed(count: int) -> int:
    """Syllables a name has in a world of ``count`` names: two up to about a hundred names, three up to four thousand, four beyond."""
    syllables = 2
    while 3 * count > _SMALLEST_SHARE * len(SYLLABLES) ** syllables:
        syllables += 1
    return syllables


def draw_names(draws: Draws, count: int, split: str) -> list[str]:
    """``count`` distinct names of a split, in random order."""
    base = len(SYLLABLES)
    syllables = syllables_needed(count)
    codes = np.empty(0, dtype=np.int64)
    while len(codes) < count:
        drawn = draws.below(base**syllables, 8 * (count - len(codes)) + 64)
        drawn = drawn[_split_of_codes(drawn, syllables) == SPLITS.index(split)]
        codes = np.concatenate([codes, drawn])
        _, first = np.unique(codes, return_index=True)
        codes = codes[np.sort(first)]
    codes = codes[:count]
    capitals = np.array([syllable.capitalize() for syllable in SYLLABLES])
    names = capitals[codes // base ** (syllables - 1)]
    for power in range(syllables - 2, -1, -1):
        names = np.char.add(names, np.array(SYLLABLES)[codes // base**power % base])
    return [str(name) for name in names.tolist()]
