"""A cache file that processes and runs share: what one of them has asked, none asks again."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from searchqa_retrievers.counted import added_counters, merged_counters
from searchqa_retrievers.in_flight import Answers, Flight, InFlight, wait
from searchqa_retrievers.stored_answers import digest, hits_from_json, hits_to_json
from searchqa_retrievers.types import Hit, Retriever, RetrieverError, SearchRequest
from searchqa_retrievers.wrapped import Wrapped, check_answers, known_stamp

logger = logging.getLogger(__name__)

LEASE = 10.0
PATIENCE = 120.0
MAX_ENTRIES = 1_000_000
_APPLICATION = 0x53514331  # "SQC1", which tells the file from other applications' databases
_VERSION = 1
_TABLES = (
    "CREATE TABLE answers (number INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL UNIQUE, hits TEXT NOT NULL, crc INTEGER NOT NULL)",
    "CREATE TABLE claims (key BLOB PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID",
)
_BUSY_SECONDS = 2.0
_AT_ONCE = 500  # keys in one statement
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1
_PASSING = ("SQLITE_FULL", "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PROTOCOL")

Requests = Mapping[Hashable, SearchRequest]
Value = TypeVar("Value")


class DiskCached(Wrapped):
    """Keeps answers in a SQLite file that any number of threads, processes and runs on one machine share.

    An answer is found by the stamp of the retriever, its ``cache_key`` and, where it follows the progress of training, the progress: different
    retrievers and corpora share a file, not answers. Of processes and threads that miss the same key at the same time one asks, and the others
    wait for its answer: within a process on the call, across processes on a claim in the file, which lapses when the process that made it was
    killed. Waiting is bounded; then, and after a failure, each asks itself. A failure is never stored. Beyond ``max_entries`` the oldest
    answers go.

    Without its server, a retriever cannot say whose answers it wants: a search is then a lost back end, as it is without a cache file, until the
    server was asked once what it searches.

    A disk that is full, or a file that is locked for long, is reported once in the log, and counted (``search/disk_errors``): answers still
    come, but are not stored.

    Parameters
    ----------
    retriever : Retriever
        With ``stamp()``: all that its answers depend on.
    file : path
        Made if it is not there. It must be on a disk of this machine: network file systems have no memory that processes share.
    max_entries : int
        At least 1.
    lease : float
        Seconds after which the claim of a killed process lapses; a living one renews its own.
    patience : float
        Seconds that one waits for the answer of another.

    Raises
    ------
    RetrieverError
        The file is not such a cache, is damaged, or cannot be written; the retriever has no stamp.
    """

    def __init__(
        self,
        retriever: Retriever,
        file: str | os.PathLike[str],
        max_entries: int = MAX_ENTRIES,
        lease: float = LEASE,
        patience: float = PATIENCE,
    ) -> None:
        if isinstance(max_entries, bool) or not isinstance(max_entries, int) or max_entries < 1:
            raise RetrieverError(f"max_entries of a cache file must be a whole number of at least 1, got {max_entries!r}")
        for name, seconds in (("lease", lease), ("patience", patience)):
            if not 0 < seconds < float("inf"):
                raise RetrieverError(f"{name} of a cache file must be a number of seconds above 0, got {seconds!r}")
        super().__init__(retriever)
        if not hasattr(retriever, "stamp"):
            raise RetrieverError(
                f"a cache file is shared by different retrievers, so retriever {self.name!r} needs `stamp()`: all settings that a result depends on"
            )
        self.file = Path(file)
        self.max_entries = max_entries
        self.lease, self.patience = lease, patience
        self.hits = self.joins = self.misses = self.errors = 0
        self._warned = False
        self._lock = threading.Lock()  # of the counters and of what is under way
        self._database_lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._described: str | None = None
        self._progress: tuple[int, int] | None = None
        self._begin()
        with self._database_lock:
            self._connected()
        _CACHES.add(self)

    def _namespace(self) -> bytes:
        """What tells the answers of this retriever from those of others. Its stamp is taken once, as soon as it is known."""
        if self._described is None:
            self._described = json.dumps(known_stamp(self.name, self.stamp()), sort_keys=True, default=str)
        return digest(self._described, self._progress)

    # -- searching -----------------------------------------------------------------------------------------------------------------------

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        if not requests:
            return []
        namespace = self._namespace()
        keys = [digest(namespace, self.retriever.cache_key(request)) for request in requests]
        by_key: Requests = dict(zip(reversed(keys), reversed(requests), strict=True))
        joined: dict[Hashable, Flight] = {}
        own: dict[Hashable, SearchRequest] = {}
        with self._lock:
            for key in dict.fromkeys(keys):
                flight = self._in_flight.join(key)
                if flight is None:
                    own[key] = by_key[key]
                else:
                    joined[key] = flight
            begun = self._in_flight.begin(own) if own else None
        found: Answers = {}
        asked = waited = 0
        if begun is not None:
            try:
                found, asked, waited = self._answer(own)
            finally:
                with self._lock:
                    self._in_flight.end(begun, own, found or None)
        if joined:
            others = wait(joined, self.patience)
            alone = {key: by_key[key] for key in joined if key not in others}
            found |= others
            if alone:
                found |= self._ask(alone)
            waited += len(others)
            asked += len(alone)
        with self._lock:
            self.hits += len(requests) - asked - waited
            self.joins += waited
            self.misses += asked
        return [list(found[key]) for key in keys]

    def _answer(self, requests: Requests) -> tuple[Answers, int, int]:
        """Answers from the file, from other processes that are just asking, or from the retriever; how many were asked, and how many waited for."""
        found: Answers = self._read(requests)
        missing = {key: request for key, request in requests.items() if key not in found}
        asked = waited = 0
        deadline = time.monotonic() + self.patience
        pause = _SHORTEST_PAUSE
        first = True
        while missing:
            stored, claimed = self._claim(missing)
            if missing and time.monotonic() > deadline:
                claimed = [key for key in missing if key not in stored]
            found |= stored
            waited += 0 if first else len(stored)
            if claimed:
                found |= self._ask({key: missing[key] for key in claimed})
                asked += len(claimed)
            missing = {key: request for key, request in missing.items() if key not in found}
            if missing:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                arrived = self._read(missing)
                found |= arrived
                waited += len(arrived)
                missing = {key: request for key, request in missing.items() if key not in found}
            first = False
        return found, asked, waited

    def _ask(self, requests: Requests) -> Answers:
        """Ask the retriever and store its answers; without an answer, others may ask."""
        answered, ended = False, threading.Event()
        threading.Thread(target=self._renew, args=(list(requests), ended), daemon=True).start()
        try:
            answers = self.retriever.search(list(requests.values()))
            check_answers(self.name, len(answers), len(requests))
            answered = True
        finally:
            ended.set()
            if not answered:
                self._use(lambda database: self._give_up(database, requests), None, write=True)
        found: Answers = dict(zip(requests, answers, strict=True))
        self._store(found)
        return found

    def _renew(self, keys: Sequence[Hashable], ended: threading.Event) -> None:
        """Keep our claims while the retriever is asked."""

        def write(database: sqlite3.Connection) -> None:
            until = time.time() + self.lease
            rows = [(until, key, self._owner) for key in keys]
            database.executemany("UPDATE claims SET until = ? WHERE key = ? AND owner = ?", rows)

        while not ended.wait(self.lease / 3):
            try:
                self._use(write, None, write=True)
            except RetrieverError:  # a damaged file, of which the thread that asks will hear when it stores the answer
                return

    # -- the file ------------------------------------------------------------------------------------------------------------------------

    def _read(self, keys: Iterable[Hashable]) -> Answers:
        """The answers that the file has."""
        nothing: Answers = {}
        return self._use(lambda database: self._read_in(database, keys), nothing)

    def _checked(self, hits: Any, crc: Any) -> list[Hit]:
        try:
            if zlib.crc32(hits.encode()) != crc:
                raise ValueError("its checksum is wrong")
            return hits_from_json(json.loads(hits))
        except (ValueError, AttributeError) as error:
            raise self._damage(error) from error

    def _claim(self, missing: Requests) -> tuple[Answers, list[Hashable]]:
        """What others have answered meanwhile, and the keys that are now ours to ask. Where nothing can be written, all are."""
        if self._use(lambda database: self._all_held(database, missing), False):
            return {}, []
        all_ours: tuple[Answers, list[Hashable]] = ({}, list(missing))
        return self._use(lambda database: self._claim_in(database, missing), all_ours, write=True)

    def _all_held(self, database: sqlite3.Connection, keys: Requests) -> bool:
        """Whether others have claims to all of the keys; a look that keeps nobody from writing."""
        held = 0
        for some in _portions(keys):
            query = f"SELECT count(*) FROM claims WHERE until > ? AND owner != ? AND key IN ({_marks(some)})"
            held += database.execute(query, [time.time(), self._owner, *some]).fetchone()[0]
        return held == len(keys)

    def _claim_in(self, database: sqlite3.Connection, missing: Requests) -> tuple[Answers, list[Hashable]]:
        now = time.time()
        stored = self._read_in(database, missing)
        claimed: list[Hashable] = []
        for key in missing:
            if key not in stored:
                taken = database.execute(
                    "INSERT INTO claims VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET owner = excluded.owner, until = excluded.until "
                    "WHERE until <= ? OR owner = excluded.owner",
                    (key, self._owner, now + self.lease, now),
                )
                if taken.rowcount:
                    claimed.append(key)
        return stored, claimed

    def _read_in(self, database: sqlite3.Connection, keys: Iterable[Hashable]) -> Answers:
        found: Answers = {}
        for some in _portions(keys):
            rows = database.execute(f"SELECT key, hits, crc FROM answers WHERE key IN ({_marks(some)})", some)
            found.update((key, self._checked(hits, crc)) for key, hits, crc in rows)
        return found

    def _store(self, answers: Mapping[Hashable, Sequence[Hit]]) -> None:
        texts = [(key, json.dumps(hits_to_json(hits), separators=(",", ":"))) for key, hits in answers.items()]
        rows = [(key, text, zlib.crc32(text.encode())) for key, text in texts]

        def write(database: sqlite3.Connection) -> None:
            database.executemany("INSERT OR IGNORE INTO answers (key, hits, crc) VALUES (?, ?, ?)", rows)
            self._give_up(database, answers)
            database.execute("DELETE FROM answers WHERE number <= (SELECT max(number) FROM answers) - ?", (self.max_entries,))

        self._use(write, None, write=True)

    def _give_up(self, database: sqlite3.Connection, keys: Iterable[Hashable]) -> None:
        """Remove our claims, and those that have lapsed."""
        database.executemany("DELETE FROM claims WHERE key = ? AND owner = ?", [(key, self._owner) for key in keys])
        database.execute("DELETE FROM claims WHERE until <= ?", (time.time(),))

    def _use(self, work: Callable[[sqlite3.Connection], Value], otherwise: Value, *, write: bool = False) -> Value:
        """What ``work`` returns, or ``otherwise`` when there is trouble with the disk; with ``write`` all that it writes is stored, or nothing."""
        with self._database_lock:
            database = self._connected()
            try:
                if not write:
                    return work(database)
                database.execute("BEGIN IMMEDIATE")
                try:
                    result = work(database)
                    database.execute("COMMIT")
                    return result
                finally:
                    if database.in_transaction:
                        database.execute("ROLLBACK")
            except sqlite3.Error as error:
                self._report(error)
                return otherwise

    def _report(self, error: sqlite3.Error) -> None:
        """Log trouble that passes, such as a full disk, once; raise what says that the file is not sound."""
        if not _passing(error):
            raise self._damage(error) from error
        self.errors += 1
        if not self._warned:
            self._warned = True
            logger.warning("Cache file %s: %s. Searches go on; what they find is stored again once that is possible.", self.file, error)

    def _damage(self, error: Exception) -> RetrieverError:
        return RetrieverError(f"cache file {self.file} is damaged: {error}. Delete it, with {self.file.name}-wal and {self.file.name}-shm")

    def _begin(self) -> None:
        """What a process has for itself."""
        self._in_flight = InFlight()
        self._owner = os.urandom(8).hex()

    def _connected(self) -> sqlite3.Connection:
        if self._database is None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                database = sqlite3.connect(self.file, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
                _prepare(database)
            except (OSError, sqlite3.Error) as error:
                raise RetrieverError(
                    f"cache file {self.file} cannot be used: {error}. Give a file on a disk of this machine, in a folder that can be written, that "
                    "this package made or that is not there yet"
                ) from error
            self._database = database
        return self._database

    def _disconnect(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    # -- the rest ------------------------------------------------------------------------------------------------------------------------

    def set_progress(self, step: int, total: int) -> None:
        """Pass the progress of training on; where answers depend on it, those given at another one are not taken."""
        super().set_progress(step, total)
        self._progress = (step, total) if self.follows_progress else None

    def counters(self) -> dict[str, float]:
        """Hits, joins, misses and errors, with the counters of the inner retriever; see ``searchqa_retrievers.counted``."""
        own = {"hits": self.hits, "joins": self.joins, "misses": self.misses, "errors": self.errors}
        return added_counters(merged_counters(self.retriever), {f"search/disk_{name}": float(count) for name, count in own.items()})

    def close(self) -> None:
        """Close the file and the inner retriever."""
        super().close()
        with self._database_lock:
            self._disconnect()

    def __len__(self) -> int:
        return self._use(lambda database: int(database.execute("SELECT count(*) FROM answers").fetchone()[0]), 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return DiskCached, (self.retriever, self.file, self.max_entries, self.lease, self.patience)

    def __repr__(self) -> str:
        return f"DiskCached({self.retriever!r}, {str(self.file)!r})"


def _prepare(database: sqlite3.Connection) -> None:
    """Make the tables of a new file, or check that they are ours."""
    deadline = time.monotonic() + 10
    while True:  # of processes that open a new file at once, each but one finds it locked for a moment
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")  # a killed process loses nothing, a power cut perhaps the latest answers
            database.execute("BEGIN IMMEDIATE")
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(_SHORTEST_PAUSE)
    try:
        ((application,),) = database.execute("PRAGMA application_id").fetchall()
        ((version,),) = database.execute("PRAGMA user_version").fetchall()
        ((tables,),) = database.execute("SELECT count(*) FROM sqlite_master").fetchall()
        if (application, version, tables) == (0, 0, 0):
            for statement in _TABLES:
                database.execute(statement)
            database.execute(f"PRAGMA application_id={_APPLICATION}")
            database.execute(f"PRAGMA user_version={_VERSION}")
        elif application != _APPLICATION:
            raise sqlite3.DatabaseError("it is the database of another application")
        elif version != _VERSION:
            raise sqlite3.DatabaseError(f"its version is {version}, and this package reads version {_VERSION}")
        database.execute("COMMIT")
    except BaseException:
        database.close()
        raise


def _passing(error: sqlite3.Error) -> bool:
    name = getattr(error, "sqlite_errorname", "")
    return any(name == kind or name.startswith(f"{kind}_") for kind in _PASSING)


def _portions(keys: Iterable[Hashable]) -> Iterator[list[Hashable]]:
    listed = list(keys)
    for start in range(0, len(listed), _AT_ONCE):
        yield listed[start : start + _AT_ONCE]


def _marks(keys: Sequence[Hashable]) -> str:
    return ",".join("?" * len(keys))


# A forked process must not inherit an open SQLite file: its copy of the connection says that locks are held which its parent alone has. So the files
# are closed before a fork, and each process opens them again when it next needs them.

_CACHES: weakref.WeakSet[DiskCached] = weakref.WeakSet()
_held: list[DiskCached] = []


def _before_fork() -> None:
    for cache in list(_CACHES):
        cache._lock.acquire()
        cache._database_lock.acquire()
        cache._disconnect()
        _held.append(cache)


def _after_fork() -> None:
    while _held:
        cache = _held.pop()
        cache._database_lock.release()
        cache._lock.release()


def _after_fork_in_child() -> None:
    for cache in _held:
        cache._begin()  # the threads that were asking are the parent's
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
