"""A recording of what a run's searches found, from which the run is played again without the back end.

A recording is a file of JSON lines. One names a retriever: its ``stamp``, and on which parts of a request its answers depend; there is one for each
retriever that the run uses, such as one for each split of generated worlds. Each other line is the answer to one request, or one failure of the
back end::

    {"key": "5f..", "cache_key": "a0..", "query": "capital of France", "top_k": 3, "hits": [["12", "Paris", "Paris is ...", 17.25], ...]}
    {"key": "5f..", "query": "capital of France", "failed": "search server ... gave no answer in 30 s"}

Lines are only ever appended, under a lock, so that several processes can write one recording; half a line that a killed process left is removed.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from searchqa_retrievers.checks import check_request
from searchqa_retrievers.counted import added_counters, merged_counters
from searchqa_retrievers.in_flight import Answers, Flight, InFlight, wait
from searchqa_retrievers.stored_answers import digest, hits_from_json, hits_to_json, json_line
from searchqa_retrievers.types import Hit, Retriever, RetrieverError, RetrieverUnavailable, SearchRequest, default_cache_key, is_outage
from searchqa_retrievers.wrapped import Wrapped, begin_in_forks, check_answers, known_stamp

logger = logging.getLogger(__name__)

FORMAT = "searchqa-recording"
VERSION = 1
_LOCK_SECONDS = 60.0
_PATIENCE = 120.0
_PROBES: Mapping[str, Any] = {"question_id": "other", "question": "other?", "turn": 1, "seed": 1, "golden_answers": ("other",)}


class _Place(NamedTuple):
    """Where in the file an answer lies, and the ``cache_key`` of its request."""

    start: int
    length: int
    cache_key: str


class _Lines:
    """The lines of a recording, found by key; answers stay in the file until they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, _Place] = {}
        self.by_cache_key: dict[str, _Place] = {}
        self.failures: dict[str, list[str]] = {}
        self.end = 0
        self._numbered = 0

    def follow(self, file: BinaryIO) -> None:
        """Take in the complete lines that ``file``, open for reading bytes, has beyond those taken in before."""
        file.seek(self.end)
        for line in file:
            if not line.endswith(b"\n"):
                break
            self._numbered += 1
            try:
                self._take(json.loads(line), self.end, len(line))
            except (ValueError, KeyError, TypeError) as error:
                raise RetrieverError(
                    f"recording {self.path}, line {self._numbered}: not a line of a recording ({type(error).__name__}: {error}). Remove the line, "
                    "or give another file"
                ) from error
            self.end += len(line)

    def _take(self, line: Any, start: int, length: int) -> None:
        if "format" in line or not self.headers:
            if line["format"] != FORMAT or line["version"] != VERSION:
                raise ValueError(f"a line that names a retriever must have the format {FORMAT!r} in version {VERSION}")
            stamp, name, fields = line["stamp"], line["name"], line["fields"]
            if not (isinstance(stamp, dict) and isinstance(name, str) and set(fields) <= set(_PROBES)):
                raise ValueError("a line that names a retriever must have a stamp, a name, and the names of fields")
            self.headers[_identity(line)] = line
        elif "failed" in line:
            self.failures.setdefault(line["key"], []).append(str(line["failed"]))
        else:
            hits_from_json(line["hits"])
            place = _Place(start, length, line["cache_key"])
            self.answers.setdefault(line["key"], place)
            self.by_cache_key.setdefault(place.cache_key, place)

    def read(self, file: BinaryIO, place: _Place) -> list[Hit]:
        """The answer that lies there."""
        if hasattr(os, "pread"):  # processes that were forked from one another share the position in a file
            line = os.pread(file.fileno(), place.length, place.start)
        else:
            file.seek(place.start)
            line = file.read(place.length)
        return hits_from_json(json.loads(line)["hits"])


def _identity(header: Mapping[str, Any]) -> str:
    """What stands for a retriever in a recording."""
    return digest(json.dumps([header[part] for part in ("name", "stamp", "fields", "follows_progress")], sort_keys=True)).hex()


def request_key(retriever: str, fields: Sequence[str], request: SearchRequest, progress: Sequence[int] | None) -> str:
    """What stands for a request in a recording: hash of its retriever, query, ``top_k``, filters, and those of the other fields that answers depend on."""
    values = tuple(getattr(request, field) for field in fields)
    return digest(retriever, default_cache_key(request), values, None if progress is None else tuple(progress)).hex()


def _whole_key(fields: Sequence[str], request: SearchRequest) -> Hashable:
    """What tells requests apart in a recording of one retriever."""
    return (default_cache_key(request), *(getattr(request, field) for field in fields))


def fields_of(retriever: Retriever) -> tuple[str, ...]:
    """The fields of a request, beside query, ``top_k`` and filters, that change the retriever's ``cache_key``."""
    probe = SearchRequest("probe", 1, question_id="one", question="one?", golden_answers=("one",))
    try:
        key = retriever.cache_key(probe)
        return tuple(field for field, other in _PROBES.items() if retriever.cache_key(replace(probe, **{field: other})) != key)
    except RetrieverError:  # it has no key for a request like this: then any field may matter
        return tuple(_PROBES)


def _failure(key: str, request: SearchRequest, lost: str) -> bytes:
    return json_line({"key": key, "query": request.query, "failed": lost})


class Recorded(Wrapped):
    """Appends every answer and every failure of a retriever to a recording; the first answer of a ``cache_key`` holds for the whole run.

    A back end that changes its mind therefore gives a run that is consistent, and the same when it is replayed. Inside a cache in memory, and
    outside a cache file, whose answers belong to the run too. A recording that is there goes on, as in a training run that is resumed. Any number
    of retrievers, threads and processes may write the same recording.

    Requests that the retriever holds equal (its ``cache_key``) are asked once, but each different one has its line, since a replay is asked it: so
    the ``cache_key`` of a recorded retriever is finer than its own.

    While a server inside could not be asked what it searches, a search is a lost back end; that is recorded as soon as the server is known.

    Parameters
    ----------
    retriever : Retriever
    file : path

    Raises
    ------
    RetrieverError
        The file is no recording, or cannot be written (also in :meth:`search`: a run whose recording has gaps could not be replayed).
    """

    def __init__(self, retriever: Retriever, file: str | os.PathLike[str]) -> None:
        super().__init__(retriever)
        self.file = Path(file)
        self.hits = 0
        self._progress: tuple[int, int] | None = None
        self._lines = _Lines(self.file)
        self._fields = fields_of(retriever)
        self._identity: str | None = None
        self._unwritten: list[tuple[SearchRequest, tuple[int, int] | None, str]] = []
        self._warned = False
        begin_in_forks(self)
        with self._appending():
            pass  # a file that is no recording, or cannot be written, shows here
        try:
            self._identified()
        except RetrieverUnavailable:
            logger.info("Recording %s begins once the server of retriever %r can be asked what it searches.", self.file, self.name)

    def begin_process(self) -> None:
        """The lock and the calls under way are those of one process."""
        self._lock = threading.Lock()
        self._in_flight = InFlight()

    def _identified(self) -> str:
        """What stands for the retriever in the recording, which names it from then on. Its stamp is taken once, as soon as it is known."""
        if self._identity is None:
            header = {"format": FORMAT, "version": VERSION, "name": self.name, "stamp": known_stamp(self.name, self.stamp())}
            header |= {"fields": list(self._fields), "follows_progress": self.follows_progress}
            line = json_line(header)
            identity = _identity(json.loads(line))
            with self._appending() as (write, _):
                if identity not in self._lines.headers:
                    write(line)
                self._identity = identity
        if self._unwritten:
            with self._appending() as (write, _):
                unwritten, self._unwritten = self._unwritten, []
                for request, progress, lost in unwritten:
                    write(_failure(request_key(self._identity, self._fields, request, progress), request, lost))
        return self._identity

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        if not requests:
            return []
        progress = self._progress
        try:
            identity = self._identified()
        except RetrieverUnavailable as error:
            distinct = {_whole_key(self._fields, request): request for request in requests}
            with self._lock:
                self._unwritten += [(request, progress, str(error)) for request in distinct.values()]
            raise
        keys = [request_key(identity, self._fields, request, progress) for request in requests]
        cache_keys = [digest(identity, self.retriever.cache_key(request), progress).hex() for request in requests]
        wanted = {key: (request, cache_key) for key, request, cache_key in zip(keys, requests, cache_keys, strict=True)}
        own: dict[str, dict[str, SearchRequest]] = {}  # requests by key, of one cache_key each
        joined: dict[str, dict[str, SearchRequest]] = {}
        flights: dict[Hashable, Flight] = {}
        with self._lock:
            for key, (request, cache_key) in wanted.items():
                if key in self._lines.answers or cache_key in self._lines.by_cache_key:
                    continue
                flight = self._in_flight.join(cache_key)
                if flight is None:
                    own.setdefault(cache_key, {})[key] = request
                else:
                    flights[cache_key] = flight
                    joined.setdefault(cache_key, {})[key] = request
            begun = self._in_flight.begin(own) if own else None
        found: dict[str, Sequence[Hit]] = {}
        if begun is not None:
            answers: Answers | None = None
            try:
                fresh = self._ask(own)
                found = self._settle({key: wanted[key] for some in own.values() for key in some}, fresh)
                answers = fresh
            finally:
                with self._lock:
                    self._in_flight.end(begun, own, answers)
        others = wait(flights, _PATIENCE)
        alone = {cache_key: some for cache_key, some in joined.items() if cache_key not in others}
        if alone:
            others |= self._ask(alone)
        if len(found) < len(wanted):
            found |= self._settle({key: those for key, those in wanted.items() if key not in found}, others)
        asked = {key for some in (*own.values(), *alone.values()) for key in some}
        with self._lock:
            self.hits += sum(key not in asked for key in keys)
        return [list(found[key]) for key in keys]

    def _ask(self, missing: Mapping[str, Mapping[str, SearchRequest]]) -> Answers:
        """Answers of the retriever by ``cache_key``; of the requests of one, the first is asked."""
        try:
            answers = self.retriever.search([next(iter(some.values())) for some in missing.values()])
        except Exception as error:
            if not is_outage(error):
                raise
            lost = str(error) if isinstance(error, RetrieverUnavailable) else f"{type(error).__name__}: {error}"
            if not (isinstance(error, RetrieverUnavailable) or self._warned):
                self._warned = True
                logger.warning("An error of retriever %r counts as a lost back end.", self.name, exc_info=True)
            with self._appending() as (write, _):
                for some in missing.values():
                    for key, request in some.items():
                        write(_failure(key, request, lost))
            raise RetrieverUnavailable(lost) from error
        check_answers(self.name, len(answers), len(missing))
        return dict(zip(missing, answers, strict=True))

    def _settle(self, wanted: Mapping[str, tuple[SearchRequest, str]], fresh: Answers) -> dict[str, Sequence[Hit]]:
        """The recorded answers; those of ``fresh`` are recorded where there is none yet."""
        lines = self._lines
        found: dict[str, Sequence[Hit]] = {}
        with self._lock:
            if all(key in lines.answers for key in wanted):
                with self._reading() as file:
                    return {key: lines.read(file, self._place(key, cache_key)) for key, (_, cache_key) in wanted.items()}
        with self._appending() as (write, file):
            for key, (request, cache_key) in wanted.items():
                if key in lines.answers:
                    found[key] = lines.read(file, self._place(key, cache_key))
                    continue
                earlier = lines.by_cache_key.get(cache_key)
                hits = lines.read(file, earlier) if earlier is not None else fresh[cache_key]
                row = {"key": key, "cache_key": cache_key, "query": request.query, "top_k": request.top_k, "hits": hits_to_json(hits)}
                write(json_line(row))
                found[key] = hits
        return found

    def _place(self, key: str, cache_key: str) -> _Place:
        place = self._lines.answers[key]
        if place.cache_key != cache_key:
            raise RetrieverError(
                f"recording {self.file} cannot tell two requests apart that retriever {self.name!r} does: their query, top_k, filters and "
                f"{list(self._fields)} are equal, their cache_key is not. Either the recording was made with another version of the retriever or "
                "of this package: then record to a new file. Or `cache_key` depends on other fields for some requests than for others: let it "
                "depend on the same for all"
            )
        return place

    @contextmanager
    def _reading(self) -> Iterator[BinaryIO]:
        try:
            with self.file.open("rb") as file:
                yield file
        except OSError as error:
            raise RetrieverError(f"recording {self.file} cannot be read: {error}") from error

    @contextmanager
    def _appending(self) -> Iterator[tuple[Callable[[bytes], None], BinaryIO]]:
        """Under the lock of all writers, with all lines of others taken in: a function that appends a line, and the file for reading."""
        import filelock

        lines = self._lines
        try:
            with self._lock:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with (
                    self.file.open("ab", buffering=0) as appended,
                    filelock.FileLock(f"{self.file}.lock", timeout=_LOCK_SECONDS),
                    self.file.open("rb") as file,
                ):
                    lines.follow(file)
                    if appended.seek(0, os.SEEK_END) > lines.end:
                        appended.truncate(lines.end)  # half a line of a process that was killed while it held the lock

                    def write(line: bytes) -> None:
                        left = line
                        try:
                            while left:
                                left = left[appended.write(left) :]
                        except OSError:
                            appended.truncate(lines.end)
                            raise
                        lines.follow(file)

                    yield write, file
        except filelock.Timeout as error:
            raise RetrieverError(f"recording {self.file} was locked by another process for {_LOCK_SECONDS:.0f} s") from error
        except (OSError, NotImplementedError) as error:  # filelock: NotImplementedError where the file system has no locks
            raise RetrieverError(f"recording {self.file} cannot be written: {error}. Make room, or record to another place") from error

    def cache_key(self, request: SearchRequest) -> Hashable:
        return (_whole_key(self._fields, request), self.retriever.cache_key(request))

    def set_progress(self, step: int, total: int) -> None:
        """Pass the progress of training on; where answers depend on it, it is part of what they are recorded under."""
        super().set_progress(step, total)
        self._progress = (step, total) if self.follows_progress else None

    def counters(self) -> dict[str, float]:
        """``search/record_hits``, with the counters of the inner retriever; see ``searchqa_retrievers.counted``."""
        return added_counters(merged_counters(self.retriever), {"search/record_hits": float(self.hits)})

    def __len__(self) -> int:
        return len(self._lines.answers)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorded, (self.retriever, self.file)

    def __repr__(self) -> str:
        return f"Recorded({self.retriever!r}, {str(self.file)!r})"


class Replay:
    """Answers from a recording, without the back end.

    A request that the recording has no answer to is a lost back end, and so is each that was one in the recorded run, with the same message:
    the same episodes are truncated.

    Parameters
    ----------
    file : path
    stamp : mapping or sequence of mappings, optional
        Parts of the stamp of the retriever that is meant, where the recording has several; of a sequence, one must fit.

    Raises
    ------
    RetrieverError
        The file is no recording, or it has not exactly one retriever with that stamp.
    """

    def __init__(self, file: str | os.PathLike[str], stamp: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None) -> None:
        self.file = Path(file)
        stamps = [stamp] if isinstance(stamp, Mapping) else stamp or []
        self._asked_stamps = [dict(one) for one in stamps if one]
        self.hits = 0
        self._lines = _Lines(self.file)
        try:
            self._opened = self.file.open("rb")
            self._lines.follow(self._opened)
        except OSError as error:
            raise RetrieverError(f"recording {self.file} cannot be read: {error}") from error
        there = list(self._lines.headers.values())
        asked = self._asked_stamps or [{}]
        meant = [header for header in there if any(one.items() <= header["stamp"].items() for one in asked)]
        if len(meant) != 1:
            recorded = "; ".join(json.dumps(header["stamp"]) for header in there) or "none"
            wanted = f" with stamp {' or '.join(map(str, self._asked_stamps))}" if self._asked_stamps else ""
            raise RetrieverError(
                f"recording {self.file} must have one retriever{wanted}, but it has {len(meant)}. Say by `stamp` which is meant; these are there: "
                f"{recorded}"
            )
        self._header = meant[0]
        self._identity, self._fields = _identity(self._header), tuple(self._header["fields"])
        self.name: str = self._header["name"]
        self.needs_gold = "golden_answers" in self._fields
        self.follows_progress = bool(self._header["follows_progress"])
        self._progress: tuple[int, int] | None = None
        self._failures = {key: list(reversed(messages)) for key, messages in self._lines.failures.items()}
        begin_in_forks(self)

    def begin_process(self) -> None:
        """A lock is that of one process."""
        self._lock = threading.Lock()

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        for request in requests:
            check_request(replace(request, filters=None), self.name)
        progress = self._progress
        keys = [request_key(self._identity, self._fields, request, progress) for request in requests]
        with self._lock:
            lost = [self._failures[key].pop() for key in dict.fromkeys(keys) if self._failures.get(key)]
            if lost:
                raise RetrieverUnavailable(lost[0])
            for key, request in zip(keys, requests, strict=True):
                if key not in self._lines.answers:
                    raise RetrieverUnavailable(f"recording {self.file} has no answer to {request.query[:80]!r} (top_k {request.top_k})")
            found = {key: self._lines.read(self._opened, self._lines.answers[key]) for key in keys}
            self.hits += len(requests)
        return [list(found[key]) for key in keys]

    def cache_key(self, request: SearchRequest) -> Hashable:
        return _whole_key(self._fields, request)

    def set_progress(self, step: int, total: int) -> None:
        """Answer from now on as at that progress, where the recorded retriever followed it."""
        self._progress = (step, total) if self.follows_progress else None

    def stamp(self) -> dict[str, Any]:
        """The stamp of the recorded retriever: a run and its replay can be compared."""
        return dict(self._header["stamp"])

    def counters(self) -> dict[str, float]:
        """``search/record_hits``: what it answered."""
        return {"search/record_hits": float(self.hits)}

    def close(self) -> None:
        """Close the file."""
        self._opened.close()

    def __len__(self) -> int:
        return len(self._lines.answers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Replay:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Replay, (self.file, self._asked_stamps)

    def __repr__(self) -> str:
        return f"Replay({str(self.file)!r})"


def make_replay(corpus: object, file: str, stamp: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None) -> Retriever:
    """The retriever ``"replay"`` of a configuration."""
    return Replay(file, stamp)
