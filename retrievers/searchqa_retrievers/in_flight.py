"""Questions under way, so that who asks the same at the same time waits for the answer instead of asking again."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence

from searchqa_retrievers.types import Hit

Answers = dict[Hashable, Sequence[Hit]]


class Flight:
    """One call of an inner retriever. ``answers`` is None until it has ended, and after a failure."""

    __slots__ = ("answers", "ended")

    def __init__(self) -> None:
        self.answers: Answers | None = None
        self.ended = threading.Event()


class InFlight:
    """The calls under way by key. The caller holds its lock round ``join``, ``begin`` and ``end``, and must not hold it in :func:`wait`."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight] = {}

    def join(self, key: Hashable) -> Flight | None:
        """The call that will answer ``key``, if there is one."""
        return self._flights.get(key)

    def begin(self, keys: Iterable[Hashable]) -> Flight:
        """Announce a call; whatever comes of it, ``end`` must follow."""
        flight = Flight()
        self._flights.update(dict.fromkeys(keys, flight))
        return flight

    def end(self, flight: Flight, keys: Iterable[Hashable], answers: Answers | None) -> None:
        """Give those who wait the answers, or None for a failure."""
        for key in keys:
            self._flights.pop(key, None)
        flight.answers = answers
        flight.ended.set()


def wait(joined: Mapping[Hashable, Flight], patience: float) -> Answers:
    """The answers of calls of others, as far as they come within ``patience`` seconds and do not fail."""
    deadline = time.monotonic() + patience
    answers: Answers = {}
    for key, flight in joined.items():
        if flight.ended.wait(max(0.0, deadline - time.monotonic())) and flight.answers is not None:
            answers[key] = flight.answers[key]
    return answers
