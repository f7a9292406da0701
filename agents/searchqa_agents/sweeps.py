"""The jobs of a sweep: a record of each, by which the same line again knows what is left, and a report what happened.

    <folder of the sweep>/
        multirun.yaml             the line and the configuration of the sweep, as Hydra writes them
        sweep.json                each time that a line was begun here: when, by which process, and what it left as it was
        jobs/<name>.json          a job: its state, and each attempt
        jobs/<name>.error.txt     the trace of its last error

A job writes its record itself, in whichever process its launcher runs it. A job that is recorded as running and whose process has gone was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from searchqa_agents.runs import RunFolderError, StorageError, replace_file

logger = logging.getLogger(__name__)

JOBS_FOLDER = "jobs"
SWEEP_RECORD = "sweep.json"
SCHEMA = 1

RUNNING, FINISHED, FAILED, KILLED, STOPPED, SKIPPED = "running", "finished", "failed", "killed", "stopped", "skipped"
REFUSED = "refused"
"""Of an attempt: the job's folder holds something else, or is in use; what it holds stayed as it was."""
LOST = "running or lost"
"""As what a job is told that runs on another machine, whose processes cannot be seen from here."""
NOT_BEGUN = "not begun"
DONE = (FINISHED, SKIPPED)
ATTEMPTS = 2
"""How often one line tries a job that is killed. A launcher that loses one process may end those of other jobs too."""
LONGEST_NAME = 180
"""bytes of a job's name that stand in the names of its files, which a file system lets have 255 with what we put before and behind"""
SECONDS_FOR_LOCK = 60.0
SECONDS_BETWEEN_LOOKS = 0.5


LAUNCH_DEFAULTS: Mapping[str, Any] = {
    "command": "",
    "pid": 0,
    "process": "",
    "host": "",
    "launcher": "basic",
    "jobs": None,
    "left": {},
    "claimed": {},
    "ended": None,
    "error": None,
}
"""What an entry of ``sweep.json`` is taken to say where it has no such key."""


class SweepRecordError(RunFolderError):
    """A record of a sweep cannot be read."""


class SameFolderError(RunFolderError):
    """Two jobs of one line have the same folder."""


@dataclass(frozen=True)
class Attempt:
    """One time that a job was begun."""

    status: str
    launch: str
    """the id of the line that began it, see ``searchqa_agents.multirun.Launch``"""
    started: str
    """ISO 8601, in UTC"""
    pid: int
    process: str
    """tells the process from a later one with the same number; empty where the system does not say"""
    host: str
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class JobRecord:
    """What is known of a job, from ``jobs/<name>.json``.

    Attributes
    ----------
    name
        Its folder beneath the sweep's, such as ``algo-ppo_seed-1`` or ``grpo/sparse/seed-0``.
    value
        Its objective, where one is asked for.
    """

    name: str
    overrides: tuple[str, ...]
    history: tuple[Attempt, ...] = ()
    value: float | None = None

    @property
    def status(self) -> str:
        """As recorded; :meth:`state` also looks whether the process of a running job is still there."""
        if not self.history:
            return SKIPPED
        last = self.history[-1].status
        if last == REFUSED:
            return FINISHED if any(attempt.status == FINISHED for attempt in self.history) else FAILED
        return last

    def state(self) -> str:
        """``running``, ``finished``, ``failed``, ``killed``, ``stopped``, ``skipped`` (was finished before there was a record) or ``running or lost``."""
        if self.status != RUNNING:
            return self.status
        last = self.history[-1]
        here = is_alive(last.host, last.pid, last.process)
        return LOST if here is None else RUNNING if here else KILLED

    @property
    def error(self) -> str | None:
        """That of the last attempt, in one line."""
        return self.history[-1].error if self.history and self.status not in DONE else None

    @property
    def seconds(self) -> float | None:
        """What all attempts took together; None where none has ended."""
        known = [attempt.seconds for attempt in self.history if attempt.seconds is not None]
        return sum(known) if known else None

    def to_json(self, folder: Path) -> dict[str, Any]:
        """The record as it is written: what the last attempt says stands at the top, for other readers."""
        last = self.history[-1] if self.history else None
        return {
            "schema": SCHEMA,
            "name": self.name,
            "status": self.status,
            "error": self.error,
            "folder": str(folder / self.name),
            "overrides": list(self.overrides),
            "seconds": self.seconds,
            "attempts": len(self.history),
            "pid": last.pid if last else None,
            "host": last.host if last else None,
            "value": self.value,
            "history": [asdict(attempt) for attempt in self.history],
        }


class Sweep:
    """The records in a sweep's folder; safe with any number of processes.

    Parameters
    ----------
    folder
        That of the sweep.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def record_file(self, name: str) -> Path:
        """Where the record of a job lies."""
        return self.folder / JOBS_FOLDER / f"{_file_name(name)}.json"

    def error_file(self, name: str) -> Path:
        """Where the trace of a job's last error lies, once it had one."""
        return self.folder / JOBS_FOLDER / f"{_file_name(name)}.error.txt"

    # -- reading -------------------------------------------------------------------------------------------------------------------------

    def jobs(self) -> list[JobRecord]:
        """All jobs that have a record, in the order in which they were begun first; skipped ones first, by name.

        Raises
        ------
        SweepRecordError
            If one of the records cannot be read; :meth:`readable_jobs` goes on without it.
        """
        records, damaged = self.readable_jobs()
        if damaged:
            raise damaged[0]
        return records

    def readable_jobs(self) -> tuple[list[JobRecord], list[SweepRecordError]]:
        """As :meth:`jobs`, of the records that can be read; and what is wrong with each of the others."""
        records, damaged = [], []
        for file in sorted((self.folder / JOBS_FOLDER).glob("*.json")):
            if file.name.startswith(".partial-"):  # being written, or left by a process that was killed while it wrote
                continue
            try:
                records.append(_read_record(file))
            except FileNotFoundError:  # removed since the folder was listed
                continue
            except SweepRecordError as error:
                damaged.append(error)
        return sorted(records, key=lambda record: (record.history[0].started if record.history else "", record.name)), damaged

    def launches(self) -> list[dict[str, Any]]:
        """What ``sweep.json`` says, a mapping for each time that a line was begun here, oldest first.

        ``id``, ``line``, ``started``, ``pid``, ``process``, ``host``, ``launcher``, ``jobs`` (the overrides of each; None where a sweeper finds them
        while it goes on), ``left`` (job -> why this line left it as it was), ``claimed`` (job -> the overrides with which this line came to it), ``ended``
        once it has, and ``error`` where it was given up. What files of earlier versions do not have is as in :data:`LAUNCH_DEFAULTS`.

        Raises
        ------
        SweepRecordError
            If the file cannot be read.
        """
        file = self.folder / SWEEP_RECORD
        if not file.is_file():
            return []
        try:
            return [_launch_of(entry) for entry in json.loads(file.read_text(encoding="utf-8"))["launches"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SweepRecordError(
                f"{file} cannot be read: {error!r}. Remove it: the records of the jobs are in {JOBS_FOLDER}/."
            ) from error

    def launched(self, launch: str) -> dict[str, Any]:
        """What ``sweep.json`` says of one launch."""
        return next(one for one in self.launches() if one["id"] == launch)

    # -- writing -------------------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the processes that change records of this sweep; each holds it for milliseconds."""
        from filelock import FileLock, Timeout

        folder = self.folder / JOBS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=SECONDS_FOR_LOCK):
                yield
        except Timeout as error:
            raise RunFolderError(
                f"{folder}/.lock is held by another process for more than {SECONDS_FOR_LOCK:.0f} seconds. End that process, then give the same line again."
            ) from error

    def add_launch(self, launch: str, command: str, line: Sequence[str], launcher: str, jobs: Sequence[Sequence[str]] | None) -> None:
        """Add a launch, by this process, to ``sweep.json``."""
        own = os.getpid()
        with self._locked():
            entry: dict[str, Any] = {"id": launch, "command": command, "line": list(line), "started": _now(), "pid": own}
            entry |= {"process": process_mark(own) or "", "host": socket.gethostname(), "launcher": launcher}
            entry |= {"jobs": None if jobs is None else [list(words) for words in jobs], "left": {}, "claimed": {}}
            entry |= {"ended": None, "error": None}
            self._write_launches([*self.launches(), entry])

    def _change_launch(self, launch: str, change: Callable[[dict[str, Any]], object]) -> None:
        launches = self.launches()
        for entry in launches:
            if entry["id"] == launch:
                change(entry)
        self._write_launches(launches)

    def _write_launches(self, launches: Sequence[Mapping[str, Any]]) -> None:
        _write_json(self.folder / SWEEP_RECORD, {"schema": SCHEMA, "launches": launches})

    def begin(
        self, name: str, overrides: Sequence[str], launch: str, *, retry: bool, done: Callable[[JobRecord | None], bool]
    ) -> str | None:
        """Take a job over, for this process; or say why it is left as it is: ``finished``, ``failed``, ``killed``, or ``in use by ...``.

        Parameters
        ----------
        overrides
            The job's.
        launch
            The id of the line that it belongs to. What failed in this launch is not tried again by it, and what was killed is tried once more.
        retry
            Whether to try again what failed in an earlier launch.
        done
            Whether the job's folder holds the results of this very configuration; gets the record, None where there is none.

        Raises
        ------
        SweepRecordError
            If the job's record cannot be read. The line leaves such a job as it is.
        SameFolderError
            If another job of this launch has the same folder.
        """
        with self._locked():
            self._claim(name, overrides, launch)
            try:
                before = self._read(name)
            except SweepRecordError as error:
                why = str(error)
                self._change_launch(launch, lambda entry: entry["left"].setdefault(name, why))
                raise
            record = before or JobRecord(name, tuple(overrides))
            state = record.state() if before else NOT_BEGUN
            reason = None
            if state in (*DONE, NOT_BEGUN):
                if done(before):
                    reason = FINISHED
            elif state == RUNNING or (state == LOST and _in_use(self.folder / name)):
                last = record.history[-1]
                reason = f"in use by process {last.pid} on {last.host}"
            elif state == FAILED:
                reason = FAILED if not retry or record.history[-1].launch == launch else None
            elif sum(attempt.launch == launch and attempt.status in (KILLED, RUNNING) for attempt in record.history) >= ATTEMPTS:
                reason = KILLED
            if reason is not None:
                if before is None:
                    self._write(record)
                self._change_launch(launch, lambda entry: entry["left"].setdefault(name, reason))
                return reason
            record = _ended(record, KILLED, _GONE) if record.status == RUNNING else record
            attempt = Attempt(RUNNING, launch, _now(), os.getpid(), process_mark(os.getpid()) or "", socket.gethostname())
            self._write(replace(record, overrides=tuple(overrides), history=(*record.history, attempt)))
            return None

    def _claim(self, name: str, overrides: Sequence[str], launch: str) -> None:
        """Note which job of a launch has this folder."""
        claimed = next((one["claimed"].get(name) for one in self.launches() if one["id"] == launch), None)
        if claimed is None:
            self._change_launch(launch, lambda entry: entry["claimed"].setdefault(name, list(overrides)))
        elif sorted(claimed) != sorted(overrides):
            raise SameFolderError(
                f"two jobs of this line have the folder {self.folder / name}: {' '.join(claimed)}, and {' '.join(overrides)}. "
                "Let hydra.sweep.subdir name all that differs between jobs, or give each of the two a line with a run_dir of its own."
            )

    def carry_out(self, name: str, work: Callable[[], float | None]) -> tuple[float | None, str | None]:
        """Do the work of a job that this process has taken over, and record how it ended. Returns its objective, and its error in one line.

        What ends the process itself, such as Ctrl-C, is recorded and raised.
        """
        begun = time.monotonic()
        try:
            value = work()
        except Exception as error:  # noqa: BLE001, whatever it is, it is recorded, and the sweep goes on
            refused = isinstance(error, RunFolderError) and not isinstance(error, StorageError)
            text = one_line(error)
            self.error_file(name).write_text(visible("".join(traceback.format_exception(error))), encoding="utf-8")
            self._end(name, REFUSED if refused else FAILED, text, time.monotonic() - begun)
            return None, text
        except BaseException as error:
            self._end(name, STOPPED, "stopped" if isinstance(error, KeyboardInterrupt) else one_line(error), time.monotonic() - begun)
            raise
        self._end(name, FINISHED, None, time.monotonic() - begun, value)
        return value, None

    def _end(self, name: str, status: str, error: str | None, seconds: float | None, value: float | None = None) -> None:
        with self._locked():
            record = self._read(name)
            if record is not None:
                record = _ended(record, status, error, seconds)
                self._write(replace(record, value=record.value if value is None else value))

    def settle(self, launch: str, status: str = KILLED) -> list[str]:
        """Record how the jobs of a launch ended whose process has gone without a word. Returns their names."""
        found = []
        with self._locked():
            for record in self.readable_jobs()[0]:
                if record.state() == KILLED and record.status == RUNNING and record.history[-1].launch == launch:
                    self._write(_ended(record, status, _GONE if status == KILLED else status))
                    found.append(record.name)
        return found

    def end_launch(self, launch: str, error: str | None = None) -> None:
        """Note that a line came to its end, with or without failed jobs; or that it was given up, because of an error of no job."""
        with self._locked():
            self._change_launch(launch, lambda entry: entry.update(ended=_now(), error=error))

    def wait_for(self, launch: str) -> None:
        """Wait for the jobs of a launch that go on in processes of their own, where their launcher has returned already."""
        told = False
        while True:
            going_on = [job.name for job in self.readable_jobs()[0] if job.state() == RUNNING and job.history[-1].launch == launch]
            if not going_on:
                return
            if not told:
                logger.info("Waiting for %s.", ", ".join(going_on))
                told = True
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _read(self, name: str) -> JobRecord | None:
        try:
            return _read_record(self.record_file(name))
        except FileNotFoundError:
            return None

    def _write(self, record: JobRecord) -> None:
        _write_json(self.record_file(record.name), record.to_json(self.folder))


_GONE = "its process was killed, or ended without a word"


def _ended(record: JobRecord, status: str, error: str | None, seconds: float | None = None) -> JobRecord:
    last = replace(record.history[-1], status=status, error=error, seconds=None if seconds is None else round(seconds, 3))
    return replace(record, history=(*record.history[:-1], last))


def _file_name(name: str) -> str:
    """A job's name as that of a file: ``/`` is ``__``. Where that is too long, or where another name has the same, a hash tells them apart."""
    plain = name.replace("/", "__")
    kept = plain.encode("utf-8", "surrogateescape")
    if len(kept) <= LONGEST_NAME and not re.search("__|_/|/_", name):
        return plain
    mark = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{kept[:LONGEST_NAME].decode('utf-8', 'ignore')}-{mark}"


def _read_record(file: Path) -> JobRecord:
    """The record in a file. Raises ``FileNotFoundError`` where there is none, and ``SweepRecordError`` for anything else than a record."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        history = tuple(_attempt_of(attempt) for attempt in kept["history"])
        value = kept["value"]
        _check(value is None or isinstance(value, (int, float)), "value", value)
        _check(isinstance(kept["name"], str), "name", kept["name"])
        return JobRecord(kept["name"], tuple(_words(kept["overrides"], "overrides")), history, value)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SweepRecordError(
            f"{file} is not the record of a job: {error!r}. Remove it: the job is then looked at as a new one."
        ) from error


def _attempt_of(entry: Any) -> Attempt:
    attempt = Attempt(**entry)
    for key in ("status", "launch", "process", "host"):
        _check(isinstance(getattr(attempt, key), str), key, getattr(attempt, key))
    _check(isinstance(attempt.pid, int), "pid", attempt.pid)
    _check(attempt.seconds is None or isinstance(attempt.seconds, (int, float)), "seconds", attempt.seconds)
    _check(attempt.error is None or isinstance(attempt.error, str), "error", attempt.error)
    datetime.fromisoformat(attempt.started)
    return attempt


def _launch_of(entry: Any) -> dict[str, Any]:
    """An entry of ``sweep.json``, its types checked."""
    _check(isinstance(entry, dict), "launches", entry)
    launch: dict[str, Any] = {**deepcopy(dict(LAUNCH_DEFAULTS)), **entry}
    for key in ("id", "command", "process", "host", "launcher"):
        _check(isinstance(launch[key], str), key, launch[key])
    _check(isinstance(launch["pid"], int), "pid", launch["pid"])
    for key in ("ended", "error"):
        _check(launch[key] is None or isinstance(launch[key], str), key, launch[key])
    _words(launch["line"], "line")
    _check(launch["jobs"] is None or isinstance(launch["jobs"], list), "jobs", launch["jobs"])
    for words in launch["jobs"] or ():
        _words(words, "jobs")
    _check(isinstance(launch["left"], dict), "left", launch["left"])
    _words(list(launch["left"].values()), "left")
    _check(isinstance(launch["claimed"], dict), "claimed", launch["claimed"])
    for words in launch["claimed"].values():
        _words(words, "claimed")
    datetime.fromisoformat(launch["started"])
    return launch


def _words(value: Any, key: str) -> list[str]:
    _check(isinstance(value, list) and all(isinstance(word, str) for word in value), key, value)
    return list(value)


def _check(holds: bool, key: str, value: Any) -> None:
    if not holds:
        raise TypeError(f"{key} is {value!r}")


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    replace_file(file, lambda partial: partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _in_use(folder: Path) -> bool:
    """Whether a process has the run folder open, as seen by its lock, which also other machines hold."""
    from filelock import FileLock, Timeout

    if not folder.is_dir():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def process_mark(pid: int) -> str | None:
    """What tells a running process of this machine from a later one with the same number.

    None where there is none, or one that has ended and that nobody has asked about; empty where the system does not say.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
        return _mark_without_proc(pid)
    fields = stat.rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text(encoding='ascii').strip() if boot.exists() else ''}:{fields[19]}"


def _mark_without_proc(pid: int) -> str | None:
    if os.name != "posix":  # signal 0 would end it there
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # somebody else's
        return ""
    return ""


def is_alive(host: str, pid: int, process: str) -> bool | None:
    """Whether the process with this number and mark (:func:`process_mark`) is still there; None where that cannot be seen from here."""
    if host != socket.gethostname() or os.name != "posix":
        return None
    return process_mark(pid) == process


def one_line(error: BaseException) -> str:
    """What went wrong, as the command line would say it, in one line."""
    from searchqa_agents.cli import explained

    message = explained(error)
    text = message.text if message is not None else f"{type(error).__name__}: {error}"
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    """A text whose control characters, such as those that colour a terminal, stand as escapes; lines and tabs stay."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else sign.encode("unicode_escape").decode("ascii") for sign in text)
