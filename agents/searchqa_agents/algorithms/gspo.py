"""Group sequence policy optimisation (GSPO), multi-turn.

Zheng et al. 2025 (arXiv 2507.18071). Advantages are GRPO's; the ratio that is clipped is one per trajectory, the geometric mean of its tokens'
ratios. What is different here:

- A trajectory's length is the number of tokens that the policy sampled, over all its turns; environment text has no ratio.
- Two updates per rollout by default: with a single one all ratios are 1, and GSPO is GRPO with a mean over sequences. Minibatches and
  micro-batches hold whole trajectories, so that a ratio is never divided.
- KL and entropy, where asked for, are means over tokens.

The paper's setting in these terms: ``num_minibatches=4, clip_coef=3e-4, clip_coef_high=4e-4``.
"""

from __future__ import annotations

from dataclasses import dataclass

from searchqa_agents.advantages import group_advantages
from searchqa_agents.algorithm import Algorithm, AlgorithmConfig, LossTerms, Totals, register, regularised, sequence_rewards
from searchqa_agents.batch import Batch
from searchqa_agents.losses import sequence_ratio_loss
from searchqa_agents.policy import TokenStats
from searchqa_envs.errors import ConfigurationError


@dataclass
class GSPOConfig(AlgorithmConfig):
    """Settings of GSPO."""

    clip_coef: float = 3e-4
    """a sequence's ratio is clipped to 1 - clip_coef ..."""
    clip_coef_high: float | None = 4e-4
    """... and 1 + clip_coef_high"""
    normalise_std: bool = True
    """divide advantages by the standard deviation of the group's rewards"""
    num_minibatches: int = 2
    """updates in each pass"""

    def __post_init__(self) -> None:
        if self.token_weighting != "token-mean":
            raise ConfigurationError(
                f"GSPO's loss is a mean over sequences by its formula: leave out token_weighting; got {self.token_weighting!r}."
            )


def advantages(batch: Batch, config: GSPOConfig) -> Batch:
    """Each episode's reward relative to its group, repeated to its tokens."""
    of_sequence = group_advantages(sequence_rewards(batch, config), batch.group_ids, normalise_std=config.normalise_std)  # [S]
    return batch._replace(advantages=of_sequence[batch.sequence_ids])


def loss(stats: TokenStats, part: Batch, totals: Totals, config: GSPOConfig) -> LossTerms:
    """The clipped loss with one ratio per sequence; a part holds whole sequences."""
    assert part.advantages is not None
    policy = sequence_ratio_loss(
        stats.logprob,
        part.old_logprobs,
        part.advantages,
        part.sequence_ids,
        totals.sequences,
        clip_coef=config.clip_coef,
        clip_coef_high=config.clip_coef_high,
        weights=part.weights,
        mask=part.policy_mask,
    )
    terms = regularised(policy.loss, stats, part, totals, config)
    return LossTerms(terms.loss, {**terms.metrics, "clipfrac": policy.clipfrac})


register(Algorithm("gspo", GSPOConfig, advantages, loss))
