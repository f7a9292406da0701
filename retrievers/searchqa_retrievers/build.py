"""From a name or a configuration to a retriever."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from searchqa_retrievers.cached import Cached
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.types import Retriever, RetrieverError

DEFAULT_CACHE_ENTRIES = 10_000


def build_retriever(config: str | Mapping[str, Any] | Retriever, corpus: Corpus | Callable[[], Corpus]) -> Retriever:
    """Make the retriever that ``config`` describes over ``corpus``.

    Parameters
    ----------
    config
        A name (``"bm25"``, ``"dense"``, ``"http"``, ``"random"``, ``"none"``); or a mapping with ``name``, the arguments of that retriever, for ``bm25`` also
        ``preset`` (``"search-r1"``: k1 0.9, b 0.4; single values can be given beside it), and ``cache_entries`` (default 10,000
        answers kept in memory, 0 for none); or a retriever, which is returned as it is.
    corpus
        The passages, or a function that gives them, which is called only where the retriever needs any (not for ``"http"`` and ``"none"``).

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
    make = _MAKERS.get(name) if isinstance(name, str) else None
    if make is None:
        raise RetrieverError(f"the name of a retriever must be one of {_choices()}, got {name!r}; pass an object for one of your own")
    entries = options.pop("cache_entries", DEFAULT_CACHE_ENTRIES)
    if isinstance(entries, bool) or not isinstance(entries, int) or entries < 0:
        raise RetrieverError(f"cache_entries must be a whole number of at least 0 (0: no cache), got {entries!r}")
    allowed = [parameter for parameter in inspect.signature(make).parameters if parameter != "corpus"]
    unknown = sorted(map(str, set(options) - set(allowed)))
    if unknown:
        raise RetrieverError(f"retriever {name!r} has no option {', '.join(unknown)}; it has {', '.join([*allowed, 'cache_entries'])}")
    retriever = make(corpus if callable(corpus) else lambda: corpus, **options)
    return Cached(retriever, entries) if entries else retriever


def _bm25(
    corpus: Callable[[], Corpus],
    preset: str = "bm25s",
    k1: float | None = None,
    b: float | None = None,
    method: str = "lucene",
    stopwords: Any = "en",
    stemmer: str | None = "english",
    cache_dir: str | None = None,
    show_progress: bool = True,
) -> Retriever:
    from searchqa_retrievers.bm25 import BM25_PRESETS, BM25Retriever

    if preset not in BM25_PRESETS:
        raise RetrieverError(f"preset of retriever 'bm25' must be one of {', '.join(BM25_PRESETS)}, got {preset!r}")
    values = BM25_PRESETS[preset]
    return BM25Retriever(
        corpus(),
        k1=values["k1"] if k1 is None else k1,
        b=values["b"] if b is None else b,
        method=method,
        stopwords=stopwords,
        stemmer=stemmer,
        cache_dir=cache_dir,
        show_progress=show_progress,
    )


def _dense(
    corpus: Callable[[], Corpus],
    encoder: str | Mapping[str, Any] = "search-r1",
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    index: str = "flat",
    storage: str = "float32",
    cache_dir: str | None = None,
    rescore_factor: int = 32,
    nprobe: int | None = None,
    faiss_file: str | None = None,
    faiss_rows: str | None = None,
    show_progress: bool = True,
) -> Retriever:
    from searchqa_retrievers.dense import DenseRetriever
    from searchqa_retrievers.encoders import Encoder, EncoderSettings

    if not isinstance(encoder, str):
        fields = list(inspect.signature(EncoderSettings).parameters)
        if "model" not in encoder or set(encoder) - set(fields):
            raise RetrieverError(f"encoder must be a preset or a mapping with 'model' and any of {', '.join(fields)}, got {encoder!r}")
    return DenseRetriever(
        corpus(),
        Encoder(encoder if isinstance(encoder, str) else EncoderSettings(**encoder), model, device, dtype),
        index=index,
        storage=storage,
        cache_dir=cache_dir,
        rescore_factor=rescore_factor,
        nprobe=nprobe,
        faiss_file=faiss_file,
        faiss_rows=faiss_rows,
        show_progress=show_progress,
    )


def _http(
    corpus: Callable[[], Corpus],
    url: str = "http://127.0.0.1:8000",
    format: str = "searchqa",
    timeout: float = 10.0,
    deadline: float = 30.0,
    retries: int = 4,
) -> Retriever:
    from searchqa_retrievers.http_client import Http

    token = os.environ.get("SEARCHQA_RETRIEVER_TOKEN") or None  # no option: configurations are saved with runs
    return Http(url, format, timeout=timeout, deadline=deadline, retries=retries, token=token)


def _random(corpus: Callable[[], Corpus], seed: int = 0) -> Retriever:
    from searchqa_retrievers.controls import RandomRetriever

    return RandomRetriever(corpus(), seed)


def _none(corpus: Callable[[], Corpus]) -> Retriever:
    from searchqa_retrievers.controls import NoRetriever

    return NoRetriever()


_MAKERS: dict[str, Callable[..., Retriever]] = {"bm25": _bm25, "none": _none, "random": _random, "dense": _dense, "http": _http}


def _choices() -> str:
    return ", ".join(_MAKERS)
