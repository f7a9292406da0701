"""Group relative policy optimisation (GRPO), multi-turn; with options also Dr. GRPO, DAPO and GiGPO.

DeepSeekMath (arXiv 2402.03300), algorithm 1, outcome supervision. What is different here:

- The loss is the mean over all policy tokens of a minibatch (``token_weighting="token-mean"``), not the mean of each output's own mean
  (``"sequence-mean"``, the paper's equation 3).
- One update per rollout by default, so that ratios are 1 and nothing is clipped; ``update_epochs`` and ``num_minibatches`` give more.
- No KL term by default; the reference is the policy as training begins.
- Episodes have several turns: only tokens that the policy sampled count, never prompt, passages or other environment text.
- Old log-probabilities are those recorded when the tokens were sampled (``recompute_logprobs`` evaluates them anew).

In these terms:

- Search-R1's and ZeroSearch's GRPO: the recipes ``published/search_r1_grpo`` and ``published/zerosearch_grpo`` in ``searchqa_conf``. Theirs averages
  tokens per micro-batch, and Search-R1's groups could collide across data sets.
- R1-Searcher, Llama stage 1 (``group_norm``): in ``published/r1_searcher_llama``. Its groups held 8 rewards among 8 zeros, and its KL penalties are
  subtracted token by token behind the normalisation, here from the episode's reward before it.
- Dr. GRPO (arXiv 2503.20783): ``normalise_std=False, token_weighting="constant-length"`` with ``constant_length`` the longest response; no KL.
- DAPO (arXiv 2503.14476): ``clip_coef_high=0.28, dynamic_sampling=10`` (questions whose rewards are all alike are replaced; here a bound ends that),
  ``token_weighting="token-mean"``, no KL; ``questions_per_step=512, group_size=16, num_minibatches=16, learning_rate=1e-6``. Left out: its overlong
  reward shaping. Here an episode that runs out of room is truncated and has the reward of its environment.
- GiGPO (Feng et al. 2025, arXiv 2505.10978): ``credit="turn"``. A segment's anchor state is the environment text that it answers to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from searchqa_agents.advantages import group_advantages, segment_index, state_group_advantages
from searchqa_agents.algorithm import Algorithm, AlgorithmConfig, LossTerms, Totals, clipped_loss, register, sequence_rewards, token_rewards
from searchqa_agents.batch import Batch, anchor_states
from searchqa_agents.policy import TokenStats


@dataclass
class GRPOConfig(AlgorithmConfig):
    """Settings of GRPO."""

    clip_coef: float = 0.2
    """ratios are clipped to 1 - clip_coef and 1 + clip_coef"""
    clip_coef_high: float | None = None
    """the upper clip where it differs (DAPO's clip-higher)"""
    normalise_std: bool = True
    """divide advantages by the standard deviation of the group's rewards (not in Dr. GRPO)"""
    credit: Literal["episode", "turn"] = "episode"
    """compare episodes of a group; or, besides, the turns of a group that began in an equal state (GiGPO)"""
    gamma: float = 1.0
    """discount per turn of GiGPO's turn advantages"""
    omega: float = 1.0
    """weight of GiGPO's turn advantages"""


def advantages(batch: Batch, config: GRPOConfig) -> Batch:
    """Each episode's reward relative to its group, repeated to its tokens; with credit by turn also each turn's return among its equals."""
    if config.credit == "episode":
        of_sequence = group_advantages(sequence_rewards(batch, config), batch.group_ids, normalise_std=config.normalise_std)  # [S]
        return batch._replace(advantages=of_sequence[batch.sequence_ids])
    segment, first = segment_index(batch.sequence_ids, batch.segment_ids)  # [N], [K]
    rewards = batch.rewards.new_zeros(len(first)).index_add_(0, segment, token_rewards(batch, config))  # [K]
    sequence = batch.sequence_ids[first]  # [K]
    of_segment = state_group_advantages(
        rewards,
        sequence,
        batch.group_ids[sequence],
        anchor_states(batch),
        gamma=config.gamma,
        omega=config.omega,
        normalise_std=config.normalise_std,
    )  # [K]
    return batch._replace(advantages=of_segment[segment])


def loss(stats: TokenStats, part: Batch, totals: Totals, config: GRPOConfig) -> LossTerms:
    """The clipped loss, with KL and entropy where asked for."""
    return clipped_loss(stats, part, totals, config, clip_coef=config.clip_coef, clip_coef_high=config.clip_coef_high)


register(Algorithm("grpo", GRPOConfig, advantages, loss))
