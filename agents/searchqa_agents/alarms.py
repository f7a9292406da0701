"""Alarms that tell when a policy collapses: entropy, length, searches, and rewards that no longer differ.

They look at the metrics of each step (:func:`searchqa_agents.trainer.rollout_metrics`), are told nothing else, and draw nothing: fed with the lines of
``metrics.jsonl``, alarms of a resumed run are where they were. They warn; they stop nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

from searchqa_envs.errors import ConfigurationError


@dataclass
class AlarmConfig:
    """When to warn. A threshold of 0 switches its alarm off."""

    window: int = 5
    """steps whose mean is looked at; the first so many are the start that the others are compared with"""
    entropy_share: float = 0.1
    """entropy per token below this share of its start"""
    length_factor: float = 3.0
    """sampled tokens per episode more than so many times their start, or less than that part of it"""
    fewest_searches: float = 0.05
    """searches per episode below this"""
    search_budget_share: float = 0.95
    """searches per episode above this share of the most that an episode can have: one fewer than its turns, as the last can only answer"""
    reward_spread: float = 0.02
    """standard deviation of the rewards, or the share of episodes with an advantage, below this while exact match is below top_reward"""
    top_reward: float = 0.9
    """exact match from which on equal rewards are no fault"""

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) < (1 if f.name == "window" else 0):
                raise ConfigurationError(f"alarms.{f.name} must be at least {int(f.name == 'window')}; got {getattr(self, f.name)}.")
        if 0 < self.length_factor <= 1:
            raise ConfigurationError(f"alarms.length_factor must be above 1, or 0 for no alarm; got {self.length_factor}.")


class Alarm(NamedTuple):
    """What was seen, at which step, and since when at the latest it has been coming."""

    name: str
    step: int
    since: int
    message: str


_WATCHED = ("entropy", "sampled_tokens", "searches", "em", "reward_std", "trained_share")


class Alarms:
    """Watches one training phase; each alarm is raised once in each of its stages.

    Parameters
    ----------
    config
        Thresholds.
    max_turns
        Turns of an episode.
    """

    def __init__(self, config: AlarmConfig, max_turns: int) -> None:
        self.config = config
        self.max_turns = max_turns
        self.raised: list[Alarm] = []
        self._raised_before = 0
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=config.window) for name in _WATCHED}
        self._start: dict[str, float] = {}
        self._steps: deque[int] = deque(maxlen=config.window)

    def begin(self, max_turns: int) -> None:
        """Begin a stage, whose rewards and searches are not to be compared with those before."""
        self.max_turns = max_turns
        self._raised_before = len(self.raised)
        self._start.clear()
        self._steps.clear()
        for values in self._recent.values():
            values.clear()

    def update(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms that the metrics of a step raise, beside those that were raised before."""
        self._steps.append(step)
        for name, values in self._recent.items():
            if f"charts/{name}" in metrics:
                values.append(metrics[f"charts/{name}"])
                if len(values) == self.config.window and name not in self._start:
                    self._start[name] = sum(values) / len(values)
        before = {alarm.name for alarm in self.raised[self._raised_before :]}
        new = [Alarm(name, step, self._steps[0], message) for name, message in self._seen().items() if name not in before]
        self.raised += new
        return new

    def _mean(self, name: str) -> float | None:
        """Of the last steps; None before there are enough of them."""
        values = self._recent[name]
        return sum(values) / len(values) if len(values) == self.config.window else None

    def _seen(self) -> dict[str, str]:
        """Message by name of all that is amiss now."""
        config, found = self.config, {}
        entropy, length, searches = self._mean("entropy"), self._mean("sampled_tokens"), self._mean("searches")
        if entropy is not None and entropy < config.entropy_share * self._start["entropy"]:
            found["entropy"] = (
                f"entropy per token fell from {self._start['entropy']:.3g} to {entropy:.3g}: the policy hardly varies what it writes any more. "
                "A lower learning rate, an entropy bonus (algo.entropy_coef) or a higher clip (algo.clip_coef_high) hold it up."
            )
        if length is not None and config.length_factor:
            start = self._start["sampled_tokens"]
            if not start / config.length_factor <= length <= start * config.length_factor:
                found["length"] = (
                    f"sampled tokens per episode went from {start:.3g} to {length:.3g}. Look at the trajectories in report.html; a lower "
                    "learning rate, or a KL term (algo.kl_coef, in a new run), holds the policy nearer to its start."
                )
        if searches is not None and searches < config.fewest_searches:
            found["no searches"] = (
                f"{searches:.3g} searches per episode, from {self._start['searches']:.3g}: the policy answers from memory. Check that searching "
                "can pay (the reward, the retriever), or start from demonstrations that search."
            )
        budget = self.max_turns - 1  # a query in the last turn is not searched for
        if searches is not None and config.search_budget_share and budget and searches > config.search_budget_share * budget:
            found["all searches"] = (
                f"{searches:.3g} searches in episodes of {self.max_turns} turns: the policy searches until its budget is spent instead of "
                "answering. Look at the trajectories in report.html, or let the environment announce the last turn (env.forced_answer=true)."
            )
        em, spread, trained = self._mean("em"), self._mean("reward_std"), self._mean("trained_share")
        low = [value for value in (spread, trained) if value is not None and value < config.reward_spread]
        if low and em is not None and em < config.top_reward:
            found["reward spread"] = (
                f"rewards hardly differ any more (standard deviation {'unknown' if spread is None else f'{spread:.3g}'}, share of episodes with "
                f"an advantage {'unknown' if trained is None else f'{trained:.3g}'}) at exact match {em:.3g}: there is nothing left to learn from. "
                "Larger groups, a higher temperature or other questions bring differences."
            )
        return found
