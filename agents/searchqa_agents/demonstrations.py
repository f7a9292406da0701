"""Demonstrations: scripted experts played in the real environment, so that tokens and loss mask are the environment's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from searchqa_agents.rollout import draw_questions, episode_seed, rollout
from searchqa_agents.scripted import Script, ScriptedAgent
from searchqa_agents.trajectory import Trajectory

Batches = Callable[[int], list[Trajectory]]
"""The batch of a step: the same step gives the same batch."""


def demonstrate(venv: VectorEnv[Any, Any, Any], script: str | Script, questions: Sequence[int | str], seed: int = 0) -> list[Trajectory]:
    """One demonstration for each question."""
    return rollout(venv, ScriptedAgent.for_env(script, venv), questions, seed=seed)


def fresh_demonstrations(
    venv: VectorEnv[Any, Any, Any], script: str | Script, *, batch_size: int, seed: int, num_worlds: int | None = 4
) -> Batches:
    """Batches of new demonstrations, each on newly drawn questions (``num_worlds``: see :func:`~searchqa_agents.rollout.draw_questions`)."""
    agent = ScriptedAgent.for_env(script, venv)

    def batch(step: int) -> list[Trajectory]:
        questions = draw_questions(agent.source, batch_size, seed=episode_seed(seed, step, 0), num_worlds=num_worlds)
        return rollout(venv, agent, questions, seed=episode_seed(seed, step, 1))

    return batch


def recorded_demonstrations(trajectories: Sequence[Trajectory], *, batch_size: int, seed: int) -> Batches:
    """Batches from given trajectories, each epoch in a new order; the last batch of an epoch runs on into the next."""

    def order(epoch: int) -> list[int]:
        return [int(i) for i in np.random.default_rng([seed, epoch]).permutation(len(trajectories))]

    def batch(step: int) -> list[Trajectory]:
        places = range(step * batch_size, (step + 1) * batch_size)
        orders = {epoch: order(epoch) for epoch in {place // len(trajectories) for place in places}}
        return [trajectories[orders[place // len(trajectories)][place % len(trajectories)]] for place in places]

    return batch
