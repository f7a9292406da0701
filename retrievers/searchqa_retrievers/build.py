"""From a name or a configuration to a retriever."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from searchqa_retrievers.cached import Cached
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.types import Retriever, RetrieverError

DEFAULT_CACHE_ENTRIES = 10_000


class _Maker(NamedTuple):
    """Where the function ``make(corpus, **options) -> Retriever`` of a name lies, and whether it searches ``corpus``."""

    module: str
    function: str = "make"
    local: bool = True


_MAKERS: Mapping[str, _Maker] = {
    "bm25": _Maker("sparse"),
    "dense": _Maker("dense"),
    "hybrid": _Maker("hybrid"),
    "rerank": _Maker("rerank"),
    "filtered": _Maker("filtered"),
    "sources": _Maker("sources"),
    "milvus": _Maker("milvus"),
    "random": _Maker("controls", "make_random"),
    "none": _Maker("controls", "make_none"),
    "http": _Maker("http_client", local=False),
    "shards": _Maker("shards", local=False),
    "online": _Maker("online", local=False),
    "replay": _Maker("recording", "make_replay", local=False),
}
RETRIEVERS = tuple(_MAKERS)
"""The names that :func:`build_retriever` knows."""


def build_retriever(
    config: str | Mapping[str, Any] | Retriever, corpus: Corpus | Callable[[], Corpus], cache_entries: int = DEFAULT_CACHE_ENTRIES
) -> Retriever:
    """Make the retriever that ``config`` describes over ``corpus``.

    Parameters
    ----------
    config
        A name of :data:`RETRIEVERS`; or a mapping with ``name``, the arguments of that retriever, and ``cache_entries``; or a
        retriever, which is returned as it is.
    corpus
        The passages, or a function that gives them, which is called only where the retriever needs any.
    cache_entries
        Answers kept in memory where ``config`` does not say; 0 for none.

    Raises
    ------
    RetrieverError
        The name or a key is unknown; the message lists the choices.
    """
    if isinstance(config, str):
        config = {"name": config}
    elif not isinstance(config, Mapping):
        if isinstance(config, Retriever):
            return config
        raise RetrieverError(
            f"a retriever must be a name ({_choices()}), a mapping with 'name', or an object with `search` and `cache_key`, "
            f"got {type(config).__name__}"
        )
    options = dict(config)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in _MAKERS:
        raise RetrieverError(f"the name of a retriever must be one of {_choices()}, got {name!r}; pass an object for one of your own")
    entries = options.pop("cache_entries", cache_entries)
    if isinstance(entries, bool) or not isinstance(entries, int) or entries < 0:
        raise RetrieverError(f"cache_entries must be a whole number of at least 0 (0: no cache), got {entries!r}")
    maker = _MAKERS[name]
    make: Callable[..., Retriever] = getattr(import_module(f"searchqa_retrievers.{maker.module}"), maker.function)
    allowed = [parameter for parameter in inspect.signature(make).parameters if parameter != "corpus"]
    unknown = sorted(map(str, set(options) - set(allowed)))
    if unknown:
        raise RetrieverError(f"retriever {name!r} has no option {', '.join(unknown)}; it has {', '.join([*allowed, 'cache_entries'])}")
    retriever = make(corpus if callable(corpus) else lambda: corpus, **options)
    return Cached(retriever, entries) if entries else retriever


def searches_corpus(config: str | Mapping[str, Any]) -> bool:
    """Whether the retriever of that name is made over a corpus (false: it asks somebody else, such as a server)."""
    name = config if isinstance(config, str) else config.get("name")
    return _MAKERS[name].local if isinstance(name, str) and name in _MAKERS else True


def _choices() -> str:
    return ", ".join(_MAKERS)
