"""One episode as text for people: safe for a terminal, turn by turn."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from searchqa_agents.trajectory import Trajectory

_BLANKS = frozenset("\t\u2028\u2029\r")
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn"))
"""Controls, marks that turn the direction of writing or have no width, halves of surrogate pairs, private and unassigned characters."""


def plain_text(text: str, *, lines: bool = False) -> str:
    """Text that cannot steer a terminal: control characters are shown as pictures, other hidden ones as �; line breaks too, unless ``lines``."""
    return "".join(_shown(character, lines) for character in text)


def _shown(character: str, lines: bool) -> str:
    if character == "\n":
        return "\n" if lines else "⏎"
    if character in _BLANKS:
        return " "
    if unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"


def verdict(trajectory: Trajectory) -> str:
    """ "right", "partly", "wrong", "no answer", or "lost"."""
    if trajectory.backend_error is not None:
        return "lost"
    if trajectory.answer is None:
        return "no answer"
    if trajectory.metrics.get("em", 0.0) >= 1.0:
        return "right"
    return "partly" if trajectory.metrics.get("f1", 0.0) > 0 else "wrong"


def head_of(trajectory: Trajectory) -> str:
    """The line that says how an episode ended."""
    wanted = " / ".join(trajectory.golden_answers)
    answer = "none" if trajectory.answer is None else trajectory.answer
    return plain_text(f"{verdict(trajectory)}; answer: {answer}; wanted: {wanted}; reward {trajectory.reward:g}")


def episode_text(trajectory: Trajectory) -> str:
    """All of an episode: what the policy wrote and what the environment replied."""
    parts = [f"question: {plain_text(trajectory.question)}", head_of(trajectory), ""]
    for number, turn in enumerate(trajectory.turns, start=1):
        parts += [f"[policy, turn {number}] {plain_text(turn.segment, lines=True)}"]
        parts += [f"[environment] {plain_text(turn.observation, lines=True)}"] if turn.observation else []
    return "\n".join(parts)


def sample_of(trajectories: Sequence[Trajectory], number: int) -> Trajectory | None:
    """One of the episodes whose search back end answered, by turns another one; None if there is none."""
    whole = [trajectory for trajectory in trajectories if trajectory.backend_error is None]
    return whole[number % len(whole)] if whole else None
