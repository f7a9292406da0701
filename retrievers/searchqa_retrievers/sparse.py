"""BM25 by its name in a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from searchqa_retrievers.bm25 import BM25_PRESETS, BM25Retriever
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.types import Retriever, RetrieverError

BACKENDS = ("auto", "memory", "disk")
MEMORY_PASSAGES = 1_500_000
"""Up to this many passages, ``"auto"`` takes the index that is built in memory: with passages of 100 words that takes up to 4 GB (see
:func:`~searchqa_retrievers.bm25_index.estimate`)."""


def make(
    corpus: Callable[[], Corpus],
    preset: str = "bm25s",
    k1: float | None = None,
    b: float | None = None,
    method: str = "lucene",
    stopwords: str | Sequence[str] | None = "en",
    stemmer: str | None = "english",
    backend: str = "auto",
    rescore_factor: int = 8,
    cache_dir: str | None = None,
    show_progress: bool = True,
) -> Retriever:
    """The retriever ``"bm25"`` of a configuration.

    ``preset`` is one of :data:`BM25_PRESETS`; ``k1`` and ``b`` can be given beside it. ``backend`` is ``"memory"``, ``"disk"`` or
    ``"auto"``, which chooses by the number of passages (:data:`MEMORY_PASSAGES`); ``rescore_factor`` is for the one on disk, since the
    one in memory scores every passage.
    """
    if preset not in BM25_PRESETS:
        raise RetrieverError(f"preset of retriever 'bm25' must be one of {', '.join(BM25_PRESETS)}, got {preset!r}")
    if backend not in BACKENDS:
        raise RetrieverError(f"backend of retriever 'bm25' must be one of {', '.join(BACKENDS)}, got {backend!r}")
    values = BM25_PRESETS[preset]
    passages = corpus()
    arguments: dict[str, Any] = {
        "k1": values["k1"] if k1 is None else k1,
        "b": values["b"] if b is None else b,
        "method": method,
        "stopwords": stopwords,
        "stemmer": stemmer,
        "cache_dir": cache_dir,
        "show_progress": show_progress,
    }
    if backend == "disk" or (backend == "auto" and len(passages) > MEMORY_PASSAGES):
        from searchqa_retrievers.bm25_disk import DiskBM25Retriever

        return DiskBM25Retriever(passages, **arguments, rescore_factor=rescore_factor)
    return BM25Retriever(passages, **arguments)
