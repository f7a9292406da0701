"""Search back ends for question-answering environments. See ``searchqa_retrievers.types`` for the interface."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from searchqa_retrievers.types import (
    CorpusError,
    Hit,
    Passage,
    Retriever,
    RetrieverError,
    RetrieverUnavailable,
    SearchRequest,
    default_cache_key,
)

if TYPE_CHECKING:
    from searchqa_retrievers.bm25 import BM25_PRESETS, BM25Retriever
    from searchqa_retrievers.bm25_disk import DiskBM25Retriever
    from searchqa_retrievers.build import build_retriever
    from searchqa_retrievers.cached import Cached
    from searchqa_retrievers.controls import NoRetriever, RandomRetriever
    from searchqa_retrievers.corpus import Corpus
    from searchqa_retrievers.counted import Counted
    from searchqa_retrievers.curriculum import Curriculum
    from searchqa_retrievers.dense import DenseRetriever
    from searchqa_retrievers.disk_cache import DiskCached
    from searchqa_retrievers.encoders import ENCODER_PRESETS, Encoder, EncoderSettings
    from searchqa_retrievers.filtered import Filtered
    from searchqa_retrievers.function import from_function
    from searchqa_retrievers.http_client import Http
    from searchqa_retrievers.hybrid import Hybrid
    from searchqa_retrievers.milvus import MilvusRetriever
    from searchqa_retrievers.noisy import Noisy
    from searchqa_retrievers.online import Online
    from searchqa_retrievers.paths import cache_root
    from searchqa_retrievers.recording import Recorded, Replay
    from searchqa_retrievers.rerank import CrossEncoder, Rerank
    from searchqa_retrievers.shards import Shards
    from searchqa_retrievers.simulated import Simulated
    from searchqa_retrievers.sources import Sources
    from searchqa_retrievers.stored_corpus import StoredCorpus, open_corpus

# Loaded when first asked for, so that importing an environment stays quick.
_LAZY = {
    "BM25Retriever": "bm25",
    "BM25_PRESETS": "bm25",
    "Cached": "cached",
    "Corpus": "corpus",
    "Counted": "counted",
    "CrossEncoder": "rerank",
    "Curriculum": "curriculum",
    "DenseRetriever": "dense",
    "DiskBM25Retriever": "bm25_disk",
    "DiskCached": "disk_cache",
    "ENCODER_PRESETS": "encoders",
    "Encoder": "encoders",
    "EncoderSettings": "encoders",
    "Filtered": "filtered",
    "Noisy": "noisy",
    "Http": "http_client",
    "Hybrid": "hybrid",
    "MilvusRetriever": "milvus",
    "NoRetriever": "controls",
    "Online": "online",
    "RandomRetriever": "controls",
    "Recorded": "recording",
    "Replay": "recording",
    "Rerank": "rerank",
    "Shards": "shards",
    "Simulated": "simulated",
    "Sources": "sources",
    "StoredCorpus": "stored_corpus",
    "build_retriever": "build",
    "cache_root": "paths",
    "from_function": "function",
    "open_corpus": "stored_corpus",
}

__all__ = [
    "BM25_PRESETS",
    "ENCODER_PRESETS",
    "BM25Retriever",
    "Cached",
    "Corpus",
    "CorpusError",
    "Counted",
    "CrossEncoder",
    "Curriculum",
    "DenseRetriever",
    "DiskBM25Retriever",
    "DiskCached",
    "Encoder",
    "EncoderSettings",
    "Filtered",
    "Hit",
    "Http",
    "Hybrid",
    "MilvusRetriever",
    "NoRetriever",
    "Noisy",
    "Online",
    "Passage",
    "RandomRetriever",
    "Recorded",
    "Replay",
    "Rerank",
    "Retriever",
    "RetrieverError",
    "RetrieverUnavailable",
    "SearchRequest",
    "Shards",
    "Simulated",
    "Sources",
    "StoredCorpus",
    "build_retriever",
    "cache_root",
    "default_cache_key",
    "from_function",
    "open_corpus",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
