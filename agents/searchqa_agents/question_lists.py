"""Lists of questions to train on: read from a file, found in a source, and taken in epochs."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from searchqa_envs.errors import ConfigurationError, UnknownQuestionError
from searchqa_envs.questions import QuestionSource


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
