"""BM25 by its name in a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from searchqa_retrievers.bm25 import BM25_PRESETS, BM25Retriever
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.types import Retriever, RetrieverError


def make(
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
    """The retriever ``"bm25"`` of a configuration: ``preset`` is one of :data:`BM25_PRESETS`; ``k1`` and ``b`` can be given beside it."""
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
