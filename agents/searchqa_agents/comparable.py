"""Which parts of two stamps must agree before their numbers may stand side by side, and which are only told.

A stamp says how a number was measured. Some parts decide what was measured: the questions, the passages, the search engine, how often a question was
played. Where these differ, a difference of two numbers says nothing about the two agents. Other parts are what is compared (the agent, its prompt), or
chance (the seed). A part that this module does not know, such as one of a data set of your own, counts as one that must agree.

An agent without a search engine, such as one that answers at once, was measured alike with any that has one: that is what the two differ in. Where both
have one, it must be the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from searchqa_retrievers.types import SERVER_NOT_REACHED

NOTED = frozenset({"agent", "dialect", "prompt", "reward", "tokenizer", "model", "method", "temperature", "seed", "searchqa_gym", "commit"})
"""Parts that are told and refuse nothing: what is compared, and what only chance depends on."""

BUDGETS = frozenset({"max_turns", "max_context_tokens", "max_segment_tokens", "max_observation_tokens", "forced_answer"})
"""Parts that must agree between agents of one kind and dialect, such as two checkpoints of Search-R1. Those of others belong to the system, and are told."""

UNTOLD = frozenset(
    {"threads", "cpus", "packages", "python", "platform", "command", "sets"}  # where and how a run was started
    | {"passages", "corpus", "printed_as"}  # compared as parts of others
)
"""Parts that are no difference at all, or that another part has."""

WHERE_ABSENT = {"search_controls": "off", "told_the_answer": "off", "judged": "all answers"}
"""Parts that are written where they are not as usual: what is known where one is absent."""

QUESTIONS = ("questions", "questions_sha256", "questions_played", "question_list", "described_questions")
"""Parts that say which questions were played."""

OF_SEARCHING = frozenset({"corpus", "retriever", "top_k", "search_controls"})
"""Parts that say nothing of a run without a search engine."""

MUST_BE_KNOWN = frozenset({"dataset", "corpus", "retriever", "top_k", "metric", "judge", *QUESTIONS})
"""Parts that refuse where one of the two stamps does not say them. Of all others, that is told."""

GROUPS = {
    "questions": (*QUESTIONS, "judged"),
    "data": ("dataset", "split", "revision", *QUESTIONS, "judged"),
    "budgets": tuple(BUDGETS),
}
"""Names under which several parts are allowed to differ."""
_MECHANICS = frozenset({"url", "timeout", "deadline", "retries", "concurrency"})
"""Of an agent and of a judge, what no answer depends on: where its server is, and how it is asked."""
_COMPARED_APART = frozenset({"retriever", "corpus_sha256", "metrics", *QUESTIONS})
_HASH = re.compile(r"\b[0-9a-f]{40}(?:[0-9a-f]{24})?\b")
_CALLED = ("retriever", "name", "method", "kind")
"""What says which of several kinds a mapping describes. Of another kind, the rest cannot be compared."""


@dataclass(frozen=True)
class Difference:
    """A part in which two stamps do not agree.

    Attributes
    ----------
    key
        Its path: ``top_k``, ``retriever.k1``.
    a, b
        The two values; None where a stamp does not say it.
    unknown
        One of the two does not say it, or says it in words that cannot be checked against the other.
    """

    key: str
    a: Any
    b: Any
    unknown: bool = False

    def told(self, of: str = "") -> str:
        """In words; ``of`` names what ``b`` is the value of."""
        apart = " (cannot be compared)" if self.unknown and None not in (self.a, self.b) else ""
        return f"{self.key}: {shown(self.a)} and {shown(self.b)}{f' ({of})' if of else ''}{apart}"

    def allowed(self, keys: Iterable[str]) -> bool:
        """Whether one of ``keys`` names it: its path, what its path lies in (``retriever``), a group (``questions, data, budgets``), or ``all``."""
        root = self.key.partition(".")[0]
        return any(key == "all" or self.key == key or self.key.startswith(f"{key}.") or root in GROUPS.get(key, ()) for key in keys)


def refusals(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """What must agree and does not, of two flat stamps of one set. Empty: their numbers may stand side by side."""
    return [difference for difference, matters in _differences(a, b) if matters]


def notes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """What else is not the same, and belongs beneath the table."""
    return [difference for difference, matters in _differences(a, b) if not matters]


def shown(value: Any) -> str:
    """A value of a stamp as people read it: hashes cut to 12 digits, None as ``not known``."""
    if value is None:
        return "not known"
    if isinstance(value, str):
        return _HASH.sub(lambda found: found[0][:12], value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _differences(stamp_a: Mapping[str, Any], stamp_b: Mapping[str, Any]) -> Iterator[tuple[Difference, bool]]:
    """All differences, each with whether it refuses."""
    a, b = _known(stamp_a), _known(stamp_b)
    found = _questions(a, b)
    apart = set(UNTOLD | _COMPARED_APART)
    if without_search(a) or without_search(b):
        apart |= OF_SEARCHING
        if without_search(a) != without_search(b):
            own = [_called(_engine(stamp["retriever"]) or stamp["retriever"]) if "retriever" in stamp else None for stamp in (a, b)]
            yield Difference("retriever", own[0], own[1], unknown=None in own), False
    else:
        found += [*_corpus(a, b), *_retriever(a, b)]
    found += _metric(a, b)
    for key in [key for key in {**a, **b} if key not in apart]:
        if key in WHERE_ABSENT:
            usual = WHERE_ABSENT[key]
            found += [] if a.get(key) == b.get(key) else [Difference(key, a.get(key, usual), b.get(key, usual))]
        else:
            found += _deep(key, a.get(key), b.get(key))
    same_system = _called(a.get("agent")) == _called(b.get("agent")) and a.get("dialect") == b.get("dialect")
    for difference in found:
        root = difference.key.partition(".")[0]
        if difference.unknown and root not in MUST_BE_KNOWN:
            if root not in NOTED | BUDGETS:
                yield difference, False
        else:
            yield difference, root not in NOTED and (root not in BUDGETS or same_system)


def without_search(stamp: Mapping[str, Any]) -> bool:
    """Whether a stamp says that there was no search engine."""
    retriever = stamp.get("retriever")
    return retriever == "none" or _engine(retriever).get("retriever") == "none"


def _known(stamp: Mapping[str, Any]) -> dict[str, Any]:
    """What a stamp says, as JSON would give it back: a stamp that was read and one that was just made are the same. Null is a part that it does not say."""
    plain = {str(key): _plain(part) for key, part in stamp.items() if part is not None}
    for key in ("agent", "judge"):
        if isinstance(plain.get(key), dict):
            plain[key] = _without_mechanics(plain[key])
    if isinstance(plain.get("question_list"), dict):  # how the list was chosen is no matter: its ids say which questions it has
        plain["question_list"] = {key: part for key, part in plain["question_list"].items() if key != "kind"}
    return plain


def _without_mechanics(asked: dict[str, Any]) -> dict[str, Any]:
    """An agent or a judge without them, and so the language model that an agent asks."""
    return {key: _without_mechanics(part) if isinstance(part, dict) else part for key, part in asked.items() if key not in _MECHANICS}


def _plain(value: Any) -> Any:
    """Within a part, null is a setting that is off; but for a server, it is one that does not tell what it is."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items() if not (key == "server" and part is None)}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return "none" if value is None else value if isinstance(value, str | int | float | bool) else str(value)


def _deep(key: str, a: Any, b: Any) -> list[Difference]:
    """Where two values differ, each place by its path."""
    if a is None or b is None:
        return [] if a is b else [Difference(key, a, b, unknown=True)]
    if isinstance(a, dict) and isinstance(b, dict):
        name = next((name for name in _CALLED if name in a and name in b), None)
        if name is not None and a[name] != b[name]:
            return [Difference(key, _called(a), _called(b))]
        return [one for name in {**a, **b} for one in _deep(f"{key}.{name}", a.get(name), b.get(name))]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and any(isinstance(part, dict) for part in [*a, *b]):
        return [one for i, (x, y) in enumerate(zip(a, b, strict=True)) for one in _deep(f"{key}.{i}", x, y)]
    if isinstance(a, dict) != isinstance(b, dict):  # a description in words beside settings
        return [Difference(key, _called(a), _called(b), unknown=True)]
    return [] if a == b else [Difference(key, a, b)]


def _called(value: Any) -> Any:
    return next((value[name] for name in _CALLED if name in value), value) if isinstance(value, dict) else value


def _questions(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """Which questions were played: by the hash of all of the set and what was taken of them; of a table in print, by their number and its words."""
    if not any("described_questions" in stamp for stamp in (a, b)):
        return [one for key in QUESTIONS[1:-1] for one in _deep(key, a.get(key), b.get(key))]
    x, y = a.get("questions_played"), b.get("questions_played")
    checkable = all("described_questions" in stamp for stamp in (a, b)) or (None not in (x, y) and x != y)
    x, y = _described_questions(a), _described_questions(b)
    return [] if checkable and x == y else [Difference("questions", x, y, unknown=not checkable)]


def _described_questions(stamp: Mapping[str, Any]) -> str | None:
    count, name = stamp.get("questions_played"), stamp.get("described_questions")
    if "questions_sha256" in stamp:
        name = f"of those with hash {stamp['questions_sha256'][:12]}"
    return ", ".join(str(part) for part in (count, name) if part is not None) or None


def _corpus(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """The passages that could be found: by their hash, or by their name where a table in print says it."""
    hashes = [corpus_hashes(stamp) for stamp in (a, b)]
    names = [_corpus_name(stamp) for stamp in (a, b)]
    x, y = (own[0] if len(own) == 1 else own or name for own, name in zip(hashes, names, strict=True))
    checkable = all(hashes) or (all(names) and not any(hashes))
    return [] if checkable and x == y else [Difference("corpus", x, y, unknown=not checkable)]


def corpus_hashes(stamp: Mapping[str, Any]) -> list[str]:
    """Hashes of the passages behind the retriever of a stamp, sorted; of those that the data set comes with where the retriever says none."""
    found = sorted(set(_hashes(stamp.get("retriever"))))
    if found or _engine(stamp.get("retriever")).get("retriever") in ("none", "online", "http", "simulated"):
        return found
    return [stamp["corpus_sha256"]] if stamp.get("corpus_sha256") else []


def _hashes(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from [part] if key == "corpus_sha256" and isinstance(part, str) else _hashes(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _hashes(part)


def _corpus_name(stamp: Mapping[str, Any]) -> str | None:
    engine = _engine(stamp.get("retriever"))
    if engine.get("retriever") == "none":
        return "none"
    if engine.get("retriever") == "online":
        return f"the web, by {engine.get('provider')}"
    name: str | None = stamp.get("corpus")
    return name


def _engine(retriever: Any) -> dict[str, Any]:
    """The retriever itself: what is behind a server that says what it is."""
    engine = dict(retriever) if isinstance(retriever, Mapping) else {}
    while isinstance(engine.get("server"), Mapping):
        engine = {**engine["server"], **{key: engine[key] for key in ("worlds",) if key in engine}}
    return engine


def _retriever(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    x, y = a.get("retriever"), b.get("retriever")
    if not isinstance(x, dict) or not isinstance(y, dict):
        return _deep("retriever", x, y)
    engines = [_engine(x), _engine(y)]
    found = _deep("retriever", *(_without_corpus(engine) for engine in engines))
    if not found and any(engine.get("server") == SERVER_NOT_REACHED for engine in engines):
        found.append(Difference("retriever.server", engines[0].get("server"), engines[1].get("server"), unknown=True))
    return found


def _without_corpus(value: Any) -> Any:
    """Without what :func:`_corpus` compares."""
    if isinstance(value, dict):
        return {key: _without_corpus(part) for key, part in value.items() if key not in ("corpus_sha256", "passages")}
    return [_without_corpus(part) for part in value] if isinstance(value, list) else value


def _metric(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """``metrics`` are the names of what a result has; without one in common there is nothing to compare."""
    x, y = a.get("metrics"), b.get("metrics")
    if x is None or y is None or set(x) & set(y):
        return []
    own = [", ".join(_printed(stamp, name) for name in stamp["metrics"]) for stamp in (a, b)]
    return [Difference("metric", own[0], own[1])]


def _printed(stamp: Mapping[str, Any], name: str) -> str:
    printed = (stamp.get("printed_as") or {}).get(name)
    return f"{name} (printed as {printed})" if printed else name
