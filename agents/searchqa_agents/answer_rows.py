"""Reads answers from lines of JSON: those of other code, R1-Searcher's output files, and the scores of our own runs."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import math
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from searchqa_agents.measures import SCHEMA_VERSION
from searchqa_envs.errors import MalformedRowError

STANDARD_INPUT = "-"
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_PREDICTIONS = frozenset({"prediction", "pred_ans"})
_EXAMPLE = '{"question": "...", "golden_answers": ["..."], "prediction": "..."}'


class AnswerRow(NamedTuple):
    """An answer and what it is to be compared with.

    Attributes
    ----------
    line
        Its line in the file, from 1.
    question
        None where the row has none.
    golden_answers
        At least one.
    prediction
        None where there is no answer.
    key
        Set, question and sample of a row of our own scores; None of other rows.
    row
        The whole row.
    """

    line: int
    question: str | None
    golden_answers: tuple[str, ...]
    prediction: str | None
    key: tuple[str, str, int] | None
    row: Mapping[str, Any]


def read_answers(path: str) -> Iterator[AnswerRow]:
    """The answers of a ``.jsonl`` or ``.jsonl.gz`` file, one by one; ``-`` is the standard input. Empty lines are no rows.

    A row has the golden answers as ``golden_answers`` or ``answer``, each a string or a list of strings, and the answer given as ``prediction`` or
    ``pred_ans``, a string, null, or not there. On both sides a number is read as its text, and ``true`` and ``false`` as ``yes`` and ``no`` (so R1-Searcher's
    judge reads them); the strings ``"True"`` and ``"False"`` stay what they are, and are yes and no under R1-Searcher's rules only. In a row of our own
    ``scores.jsonl`` (it has ``schema_version``) ``answer`` is the answer given.

    Raises
    ------
    MalformedRowError
        A line is none of this; the message names file, line and what is wrong. Or no row at all has an answer given by name, not even as null.
    """
    name = "standard input" if path == STANDARD_INPUT else path
    rows, any_prediction, keys = 0, False, dict[str, None]()
    with _opened(path) as file:
        lines = enumerate(file, start=1)
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                break
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise MalformedRowError(f"{name} is damaged or cut off: {error}. Fetch or write it again.") from error
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            row = _answer_row(line, number, f"{name}, line {number}")
            rows, any_prediction = rows + 1, any_prediction or row.key is not None or not _PREDICTIONS.isdisjoint(row.row)
            if not any_prediction:
                keys |= dict.fromkeys(row.row)
            yield row
    if rows and not any_prediction:
        raise MalformedRowError(
            f"{name}: none of its {rows} rows has {' or '.join(sorted(_PREDICTIONS, reverse=True))}, so that it holds no answers to score; the rows have "
            f"{', '.join(keys)}. Name the answer given 'prediction'; null where there is none."
        )


@contextmanager
def _opened(path: str) -> Iterator[Iterable[bytes]]:
    """The bytes of a file, unpacked where they are packed, whatever its name is."""
    if path == STANDARD_INPUT:
        yield _unpacked(cast(io.BufferedReader, sys.stdin.buffer))
        return
    if Path(path).is_dir():
        raise MalformedRowError(f"{path} is a folder; name a file of rows in it, such as {Path(path) / 'scores.jsonl'}.")
    with Path(path).open("rb") as file:
        if file.peek(len(_PARQUET))[: len(_PARQUET)] == _PARQUET:
            beside = Path(path).parent / "scores.jsonl"
            raise MalformedRowError(f"{path} is a Parquet file; name the rows as lines of JSON, of an evaluation its {beside}.")
        yield _unpacked(file)


def _unpacked(file: io.BufferedReader) -> Iterable[bytes]:
    packed = file.peek(len(_GZIP))[: len(_GZIP)] == _GZIP
    return gzip.GzipFile(fileobj=file) if packed else file


def _answer_row(line: bytes, number: int, where: str) -> AnswerRow:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MalformedRowError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}).") from error
    except (ValueError, RecursionError) as error:
        hint = " The file seems to be one JSON array; write one object per line." if number == 1 and line.lstrip()[:1] == b"[" else ""
        raise MalformedRowError(f"{where}: not JSON ({error}). A row is one object on one line, such as {_EXAMPLE}.{hint}") from error
    if not isinstance(row, dict):
        raise MalformedRowError(f"{where}: a row must be an object, such as {_EXAMPLE}; got {_seen(row)}.")
    question = row.get("question")
    if question is not None and not isinstance(question, str):
        raise MalformedRowError(f"{where}: question must be a string; got {_seen(question)}.")
    if "schema_version" in row:
        return _own_row(row, question, number, where)
    return AnswerRow(number, question, _golden_answers(row, where), _prediction(row, where), None, row)


def _own_row(row: Mapping[str, Any], question: str | None, number: int, where: str) -> AnswerRow:
    if row["schema_version"] != SCHEMA_VERSION:
        raise MalformedRowError(
            f"{where}: schema_version is {row['schema_version']!r}; this version of searchqa-gym reads {SCHEMA_VERSION}."
        )
    set_name, question_id, sample = (row.get(name) for name in ("set", "id", "sample"))
    if not isinstance(set_name, str) or not isinstance(question_id, str) or type(sample) is not int or "golden_answers" not in row:
        raise MalformedRowError(
            f"{where}: a row with schema_version must have set, id, sample, golden_answers and answer; got {_seen(row)}."
        )
    answer = _text_or_none(row, "answer", where)
    return AnswerRow(number, question, _golden_answers(row, where), answer, (set_name, question_id, sample), row)


def _golden_answers(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    name = "golden_answers" if row.get("golden_answers") is not None or "answer" not in row else "answer"
    if name not in row:
        raise MalformedRowError(
            f"{where}: a row must have golden_answers or answer, a string or a list of strings; it has {', '.join(row) or 'nothing'}."
        )
    value = row[name]
    golden = tuple(_as_text(one) for one in (value if isinstance(value, list) else [value]))
    for one in golden:
        if not isinstance(one, str) or not one.strip():
            raise MalformedRowError(f"{where}: {name} must be a string or a list of strings, none of them blank; got {_seen(value)}.")
    if not golden:
        raise MalformedRowError(f"{where}: {name} is an empty list; a question needs at least one golden answer.")
    return golden


def _as_text(value: Any) -> Any:
    """A number or a truth value as text; all else as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else value


def _prediction(row: Mapping[str, Any], where: str) -> str | None:
    predictions = [_text_or_none(row, name, where) for name in sorted(_PREDICTIONS, reverse=True) if name in row]
    if len(set(predictions)) > 1:
        raise MalformedRowError(f"{where}: prediction and pred_ans must not differ; got {predictions[0]!r:.80} and {predictions[1]!r:.80}.")
    if not predictions and row.get("golden_answers") is not None and "answer" in row:
        raise MalformedRowError(
            f"{where}: with both golden_answers and answer, and neither prediction nor pred_ans, it is not clear what was answered. "
            "Name the answer given 'prediction'; null where there is none."
        )
    return predictions[0] if predictions else None


def _text_or_none(row: Mapping[str, Any], name: str, where: str) -> str | None:
    value = _as_text(row.get(name))
    if value is None or isinstance(value, str):
        return value
    raise MalformedRowError(f"{where}: {name} must be a string, or null where there is no answer; got {_seen(value)}.")


def _seen(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.80}"
