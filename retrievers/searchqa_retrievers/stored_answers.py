"""Keys and answers as bytes that every process and every run reads alike."""

from __future__ import annotations

import hashlib
import json
import numbers
from collections.abc import Hashable, Sequence
from typing import Any

from searchqa_retrievers.types import Hit, Passage, RetrieverError


def stable_bytes(key: Any) -> bytes:
    """The same bytes for equal keys in every process (``hash`` differs between them), different ones for different keys.

    Knows None, truth values, numbers, text (also with lone surrogates), bytes, tuples and frozensets of these; raises
    :class:`RetrieverError` for others.
    """
    if key is None:
        return b"n"
    if isinstance(key, bool):
        return b"b1" if key else b"b0"
    if isinstance(key, str):
        text = key.encode("utf-8", "surrogatepass")
        return b"s%d:%b" % (len(text), text)
    if isinstance(key, numbers.Integral):
        return b"i%d;" % int(key)
    if isinstance(key, numbers.Real):
        return f"f{float(key).hex()};".encode()
    if isinstance(key, bytes):
        return b"y%d:%b" % (len(key), key)
    if isinstance(key, tuple):
        return b"t%d:%b" % (len(key), b"".join(map(stable_bytes, key)))
    if isinstance(key, frozenset):
        return b"z%d:%b" % (len(key), b"".join(sorted(map(stable_bytes, key))))
    raise RetrieverError(
        f"a cache file and a recording need cache keys of None, numbers, text, bytes, tuples and frozensets; got {type(key).__name__}"
    )


def digest(*parts: Hashable) -> bytes:
    """32 bytes that stand for the parts."""
    return hashlib.sha256(stable_bytes(parts)).digest()


def hits_to_json(hits: Sequence[Hit]) -> list[Any]:
    """``[[id, title, text, score], ...]``, from which :func:`hits_from_json` makes the same hits, to the last bit of a score."""
    return [[*map(_text, hit.passage), float(hit.score)] for hit in hits]


def hits_from_json(rows: Any) -> list[Hit]:
    """The hits. Raises ``ValueError`` for anything that :func:`hits_to_json` does not give."""
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 4 and isinstance(row[3], float) for row in rows):
        raise ValueError("hits must be a list of [id, title, text, score]")
    return [Hit(Passage(*map(_read_text, row[:3])), row[3]) for row in rows]


def json_line(value: Any) -> bytes:
    """One line of JSON, in ASCII, with its line break."""
    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


def _text(text: str) -> str | dict[str, str]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON would join two lone surrogates to one character
        return {"utf8": text.encode("utf-8", "surrogatepass").hex()}
    return text


def _read_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("utf8"), str):
        return bytes.fromhex(value["utf8"]).decode("utf-8", "surrogatepass")
    raise ValueError(f"a text of a hit must be a string, got {type(value).__name__}")
