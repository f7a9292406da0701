"""REINFORCE++, multi-turn, and its variant with the group's mean as baseline.

Hu et al. 2025 (arXiv 2501.03262). A token's advantage is its reward to go, KL penalties included, whitened over all tokens of the rollout; the
loss is PPO's. With ``baseline="group"`` the mean of the group is first subtracted from the episode's reward (the paper's
REINFORCE++-baseline, R1-Searcher's ``reinforce_baseline``). What is different here:

- Whitening is over the tokens that the policy sampled, of the whole rollout and over all processes.
- One update per rollout by default; no KL by default.
- KL stays in the reward with the group's baseline too, as in R1-Searcher; the paper's baseline variant has k2 in the loss
  (``kl_in="loss", kl_estimator="k2"``).

R1-Searcher's settings are the recipes ``published/r1_searcher_*`` in ``searchqa_conf``. Its loss is a mean per packed sequence; here over the
minibatch's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from searchqa_agents.advantages import discounted_returns, group_baseline_advantages, whiten
from searchqa_agents.algorithm import Algorithm, AlgorithmConfig, LossTerms, Totals, clipped_loss, register, token_rewards
from searchqa_agents.batch import Batch
from searchqa_agents.losses import KLEstimator
from searchqa_agents.policy import TokenStats


@dataclass
class ReinforcePlusPlusConfig(AlgorithmConfig):
    """Settings of REINFORCE++."""

    baseline: Literal["none", "group"] = "none"
    """what is subtracted from an episode's reward: nothing, or the mean of its group"""
    clip_coef: float = 0.2
    """ratios are clipped to 1 - clip_coef and 1 + clip_coef"""
    gamma: float = 1.0
    """discount per token"""
    kl_in: Literal["loss", "reward"] = "reward"
    """where the divergence from the policy as training begins counts"""
    kl_estimator: KLEstimator = "k1"
    """how it is estimated; k1 is for the reward: in the loss its gradient is noise with mean 0"""


def advantages(batch: Batch, config: ReinforcePlusPlusConfig) -> Batch:
    """Rewards to go, whitened over the rollout's tokens."""
    rewards = batch.rewards  # [S]
    if config.baseline == "group":
        rewards = group_baseline_advantages(rewards, batch.group_ids)
    per_token = token_rewards(batch._replace(rewards=rewards), config)  # [N]
    return batch._replace(advantages=whiten(discounted_returns(per_token, batch.sequence_ids, config.gamma)))


def loss(stats: TokenStats, part: Batch, totals: Totals, config: ReinforcePlusPlusConfig) -> LossTerms:
    """The clipped loss."""
    return clipped_loss(stats, part, totals, config, clip_coef=config.clip_coef)


register(Algorithm("reinforce_plus_plus", ReinforcePlusPlusConfig, advantages, loss))
