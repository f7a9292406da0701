"""A question, and a source of questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from searchqa_envs.errors import ConfigurationError
from searchqa_retrievers.types import Retriever


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a data set.

    ``metadata`` holds what the set knows: ``type``, ``level``, ``supporting_titles``, ``supporting_ids``, ``answer_titles``, ``split``, ...;
    unknown keys are left out. The world adds ``hops`` and ``chain``.
    """

    id: str
    question: str
    golden_answers: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def supporting_titles(self) -> tuple[str, ...]:
        """Titles of the gold passages; empty where the set does not know them."""
        return tuple(self.metadata.get("supporting_titles", ()))


class QuestionSource(Protocol):
    """Questions in a fixed order, and the corpus they are asked about.

    A source is shared by all environments of a process; it holds no episode state.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Question: ...

    def index_of(self, question_id: str) -> int:
        """Index of a question; raises ``UnknownQuestionError``."""
        ...

    def filters(self, question: Question) -> Mapping[str, str] | None:
        """What scopes a search for this question (the world's number); None where one corpus serves all."""
        ...

    def build_retriever(self, config: Mapping[str, Any]) -> Retriever:
        """The retriever ``{"name": ..., **settings}`` over this source's corpus."""
        ...

    def stamp(self) -> dict[str, Any]:
        """Data set, split, revision, corpus hash: what a number needs to be comparable."""
        ...


def checked_index(source: QuestionSource, index: object) -> int:
    """``index`` as a Python integer. Raises ``ConfigurationError`` if no question has it."""
    if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < len(source):
        raise ConfigurationError(f"index must be an integer in [0, {len(source)}), the number of questions; got {index!r}.")
    return int(index)


def question_of(source: QuestionSource, which: int | str) -> Question:
    """The question with this id or at this index. Raises ``UnknownQuestionError`` or ``ConfigurationError`` if there is none."""
    return source[source.index_of(which) if isinstance(which, str) else checked_index(source, which)]
