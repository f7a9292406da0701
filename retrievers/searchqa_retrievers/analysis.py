"""From text to terms, equal to ``bm25s.tokenize``: lower case, words of two or more characters, stop words out, stems."""

from __future__ import annotations

import re
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from searchqa_retrievers.types import RetrieverError

ANALYZER_VERSION = 1
"""Raised whenever the terms of some text change; part of the key of every stored index."""

MAX_QUERY_CHARACTERS = 16_384
"""What follows in a longer query (more than some thousands of words) is not read."""

# fmt: off
ENGLISH_STOP_WORDS = (
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not",
    "of", "on", "or", "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was", "will", "with",
)
# fmt: on
"""Lucene's classic list of 33 words, which bm25s calls ``en``."""

_find_words = re.compile(r"\b\w\w+\b").findall
_ASCII_LOWER_OR_BLANK = bytes(
    ord(char.lower()) if char.isascii() and (char.isalnum() or char == "_") else 32 for char in map(chr, range(256))
)
_MEMO_ENTRIES = 200_000
_MEMO_WORD_LENGTH = 64


class AnalyzedCorpus(NamedTuple):
    """Every term of every passage, as numbers.

    ``terms[i]`` is the term with number ``i``; ``flat`` (int32[T]) has the terms of all passages one after another, ``documents``
    (int32[T]) the passage of each, ``lengths`` (int64[N]) the number of terms of each passage.
    """

    terms: list[str]
    flat: npt.NDArray[np.int32]
    documents: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]


class Analyzer:
    """Splits text into stemmed terms.

    Parameters
    ----------
    stop_words
        ``"en"`` (33 words), another language that bm25s knows (``"de"``, ``"french"``, ...), a sequence of words, or None.
    stemmer
        An algorithm of PyStemmer (``"english"`` is Porter 2), or None.
    """

    def __init__(self, stop_words: str | Sequence[str] | None = "en", stemmer: str | None = "english") -> None:
        self.stop_words = resolve_stop_words(stop_words)
        self.stemmer = stemmer
        self._stem_words = _load_stemmer(stemmer)
        self._stem_lock = threading.Lock()
        self._memo = _StemMemo(self)

    def terms(self, text: str) -> list[str]:
        """The terms of a text, in order, repetitions kept."""
        return [term for term in map(self._memo.__getitem__, _split(text)) if term is not None]

    def analyze_corpus(self, texts: Iterable[str], advance: Callable[[], object] | None = None) -> AnalyzedCorpus:
        """The terms of all texts, numbered by first appearance; ``advance`` is called after each text."""
        word_numbers = _Numbering()
        number_of = word_numbers.__getitem__
        words = array("i")
        ends = array("q", [0])
        for text in texts:
            words.fromlist(list(map(number_of, _split(text))))  # much quicker than extend
            ends.append(len(words))
            if advance is not None:
                advance()
        vocabulary = list(word_numbers)
        term_numbers = _Numbering()
        term_of_word = np.fromiter(
            (-1 if self._is_dropped(word) else term_numbers[stem] for word, stem in zip(vocabulary, self._stem(vocabulary), strict=True)),
            dtype=np.int32,
            count=len(vocabulary),
        )
        offsets = np.frombuffer(ends, dtype=np.int64)
        counts = offsets[1:] - offsets[:-1]
        flat = term_of_word[np.frombuffer(words, dtype=np.int32)]
        del words  # memory that a large corpus needs below
        documents = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        kept = flat >= 0
        documents = documents[kept]
        flat = flat[kept]
        return AnalyzedCorpus(list(term_numbers), flat, documents, np.bincount(documents, minlength=len(counts)).astype(np.int64))

    def query_terms(self) -> Callable[[str], tuple[str, ...]]:
        """A function from a query to its terms, which remembers those of the latest few: a step asks for them several times.

        At most :data:`MAX_QUERY_CHARACTERS` characters of a query are read.
        """
        remembered = lru_cache(maxsize=256)(lambda query: tuple(self.terms(query)))
        return lambda query: remembered(query[:MAX_QUERY_CHARACTERS])

    def _is_dropped(self, word: str) -> bool:
        return len(word) < 2 or word in self.stop_words

    def _stem(self, words: list[str]) -> list[str]:
        if self._stem_words is None:
            return words
        with self._stem_lock:  # a PyStemmer object must not be used by two threads at once
            return self._stem_words(words)


def _split(text: str) -> list[str]:
    """The lower-case words of a text; words of one letter may be among them, which the caller drops."""
    if text.isascii():  # two to three times as quick
        return text.encode("ascii").translate(_ASCII_LOWER_OR_BLANK).decode("ascii").split()
    return _find_words(text.lower())


class _Numbering(dict[str, int]):
    """Numbers keys from 0 in the order in which they are first asked for."""

    def __missing__(self, key: str) -> int:
        number = self[key] = len(self)
        return number


class _StemMemo(dict[str, str | None]):
    """From a word to its term, or None for one that is dropped; bounded."""

    def __init__(self, analyzer: Analyzer) -> None:
        super().__init__()
        self._analyzer = analyzer

    def __missing__(self, word: str) -> str | None:
        term = None if self._analyzer._is_dropped(word) else self._analyzer._stem([word])[0]
        if len(word) <= _MEMO_WORD_LENGTH:
            if len(self) >= _MEMO_ENTRIES:
                self.clear()
            self[word] = term
        return term


def resolve_stop_words(stop_words: str | Sequence[str] | None) -> frozenset[str]:
    """The set of words behind a name or a list."""
    if stop_words is None:
        return frozenset()
    if not isinstance(stop_words, str):
        return frozenset(stop_words)
    if stop_words in ("en", "english"):
        return frozenset(ENGLISH_STOP_WORDS)
    from bm25s.tokenization import _infer_stopwords

    try:
        return frozenset(_infer_stopwords(stop_words))
    except ValueError as error:
        raise RetrieverError(
            f"stopwords must be a language that bm25s knows, a list of words or None, got {stop_words!r}: {error}"
        ) from error


def _load_stemmer(name: str | None) -> Callable[[list[str]], list[str]] | None:
    if name is None:
        return None
    import Stemmer

    if name not in Stemmer.algorithms(True):
        raise RetrieverError(f"stemmer must be None or one of {', '.join(Stemmer.algorithms())}, got {name!r}")
    stemmer = Stemmer.Stemmer(name)
    stemmer.maxCacheSize = 0  # its own cache costs four times what the stemming does
    stem: Any = stemmer.stemWords
    return stem  # type: ignore[no-any-return]
