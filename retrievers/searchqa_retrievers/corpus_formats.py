"""Corpora in the forms in which they are published: from a file, an archive or a folder to passages, one after another."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from searchqa_retrievers.types import CorpusError, Passage

FORMATS = ("jsonl", "kilt", "hotpotqa", "tsv")
"""``jsonl``: ``id`` with ``contents`` or ``text`` (this package, Search-R1's wiki-18). ``kilt``: the pages of ``kilt_knowledgesource.json``,
cut into passages. ``hotpotqa``: Wikipedia as HotpotQA publishes it. ``tsv``: ``id``, ``text``, ``title`` (DPR, KILT's 100-word files)."""

PASSAGE_WORDS = 100
"""Words of a passage of a KILT page, as in DPR and KILT's own 100-word files."""

_TICK = 1000
_find_link = re.compile(r"</?a\b[^>]*>")
_HEADING = re.compile(r"^(Section::::|BULLET::::(- )?)")


class Row(NamedTuple):
    """A passage and the place in the files that it was read from."""

    where: str
    passage: Passage


class _Stream(NamedTuple):
    name: str
    lines: Iterable[bytes]


def read_passages(
    path: str | Path,
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    advance: Callable[[int], object] | None = None,
) -> Iterator[Row]:
    """The passages of a corpus, in the order of its files, read as they are asked for.

    Parameters
    ----------
    path
        A file, also compressed (``.gz``, ``.bz2``; ``.zst`` from Python 3.14 on), a tar archive of such files, or a folder of them.
    format
        One of :data:`FORMATS`; ``"auto"`` looks at the first row of every file.
    fields
        For JSON lines with other names: the name in the file of ``id`` and of ``text`` (or ``contents``), and of ``title`` where there
        is one. A field that is named must be in every row.
    advance
        Called from time to time with the number of bytes read so far, as they lie on disk.

    Raises
    ------
    CorpusError
        The files cannot be read, or a row is malformed; the message names file, line (from 1) and field.
    """
    path = Path(path)
    _check_arguments(format, fields)
    try:
        for stream in _streams(path, advance):
            yield from _read(stream, format, fields)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise CorpusError(
            f"cannot read the corpus {path}: {error}; give an existing .jsonl or .jsonl.gz file, or one of {FORMATS}"
        ) from error


def corpus_files(path: str | Path) -> list[Path]:
    """The files that make up the corpus at ``path``, in order; :class:`CorpusError` where there are none."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    if not files:
        raise CorpusError(f"cannot read the corpus {path}: the folder has no files")
    return files


def _check_arguments(format: str, fields: Mapping[str, str] | None) -> None:
    if format != "auto" and format not in FORMATS:
        raise CorpusError(f"the format of a corpus must be auto or one of {', '.join(FORMATS)}, got {format!r}")
    if fields is None:
        return
    if format not in ("auto", "jsonl"):
        raise CorpusError(f"fields can be named for JSON lines only, not for the format {format!r}")
    unknown = sorted(set(fields) - {"id", "title", "text", "contents"})
    if unknown or "id" not in fields or not {"text", "contents"} & set(fields):
        raise CorpusError(f"fields must name 'id' and 'text' (or 'contents'), and may name 'title', got {dict(fields)!r}")


def _streams(path: Path, advance: Callable[[int], object] | None) -> Iterator[_Stream]:
    before = 0
    for file in corpus_files(path):
        with file.open("rb") as raw:
            if re.search(r"\.(tar(\.\w+)?|tgz|tbz2?)$", file.name):
                streams = _members(file, raw)
            else:
                streams = iter([_Stream(str(file), _decompressed(file.name, raw))])
            for stream in streams:
                yield stream._replace(lines=_counted(stream.lines, raw, before, advance)) if advance is not None else stream
            before += raw.tell()


def _members(file: Path, raw: BinaryIO) -> Iterator[_Stream]:
    with tarfile.open(fileobj=raw, mode="r|*") as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is not None and not Path(member.name).name.startswith("."):
                yield _Stream(f"{file}, member {member.name}", _decompressed(member.name, content))


def _decompressed(name: str, raw: Any) -> Iterable[bytes]:
    if name.endswith(".gz"):
        return gzip.open(raw)
    if name.endswith(".bz2"):
        return bz2.open(raw)
    if name.endswith(".zst"):
        try:
            zstd: Any = import_module("compression.zstd")
        except ModuleNotFoundError as error:
            raise CorpusError(f"cannot read {name}: this Python has no zstd (3.14 has); decompress the file first") from error
        lines: Iterable[bytes] = zstd.open(raw)
        return lines
    stream: Iterable[bytes] = raw
    return stream


def _counted(lines: Iterable[bytes], raw: BinaryIO, before: int, advance: Callable[[int], object]) -> Iterator[bytes]:
    for number, line in enumerate(lines):
        if number % _TICK == 0:
            advance(before + raw.tell())
        yield line


def _read(stream: _Stream, format: str, fields: Mapping[str, str] | None) -> Iterator[Row]:
    lines = iter(stream.lines)
    blank = []
    first = b""
    for first in lines:
        if first.strip():
            break
        blank.append(first)
    if not first.strip():
        return
    lines = chain(blank, [first], lines)
    if format == "auto":
        format = "jsonl" if fields is not None else _detect(first)
    if format == "tsv":
        yield from _read_table(stream.name, lines)
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{stream.name}, line {number}"
        row = _json_object(line, where)
        if format == "jsonl":
            yield Row(where, _plain_passage(row, where) if fields is None else _named_passage(row, fields, where))
        elif format == "hotpotqa":
            yield Row(where, _hotpotqa_passage(row, where))
        else:
            for passage in _kilt_passages(row, where):
                yield Row(where, passage)


def _detect(line: bytes) -> str:
    """The format of a file from its first row; ``jsonl``, whose reader says what is wrong, for a row that none of them has."""
    if not line.lstrip().startswith(b"{"):
        return "tsv" if line.count(b"\t") >= 2 else "jsonl"
    try:
        row = json.loads(line)
    except ValueError:
        return "jsonl"
    if "wikipedia_title" in row and isinstance(row.get("text"), list):
        return "kilt"
    return "hotpotqa" if isinstance(row.get("text"), list) and "title" in row else "jsonl"


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: not a JSON object: {error}") from error
    if not isinstance(row, dict):
        raise CorpusError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    return row


def _identifier(row: Mapping[str, Any], field: str, where: str) -> str:
    id_ = row.get(field)
    if isinstance(id_, bool) or not isinstance(id_, str | int) or id_ == "":
        raise CorpusError(f"{where}, field {field!r}: must be a non-empty string or an integer, got {id_!r:.80}")
    return str(id_)


def _plain_passage(row: dict[str, Any], where: str) -> Passage:
    id_ = _identifier(row, "id", where)
    title, text, contents = (_text_field(row, field, where) for field in ("title", "text", "contents"))
    if text is None and contents is None:
        raise CorpusError(f"{where}, field 'contents': missing; a row needs 'contents', or 'text' with an optional 'title'")
    return _passage(id_, title, text, contents)


def _named_passage(row: dict[str, Any], fields: Mapping[str, str], where: str) -> Passage:
    for name in fields.values():
        if row.get(name) is None:
            raise CorpusError(f"{where}, field {name!r}: missing; the row has {', '.join(map(repr, row))}")
    values = {field: _text_field(row, name, where) for field, name in fields.items() if field != "id"}
    return _passage(_identifier(row, fields["id"], where), values.get("title"), values.get("text"), values.get("contents"))


def _passage(id_: str, title: str | None, text: str | None, contents: str | None) -> Passage:
    """``contents`` is ``"Title"\\ntext``; where ``title`` or ``text`` are there too, they count."""
    head, newline, tail = (contents or "").partition("\n")
    if title is None:
        title = "" if not newline else head[1:-1] if len(head) >= 2 and head[0] == head[-1] == '"' else head
    if text is None:
        text = tail if newline else head
    return Passage(id_, title, text)


def _text_field(row: Mapping[str, Any], field: str, where: str) -> str | None:
    value = row.get(field)
    if value is not None and not isinstance(value, str):
        raise CorpusError(f"{where}, field {field!r}: must be a string, got {value!r:.80}")
    return value


def _hotpotqa_passage(row: dict[str, Any], where: str) -> Passage:
    """One page: ``text`` is a list of sentences (the abstracts), or of paragraphs that are lists of sentences; links are taken out."""
    title = _text_field(row, "title", where)
    if title is None:
        raise CorpusError(f"{where}, field 'title': missing")
    parts = row.get("text")
    if not isinstance(parts, list) or not all(isinstance(part, str | list) for part in parts):
        raise CorpusError(f"{where}, field 'text': must be a list of sentences or of lists of sentences, got {parts!r:.80}")
    paragraphs = [parts] if all(isinstance(part, str) for part in parts) else [[part] if isinstance(part, str) else part for part in parts]
    if any(not isinstance(sentence, str) for paragraph in paragraphs for sentence in paragraph):
        raise CorpusError(f"{where}, field 'text': a sentence must be a string, got {parts!r:.80}")
    texts = [_find_link.sub("", "".join(paragraph)).strip() for paragraph in paragraphs]
    if len(texts) > 1 and texts[0] == title:
        del texts[0]
    return Passage(_identifier(row, "id", where), title, "\n".join(filter(None, texts)))


def _kilt_passages(row: dict[str, Any], where: str) -> Iterator[Passage]:
    """A page in passages of :data:`PASSAGE_WORDS` words, over the bounds of paragraphs, with the ids ``<page>-0``, ``<page>-1``, ...

    The first paragraph, which repeats the title, is left out, and the marks of headings and lists are.
    """
    page = _identifier(row, "_id", where)
    title = _text_field(row, "wikipedia_title", where)
    if title is None:
        raise CorpusError(f"{where}, field 'wikipedia_title': missing")
    paragraphs = row.get("text")
    if not isinstance(paragraphs, list) or not all(isinstance(paragraph, str) for paragraph in paragraphs):
        raise CorpusError(f"{where}, field 'text': must be a list of paragraphs, got {paragraphs!r:.80}")
    if paragraphs and paragraphs[0].strip() == title:
        paragraphs = paragraphs[1:]
    words = [word for paragraph in paragraphs for word in _HEADING.sub("", paragraph).split()]
    for number, start in enumerate(range(0, len(words), PASSAGE_WORDS)):
        yield Passage(f"{page}-{number}", title, " ".join(words[start : start + PASSAGE_WORDS]))


def _read_table(name: str, lines: Iterable[bytes]) -> Iterator[Row]:
    """Rows as ``csv`` writes them, with tabs between columns; the first may name the columns."""
    columns = {"id": 0, "text": 1, "title": 2}
    reader = csv.reader(_decoded(name, lines), delimiter="\t")
    first = True
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise CorpusError(f"{name}, line {reader.line_num}: {error}") from error
        if cells is None:
            return
        where = f"{name}, line {reader.line_num}"
        if first and {"id", "text"} <= set(cells):
            columns = {column: place for place, column in enumerate(cells)}
        elif cells:
            if len(cells) != len(columns):
                raise CorpusError(f"{where}: must have {len(columns)} columns ({', '.join(columns)}), but has {len(cells)}")
            if not cells[columns["id"]]:
                raise CorpusError(f"{where}, field 'id': must not be empty")
            yield Row(where, Passage(cells[columns["id"]], cells[columns["title"]] if "title" in columns else "", cells[columns["text"]]))
        first = False


def _decoded(name: str, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise CorpusError(f"{name}, line {number}: not UTF-8: {error}") from error
