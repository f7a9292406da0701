"""What an evaluation has played, kept as it is played: a journal for each process, with a line for each episode that has ended.

    answers/all.jsonl              of a run in one process; 0-of-2.jsonl is that of the first of two parts
    answers/trajectories/          under the same names, the episodes that the page will show, whole

A line is ``{"begun": set, "stamp": {...}}`` before the first episode that a process plays of a set, ``{"row": scores, "time": times}`` for an episode as it
ends, ``{"searches": counters, "set": name}`` every few seconds, or ``{"ended": set, "stamp": {...}}`` where more is known by then of what the set was played
with. A last line that a killed process left unfinished is cut off when its journal is opened again.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from searchqa_agents.measures import SCHEMA_VERSION
from searchqa_agents.results import Key, Row, json_line, row_key
from searchqa_agents.runs import RunFolderError, StorageError
from searchqa_agents.trajectory import Trajectory
from searchqa_envs.errors import ConfigurationError

logger = logging.getLogger(__name__)

FOLDER = "answers"
TRAJECTORIES = "trajectories"
_ROW = b'{"row": '
"""How the line of an episode begins."""


class Part(NamedTuple):
    """Part ``number`` (from 0) of so many; each question of an evaluation is in one part."""

    number: int = 0
    of: int = 1

    @property
    def name(self) -> str:
        """What its files are called."""
        return "all" if self.of == 1 else f"{self.number}-of-{self.of}"

    def has(self, place: int) -> bool:
        """Whether the question at this place of the whole evaluation is in this part."""
        return place % self.of == self.number


def parse_part(shard: Any) -> Part | None:
    """The part that ``0/2`` names; None for null. Raises ``ConfigurationError`` for anything else."""
    if shard is None:
        return None
    number, slash, count = str(shard).partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigurationError(f"shard must be a part and the number of parts, counted from 0, such as 0/2 and 1/2; got {shard!r}.")
    return Part(int(number), int(count))


def any_answer(path: Path) -> bool:
    """Whether any episode has ended in a run's folder."""
    return any(True for _ in _episode_lines(path))


def count_answers(path: Path) -> int:
    """How many episodes have ended in a run's folder."""
    return sum(1 for _ in _episode_lines(path))


def _episode_lines(path: Path) -> Iterator[bytes]:
    for file in (path / FOLDER).glob("*.jsonl"):
        with file.open("rb") as lines:
            yield from (line for line in lines if line.startswith(_ROW) and line.endswith(b"\n"))


def way_on(path: Path, part: Part | None = None) -> str:
    """What is safe after a stop, and the line that goes on from it."""
    words = "" if part is None else f" shard={part.number}/{part.of}"
    if not any_answer(path):
        return f"No episode has ended yet: `searchqa eval resume={path}{words}` begins again, and so may any other line with this run_dir."
    return f"What was played is kept: `searchqa eval resume={path}{words}` goes on."


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"An answer could not be written: {error}. Make room first. {way_on(path)}") from error


class Journal:
    """One process's journal of an evaluation, open for appending; a second process that opens it gets a ``RunFolderError``.

    Parameters
    ----------
    path
        The run's folder.
    part
        Which part this process plays.
    """

    def __init__(self, path: Path, part: Part) -> None:
        from filelock import FileLock, Timeout

        self.path = path
        self.part = part
        self._broken = False
        folder = path / FOLDER
        with _writing(path):
            (folder / TRAJECTORIES).mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / f"{part.name}.lock", timeout=1.0)  # one who asks whether the part is running holds it for a moment
        try:
            self._lock.acquire()
        except Timeout as error:
            what = "this run" if part.of == 1 else f"part {part.number}/{part.of} of this run"
            raise RunFolderError(f"{path} is in use: another process plays {what}. Wait for it, or choose another run_dir.") from error
        try:
            with _writing(path):
                self._answers = _opened(folder / f"{part.name}.jsonl")
                self._trajectories = _opened(folder / TRAJECTORIES / f"{part.name}.jsonl")
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and let another process play this part."""
        for file in (self._answers, self._trajectories):
            file.close()
        self._lock.release()

    def begin(self, name: str, stamp: Mapping[str, Any]) -> None:
        """Say with what the episodes of a set are played from here on."""
        self._append(self._answers, {"begun": name, "stamp": json.loads(json.dumps(stamp, default=str))})

    def end(self, name: str, stamp: Mapping[str, Any]) -> None:
        """Say with what the episodes of a set were played, where more is known of it than at the beginning."""
        self._append(self._answers, {"ended": name, "stamp": json.loads(json.dumps(stamp, default=str))})

    def add(self, row: Row, time: Row, trajectory: Trajectory | None = None) -> None:
        """Keep an episode that has ended: its rows of scores and times, and the whole of it where it is given."""
        if trajectory is not None:  # first, so that no episode counts as played whose trajectory is lost
            kept = {"set": row["set"], "id": row["id"], "sample": row["sample"], "trajectory": trajectory.to_json()}
            self._append(self._trajectories, kept)
        self._append(self._answers, {"row": row, "time": time})

    def add_searches(self, name: str, counters: Mapping[str, float]) -> None:
        """Keep what some searches on a set were, as sums; and bring all so far to disk."""
        if any(counters.values()):
            self._append(self._answers, {"searches": dict(counters), "set": name})
        with _writing(self.path):
            os.fsync(self._answers.fileno())
            os.fsync(self._trajectories.fileno())

    def _append(self, file: io.FileIO, value: Mapping[str, Any]) -> None:
        """Append a line, or nothing: after half a line no other may follow."""
        rest = memoryview(json_line(value).encode())
        with _writing(self.path):
            if self._broken:
                raise OSError(f"{file.name} ends with half a line")
            end = file.seek(0, os.SEEK_END)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except BaseException:  # also an interrupt
                self._broken = True
                file.truncate(end)
                self._broken = False
                raise


def _opened(path: Path) -> io.FileIO:
    """A file to append to, without an unfinished last line. Unbuffered: what was appended outlives the process."""
    file = io.FileIO(path, "a+")
    end = file.seek(0, os.SEEK_END)
    start = end
    complete = 0
    while start > 0 and not complete:
        start = max(0, start - (1 << 20))
        file.seek(start)
        complete = file.read(1 << 20).rfind(b"\n") + 1
    if (kept := start + complete if complete else 0) < end:
        logger.warning("%s: dropped an unfinished last line of %d bytes.", path, end - kept)
        file.truncate(kept)
    return file


def running_parts(path: Path) -> list[str]:
    """The names of the journals of a run that other processes have open."""
    from filelock import FileLock, Timeout

    running = []
    for file in sorted((path / FOLDER).glob("*.lock")):
        try:
            with FileLock(file, timeout=0.1):
                pass
        except Timeout:
            running.append(file.stem)
    return running


class Answers:
    """What all journals of a run say.

    Attributes
    ----------
    rows, times
        By episode; of one that was played twice, the first.
    stamps
        By set, the stamps with which episodes of it were played.
    searches
        Counters of all journals: the set and its mapping, for each line.
    """

    def __init__(self) -> None:
        self.rows: dict[Key, Row] = {}
        self.times: dict[Key, Row] = {}
        self.stamps: dict[str, list[dict[str, Any]]] = {}
        self.searches: list[tuple[str, dict[str, float]]] = []


def read_answers(path: Path, *, whole: bool = True) -> Answers:
    """What was played so far; unless ``whole``, with empty rows, which take less memory where only their keys are wanted.

    Raises ``RunFolderError`` for a line that is not of a journal, or of another schema version.
    """
    answers = Answers()
    for file in sorted((path / FOLDER).glob("*.jsonl")):
        begun: dict[str, Any] = {}
        for where, line in _lines(file):
            try:
                if "row" in line:
                    row, time = line["row"], line["time"]
                    _check_version(row["schema_version"], where)
                    if row["set"] in begun:  # one with which nothing was played decides nothing
                        answers.stamps.setdefault(row["set"], []).append(begun.pop(row["set"]))
                    if row_key(time) != (key := row_key(row)):
                        raise ValueError("the times are another episode's")
                    answers.rows.setdefault(key, row if whole else {})
                    answers.times.setdefault(key, time if whole else {})
                elif "begun" in line:
                    begun[line["begun"]] = line["stamp"]
                elif "ended" in line:
                    answers.stamps.setdefault(line["ended"], []).append(line["stamp"])
                else:
                    answers.searches.append((line["set"], line["searches"]))
            except (KeyError, ValueError, TypeError) as error:
                raise RunFolderError(f"{where}: not a line of a journal ({type(error).__name__}: {error}). {_remove(file)}") from error
    return answers


def _check_version(version: Any, where: str) -> None:
    if version != SCHEMA_VERSION:
        raise RunFolderError(
            f"{where}: the scores have schema version {version!r}; this version of searchqa-gym goes on with {SCHEMA_VERSION} only. "
            "Choose another run_dir, or go on with the version that wrote them."
        )


def read_trajectories(path: Path) -> dict[Key, Trajectory]:
    """The whole episodes that were kept. Raises ``RunFolderError`` for a line that is none."""
    found: dict[Key, Trajectory] = {}
    for file in sorted((path / FOLDER / TRAJECTORIES).glob("*.jsonl")):
        for where, line in _lines(file):
            try:
                found.setdefault(row_key(line), Trajectory.from_json(line["trajectory"]))
            except (KeyError, ValueError, TypeError) as error:
                raise RunFolderError(f"{where}: not a trajectory ({type(error).__name__}: {error}). {_remove(file)}") from error
    return found


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file, each with its place; without an unfinished last one, which a process may be writing."""
    with file.open("rb") as lines:
        for number, text in enumerate(lines, start=1):
            if not text.endswith(b"\n"):
                return
            where = f"{file}, line {number}"
            try:
                line = json.loads(text)
            except ValueError as error:
                raise RunFolderError(f"{where}: not JSON ({error}). {_remove(file)}") from error
            if not isinstance(line, dict):
                raise RunFolderError(f"{where}: not a line of a journal. {_remove(file)}")
            yield where, line


def _remove(file: Path) -> str:
    return f"Remove the line, and what it says is played again; or remove {file.name}, and all that it says is."
