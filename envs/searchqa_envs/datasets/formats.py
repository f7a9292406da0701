"""Question files in the formats they are published in.

A row format and the way rows are kept (JSON lines, one JSON list, parquet) are independent: every format is read from each of them.
"""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from searchqa_envs.datasets.rows import Row, is_list, read_rows, shown
from searchqa_envs.errors import ConfigurationError, MalformedRowError
from searchqa_envs.questions import Question
from searchqa_retrievers.types import Passage

logger = logging.getLogger(__name__)

QuestionRows = Path | Sequence[Mapping[str, Any]]

_SPLIT_NAMES = {"validation": "dev", "valid": "dev", "val": "dev", "training": "train"}
_TITLE_LISTS = ("supporting_titles", "supporting_ids", "answer_titles", "answer_ids")


class Entry(NamedTuple):
    """A question, and the passages that came with it (none in most formats)."""

    question: Question
    passages: tuple[Passage, ...]


def canonical_text(text: str) -> str:
    """Runs of whitespace become one space, Unicode becomes NFC: the form in which titles and passages are kept and compared."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def passage_id(title: str, text: str) -> str:
    """The first 12 hex digits of sha1(title, U+001F, text): equal passages have the same id in every corpus."""
    return hashlib.sha1(f"{title}\x1f{text}".encode(), usedforsecurity=False).hexdigest()[:12]


def make_passage(title: str, text: str) -> Passage:
    """The passage of a title and a text, both made canonical."""
    title, text = canonical_text(title), canonical_text(text)
    return Passage(passage_id(title, text), title, text)


def canonical_split(split: str) -> str:
    """``validation`` and ``val`` are called ``dev`` here; other names stay."""
    return _SPLIT_NAMES.get(split, split)


def read_questions(source: QuestionRows, format: str | None = None, split: str | None = None) -> Iterator[Entry]:
    """Read questions in any of the formats of :data:`FORMATS`.

    Parameters
    ----------
    source
        A file (JSON lines, a JSON list, either gzip-compressed, or parquet) or a list of such rows.
    format
        Name of the row format; by default what the fields of the first row say.
    split
        The split of rows that name none (the file's name usually tells it).

    Raises
    ------
    MalformedRowError
        A row cannot be read, or an id occurs twice.
    """
    if format is not None and format not in FORMATS:
        raise ConfigurationError(f"a question format is one of {', '.join(FORMATS)}; got {format!r}. Leave it out to have it detected.")
    places: dict[str, str] = {}
    for row in read_rows(source):
        if format is None:
            format = detect_format(row)
        entry = FORMATS[format](row, split)
        if entry is None:
            continue
        first = places.setdefault(entry.question.id, row.place)
        if first is not row.place:
            raise MalformedRowError(
                f"{row.place}, field 'id': expected an id of its own, found {entry.question.id!r}, which {first} has already."
            )
        yield entry


def detect_format(row: Row) -> str:
    """The format whose fields a row has; raises :class:`MalformedRowError` when it is none."""
    values = row.values
    if "reward_model" in values:
        return "search-r1"
    if "golden_answers" in values:
        return "searchqa"
    if "paragraphs" in values:
        return "musique"
    if "context" in values and "evidences" in values:
        return "2wikimultihopqa"
    if "context" in values and "supporting_facts" in values:
        return "hotpotqa"
    if "idx" in values and "answer" in values:
        return "r1-searcher"
    fields = ", ".join(map(repr, values)) or "none"
    raise MalformedRowError(
        f"{row.place}, field 'golden_answers': expected the fields of one of the formats {', '.join(FORMATS)}, found the fields {fields}. "
        "The usual ones are id, question, golden_answers, metadata."
    )


def _read_searchqa(row: Row, split: str | None) -> Entry:
    """Ours and FlashRAG's: id, question, golden_answers, metadata. FlashRAG's metadata can hold HotpotQA's context and supporting facts."""
    given = row.mapping("metadata")
    metadata = {key: value for key, value in given.items() if value is not None and key not in ("context", "supporting_facts")}
    for key in _TITLE_LISTS:
        if key in metadata:
            metadata[key] = row.texts(f"metadata.{key}")
    for key in ("split", "type", "level", "source"):
        if key in metadata:
            metadata[key] = row.text(f"metadata.{key}")
    own_split = metadata.get("split", split)
    if own_split is not None:
        metadata["split"] = canonical_split(own_split)
    passages = _contexts(row, "metadata.context") if given.get("context") else ()
    if given.get("supporting_facts") and "supporting_titles" not in metadata:
        metadata |= _support(_supporting_titles(row, "metadata.supporting_facts"), passages)
    return Entry(Question(row.identifier("id"), row.text("question"), row.answers("golden_answers"), metadata), passages)


def _read_hotpotqa(row: Row, split: str | None) -> Entry:
    """HotpotQA's and 2WikiMultiHopQA's own rows (``_id``, pairs in context), and HotpotQA's on the hub (``id``, columns in context)."""
    passages = _contexts(row, "context")
    metadata: dict[str, Any] = {}
    for key in ("type", "level"):
        value = row.optional_text(key)
        if value is not None:
            metadata[key] = value
    metadata |= _support(_supporting_titles(row, "supporting_facts"), passages)
    if split is not None:
        metadata["split"] = split
    identifier = row.identifier("_id" if "_id" in row.values else "id")
    return Entry(Question(identifier, row.text("question"), (row.text("answer"),), metadata), passages)


def _read_musique(row: Row, split: str | None) -> Entry | None:
    """MuSiQue's own rows. Those of the full version that cannot be answered are left out."""
    if row.get("answerable") is False:
        logger.debug("%s: not answerable, left out", row.place)
        return None
    passages: list[Passage] = []
    gold: list[Passage] = []
    paragraphs = row.get("paragraphs")
    if not is_list(paragraphs):
        raise row.error("paragraphs", "a list of objects with title, paragraph_text, is_supporting")
    for number, values in enumerate(paragraphs):
        if not isinstance(values, Mapping):
            raise row.error("paragraphs", "a list of objects with title, paragraph_text, is_supporting")
        paragraph = Row(f"{row.place}, paragraph {number}", values)
        passage = make_passage(paragraph.text("title"), paragraph.text("paragraph_text"))
        passages.append(passage)
        supporting = values.get("is_supporting", False)
        if not isinstance(supporting, bool):
            raise paragraph.error("is_supporting", "true or false")
        if supporting:
            gold.append(passage)
    identifier = row.identifier("id")
    aliases = row.texts("answer_aliases") if row.get("answer_aliases") is not None else ()
    metadata: dict[str, Any] = {}
    if "hop" in identifier and "__" in identifier:
        metadata["type"] = identifier.partition("__")[0]
    if gold:
        metadata["supporting_titles"] = tuple(dict.fromkeys(passage.title for passage in gold))
        metadata["supporting_ids"] = tuple(dict.fromkeys(passage.id for passage in gold))
    if split is not None:
        metadata["split"] = split
    answers = tuple(dict.fromkeys((row.text("answer"), *aliases)))
    return Entry(Question(identifier, row.text("question"), answers, metadata), tuple(passages))


def _read_search_r1(row: Row, split: str | None) -> Entry:
    """Search-R1's training rows. Their indexes count within each source, so that source, split and index together make the id."""
    source = row.text("data_source")
    index = row.identifier("extra_info.index")
    own_split = row.optional_text("extra_info.split")
    split = canonical_split(own_split) if own_split else split
    target = "reward_model.ground_truth.target"
    answers = (row.text(target),) if isinstance(row.get(target), str) else row.answers(target)
    question = row.text("question") if row.get("question") is not None else _question_in_prompt(row)
    metadata = {"source": source} if split is None else {"source": source, "split": split}
    identifier = "-".join(part for part in (source, split, index) if part)
    return Entry(Question(identifier, question, answers, metadata), ())


def _read_r1_searcher(row: Row, split: str | None) -> Entry:
    """R1-Searcher's rows: idx, question, answer. What they hold of generations is passed over."""
    answers = (row.text("answer"),) if isinstance(row.get("answer"), str) else row.answers("answer")
    return Entry(Question(row.identifier("idx"), row.text("question"), answers, {} if split is None else {"split": split}), ())


def _question_in_prompt(row: Row) -> str:
    expected = "a list of messages whose last user message has the question after 'Question:'"
    prompt = row.get("prompt")
    if not is_list(prompt):
        raise row.error("prompt", expected)
    contents = [message.get("content") for message in prompt if isinstance(message, Mapping) and message.get("role") == "user"]
    if not contents or not isinstance(contents[-1], str):
        raise row.error("prompt", expected)
    _, marker, question = contents[-1].partition("Question:")
    if not marker or not question.strip():
        raise row.error("prompt", expected)
    return question.strip()


def _pairs(row: Row, field: str, columns: Sequence[str], expected: str) -> list[tuple[Any, Any]]:
    """Pairs as HotpotQA writes them ([[a, b], ...]) or as the hub does ({first: [a, ...], second: [b, ...]})."""
    value = row.get(field)
    if isinstance(value, Mapping):
        first, second = value.get(columns[0]), next((value[name] for name in columns[1:] if name in value), None)
        if not is_list(first) or not is_list(second) or len(first) != len(second):
            raise row.error(field, expected)
        return list(zip(first, second, strict=True))
    if not is_list(value) or not all(is_list(item) and len(item) == 2 for item in value):
        raise row.error(field, expected)
    return [(item[0], item[1]) for item in value]


def _contexts(row: Row, field: str) -> tuple[Passage, ...]:
    expected = "[[title, [sentence, ...]], ...] or {title: [...], sentences: [[...], ...]}"
    passages = []
    for number, (title, sentences) in enumerate(_pairs(row, field, ("title", "sentences", "content"), expected)):
        if isinstance(sentences, str):
            sentences = [sentences]
        if not isinstance(title, str) or not is_list(sentences) or not all(isinstance(sentence, str) for sentence in sentences):
            raise MalformedRowError(f"{row.place}, field '{field}': expected {expected}, found at {number} {shown((title, sentences))}.")
        passage = make_passage(title, _join(sentences))
        if passage.text:  # HotpotQA has a few paragraphs without any sentence
            passages.append(passage)
    return tuple(passages)


def _join(sentences: Sequence[str]) -> str:
    """HotpotQA's sentences carry the space between them, 2WikiMultiHopQA's do not."""
    carried = any(sentence[:1].isspace() for sentence in sentences[1:])
    return ("" if carried else " ").join(sentences)


def _supporting_titles(row: Row, field: str) -> tuple[str, ...]:
    expected = "[[title, sentence number], ...] or {title: [...], sent_id: [...]}"
    titles = []
    for title, _ in _pairs(row, field, ("title", "sent_id"), expected):
        if not isinstance(title, str) or not title.strip():
            raise row.error(field, expected)
        titles.append(canonical_text(title))
    return tuple(dict.fromkeys(titles))


def _support(titles: Iterable[str], passages: Iterable[Passage]) -> dict[str, tuple[str, ...]]:
    """Gold titles, and the ids of the passages of the context that have them."""
    titles = tuple(titles)
    if not titles:
        return {}
    ids = tuple(dict.fromkeys(passage.id for title in titles for passage in passages if passage.title == title))
    return {"supporting_titles": titles, "supporting_ids": ids} if ids else {"supporting_titles": titles}


FORMATS: dict[str, Callable[[Row, str | None], Entry | None]] = {
    "searchqa": _read_searchqa,
    "flashrag": _read_searchqa,
    "hotpotqa": _read_hotpotqa,
    "2wikimultihopqa": _read_hotpotqa,
    "musique": _read_musique,
    "search-r1": _read_search_r1,
    "r1-searcher": _read_r1_searcher,
}
"""Row formats by name. ``searchqa`` (ours) and ``flashrag`` are one format; ours names the split and the gold passages in metadata."""
