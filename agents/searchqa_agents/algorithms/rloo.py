"""REINFORCE leave-one-out (RLOO), multi-turn.

Ahmadian et al. 2024 (arXiv 2402.14740), after Kool et al. 2019. An episode's advantage is its reward minus the mean reward of the others of its
group. What is different here:

- The loss is PPO's clipped one, whose gradient is REINFORCE's at one update per rollout, so that several updates are possible too.
- It is the mean over policy tokens; the paper's mean over sequences of their sums is ``token_weighting="constant-length", constant_length=1``.
- KL (in the sequence's reward, k1, as in the paper) is off by default.

The paper's setting in these terms: ``questions_per_step=512, group_size=2`` or ``4, kl_coef=0.03`` to ``0.1, learning_rate=1e-6``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from searchqa_agents.advantages import leave_one_out_advantages
from searchqa_agents.algorithm import Algorithm, AlgorithmConfig, LossTerms, Totals, clipped_loss, register, sequence_rewards
from searchqa_agents.batch import Batch
from searchqa_agents.losses import KLEstimator
from searchqa_agents.policy import TokenStats


@dataclass
class RLOOConfig(AlgorithmConfig):
    """Settings of RLOO."""

    clip_coef: float = 0.2
    """ratios are clipped to 1 - clip_coef and 1 + clip_coef"""
    kl_in: Literal["loss", "reward"] = "reward"
    """where the divergence from the policy as training begins counts"""
    kl_estimator: KLEstimator = "k1"
    """how it is estimated; k1 is for the reward: in the loss its gradient is noise with mean 0"""


def advantages(batch: Batch, config: RLOOConfig) -> Batch:
    """Each episode's reward minus the mean of the others of its group, repeated to its tokens."""
    of_sequence = leave_one_out_advantages(sequence_rewards(batch, config), batch.group_ids)  # [S]
    return batch._replace(advantages=of_sequence[batch.sequence_ids])


def loss(stats: TokenStats, part: Batch, totals: Totals, config: RLOOConfig) -> LossTerms:
    """The clipped loss."""
    return clipped_loss(stats, part, totals, config, clip_coef=config.clip_coef)


register(Algorithm("rloo", RLOOConfig, advantages, loss))
