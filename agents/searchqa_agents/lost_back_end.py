"""When the search back end is gone: rollouts in a row that it left nothing of end a run, before it uses up its schedule learning nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from searchqa_envs.errors import ConfigurationError, SearchQAError

if TYPE_CHECKING:
    from searchqa_agents.demonstrations import Batches
    from searchqa_agents.trajectory import Trajectory

MAX_LOST_ROLLOUTS = 3
"""How many rollouts in a row may be lost, unless a run says otherwise."""


class LostBackEndError(SearchQAError):
    """The search back end is gone: nothing of what was played can be trained on or measured."""


def is_lost(trajectories: Sequence[Trajectory]) -> bool:
    """Whether episodes lost their search back end, and none of the others had a search answered.

    Episodes that never searched say nothing about the back end; trained on or measured by themselves they would stand for a policy that does not search.
    """
    whole = [t for t in trajectories if t.backend_error is None]
    return len(whole) < len(trajectories) and not any(t.metrics.get("searches", 1.0) > 0 for t in whole)


def last_error(trajectories: Sequence[Trajectory]) -> str:
    """What the last lost episode was told, without a full stop."""
    return str([t.backend_error for t in trajectories if t.backend_error is not None][-1]).rstrip(". ")


class LostRollouts:
    """Counts lost rollouts in a row.

    All that it is told must be the same in all processes of a run, as the trajectories of ``shared_rollout`` are: then they stop together.

    Parameters
    ----------
    most
        The rollouts in a row that end a run; 0: none do, and none are counted.
    rollouts
        How many the run still has: where it is to have fewer than ``most``, losing all of them ends it too.
    """

    def __init__(self, most: int, rollouts: int) -> None:
        if most < 0:
            raise ConfigurationError(f"max_lost_rollouts must be at least 0; got {most}.")
        self.most = min(most, max(rollouts, 1))
        self.in_a_row = 0
        self.episodes = 0
        """lost episodes of the last rollout"""
        self._error = ""

    def add(self, trajectories: Sequence[Trajectory]) -> None:
        """Take in a rollout."""
        self.episodes = sum(t.backend_error is not None for t in trajectories)
        if self.most and is_lost(trajectories):
            self.in_a_row += 1
            self._error = last_error(trajectories)
        else:
            self.in_a_row = 0

    def check(self) -> None:
        """Raise ``LostBackEndError`` once there were too many."""
        if self.most and self.in_a_row >= self.most:
            raise LostBackEndError(
                f"The search back end is gone: {self.in_a_row} rollouts in a row had no search answered (max_lost_rollouts). The last error: "
                f"{self._error}. Bring the back end back, then go on from the last checkpoint; steps without an answer are taken again."
            )


def watched(batches: Batches, lost: LostRollouts) -> Batches:
    """The same batches of demonstrations, counted by ``lost``; the one that is too much raises ``LostBackEndError``."""

    def batch(step: int) -> list[Trajectory]:
        played = batches(step)
        lost.add(played)
        lost.check()
        return played

    return batch


def check_measured(trajectories: Sequence[Trajectory], what: str) -> None:
    """Raise ``LostBackEndError`` for an evaluation that measured nothing."""
    if is_lost(trajectories):
        lost = sum(t.backend_error is not None for t in trajectories)
        raise LostBackEndError(
            f"The search back end is gone: {what} has no result, because {lost} of its {len(trajectories)} episodes lost it and no search was answered. "
            f"The last error: {last_error(trajectories)}. Bring the back end back, then measure again."
        )
