"""``algo=sft``: supervised fine-tuning in the place of reinforcement learning, for the comparison that R1-Searcher makes (arXiv 2503.05592, section 4).

It has as many demonstrations in a step as an RL algorithm has episodes, so that both take the same number of updates and see as many episodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from searchqa_agents.demonstrations import fresh_demonstrations
from searchqa_agents.lost_back_end import LostRollouts, watched
from searchqa_agents.optimisation import OnCheckpoint, OnStep
from searchqa_agents.policy import Policy
from searchqa_agents.sft import SFTConfig, train_sft


@dataclass
class SupervisedConfig:
    """Settings of :func:`train_supervised`; those that RL algorithms have too mean the same."""

    demonstrations: str = "oracle"
    """the script that demonstrates"""
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
    checkpoint_every: int = 0
    """steps between checkpoints; 0: only at the end"""
    seed: int = 0
    """determines demonstrations and their order"""

    def sft(self) -> SFTConfig:
        """The same as :func:`~searchqa_agents.sft.train_sft` takes it."""
        common = {name: getattr(self, name) for name in SFTConfig.__dataclass_fields__ if name != "batch_size"}
        return SFTConfig(batch_size=self.questions_per_step * self.group_size, **common)


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
    """Train ``policy`` in place on fresh demonstrations.

    ``lost`` counts batches whose search back end is gone, and ends the training when they are too many.

    Metrics: those of :func:`~searchqa_agents.sft.train_sft`, but ``charts/tokens`` counts all tokens that were read, as it does for RL algorithms.
    """
    sft = config.sft()
    batches = fresh_demonstrations(venv, config.demonstrations, batch_size=sft.batch_size, seed=sft.seed, num_worlds=sft.num_worlds)
    batches = batches if lost is None else watched(batches, lost)
    read: dict[int, int] = {}

    def counted(step: int) -> list[Any]:
        batch = batches(step)
        read[step + 1] = sum(len(trajectory.token_ids) for trajectory in batch)
        return batch

    def logged(step: int, metrics: Mapping[str, float]) -> None:
        if on_step is not None:
            on_step(step, {**metrics, "charts/tokens": float(read.pop(step))})

    train_sft(policy, counted, sft, on_step=logged, on_checkpoint=on_checkpoint, state=state)
