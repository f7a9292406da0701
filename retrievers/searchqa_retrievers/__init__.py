"""Search back ends for question-answering environments. See ``searchqa_retrievers.types`` for the interface."""

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

__all__ = ["CorpusError", "Hit", "Passage", "Retriever", "RetrieverError", "RetrieverUnavailable", "SearchRequest", "default_cache_key"]
