"""Reward ranked fine-tuning (RAFT): rejection sampling, multi-turn.

Dong et al. 2023 (arXiv 2304.06767); with verifiable rewards Xiong et al. 2025 (arXiv 2504.11343). Of each rollout the good episodes are kept, and
the policy learns to repeat them: next-token loss on its own tokens. What is different here:

- Kept is every episode whose reward reaches ``threshold``, as in the second paper; the first keeps the best of each question
  (``best_only``), whatever its reward.
- Each rollout is sampled by the policy as it is, and learned once; the first paper fine-tunes on each stage's data for longer
  (``update_epochs``).
- There is no ratio and no clip (the second paper's RAFT++ has both).

Search-R1's rejection sampling baseline is offline: five episodes on each training question by the instruct model, the right ones kept, one
supervised fine-tuning on all of them. That is one step of this with ``questions_per_step`` the whole set, ``group_size=5`` and several ``update_epochs``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from searchqa_agents.algorithm import Algorithm, AlgorithmConfig, LossTerms, Totals, register, regularised, sequence_rewards
from searchqa_agents.batch import Batch, select
from searchqa_agents.losses import reinforce_loss
from searchqa_agents.policy import TokenStats


@dataclass
class RAFTConfig(AlgorithmConfig):
    """Settings of RAFT."""

    threshold: float = 0.5
    """episodes with at least this reward are kept"""
    best_only: bool = False
    """of these, only the first with the highest reward of each group"""


def advantages(batch: Batch, config: RAFTConfig) -> Batch:
    """The episodes that are kept, each with advantage 1."""
    rewards = sequence_rewards(batch, config).tolist()
    kept = [i for i, reward in enumerate(rewards) if reward >= config.threshold]
    if config.best_only:
        groups = batch.group_ids.tolist()
        best = {groups[i]: i for i in sorted(kept, key=lambda i: (rewards[i], -i))}  # the last one put in stays
        kept = sorted(best.values())
    batch = select(batch, kept)
    return batch._replace(advantages=torch.ones_like(batch.old_logprobs))


def loss(stats: TokenStats, part: Batch, totals: Totals, config: RAFTConfig) -> LossTerms:
    """Mean negative log-likelihood of the kept episodes' tokens."""
    assert part.advantages is not None
    policy_loss = reinforce_loss(stats.logprob, part.advantages, totals.tokens, weights=part.weights, mask=part.policy_mask)
    return regularised(policy_loss, stats, part, totals, config)


register(Algorithm("raft", RAFTConfig, advantages, loss))
