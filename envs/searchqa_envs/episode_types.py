"""What an episode is made of, as rewards, metrics and viewers see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from searchqa_envs.questions import Question
from searchqa_retrievers.types import Passage

ActionKind = Literal["search", "answer", "invalid"]


class Action(NamedTuple):
    """What a segment means once parsed. ``text`` is the query or the answer, stripped; empty for an invalid action."""

    kind: ActionKind
    text: str


class Turn(NamedTuple):
    """One segment and the environment's reply.

    ``segment`` is the policy's text up to and with its closing tag; ``observation`` is the environment's text (empty at the end of an
    episode). ``searched`` is False for a search that was recorded but not executed (the last turn). ``passages`` are the retrieved
    passages as the corpus has them, before tags in them were neutralised.
    """

    segment: str
    action: Action
    searched: bool
    passages: tuple[Passage, ...]
    observation: str


@dataclass(frozen=True, slots=True)
class EpisodeView:
    """A finished episode as text and typed data, for rewards and metrics.

    ``answer`` is the text of the answer action, None when the policy gave none. ``dialect`` names the dialect. ``progress`` is
    ``(step, total)`` of training as last given to ``set_progress``; ``(0, 0)`` when it never was.
    Only reward terms named ``retrieval_*`` or ``structure_*`` may read ``passages`` or ``observation`` of a turn.
    """

    question: Question
    prompt: str
    turns: tuple[Turn, ...]
    answer: str | None
    dialect: str
    terminated: bool
    progress: tuple[int, int] = (0, 0)

    @property
    def response(self) -> str:
        """Everything after the prompt: segments and observations in turn."""
        return "".join(turn.segment + turn.observation for turn in self.turns)

    @property
    def searches(self) -> int:
        """Number of searches that were executed."""
        return sum(turn.searched for turn in self.turns)


class Reward(Protocol):
    """Called once, at the end of an episode, unless the search back end was lost. Returns named terms; the reward is their weighted sum."""

    def __call__(self, episode: EpisodeView) -> dict[str, float]: ...
