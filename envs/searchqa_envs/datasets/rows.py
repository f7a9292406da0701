"""Rows of JSON, JSON-lines and parquet files, with errors that name file, line and field."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard, cast

from searchqa_envs.errors import DataError, DataNotFoundError, MalformedRowError

_GZIP_MAGIC = b"\x1f\x8b"
_PUBLISHED_FOLDERS = dict.fromkeys(
    ("data/training_set", "data/eval_set"),
    " R1-Searcher's files of that name come with a checkout of github.com/RUCAIBox/R1-Searcher; run in it.",
)
_PARQUET_MAGIC = b"PAR1"
_SHOWN = 80  # characters of a value that an error message shows


class MissingDependencyError(DataError, ImportError):
    """An optional library is needed for this file; the message names the extra that brings it."""


def shown(value: object) -> str:
    """A value as an error message shows it: its type and the beginning of its repr."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file, and where it stands.

    ``place`` is what a message calls it (``/data/dev.json, row 3``); ``values`` are its fields.
    """

    place: str
    values: Mapping[str, Any]

    def error(self, field: str, expected: str) -> MalformedRowError:
        """The error for a field that is not what it should be."""
        value: Any = self.values
        for part in field.split("."):
            if not isinstance(value, Mapping) or part not in value:
                keys = ", ".join(map(repr, self.values)) or "none"
                return MalformedRowError(f"{self.place}, field '{field}': expected {expected}, found no such field (fields here: {keys}).")
            value = value[part]
        return MalformedRowError(f"{self.place}, field '{field}': expected {expected}, found {shown(value)}.")

    def get(self, field: str) -> Any:
        """The value of a field (dots go into inner objects), None where there is none."""
        value: Any = self.values
        for part in field.split("."):
            if not isinstance(value, Mapping):
                return None
            value = value.get(part)
        return value

    def identifier(self, field: str) -> str:
        """A non-empty string, or an integer written as one."""
        value = self.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, "a non-empty string or an integer")
        return self._encodable(field, value)

    def text(self, field: str) -> str:
        """A string that is not blank."""
        value = self.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, "a non-empty string")
        return self._encodable(field, value)

    def optional_text(self, field: str) -> str | None:
        """A string, or None where the field is absent or null."""
        value = self.get(field)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.error(field, "a string")
        return self._encodable(field, value)

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of strings, none of them blank; the list may be empty."""
        value = self.get(field)
        if not is_list(value) or not all(isinstance(item, str) and item.strip() for item in value):
            raise self.error(field, "a list of non-empty strings")
        return tuple(self._encodable(field, item) for item in value)

    def answers(self, field: str) -> tuple[str, ...]:
        """A list of at least one string, none of them blank, repetitions dropped."""
        value = self.texts(field) if is_list(self.get(field)) else ()
        if not value:
            raise self.error(field, "a list of at least one non-empty string")
        return tuple(dict.fromkeys(value))

    def mapping(self, field: str) -> Mapping[str, Any]:
        """An object; empty where the field is absent or null."""
        value = self.get(field)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.error(field, "an object")
        return value

    def _encodable(self, field: str, value: str) -> str:
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise self.error(field, "text that UTF-8 can write (no lone surrogates)") from None
        return value


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list as JSON and parquet have them (not a string)."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def read_rows(source: Path | Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """Rows of a file, or of a list of objects.

    A file is parquet, one JSON list, or JSON lines, as its first bytes say; JSON may be gzip-compressed. Blank lines are passed over.

    Raises
    ------
    DataNotFoundError
        The file does not exist.
    MalformedRowError
        Bad gzip, bad UTF-8, bad JSON, a file that is cut off or empty, a row that is no object.
    """
    if not isinstance(source, Path):
        for number, values in enumerate(source, start=1):
            place = f"item {number} of the list given"
            if not isinstance(values, Mapping):
                raise MalformedRowError(f"{place}: expected an object (dict), found {shown(values)}.")
            yield Row(place, values)
        return
    if not source.is_file():
        known = next((hint for folder, hint in _PUBLISHED_FOLDERS.items() if source.parent.as_posix().endswith(folder)), "")
        raise DataNotFoundError(f"no such file: {source}.{known} Give the path of a .jsonl, .jsonl.gz, .json or .parquet file.")
    with source.open("rb") as file:
        head = file.read(4)
    if head == _PARQUET_MAGIC:
        rows = _parquet_rows(source)
    elif _first_character(source) == b"[":
        rows = _list_rows(source)
    else:
        rows = _line_rows(source)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise MalformedRowError(f"{source}, line 1: expected at least one row, found an empty file. It may be cut off: fetch it again.")


def _open(path: Path) -> IO[bytes]:
    import gzip

    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP_MAGIC
    if path.suffix == ".gz" and not compressed:
        raise MalformedRowError(
            f"{path}, line 1: expected gzip data (the name ends in .gz), found something else. Fetch it again or rename it."
        )
    return cast(IO[bytes], gzip.open(path, "rb")) if compressed else path.open("rb")


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; trouble inside gzip data becomes an error that names the line reached."""
    import gzip
    import zlib

    number = 0
    with _open(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                yield number, line
        except EOFError:
            raise MalformedRowError(f"{path}, line {number + 1}: the gzip data are cut off. Fetch the file again.") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise MalformedRowError(f"{path}, line {number + 1}: bad gzip data ({error}). Fetch the file again.") from None


def count_lines(path: Path) -> int:
    """Lines of a JSON-lines file that are not blank; nothing is parsed."""
    return sum(1 for _, line in _raw_lines(path) if line.strip())


def _decode(place: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = raw[error.start : error.start + 4].hex(" ")
        raise MalformedRowError(
            f"{place}: expected UTF-8, found the bytes {found} at byte {error.start + 1}. Convert the file to UTF-8."
        ) from None


def _first_character(path: Path) -> bytes:
    for _, line in _raw_lines(path):
        stripped = line.removeprefix(b"\xef\xbb\xbf").strip()
        if stripped:
            return stripped[:1]
    return b""


def _line_rows(path: Path) -> Iterator[Row]:
    for number, raw in _raw_lines(path):
        if not raw.strip():
            continue
        place = f"{path}, line {number}"
        text = _decode(place, raw)
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            cut = "" if raw.endswith(b"\n") else " The file may be cut off here: fetch it again."
            raise MalformedRowError(
                f"{place}: expected one JSON object, found bad JSON at column {error.colno} ({error.msg}): {shown(text.strip())}.{cut}"
            ) from None
        except RecursionError:
            raise MalformedRowError(f"{place}: expected one JSON object, found brackets nested too deeply.") from None
        if not isinstance(values, dict):
            raise MalformedRowError(f"{place}: expected one JSON object, found {shown(values)}.")
        yield Row(place, values)


def _list_rows(path: Path) -> Iterator[Row]:
    text = "".join(_decode(f"{path}, line {number}", raw) for number, raw in _raw_lines(path))
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        cut = " The file may be cut off: fetch it again." if error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg else ""
        raise MalformedRowError(
            f"{path}, line {error.lineno}: expected a JSON list of objects, found bad JSON at column {error.colno} ({error.msg}).{cut}"
        ) from None
    except RecursionError:
        raise MalformedRowError(f"{path}, line 1: expected a JSON list of objects, found brackets nested too deeply.") from None
    for number, values in enumerate(items, start=1):
        place = f"{path}, row {number}"
        if not isinstance(values, dict):
            raise MalformedRowError(f"{place}: expected an object, found {shown(values)}.")
        yield Row(place, values)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingDependencyError(
            f"{path} is a parquet file, and reading it needs pyarrow, which is not installed: pip install 'searchqa-gym[data]'."
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        raise MalformedRowError(f"{path}, row {number + 1}: bad parquet data ({error}). Fetch the file again.") from None
