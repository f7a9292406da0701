"""Check the files of a set: readable, sums as recorded, ids unique, gold passages in the corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from searchqa_envs.datasets.download import file_sums
from searchqa_envs.datasets.formats import read_questions
from searchqa_envs.datasets.location import SetFiles
from searchqa_envs.datasets.sources import load_set_corpus
from searchqa_envs.errors import DataError, DataNotFoundError
from searchqa_envs.questions import Question
from searchqa_retrievers.types import CorpusError

_NAMED = 3  # missing ids or titles that one message names


@dataclass(slots=True)
class Report:
    """What a check found. ``splits`` counts the rows of the question files (None: rows that name no split); ``passages`` is None without corpus."""

    name: str
    folder: Path
    splits: Counter[str | None] = field(default_factory=Counter)
    extra: int = 0
    passages: int | None = None
    checked_sums: int = 0
    problems: list[str] = field(default_factory=list)


def verify_set(files: SetFiles) -> Report:
    """Read all files of a set and report every problem; raises nothing for bad data."""
    report = Report(files.name, files.folder)
    _check_sums(files, report)
    places: dict[str, str] = {}
    questions: list[Question] = []
    for path, split in files.questions:
        for question in _read(path, split, places, report):
            report.splits[question.metadata.get("split")] += 1
            questions.append(question)
    extra = _read(files.extra, None, places, report) if files.extra else []
    report.extra = len(extra)
    try:
        corpus = load_set_corpus(files)
    except DataNotFoundError:
        if any(question.metadata.get("supporting_ids") for question in questions):
            report.problems.append(f"{files.folder}: questions name supporting passages, but there is no corpus.jsonl[.gz].")
        return report
    except (DataError, CorpusError) as error:
        if str(error) not in report.problems:
            report.problems.append(str(error))
        return report
    report.passages = len(corpus)
    titles = set(corpus.titles)
    for name, known in (("supporting_ids", corpus), ("answer_ids", corpus), ("supporting_titles", titles), ("answer_titles", titles)):
        _check_known(questions, name, known, report)
    return report


def _check_sums(files: SetFiles, report: Report) -> None:
    for relative, entry in files.record.get("files", {}).items():
        found, _ = file_sums(files.folder / relative)
        expected = entry.get("sha256") if isinstance(entry, dict) else None
        report.checked_sums += 1
        if found != expected:
            report.problems.append(
                f"{files.folder / relative}: must have the sha256 {expected}, has {found}. Fetch it again: searchqa data download {files.name} --force"
            )


def _read(path: Path, split: str | None, places: dict[str, str], report: Report) -> list[Question]:
    """The questions of a file up to its first bad row; ids that another file has already are problems."""
    questions = []
    try:
        for entry in read_questions(path, split=split):
            question = entry.question
            other = places.setdefault(question.id, path.name)
            if other != path.name:
                report.problems.append(f"{path}: the id {question.id!r} is also in {other}; ids must be unique within a set.")
            questions.append(question)
    except DataError as error:
        report.problems.append(str(error))
    return questions


def _check_known(questions: list[Question], name: str, known: Container[object], report: Report) -> None:
    missing = [(value, question.id) for question in questions for value in question.metadata.get(name, ()) if value not in known]
    if missing:
        named = ", ".join(f"{value!r} of question {identifier!r}" for value, identifier in missing[:_NAMED])
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        report.problems.append(f"{report.folder}: {name} must be in the corpus; missing: {named}{more}.")
