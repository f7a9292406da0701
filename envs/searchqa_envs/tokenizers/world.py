"""The tokenizer of the generated world: words and syllables, so that a tiny model can copy names that it has never seen."""

from __future__ import annotations

import re
from collections.abc import Iterator

from searchqa_envs.dialects import (
    R1_NO_SEARCH_PROMPT,
    R1_SEARCHER_LAST_TURN,
    R1_SEARCHER_PROMPT,
    SEARCH_R1_INVALID,
    SEARCH_R1_LAST_TURN,
    SEARCH_R1_PROMPT,
)
from searchqa_envs.tokenizers.byte import TAGS
from searchqa_envs.tokenizers.table import TableTokenizer, longest_text
from searchqa_envs.world.names import SYLLABLES
from searchqa_envs.world.schema import template_texts

PAD, EOS = "<pad>", "<eos>"
_SHORTEST_PHRASE = 12
_MEMO_ENTRIES = 50_000


def _phrases() -> list[str]:
    """What the dialects' fixed texts have between tags. Short pieces are left to the words: ``" and "`` would swallow a name's blank."""
    texts = (SEARCH_R1_PROMPT, R1_NO_SEARCH_PROMPT, R1_SEARCHER_PROMPT, SEARCH_R1_INVALID, SEARCH_R1_LAST_TURN, R1_SEARCHER_LAST_TURN)
    cut = re.compile("|".join(map(re.escape, (*TAGS, "{question}"))))
    pieces = {piece for text in texts for piece in cut.split(text) if len(piece) >= _SHORTEST_PHRASE}
    return sorted(pieces, key=lambda piece: (-len(piece), piece))


PHRASES: tuple[str, ...] = tuple(_phrases())
MARKS: tuple[str, ...] = (*(mark for i in range(1, 6) for mark in (f"Doc {i}(Title:", f"Doc {i}:", f"({i})")), "Question:", "User:", "\n\n")


def _vocabulary() -> Iterator[bytes]:
    """The bytes of every token, in the order of the ids."""
    yield from (b"", b"")  # padding, end of sequence
    yield from (tag.encode() for tag in TAGS)
    yield from (bytes([value]) for value in range(256))
    words = sorted({word for text in template_texts() for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", text))} - {"s"})
    texts = [
        *(f" {syllable.capitalize()}" for syllable in SYLLABLES),
        *SYLLABLES,
        *(syllable.capitalize() for syllable in SYLLABLES),
        *(f" {word}" for word in words),
        *(word for word in words if word[0].isupper()),
        *("what", "is", "of", "yes", "no", "question"),
        *(f" {digit}" for digit in range(10)),
        *(" .", " ,", " ?", " :", " 's", "'s"),
        *MARKS,
        *PHRASES,
    ]
    yield from dict.fromkeys(text.encode() for text in texts if len(text) > 1)


VOCABULARY: tuple[bytes, ...] = tuple(_vocabulary())
_IDS = {VOCABULARY[token].decode(): token for token in (*range(2, 2 + len(TAGS)), *range(2 + len(TAGS) + 256, len(VOCABULARY)))}
_FIRST_BYTE = 2 + len(TAGS)
_LONGEST_WORD = max(len(text) for text in _IDS if text not in PHRASES)
_PIECES = re.compile(
    "|".join(map(re.escape, (*PHRASES, *TAGS, *MARKS))) + r"| ?[A-Za-z]+| ?[0-9]| ?'s(?![A-Za-z])| [.,?:]|.",
    re.DOTALL,
)


class _Memo(dict[str, tuple[int, ...]]):
    """From a piece of text to its ids; bounded."""

    def __missing__(self, piece: str) -> tuple[int, ...]:
        ids = tuple(_piece_ids(piece))
        if len(self) >= _MEMO_ENTRIES:
            self.clear()
        self[piece] = ids
        return ids


def _piece_ids(piece: str) -> Iterator[int]:
    """The longest known text first, from left to right; bytes where none is known."""
    if piece in _IDS:
        yield _IDS[piece]
        return
    start = 0
    while start < len(piece):
        for end in range(min(len(piece), start + _LONGEST_WORD), start + 1, -1):
            token = _IDS.get(piece[start:end])
            if token is not None:
                yield token
                start = end
                break
        else:
            character = piece[start] if not "\ud800" <= piece[start] <= "\udfff" else "\ufffd"
            yield from (_FIRST_BYTE + value for value in character.encode())
            start += 1


class WorldTokenizer(TableTokenizer):
    """Tags, bytes, syllables and the words of the world's pages and questions, in a fixed vocabulary of a few hundred ids.

    A name is one id for each syllable, the same ones wherever a blank stands before it: `` Mako`` is `` Ma`` ``ko`` on its page, behind
    ``(Title:``, in a query and in an answer. Without a blank (at the start of a text, after ``>`` or ``(1)``) only the first id differs.
    Known words are one id with their blank. The dialects' tags are one id each, the fixed sentences of their prompts and replies too.
    Everything else is UTF-8 bytes. The ids of a text depend on nothing outside the module; a change of the vocabulary changes ``name``.

    ``decode(encode(text)) == text`` for every text without lone surrogates; those become U+FFFD. No text encodes to padding or end of sequence.
    """

    name = "world-1"
    vocab_size = len(VOCABULARY)
    pad_id = 0
    eos_id = 1
    reserved = (*TAGS, PAD, EOS)
    longest_piece = longest_text(VOCABULARY)

    def __init__(self) -> None:
        super().__init__(VOCABULARY)
        self._memo = _Memo()

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without end of sequence."""
        memo = self._memo
        return [token for piece in _PIECES.findall(text) for token in memo[piece]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WorldTokenizer) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __reduce__(self) -> tuple[type[WorldTokenizer], tuple[()]]:
        return WorldTokenizer, ()
