"""Proximal policy optimisation (PPO), multi-turn, with a critic.

Schulman et al. 2017 (arXiv 1707.06347), for language models as in InstructGPT (arXiv 2203.02155). What is different here:

- A step is a token that the policy sampled; the step after a segment's last token is the next segment's first. Environment text between them
  has no value, no advantage and no loss. With ``credit="turn"`` a step is a whole segment, and the critic is asked once for each.
- An episode has one reward, at its end, and no value is taken over from beyond it, whether it terminated or was truncated.
- One update per rollout by default (``algo=ppo`` on the line: two), so that ratios are 1; ``update_epochs`` and ``num_minibatches`` give more.
- KL from the policy as training begins is subtracted from each token's reward (k1, as InstructGPT does) where ``kl_coef`` is above 0.
- Advantages are whitened over all tokens of the rollout, not of a minibatch.

Search-R1's and ZeroSearch's settings are the recipes ``published/search_r1_ppo`` and ``published/zerosearch_ppo`` in ``searchqa_conf``; with
``environment_tokens=True`` critic, GAE and whitening see the environment's tokens as theirs do, and the policy's loss and KL do not. They average tokens
per micro-batch; here the mean is over the minibatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from searchqa_agents.advantages import gae, segment_gae, segment_starts, whiten
from searchqa_agents.algorithm import Algorithm, AlgorithmConfig, LossTerms, Totals, clipped_loss, register, token_rewards
from searchqa_agents.batch import Batch
from searchqa_agents.losses import KLEstimator, value_loss
from searchqa_agents.policy import TokenStats
from searchqa_envs.errors import ConfigurationError


@dataclass
class PPOConfig(AlgorithmConfig):
    """Settings of PPO."""

    clip_coef: float = 0.2
    """ratios are clipped to 1 - clip_coef and 1 + clip_coef"""
    gamma: float = 1.0
    """discount per step"""
    lam: float = 1.0
    """GAE's lambda: 1 is the return minus the value, 0 the error of one step"""
    credit: Literal["token", "turn"] = "token"
    """what a step is: a token, or a whole segment"""
    whiten: bool = True
    """shift and scale the advantages of the rollout's tokens to mean 0 and variance 1"""
    value_coef: float = 1.0
    """weight of the critic's loss; it matters where the critic shares the policy's trunk"""
    value_clip_coef: float | None = 0.5
    """the critic's values are clipped to within this of those of the rollout; null: no clip"""
    critic_warmup: int = 0
    """steps at the beginning in which only the critic learns; of a shared one that is the trunk too"""
    environment_tokens: bool = False
    """critic, GAE and whitening see environment tokens too, as in Search-R1; the policy's loss and KL never do"""
    kl_in: Literal["loss", "reward"] = "reward"
    """where the divergence from the policy as training begins counts"""
    kl_estimator: KLEstimator = "k1"
    """how it is estimated; k1 is for the reward: in the loss its gradient is noise with mean 0"""

    def __post_init__(self) -> None:
        if self.credit == "turn" and self.environment_tokens:
            raise ConfigurationError(
                "With credit=turn the critic is read where segments begin: environment_tokens must be false; got true."
            )


def advantages(batch: Batch, config: PPOConfig) -> Batch:
    """GAE over tokens or over segments, whitened."""
    values = batch.values
    assert values is not None
    rewards, sequence = token_rewards(batch, config), batch.sequence_ids
    if config.credit == "turn":
        estimate = segment_gae(rewards, values, sequence, batch.segment_ids, config.gamma, config.lam)
        values = estimate.returns - estimate.advantages  # of the state in which the token's segment begins
    else:
        estimate = gae(rewards, values, sequence, config.gamma, config.lam)
    of_tokens = whiten(estimate.advantages) if config.whiten else estimate.advantages
    return batch._replace(advantages=of_tokens, returns=estimate.returns, values=values)


def loss(stats: TokenStats, part: Batch, totals: Totals, config: PPOConfig) -> LossTerms:
    """The clipped loss of the policy plus the clipped loss of the critic."""
    assert stats.value is not None
    assert part.values is not None
    assert part.returns is not None
    terms = clipped_loss(stats, part, totals, config, clip_coef=config.clip_coef)
    if config.credit == "turn":
        read, count = segment_starts(part.sequence_ids, part.segment_ids), totals.segments
    else:
        read, count = None, totals.evaluated
    critic = value_loss(stats.value, part.values, part.returns, count, clip_coef=config.value_clip_coef, mask=read)
    metrics = {**terms.metrics, "value_loss": critic.loss.detach(), "value_clipfrac": critic.clipfrac}
    policy_learns = float(totals.step >= config.critic_warmup)
    return LossTerms(policy_learns * terms.loss + config.value_coef * critic.loss, metrics)


register(Algorithm("ppo", PPOConfig, advantages, loss, critic=True, environment_tokens=lambda config: config.environment_tokens))
