"""REINFORCE as ZeroSearch has it, multi-turn.

Williams 1992; ZeroSearch (arXiv 2505.04588) trains with it. An episode's reward is every token's advantage: no baseline, no whitening, and
still PPO's clipped loss, which is REINFORCE's own at one update per rollout. What is different here:

- KL from the policy as training begins, where ``kl_coef`` is above 0, is *added* to the loss. ZeroSearch's released code subtracts it, which
  rewards divergence (its author acknowledged the sign).
- Each update is the exact mean over the tokens of its minibatch; ZeroSearch's second update of a step is scaled down by a fixed count.

ZeroSearch's settings are the recipe ``published/zerosearch_reinforce`` in ``searchqa_conf``. (Posts about ZeroSearch call this REINFORCE++; that is
another algorithm.)
"""

from __future__ import annotations

from dataclasses import dataclass

from searchqa_agents.advantages import discounted_returns
from searchqa_agents.algorithm import Algorithm, AlgorithmConfig, LossTerms, Totals, clipped_loss, register, token_rewards
from searchqa_agents.batch import Batch
from searchqa_agents.policy import TokenStats


@dataclass
class ReinforceConfig(AlgorithmConfig):
    """Settings of REINFORCE."""

    clip_coef: float = 0.2
    """ratios are clipped to 1 - clip_coef and 1 + clip_coef"""
    gamma: float = 1.0
    """discount per token"""


def advantages(batch: Batch, config: ReinforceConfig) -> Batch:
    """Each token's reward to go: at gamma 1 the episode's reward."""
    return batch._replace(advantages=discounted_returns(token_rewards(batch, config), batch.sequence_ids, config.gamma))


def loss(stats: TokenStats, part: Batch, totals: Totals, config: ReinforceConfig) -> LossTerms:
    """The clipped loss, with KL and entropy where asked for."""
    return clipped_loss(stats, part, totals, config, clip_coef=config.clip_coef)


register(Algorithm("reinforce", ReinforceConfig, advantages, loss))
