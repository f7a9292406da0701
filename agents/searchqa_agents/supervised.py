"""``algo=sft``: supervised fine-tuning in the place of reinforcement learning, for the comparison that R1-Searcher makes (arXiv 2503.05592, section 4).

On fresh demonstrations of a script it has as many in a step as an RL algorithm has episodes, so that both take the same number of updates and see as many
episodes. On trajectories that were collected before (``trajectories``), with ``keep=right``, it is rejection sampling (arXiv 2503.09516, section 4.2). Only
what the policy wrote is learned: environment tokens are masked.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from searchqa_agents.collected import Collected, Keep, collect, fitting, trajectory_files
from searchqa_agents.demonstrations import fresh_demonstrations, recorded_demonstrations
from searchqa_agents.lost_back_end import LostRollouts, watched
from searchqa_agents.optimisation import OnCheckpoint, OnStep
from searchqa_agents.policy import Policy
from searchqa_agents.ranges import check_ranges
from searchqa_agents.select_questions import check_metric
from searchqa_agents.sft import SFTConfig, train_sft
from searchqa_envs.errors import ConfigurationError

logger = logging.getLogger(__name__)


@dataclass
class SupervisedConfig:
    """Settings of :func:`train_supervised`; those that RL algorithms have too mean the same.

    With ``trajectories`` these are looked for at once, and with ``epochs`` they are read, because ``steps`` then follows from how many are kept.
    Raises ``ConfigurationError`` where there are none, and for values that cannot be.
    """

    demonstrations: str = "oracle"
    """the script that demonstrates, where no trajectories are given"""
    trajectories: Any = None
    """learn from these instead: a run's folder, a trajectory file, a pattern of such, or a list"""
    keep: Keep = "right"
    """of them: right (rejection sampling) or all"""
    metric: str = "em"
    """what makes one right: em, cover_em, f1, ..., or reward"""
    right_at: float = 1.0
    """from this value on"""
    max_per_question: int | None = None
    """of each question at most so many, the first; null: all that are kept"""
    epochs: float | None = None
    """passes over the trajectories, from which steps follows; null: steps"""
    steps: int = 30
    """optimiser steps"""
    questions_per_step: int = 32
    """times group_size: the demonstrations in a step, each on a question of its own"""
    group_size: int = 8
    """times questions_per_step: the demonstrations in a step"""
    num_worlds: int | None = 4
    """generated worlds: how many new ones each step is about; null draws every question from all worlds"""
    learning_rate: float = 5e-4
    """peak learning rate of AdamW"""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient"""
    beta2: float = 0.98
    """AdamW's decay of the mean squared gradient"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    warmup_steps: int = 0
    """steps of linear learning-rate warm-up"""
    final_fraction: float = 0.1
    """the learning rate falls linearly to this fraction of its peak"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    max_tokens: int = 16_384
    """tokens in a micro-batch, padding included"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """arithmetic of forward and backward passes; bfloat16 by autocast, weights and optimiser stay as they are"""
    gradient_checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0: only at the end"""
    seed: int = 0
    """determines demonstrations and their order"""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_metric(self.metric)
        if self.trajectories is None:
            if self.epochs is not None:
                raise ConfigurationError(f"epochs are passes over given trajectories; got epochs={self.epochs:g} without trajectories.")
        elif self.max_per_question is not None and self.max_per_question < 1:
            raise ConfigurationError(f"max_per_question must be at least 1 or null; got {self.max_per_question}.")
        elif self.epochs is None:
            trajectory_files(self.trajectories)
        else:
            self.steps = self.collected().steps(self.epochs, self.batch_size)

    @property
    def batch_size(self) -> int:
        """Demonstrations in a step."""
        return self.questions_per_step * self.group_size

    def collected(self) -> Collected:
        """The given trajectories that are kept."""
        return collect(
            self.trajectories, keep=self.keep, metric=self.metric, right_at=self.right_at, max_per_question=self.max_per_question
        )

    def sft(self) -> SFTConfig:
        """The same as :func:`~searchqa_agents.sft.train_sft` takes it."""
        common = {name: getattr(self, name) for name in SFTConfig.__dataclass_fields__ if name != "batch_size"}
        return SFTConfig(batch_size=self.batch_size, **common)


def train_supervised(
    policy: Policy,
    venv: Any,
    config: SupervisedConfig,
    *,
    on_step: OnStep | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    state: Mapping[str, Any] | None = None,
    lost: LostRollouts | None = None,
) -> None:
    """Train ``policy`` in place, on fresh demonstrations or on the given trajectories, in a new order in each epoch.

    ``lost`` counts batches whose search back end is gone, and ends the training when they are too many.

    Metrics: those of :func:`~searchqa_agents.sft.train_sft`, but ``charts/tokens`` counts all tokens that were read, as it does for RL algorithms; with
    the first step what of given trajectories is kept, see :class:`~searchqa_agents.collected.Collected`.

    Raises
    ------
    ConfigurationError
        If given trajectories do not fit (:func:`~searchqa_agents.collected.fitting`), or are not those that the run of ``state`` was begun with.
    """
    sft = config.sft()
    collected = None if config.trajectories is None else fitting(config.collected(), venv)
    if collected is None:
        batches = fresh_demonstrations(venv, config.demonstrations, batch_size=sft.batch_size, seed=sft.seed, num_worlds=sft.num_worlds)
        batches = batches if lost is None else watched(batches, lost)
    else:
        told = ", ".join(f"{value:.0f} {name.rpartition('/')[2].replace('_', ' ')}" for name, value in collected.counts.items())
        logger.info("Learning from collected trajectories: %s.", told)
        batches = recorded_demonstrations(collected.trajectories, batch_size=sft.batch_size, seed=sft.seed)
    digest = None if collected is None else collected.sha256
    if state is not None and state.get("trajectories") != digest:
        raise ConfigurationError(
            f"A run goes on with the demonstrations that it was begun with, and {config.trajectories or config.demonstrations!r} gives others: files were "
            "added or changed, or keep, metric, right_at or max_per_question are others. Bring them back, or begin a new run with start=<its checkpoint>."
        )
    read: dict[int, int] = {}

    def counted(step: int) -> list[Any]:
        batch = batches(step)
        read[step + 1] = sum(len(trajectory.token_ids) for trajectory in batch)
        return batch

    def logged(step: int, metrics: Mapping[str, float]) -> None:
        if on_step is not None:
            first = collected.counts if collected is not None and step == 1 else {}
            on_step(step, {**metrics, "charts/tokens": float(read.pop(step)), **first})

    def saved(step: int, state: Mapping[str, Any]) -> None:
        if on_checkpoint is not None:
            on_checkpoint(step, state if digest is None else {**state, "trajectories": digest})

    train_sft(policy, counted, sft, on_step=logged, on_checkpoint=saved, state=state)
