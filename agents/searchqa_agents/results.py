"""The results of an evaluation as files: written whole, read back and checked.

    scores.jsonl      a row of scores per episode (searchqa_agents.measures.score_row), without times: equal runs give equal bytes
    times.jsonl       the seconds of each episode, in the same order
    results.parquet   the same rows flat, with seconds, and with schema version and stamps in the file's metadata
    stamp.json        what the numbers need to be comparable, for each set
    judgements.jsonl  what a judge said of each answer, where one was asked; read as the metric ``judge``

Any text can be an answer: lone surrogates are written as JSON escapes, and two that make a pair are read as the character that they stand for.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchqa_agents.measures import GROUPS, SCHEMA_VERSION
from searchqa_agents.runs import SUMMARY_FILE, RunFolderError, StorageError, replace_file
from searchqa_envs.errors import ConfigurationError

logger = logging.getLogger(__name__)

SCORES_FILE = "scores.jsonl"
TIMES_FILE = "times.jsonl"
PARQUET_FILE = "results.parquet"
STAMP_FILE = "stamp.json"
JUDGEMENTS_FILE = "judgements.jsonl"
_MADE_OF_RESULTS = ("scores.png", "report.html")

Row = dict[str, Any]
Key = tuple[str, str, int]

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema_version": int,
    "set": str,
    "id": str,
    "sample": int,
    "question": str,
    "golden_answers": list,
    "answer": (str, type(None)),
    "groups": dict,
    "metrics": dict,
    "turns": list,
    "terminated": bool,
    "truncated": bool,
    "retokenized": bool,
}
_AGAIN = f"Write it again (`searchqa eval resume=<the run's folder>`), or read the folder's other form ({SCORES_FILE}, {PARQUET_FILE})."


@dataclass(frozen=True)
class Results:
    """What an evaluation left behind.

    Attributes
    ----------
    name
        Of the run: its folder's, or that of a file which does not lie under the usual name.
    rows
        Rows of scores (:func:`~searchqa_agents.measures.score_row`): by set, question and sample. With the metric ``judge`` where answers were judged.
    times
        Rows of times, in the same order; empty where they are not known.
    stamps
        Of each set, flat.
    """

    name: str
    rows: list[Row]
    times: list[Row]
    stamps: dict[str, dict[str, Any]]


def row_key(row: Mapping[str, Any]) -> Key:
    """Which episode a row of scores, of times or of judgements is about: set, question and sample."""
    return row["set"], row["id"], row["sample"]


# -- lines -----------------------------------------------------------------------------------------------------------------------------------


_SURROGATE = re.compile("[\ud800-\udfff]")


def json_line(value: Mapping[str, Any]) -> str:
    """A mapping as one line of JSON that UTF-8 can hold, with its line break; raises ``ValueError`` for NaN and infinity, which JSON does not have."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not text.isascii():
        text = _SURROGATE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)
    return text + "\n"


def _read_lines(path: Path, check: Callable[[Any, str], Row], unfinished: bool = False) -> list[Row]:
    """The checked rows of a file; where it may be ``unfinished``, without a last line that has no line break."""
    rows: list[Row] = []
    number = 0
    with _reading(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                if unfinished:
                    break
                raise RunFolderError(f"{path}, line {number}: the line is cut off after {len(line)} bytes. {_AGAIN}")
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RunFolderError(f"{path}, line {number}: not JSON ({error}). {_AGAIN}") from error
            rows.append(check(value, f"{path}, line {number}"))
    return rows


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} is not there. The results of a finished `searchqa eval` hold it.") from error
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error}.") from error


# -- checks ----------------------------------------------------------------------------------------------------------------------------------


def _wrong(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.80}"


def _check_score(value: Any, where: str) -> Row:
    """A row of scores; raises ``RunFolderError`` for anything else."""
    if not isinstance(value, dict):
        raise RunFolderError(f"{where}: a row must be an object; got {_wrong(value)}. {_AGAIN}")
    _check_version(value.get("schema_version"), where)
    missing = [name for name in _FIELDS if name not in value]
    if missing:
        raise RunFolderError(f"{where}: the row has no {', '.join(missing)}. {_AGAIN}")
    for name, kind in _FIELDS.items():
        own = value[name]
        if not isinstance(own, kind) or (isinstance(own, bool) and kind is int):
            raise RunFolderError(f"{where}: {name} cannot be {_wrong(own)}. {_AGAIN}")
    for name, number in value["metrics"].items():
        if not _is_number(number):
            raise RunFolderError(f"{where}: the metric {name} must be a finite number; got {_wrong(number)}. {_AGAIN}")
    for name, group in value["groups"].items():
        if not isinstance(group, str | int):
            raise RunFolderError(f"{where}: the group {name} must be a text or a whole number; got {_wrong(group)}. {_AGAIN}")
    if not all(isinstance(gold, str) for gold in value["golden_answers"]):
        raise RunFolderError(f"{where}: golden_answers must be texts; got {value['golden_answers']!r:.80}. {_AGAIN}")
    for turn in value["turns"]:
        if not isinstance(turn, dict) or not isinstance(turn.get("passages"), list) or not all(map(_is_passage, turn["passages"])):
            raise RunFolderError(f"{where}: a turn must be an object with passages, pairs of id and title; got {_wrong(turn)}. {_AGAIN}")
        if not _is_number(turn.get("title_recall", 0)):
            raise RunFolderError(f"{where}: title_recall must be a finite number; got {_wrong(turn['title_recall'])}. {_AGAIN}")
    return value


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63  # a larger one may not be a float


def _is_passage(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], str)


def _check_version(version: Any, where: str) -> None:
    if version != SCHEMA_VERSION:
        raise RunFolderError(
            f"{where}: schema_version is {version!r}; this version of searchqa-gym reads {SCHEMA_VERSION}. "
            "Read it with the version that wrote it (`searchqa_gym` in its stamp), or play the evaluation again."
        )


def _check_keyed(value: Any, where: str) -> Row:
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("set"), str)
        or not isinstance(value.get("id"), str)
        or type(value.get("sample")) is not int
    ):
        raise RunFolderError(f"{where}: a row must have set, id and sample; got {value!r:.80}. {_AGAIN}")
    return value


def _check_time(value: Any, where: str) -> Row:
    row = _check_keyed(value, where)
    seconds = row.get("seconds")
    if not isinstance(seconds, dict) or not all(type(part) in (int, float) for part in seconds.values()):
        raise RunFolderError(f"{where}: seconds must be numbers by part; got {_wrong(seconds)}. {_AGAIN}")
    return row


def _check_judgement(value: Any, where: str) -> Row:
    row = _check_keyed(value, where)
    if not isinstance(row.get("correct"), bool):
        raise RunFolderError(f"{where}: correct must be true or false; got {_wrong(row.get('correct'))}. Remove the line and judge again.")
    return row


def _check_unique(rows: Iterable[Row], where: str) -> dict[Key, int]:
    """Where each episode's row is; raises ``RunFolderError`` if one has two."""
    places: dict[Key, int] = {}
    for place, row in enumerate(rows):
        key = row_key(row)
        if key in places:
            raise RunFolderError(
                f"{where}: rows {places[key] + 1} and {place + 1} are both sample {key[2]} of question {key[1]!r} of {key[0]}; it would count twice. "
                "Remove one of them, or name each question once."
            )
        places[key] = place
    return places


def _check_same_episodes(rows: Iterable[Row], times: Iterable[Row], where: str) -> None:
    scored, timed = {row_key(row) for row in rows}, {row_key(row) for row in times}
    if timed and scored != timed:
        example = min(scored ^ timed)
        raise RunFolderError(
            f"{where}: times must be of the same episodes as scores; {len(scored - timed)} have no times and {len(timed - scored)} no scores, "
            f"such as sample {example[2]} of question {example[1]!r} of {example[0]}. {_AGAIN}"
        )


# -- stamps ----------------------------------------------------------------------------------------------------------------------------------


def joined_stamp(stamps: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of ``stamp.json``: the stamp itself of a single set; of several what they have in common, and under ``sets`` each whole."""
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(stamps, default=str))
    if len(plain) == 1:
        return next(iter(plain.values()))
    first, *others = plain.values()
    common = {key: value for key, value in first.items() if all(key in other and other[key] == value for other in others)}
    return {**common, "sets": plain}


def split_stamp(stamp: Mapping[str, Any], sets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The stamp of each set, flat, from the content of ``stamp.json``; raises ``ConfigurationError`` where a set has none."""
    own = stamp.get("sets", {sets[0]: stamp} if len(sets) == 1 else {})
    missing = [name for name in sets if name not in own]
    if missing:
        raise ConfigurationError(f"the stamp must be of all sets that have scores; it has none of {', '.join(missing)}.")
    return {name: dict(own[name]) for name in sets}


# -- writing ---------------------------------------------------------------------------------------------------------------------------------


def write_results(folder: Path, rows: Sequence[Row], times: Sequence[Row], stamps: Mapping[str, Mapping[str, Any]]) -> None:
    """Write ``scores.jsonl``, ``times.jsonl``, ``results.parquet`` and ``stamp.json``, each whole or not at all.

    Parameters
    ----------
    folder
        Of the run; it must be there.
    rows
        Rows of scores in their final order: sets in the order in which they were named, then the question's place, then the sample.
    times
        Rows of times of the same episodes, in any order; or none.
    stamps
        Of each set, flat.

    Raises
    ------
    RunFolderError
        If there is no row, an episode has two, a row is not one of scores, or times are of other episodes.
    ConfigurationError
        If a set has no stamp, or pyarrow is not installed.
    StorageError
        If a file could not be written.
    """
    if not rows:
        raise RunFolderError(f"{folder}: there is no row of scores to write; an evaluation needs at least one question.")
    for number, row in enumerate(rows, start=1):
        _check_score(row, f"{folder}, row {number} of scores")
    places = _check_unique(rows, str(folder))
    _check_unique(times, str(folder))
    _check_same_episodes(rows, times, str(folder))
    ordered = sorted(times, key=lambda row: places[row_key(row)])
    rows = [_in_order(row) for row in rows]
    stamp = joined_stamp(split_stamp({"sets": stamps}, _sets(rows)))
    try:
        replace_file(folder / TIMES_FILE, lambda partial: _write_lines(partial, ordered))
        replace_file(folder / STAMP_FILE, lambda partial: _write_lines(partial, (stamp,), indent=2))
        replace_file(folder / PARQUET_FILE, lambda partial: _write_parquet(partial, rows, ordered, stamp), suffix=".parquet")
        replace_file(folder / SCORES_FILE, lambda partial: _write_lines(partial, rows))
    except OSError as error:
        raise StorageError(
            f"The results could not be written to {folder}: {error}. Make room and resume the run: what was played is kept."
        ) from error


def remove_results(folder: Path) -> None:
    """Remove what an earlier end of an evaluation left to read, but for its judgements: while more is played, it would stand for the whole.

    Raises ``StorageError`` if a file cannot be removed.
    """
    try:
        for name in (SUMMARY_FILE, SCORES_FILE, PARQUET_FILE, TIMES_FILE, STAMP_FILE, *_MADE_OF_RESULTS):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"The earlier results in {folder} could not be removed: {error}. They have to make room for those to come."
        ) from error


def _sets(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["set"] for row in rows))


def _in_order(row: Row) -> Row:
    """A row with its keys in a fixed order, and floats for metrics, so that equal rows give equal bytes."""
    extra = {name: row[name] for name in sorted(row.keys() - _FIELDS.keys())}
    ordered = {name: row[name] for name in _FIELDS} | extra
    ordered["groups"] = dict(sorted(row["groups"].items()))
    ordered["metrics"] = {name: float(value) for name, value in sorted(row["metrics"].items())}
    return ordered


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]], indent: int | None = None) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json_line(row) if indent is None else json.dumps(row, indent=indent) + "\n")


# -- Parquet ---------------------------------------------------------------------------------------------------------------------------------

_ROWS_AT_A_TIME = 8192
_METADATA_KEY = b"searchqa_results"
_PLAIN = ("set", "id", "sample", "question", "golden_answers", "answer", "terminated", "truncated", "retokenized")
_TURN_COLUMN = "turn_list"
_EXACT_COLUMN = "exact_json"
"""A row as JSON where the other columns cannot hold it: a text that is not valid Unicode, a group of an unusual type, a key of a later version."""


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigurationError(f"{PARQUET_FILE} needs pyarrow, which is not installed: pip install 'searchqa-gym[agents]'.") from error
    return pyarrow, parquet


def _columns(pyarrow: Any) -> dict[str, Any]:
    """Types of the columns that are always there."""
    text = pyarrow.string()
    passage = pyarrow.struct([("id", text), ("title", text)])
    turn = pyarrow.struct([("action", text), ("content", text), ("passages", pyarrow.list_(passage)), ("title_recall", pyarrow.float64())])
    return {
        "set": text,
        "id": text,
        "sample": pyarrow.int64(),
        "question": text,
        "golden_answers": pyarrow.list_(text),
        "answer": text,
        "type": text,
        "hops": pyarrow.int64(),
        "level": text,
        "terminated": pyarrow.bool_(),
        "truncated": pyarrow.bool_(),
        "retokenized": pyarrow.bool_(),
        _TURN_COLUMN: pyarrow.list_(turn),
        _EXACT_COLUMN: text,
    }


def _write_parquet(path: Path, rows: Sequence[Row], times: Sequence[Row], stamp: Mapping[str, Any]) -> None:
    pyarrow, parquet = _pyarrow()
    columns = _columns(pyarrow)
    names = sorted({name for row in rows for name in row["metrics"]})
    parts = list(dict.fromkeys(part for row in times for part in row["seconds"]))
    metric_columns = {name: f"metric_{name}" if name in columns or name.startswith(("metric_", "seconds_")) else name for name in names}
    time_columns = {part: f"seconds_{part}" for part in parts}
    fields = [*columns.items(), *((name, pyarrow.float64()) for name in (*metric_columns.values(), *time_columns.values()))]
    about = {"schema_version": SCHEMA_VERSION, "stamp": stamp, "metrics": metric_columns, "seconds": time_columns, "timed": bool(times)}
    schema = pyarrow.schema(fields, metadata={_METADATA_KEY: json.dumps(about).encode()})
    with parquet.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            chunk = rows[start : start + _ROWS_AT_A_TIME]
            flat = [_flat(row) for row in chunk]
            seconds = [row["seconds"] for row in times[start : start + _ROWS_AT_A_TIME]] or [{}] * len(chunk)
            arrays = {name: [own[name] for own in flat] for name in columns}
            arrays |= {column: [row["metrics"].get(name) for row in chunk] for name, column in metric_columns.items()}
            arrays |= {column: [own.get(part) for own in seconds] for part, column in time_columns.items()}
            writer.write_table(pyarrow.table(arrays, schema=schema))


def _flat(row: Row) -> Row:
    """A row's values for the columns that are always there."""
    groups = row["groups"]
    hops = groups.get("hops")
    flat: Row = {name: row[name] for name in _PLAIN}
    flat |= {name: str(groups[name]) if name in groups else None for name in GROUPS}
    flat["hops"] = hops if type(hops) is int and abs(hops) < 2**63 else None
    flat[_TURN_COLUMN] = [
        {
            "action": str(turn.get("action")),
            "content": str(turn.get("content")),
            "passages": [{"id": doc_id, "title": title} for doc_id, title in turn["passages"]],
            "title_recall": turn.get("title_recall"),
        }
        for turn in row["turns"]
    ]
    flat = _valid_texts(flat)
    flat[_EXACT_COLUMN] = None if _unflat(flat, row["metrics"]) == row else json_line(row)
    return flat


def _unflat(flat: Row, metrics: Mapping[str, float]) -> Row:
    """The row of :func:`_flat`, where its columns could hold it."""
    turns = []
    for own in flat[_TURN_COLUMN]:
        turn = {"action": own["action"], "content": own["content"], "passages": [[one["id"], one["title"]] for one in own["passages"]]}
        turns.append(turn if own["title_recall"] is None else turn | {"title_recall": own["title_recall"]})
    values = {
        "schema_version": SCHEMA_VERSION,
        **{name: flat[name] for name in _PLAIN},
        "groups": {name: flat[name] for name in GROUPS if flat[name] is not None},
        "metrics": dict(metrics),
        "turns": turns,
    }
    return {name: values[name] for name in _FIELDS}


def _valid_texts(value: Any) -> Any:
    """A value with its texts as valid Unicode: a lone surrogate becomes the replacement character."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {name: _valid_texts(own) for name, own in value.items()}
    return [_valid_texts(own) for own in value] if isinstance(value, list | tuple) else value


def _read_parquet(path: Path) -> tuple[list[Row], list[Row], dict[str, Any]]:
    """Rows, times and the joined stamp of a ``results.parquet``; raises ``RunFolderError`` for anything else."""
    pyarrow, parquet = _pyarrow()
    rows: list[Row] = []
    times: list[Row] = []
    with _reading(path):
        try:
            with parquet.ParquetFile(path, page_checksum_verification=True) as file:
                about = _about(file.schema_arrow, path, _columns(pyarrow))
                for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME):
                    columns = {name: batch.column(name).to_pylist() for name in batch.schema.names}
                    for i in range(batch.num_rows):
                        row = _parquet_row(columns, i, about["metrics"], f"{path}, row {len(rows) + 1}")
                        rows.append(row)
                        if about["timed"]:
                            seconds = {part: columns[name][i] for part, name in about["seconds"].items() if columns[name][i] is not None}
                            times.append({"set": row["set"], "id": row["id"], "sample": row["sample"], "seconds": seconds})
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise RunFolderError(f"{path}, after row {len(rows)}: not a whole Parquet file ({error}). {_AGAIN}") from error
    return rows, times, about["stamp"]


def _about(schema: Any, path: Path, columns: Mapping[str, Any]) -> dict[str, Any]:
    """What the file's metadata tell of it, checked against its columns."""
    told = (schema.metadata or {}).get(_METADATA_KEY)
    if told is None:
        raise RunFolderError(
            f"{path}: the file's metadata have no {_METADATA_KEY.decode()}: it is not a {PARQUET_FILE} of `searchqa eval`, or was written again by a "
            f"program that left them out. Give the one that the evaluation wrote, or its {SCORES_FILE}."
        )
    try:
        about: dict[str, Any] = json.loads(told)
        version, needed = about["schema_version"], {*columns, *about["metrics"].values(), *about["seconds"].values()}
        if not isinstance(about["stamp"], dict) or not isinstance(about["timed"], bool):
            raise ValueError("no stamp")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path}: the file's metadata are damaged ({type(error).__name__}: {error}). {_AGAIN}") from error
    _check_version(version, str(path))
    missing = sorted(needed - set(schema.names))
    if missing:
        raise RunFolderError(f"{path}: the file has no column {', '.join(missing)}. {_AGAIN}")
    other = [name for name, kind in columns.items() if schema.field(name).type != kind]
    if other:
        raise RunFolderError(f"{path}: the column {other[0]} must hold {columns[other[0]]}, not {schema.field(other[0]).type}. {_AGAIN}")
    return about


def _parquet_row(columns: Mapping[str, list[Any]], i: int, metrics: Mapping[str, str], where: str) -> Row:
    exact = columns[_EXACT_COLUMN][i]
    if exact is not None:
        try:
            return _check_score(json.loads(exact), where)
        except (ValueError, RecursionError) as error:
            raise RunFolderError(f"{where}: {_EXACT_COLUMN} is not JSON ({error}). {_AGAIN}") from error
    own = {name: columns[column][i] for name, column in metrics.items() if columns[column][i] is not None}
    try:
        row = _unflat({name: columns[name][i] for name in (*_PLAIN, *GROUPS, _TURN_COLUMN)}, own)
    except TypeError as error:  # null where a list must be
        raise RunFolderError(f"{where}: a value is missing ({error}). {_AGAIN}") from error
    return _check_score(row, where)


# -- reading ---------------------------------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> Results:
    """The results of a finished evaluation.

    Parameters
    ----------
    path
        The run's folder, its ``scores.jsonl`` or its ``results.parquet``: all give the same. ``times.jsonl``, ``stamp.json`` and ``judgements.jsonl`` are
        read where they lie beside; a ``results.parquet`` brings times and stamps with it.

    Raises
    ------
    RunFolderError
        If there are no results, a file is damaged or of another schema version, an episode has two rows, or a set has no stamp; the message names
        file and row.
    ConfigurationError
        If pyarrow is needed and not installed.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (SCORES_FILE, PARQUET_FILE) if (path / name).is_file()]
        if not found:
            raise RunFolderError(
                f"{path} holds neither {SCORES_FILE} nor {PARQUET_FILE}: it has no results, or the evaluation is not finished: "
                f"`searchqa eval resume={path}` goes on with it."
            )
        path = found[0]
    if path.suffix == ".parquet":
        rows, times, stamp = _read_parquet(path)
    else:
        rows = _read_lines(path, _check_score)
        beside = path.parent / TIMES_FILE
        times = _read_lines(beside, _check_time) if beside.is_file() else []
        stamp = _read_stamp(path.parent / STAMP_FILE)
    if not rows:
        raise RunFolderError(f"{path}: there is no row in the file. {_AGAIN}")
    places = _check_unique(rows, str(path))
    _check_unique(times, str(path.parent / TIMES_FILE))
    _check_same_episodes(rows, times, str(path))
    try:
        stamps = split_stamp(stamp, _sets(rows))
    except ConfigurationError as error:
        raise RunFolderError(f"{path}: {error} Put the {STAMP_FILE} of the run beside it.") from error
    _merge_judgements(path.parent / JUDGEMENTS_FILE, rows, places)
    usual = path.name in (SCORES_FILE, PARQUET_FILE)
    times.sort(key=lambda row: places[row_key(row)])
    return Results(path.resolve().parent.name if usual else path.stem, rows, times, stamps)


def _read_stamp(path: Path) -> dict[str, Any]:
    with _reading(path):
        try:
            stamp = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise RunFolderError(f"{path}: not JSON ({error}). {_AGAIN}") from error
    if not isinstance(stamp, dict) or not isinstance(stamp.get("sets", {}), dict):
        raise RunFolderError(f"{path}: a stamp must be an object; got {_wrong(stamp)}. {_AGAIN}")
    return stamp


def _merge_judgements(path: Path, rows: Sequence[Row], places: Mapping[Key, int]) -> None:
    """Give the rows that were judged the metric ``judge``; of two judgements of one answer the later counts."""
    if not path.is_file():
        return
    judged: set[Key] = set()
    for judgement in _read_lines(path, _check_judgement, unfinished=True):
        key = row_key(judgement)
        if key not in places:
            raise RunFolderError(
                f"{path}: sample {key[2]} of question {key[1]!r} of {key[0]} was judged, but has no scores here. These are judgements of another run: "
                "remove the file and judge again."
            )
        rows[places[key]]["metrics"]["judge"] = float(judgement["correct"])
        judged.add(key)
    if len(judged) < len(rows):
        logger.warning("%s: %d of %d answers are judged; the mean of judge is over these only.", path, len(judged), len(rows))
