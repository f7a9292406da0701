"""From a name or a configuration to a retriever."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from searchqa_retrievers.cached import Cached
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.counted import Counted
from searchqa_retrievers.options import check_options
from searchqa_retrievers.types import Retriever, RetrieverError

DEFAULT_CACHE_ENTRIES = 10_000
COMMON_OPTIONS = ("cache_entries", "cache_file", "record", "price")
"""What the configuration of every retriever may have: answers kept in memory, a file that keeps them for all processes and runs
(:class:`~searchqa_retrievers.disk_cache.DiskCached`), a file that the run's searches are recorded to
(:class:`~searchqa_retrievers.recording.Recorded`), and the price of one request (:class:`~searchqa_retrievers.counted.Counted`)."""


class _Maker(NamedTuple):
    """Where the function ``make(corpus, **options) -> Retriever`` of a name lies, whether it searches ``corpus``, and whether it has a back end."""

    module: str
    function: str = "make"
    local: bool = True
    counted: bool = True


_MAKERS: Mapping[str, _Maker] = {
    "bm25": _Maker("sparse"),
    "dense": _Maker("dense"),
    "hybrid": _Maker("hybrid"),
    "rerank": _Maker("rerank"),
    "filtered": _Maker("filtered"),
    "noisy": _Maker("noisy"),
    "sources": _Maker("sources"),
    "milvus": _Maker("milvus"),
    "random": _Maker("controls", "make_random"),
    "none": _Maker("controls", "make_none", counted=False),
    "http": _Maker("http_client", local=False),
    "shards": _Maker("shards", local=False),
    "online": _Maker("online", local=False),
    "simulated": _Maker("simulated", local=False),
    "replay": _Maker("recording", "make_replay", local=False, counted=False),
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
        A name of :data:`RETRIEVERS`; or a mapping with ``name``, the arguments of that retriever, and some of :data:`COMMON_OPTIONS`; or a
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
    options, common = split_options(config)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in _MAKERS:
        raise RetrieverError(f"the name of a retriever must be one of {_choices()}, got {name!r}; pass an object for one of your own")
    maker = _MAKERS[name]
    make: Callable[..., Retriever] = getattr(import_module(f"searchqa_retrievers.{maker.module}"), maker.function)
    check_options(name, make, options, COMMON_OPTIONS)
    retriever = make(corpus if callable(corpus) else lambda: corpus, **options)
    return with_options(retriever, common, cache_entries, counted=maker.counted)


def split_options(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of one retriever, and those of :data:`COMMON_OPTIONS`, checked."""
    common = {key: value for key, value in config.items() if key in COMMON_OPTIONS}
    entries, price = common.get("cache_entries", 0), common.get("price", 0.0)
    if isinstance(entries, bool) or not isinstance(entries, int) or entries < 0:
        raise RetrieverError(f"cache_entries must be a whole number of at least 0 (0: no cache), got {entries!r}")
    if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < math.inf:
        raise RetrieverError(f"price must be a number of at least 0, the price of one request, got {price!r}")
    for key in ("cache_file", "record"):
        if common.get(key) is not None and not isinstance(common[key], str | os.PathLike):
            raise RetrieverError(f"{key} must be the path of a file, got {common[key]!r}")
    return {key: value for key, value in config.items() if key not in COMMON_OPTIONS}, common


def with_options(
    retriever: Retriever, common: Mapping[str, Any], cache_entries: int = DEFAULT_CACHE_ENTRIES, *, counted: bool = True
) -> Retriever:
    """``Cached(Recorded(DiskCached(Counted(retriever))))``, as far as the common options ask for it.

    Only what no cache knows costs money and time, so the count is innermost. What a cache file answers belongs to the run, so the recording is
    outside of it. Memory is outermost, because it is the quickest; each answer passes the recording before memory has it.

    Parameters
    ----------
    common
        From :func:`split_options`.
    cache_entries
        Where ``common`` does not say.
    counted
        False for a retriever without a back end.
    """
    if counted:
        retriever = Counted(retriever, common.get("price", 0.0))
    if common.get("cache_file") is not None:
        from searchqa_retrievers.disk_cache import DiskCached

        retriever = DiskCached(retriever, common["cache_file"])
    if common.get("record") is not None:
        from searchqa_retrievers.recording import Recorded

        retriever = Recorded(retriever, common["record"])
    entries = common.get("cache_entries", cache_entries)
    return Cached(retriever, entries) if entries else retriever


def searches_corpus(config: str | Mapping[str, Any]) -> bool:
    """Whether the retriever of that name is made over a corpus (false: it asks somebody else, such as a server)."""
    name = config if isinstance(config, str) else config.get("name")
    return _MAKERS[name].local if isinstance(name, str) and name in _MAKERS else True


def has_back_end(config: str | Mapping[str, Any]) -> bool:
    """Whether calls of the retriever of that name are counted (false: it has nothing to ask, such as ``none``)."""
    name = config if isinstance(config, str) else config.get("name")
    return _MAKERS[name].counted if isinstance(name, str) and name in _MAKERS else True


def _choices() -> str:
    return ", ".join(_MAKERS)
