"""Several retrievers under names, of which each request chooses one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from searchqa_retrievers.composition import Composition, ask, build_inner, stamp_of
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.types import Hit, Retriever, RetrieverError, SearchRequest


class Sources(Composition):
    """Sends a request to the source that ``filters["source"]`` names; all other filters go on to it.

    Parameters
    ----------
    sources : mapping of str to Retriever
        One or more.
    default : str or None
        The source of requests that name none. Default: such a request is an error.

    Raises
    ------
    RetrieverError
        There is no source, or ``default`` is none of them; in searching: a request names an unknown source, or none where there is no
        default.
    """

    name = "sources"

    def __init__(self, sources: Mapping[str, Retriever], default: str | None = None) -> None:
        if not isinstance(sources, Mapping) or not sources or not all(isinstance(name, str) and name for name in sources):
            raise RetrieverError(f"sources of retriever 'sources' must be a mapping from names to retrievers, got {sources!r:.200}")
        super().__init__(list(sources.values()))
        self.sources: Mapping[str, Retriever] = dict(sources)
        if default is not None and (not isinstance(default, str) or default not in self.sources):
            raise RetrieverError(f"default of retriever 'sources' must be one of {', '.join(self.sources)}, got {default!r}")
        self.default = default

    def serves_filter(self, key: str) -> bool | None:
        """``source``, and what all sources serve."""
        return True if key == "source" else super().serves_filter(key)

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        """Answer all requests, those to one source in one call."""
        routed = [self._routed(request) for request in requests]
        answers: list[list[Hit]] = [[] for _ in requests]
        for source in dict.fromkeys(source for source, _ in routed):
            positions = [position for position, (chosen, _) in enumerate(routed) if chosen == source]
            found = ask(self.sources[source], [routed[position][1] for position in positions])
            for position, hits in zip(positions, found, strict=True):
                answers[position] = hits
        return answers

    def cache_key(self, request: SearchRequest) -> Hashable:
        source, inner = self._routed(request)
        return (source, self.sources[source].cache_key(inner))

    def stamp(self) -> dict[str, Any]:
        """The settings that a result depends on, for the record of a run."""
        return {
            "retriever": self.name,
            "default": self.default,
            "sources": {name: stamp_of(retriever) for name, retriever in self.sources.items()},
        }

    def __repr__(self) -> str:
        return f"Sources({dict(self.sources)!r}, default={self.default!r})"

    def _routed(self, request: SearchRequest) -> tuple[str, SearchRequest]:
        """The source of a request, and the request as that source gets it."""
        filters = dict(request.filters or {})
        source = filters.pop("source", self.default)
        if source is None or source not in self.sources:
            raise RetrieverError(f"filters['source'] of a request must be one of {', '.join(self.sources)}, got {source!r}")
        return source, replace(request, filters=filters or None)


def make(corpus: Callable[[], Corpus], sources: Mapping[str, str | Mapping[str, Any] | Retriever], default: str | None = None) -> Retriever:
    """The retriever ``"sources"`` of a configuration.

    ``sources`` maps names to configurations. One with the key ``corpus``, a path as ``stored_corpus.open_corpus`` takes it, has passages
    of its own; the others share those of the environment.
    """
    if not isinstance(sources, Mapping) or not sources:
        raise RetrieverError(f"sources of retriever 'sources' must be a mapping from names to configurations, got {sources!r:.200}")
    built = {}
    for name, config in sources.items():
        passages = corpus
        if isinstance(config, Mapping) and "corpus" in config:
            config = dict(config)
            passages = _reader(config.pop("corpus"), name)
        built[name] = build_inner(config, passages, Sources.name)
    return Sources(built, default)


def _reader(path: object, source: str) -> Callable[[], Corpus]:
    if not isinstance(path, str):
        raise RetrieverError(f"corpus of the source {source!r} must be the path of a file or folder with passages, got {path!r:.200}")

    def read() -> Corpus:
        from searchqa_retrievers.stored_corpus import open_corpus

        return open_corpus(path)

    return read
