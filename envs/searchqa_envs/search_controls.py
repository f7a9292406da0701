"""What a policy may say about a search behind its query: how many passages, from which source, with which filter."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from searchqa_envs.errors import ConfigurationError

SEPARATOR = "||"
_NAME = re.compile(r"\w(?:[\w .-]*\w)?")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_WORD = re.compile(r"[^\W_]")


def _has_word(value: str) -> bool:
    """Whether there is a letter or digit, also in the form in which ``searchqa_retrievers.filtered`` compares titles."""
    return _WORD.search(unicodedata.normalize("NFKC", value)) is not None


@dataclass(frozen=True, slots=True)
class Controls:
    """What one search said: ``top_k``, None where it said nothing of it, and filters as pairs of key and value."""

    top_k: int | None = None
    filters: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class SearchControls:
    """What the searches of an environment may say.

    A search says it behind ``||``, as ``key=value`` with semicolons between: ``who built it || k=5; source=news; title=Lisbon``. ``k`` is a
    number from 1 to ``top_k`` in the digits 0 to 9, ``source`` one of ``sources`` as it is written here, and each of ``filters`` is a key
    whose value is any text with a letter or digit. Keys, values and the query are stripped. Nothing else is understood: an unknown or
    repeated key, a value out of its range, an empty part or a second ``||`` make the action invalid.

    Attributes
    ----------
    top_k : int or None
        The greatest ``k``; None: a search cannot say it.
    sources, filters : tuple of str
        Letters, digits, and blanks, dots and hyphens between them.

    Raises
    ------
    ConfigurationError
        A value is out of its range, or a search could say nothing.
    """

    top_k: int | None = None
    sources: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        top_k: object = self.top_k
        if top_k is not None:
            if isinstance(top_k, bool) or not isinstance(top_k, Integral) or not 1 <= int(top_k) < 10**9:
                raise ConfigurationError(f"search_controls.top_k must be an integer of at least 1, the greatest k; got {top_k!r}.")
            object.__setattr__(self, "top_k", int(top_k))  # NumPy's integers are no JSON
        for field in ("sources", "filters"):
            names = getattr(self, field)
            if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names) or len(set(names)) != len(names):
                raise ConfigurationError(
                    f"search_controls.{field} must be different names of letters, digits, blanks, dots and hyphens; got {list(names)!r}."
                )
        if {"k", "source"} & set(self.filters):
            raise ConfigurationError(
                f"search_controls.filters cannot have 'k' or 'source', which mean something else; got {list(self.filters)}."
            )
        if self.top_k is None and not self.sources and not self.filters:
            raise ConfigurationError("search_controls must have top_k, sources or filters; None leaves all searches plain.")

    @classmethod
    def from_argument(cls, argument: object) -> SearchControls | None:
        """From ``{"top_k": 10, "sources": ["wiki", "news"], "filters": ["title"]}``, all of it optional; None stays None."""
        if argument is None or isinstance(argument, SearchControls):
            return argument
        if not isinstance(argument, Mapping) or set(argument) - {"top_k", "sources", "filters"}:
            raise ConfigurationError(f"search_controls must be a mapping with top_k, sources or filters, or None; got {argument!r}.")
        names: dict[str, tuple[Any, ...]] = {}
        for field in ("sources", "filters"):
            given = argument.get(field)
            given = () if given is None else given
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise ConfigurationError(f"search_controls.{field} must be a list of names; got {given!r}.")
            names[field] = tuple(given)
        return cls(argument.get("top_k"), **names)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that a search may write, ``k`` apart, which are those of the request's filters."""
        return (*(["source"] if self.sources else []), *self.filters)

    def parse(self, content: str) -> tuple[str, Controls | None] | None:
        """Query and controls (None where it says nothing) of what stands between the search tags; None for what cannot be understood."""
        query, separator, stated = content.partition(SEPARATOR)
        if not separator:
            return content, None
        if SEPARATOR in stated:
            return None
        top_k: int | None = None
        filters: dict[str, str] = {}
        for part in stated.split(";", len(self.keys) + 2):  # more parts than keys are refused without reading them all
            key, equals, value = (text.strip() for text in part.partition("="))
            if not equals or key in filters or (key == "k" and top_k is not None):
                return None
            if key == "k" and self.top_k is not None:
                if not _NUMBER.fullmatch(value) or int(value) > self.top_k:
                    return None
                top_k = int(value)
            elif (key == "source" and value in self.sources) or (key in self.filters and _has_word(value)):
                filters[key] = value
            else:
                return None
        return query.strip(), Controls(top_k, tuple(sorted(filters.items())))

    def sentence(self, search_open: str, search_close: str) -> str:
        """Tells a policy of all this; not a part of any published prompt."""
        ways, example = [], []
        if self.top_k is not None:
            ways.append(f"k from 1 to {self.top_k} for the number of results")
            example.append(f"k={min(5, self.top_k)}")
        if self.sources:
            ways.append(f"source for where to search ({', '.join(self.sources)})")
            example.append(f"source={self.sources[0]}")
        for name in self.filters:
            ways.append(f"{name} for words that the {name} of each result must have")
            example.append(f"{name}=words")
        return (
            f"Behind a query you can write {SEPARATOR} and then, separated by semicolons, {'; '.join(ways)}. "
            f"For example, {search_open} query {SEPARATOR} {'; '.join(example)} {search_close}."
        )

    def stamp(self) -> dict[str, Any]:
        """As :meth:`from_argument` takes it."""
        return {"top_k": self.top_k, "sources": list(self.sources), "filters": list(self.filters)}
