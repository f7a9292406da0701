"""Checks that every retriever of this package makes on a request."""

from __future__ import annotations

from searchqa_retrievers.types import RetrieverError, SearchRequest


def check_request(request: SearchRequest, retriever: str) -> None:
    """Raise :class:`RetrieverError` for a request that a plain search engine cannot answer as asked."""
    if request.top_k < 1:
        raise RetrieverError(f"top_k must be at least 1, but the request for {request.query[:80]!r} has {request.top_k}")
    if request.filters:
        raise RetrieverError(
            f"retriever {retriever!r} has no filters, but the request asks for {dict(request.filters)!r}; leave `filters` empty "
            "or use a retriever that supports them"
        )
