"""Lists of questions: read from a file or drawn once and for all, found in a source, and taken in epochs."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from searchqa_envs.errors import ConfigurationError, UnknownQuestionError
from searchqa_envs.questions import QuestionSource

_FIXED = re.compile(r"fixed-([0-9]+)")


def read_question_ids(file: str | os.PathLike[str]) -> list[str]:
    """The ``id`` of each row of a jsonl or jsonl.gz file, in its order. Raises ``ConfigurationError`` for no file, no rows, no id, or one twice."""
    if not isinstance(file, (str, os.PathLike)):
        raise ConfigurationError(f"questions must be the path of a jsonl file, or null; got {file!r}.")
    path = Path(file).expanduser()
    opened = gzip.open if path.suffix == ".gz" else open
    ids: dict[str, int] = {}
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row: Any = json.loads(line)
                name = row.get("id") if isinstance(row, dict) else None
                if not isinstance(name, str):
                    raise ConfigurationError(
                        f"{path}, line {number}: a row of a list of questions needs a text 'id'; got {line.strip()!r:.100}."
                    )
                if name in ids:
                    raise ConfigurationError(
                        f"{path}, line {number}: the question {name!r} is in line {ids[name]} already; remove one of them."
                    )
                ids[name] = number
    except ConfigurationError:  # a ValueError too: what is said above
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:  # also those of a packed file that is cut off or damaged
        raise ConfigurationError(
            f"The list of questions {path} cannot be read: {error}. It needs a JSON object with 'id' in each line."
        ) from error
    if not ids:
        raise ConfigurationError(f"The list of questions {path} has no rows.")
    return list(ids)


def indices_of(ids: Sequence[str], source: QuestionSource, file: str) -> list[int]:
    """The place of each question in a source. Raises ``ConfigurationError`` that names the first one which is not there."""
    found = []
    for name in ids:
        try:
            found.append(source.index_of(name))
        except UnknownQuestionError as error:
            raise ConfigurationError(
                f"{file} asks for the question {name!r}, which {source.name} with these settings (env.split and others) has not. Choose the "
                "settings that the list was made with, or make it anew."
            ) from error
    return found


def check_choice(choice: Any, key: str = "questions") -> None:
    """Raise ``ConfigurationError`` for what cannot say which questions of a set to play; see :func:`chosen_questions`."""
    fixed = _FIXED.fullmatch(choice) if isinstance(choice, str) else None
    count = int(fixed[1]) if fixed else choice
    if isinstance(count, bool) or not isinstance(count, int | str | None) or count == "":
        raise ConfigurationError(
            f"{key} must be null (all), a number (the first so many), fixed-N, or a file of ids (jsonl or jsonl.gz); got {choice!r}."
        )
    if isinstance(count, int) and count < 1:
        raise ConfigurationError(f"{key} must be at least 1; got {count}.")


def choice_of(questions: Any, name: str, others: Sequence[str] = ()) -> Any:
    """What the key ``questions`` says of the set ``name``, where ``others`` are played too.

    Raises
    ------
    ConfigurationError
        For a file that would have to be of several sets, a mapping without this set or with one that is not played, and what :func:`check_choice` refuses.
    """
    if isinstance(questions, Mapping):
        played = (name, *others)
        unknown = [key for key in questions if key not in played]
        if unknown or name not in questions:
            wrong = f"it names {unknown[0]}, which is not played" if unknown else f"it does not name {name}"
            raise ConfigurationError(
                f"questions as a mapping must name each set that is played ({', '.join(sorted(played))}) and no other, null for all its questions; {wrong}."
            )
        check_choice(questions[name], f"questions.{name}")
        return questions[name]
    check_choice(questions)
    if isinstance(questions, str) and not _FIXED.fullmatch(questions) and others:
        raise ConfigurationError(
            f"questions={questions} is a list of one set, and several are played; say of which: questions={{{name}: {questions}, {others[0]}: null, ...}}."
        )
    return questions


def chosen_questions(choice: Any, source: QuestionSource) -> tuple[list[int], str]:
    """Which questions of a source to play: their places there, ascending, and the kind of the choice.

    Parameters
    ----------
    choice
        None: all. A number: the first so many. ``fixed-N``: the N questions with the smallest sha256 of ``<set>/<id>``, so that the list depends on the ids
        alone, and a longer one has all of a shorter one. Anything else: a file of ids, see :func:`read_question_ids`.

    Returns
    -------
    indices, kind
        The kind is ``all`` (also where another choice takes all), ``first``, ``fixed`` or ``file``.
    """
    size = len(source)
    fixed = _FIXED.fullmatch(choice) if isinstance(choice, str) else None
    if choice is None:
        return list(range(size)), "all"
    if isinstance(choice, int):
        indices, kind = list(range(min(choice, size))), "first"
    elif fixed:
        digests = sorted((hashlib.sha256(f"{source.name}/{source[index].id}".encode()).digest(), index) for index in range(size))
        indices, kind = sorted(index for _, index in digests[: int(fixed[1])]), "fixed"
    else:
        indices, kind = sorted(indices_of(read_question_ids(choice), source, str(choice))), "file"
    return indices, "all" if len(indices) == size else kind


def ids_stamp(ids: Sequence[str]) -> dict[str, Any]:
    """What tells two lists apart."""
    return {"count": len(ids), "sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest()}


def epoch_questions(questions: Sequence[int], count: int, *, seed: int, step: int) -> list[int]:
    """The ``count`` questions of a step (from 0): steps go through the list again and again, each epoch in a new order, each question once an epoch.

    A function of the seed and the step alone. A step in which an epoch ends takes the rest of its questions from the next one.
    """
    places = range(step * count, (step + 1) * count)
    size = len(questions)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(size) for epoch in {place // size for place in places}}
    return [questions[int(orders[place // size][place % size])] for place in places]


def extra_questions(questions: Sequence[int], count: int, *, seed: int) -> list[int]:
    """``count`` questions of the list at random, for rounds that play others in the place of some; different ones where there are enough."""
    rng = np.random.default_rng(seed)
    return [questions[int(place)] for place in rng.choice(len(questions), count, replace=count > len(questions))]
