"""What an episode is made of, as rewards, metrics and viewers see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from searchqa_envs.questions import Question
from searchqa_envs.search_controls import Controls
from searchqa_retrievers.types import Passage

ActionKind = Literal["search", "answer", "invalid"]


class Action(NamedTuple):
    """What a segment means once parsed. ``text`` is the query or the answer, stripped; empty for an invalid action."""

    kind: ActionKind
    text: str

    @property
    def controls(self) -> Controls | None:
        """What a search said beside its query; None where it said nothing."""
        return None

    def saved(self) -> list[Any]:
        """Plain values, from which :func:`restored_action` makes the action again."""
        return list(self)


class ControlledSearch(Action):
    """A search that said something beside its query. As a tuple it is ``("search", query)``, and it equals only searches with equal controls."""

    _controls: Controls

    def __new__(cls, text: str, controls: Controls) -> ControlledSearch:
        action = super().__new__(cls, "search", text)
        action._controls = controls
        return action

    @property
    def controls(self) -> Controls:
        """What the search said beside its query."""
        return self._controls

    def saved(self) -> list[Any]:
        """Plain values, from which :func:`restored_action` makes the action again."""
        return [*self, {"top_k": self.controls.top_k, "filters": [list(pair) for pair in self.controls.filters]}]

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, other) is True and getattr(other, "controls", None) == self.controls

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((*self, self.controls))

    def __reduce__(self) -> tuple[Any, ...]:
        return ControlledSearch, (self.text, self.controls)

    def __repr__(self) -> str:
        return f"ControlledSearch(text={self.text!r}, controls={self.controls!r})"


def restored_action(saved: Sequence[Any]) -> Action:
    """The action of :meth:`Action.saved`."""
    kind, text, *stated = saved
    if not stated:
        return Action(kind, text)
    filters = tuple((key, value) for key, value in stated[0]["filters"])
    return ControlledSearch(text, Controls(stated[0]["top_k"], filters))


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
