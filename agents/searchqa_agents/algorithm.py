"""What an RL algorithm is here: its settings, its advantages and its loss. The loop around them is :func:`searchqa_agents.trainer.train`.

A new algorithm is one file::

    @dataclass
    class MyConfig(AlgorithmConfig):
        clip_coef: float = 0.2
        '''what it is'''

    def advantages(batch: Batch, config: MyConfig) -> Batch:
        ...
        return batch._replace(advantages=...)

    def loss(stats: TokenStats, part: Batch, totals: Totals, config: MyConfig) -> LossTerms:
        ...

    register(Algorithm("mine", MyConfig, advantages, loss))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from torch import Tensor

from searchqa_agents.batch import Batch
from searchqa_agents.language_model import Sampling
from searchqa_agents.losses import KLEstimator, TokenWeighting, clipped_policy_loss, entropy_bonus, kl_estimate, kl_penalised_rewards
from searchqa_agents.policy import TokenStats
from searchqa_agents.ranges import check_ranges
from searchqa_envs.errors import ConfigurationError


@dataclass
class AlgorithmConfig:
    """What every algorithm can be told; each adds its own settings and may change defaults."""

    steps: int = 30
    """rollouts, each followed by its updates"""
    token_budget: int | None = None
    """end with the rollout in which the policy has sampled so many tokens in all, at the latest after ``steps``; schedules are then over the budget"""
    questions_per_step: int = 32
    """questions in a rollout"""
    group_size: int = 8
    """episodes on each question"""
    num_worlds: int | None = 4
    """generated worlds: how many new ones each rollout is about; null draws every question from all worlds"""
    dynamic_sampling: int = 1
    """roll out up to this many times as many questions, until enough groups have rewards that differ; 1: once (DAPO has more)"""
    temperature: float = 1.0
    """sampling temperature"""
    top_p: float = 1.0
    """sample from the most likely tokens up to this probability mass; below 1 losses get truncated importance weights"""
    top_k: int = 0
    """sample from this many of the most likely tokens; 0: all"""
    recompute_logprobs: bool = False
    """evaluate old log-probabilities with the trainer's own arithmetic, where another engine sampled; weights then correct for the difference"""
    importance_cap: float = 2.0
    """truncated importance weights are at most this"""
    learning_rate: float = 5e-4
    """peak learning rate of AdamW"""
    critic_learning_rate: float | None = None
    """peak learning rate of the critic; null: learning_rate"""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient"""
    beta2: float = 0.98
    """AdamW's decay of the mean squared gradient"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """how the learning rate changes after its warm-up"""
    schedule_steps: int | None = None
    """steps over which it changes; null: steps"""
    warmup_steps: int = 0
    """steps of linear learning-rate warm-up"""
    warmup_ratio: float | None = None
    """instead of warmup_steps: their share of all steps, rounded down"""
    critic_warmup_ratio: float | None = None
    """the same for the critic's learning rate; null: the policy's warm-up"""
    final_fraction: float = 0.1
    """the learning rate ends at this fraction of its peak"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    update_epochs: int = 1
    """passes over each rollout"""
    num_minibatches: int = 1
    """updates in each pass"""
    mask_environment: bool = True
    """only tokens that the policy sampled are learned from; false, the ablation: passages and other environment text too, as if it had written them"""
    reward_clip: float | None = None
    """rewards are clipped to minus and plus this before anything else; null: not"""
    token_weighting: TokenWeighting = "token-mean"
    """the loss is a mean over tokens, a mean over sequences of their means, or a sum divided by a constant length"""
    constant_length: float | None = None
    """that length"""
    kl_coef: float = 0.0
    """weight of the KL divergence from the policy as training begins"""
    kl_in: Literal["loss", "reward"] = "loss"
    """where that divergence counts"""
    kl_estimator: KLEstimator = "k3"
    """how it is estimated; k1 is for the reward: in the loss its gradient is noise with mean 0"""
    kl_clamp: float | None = 10.0
    """bound of each token's estimate; null: none"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    max_kl: float | None = None
    """leave out the rest of a rollout's updates once the policy is this far from the one that sampled (k3, nats per token); null: never"""
    max_tokens: int = 16_384
    """tokens in a micro-batch, padding included"""
    packing: Literal["auto", "never", "always"] = "auto"
    """one row without padding instead of length-sorted rows; auto: where the model has a variable-length attention kernel"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """arithmetic of training's forward and backward passes; bfloat16 by autocast, weights and optimiser stay as they are"""
    critic: Literal["shared", "separate"] = "separate"
    """a value head on the policy's own trunk, or a critic of its own that begins as a copy; for algorithms with values only"""
    gradient_checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0: only at the end"""
    seed: int = 0
    """determines questions and samples"""


class Totals(NamedTuple):
    """What the whole minibatch holds, over all micro-batches and processes: the numbers that losses are divided by."""

    tokens: int
    """tokens that the policy sampled"""
    sequences: int
    """trajectories"""
    segments: int
    """turns"""
    evaluated: int
    """evaluated tokens: as ``tokens``, and environment tokens where these are evaluated"""
    step: int
    """rollouts before this one"""


class LossTerms(NamedTuple):
    """A micro-batch's share of the minibatch's loss, and of what is logged as ``losses/<name>``; only ``loss`` carries a gradient."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


Config = TypeVar("Config", bound=AlgorithmConfig)


@dataclass(frozen=True)
class Algorithm(Generic[Config]):
    """An algorithm by its name.

    Attributes
    ----------
    advantages
        From a whole rollout's batch to the same with ``advantages`` (and ``returns`` for a critic). It may leave trajectories out
        (:func:`~searchqa_agents.batch.select`). Pure. All processes see the whole batch.
    loss
        From a micro-batch's :class:`~searchqa_agents.policy.TokenStats`, its part of the batch and the minibatch's totals to its share of the loss.
        A micro-batch holds whole trajectories, and may hold none.
    critic
        Values are needed.
    environment_tokens
        From the settings to whether environment tokens are evaluated too.
    silent_without_advantage
        A trajectory whose advantages are all 0 has no gradient in the policy's loss, so that it need not be evaluated
        (unless KL, entropy or a critic are in the loss).
    """

    name: str
    config: type[Config]
    advantages: Callable[[Batch, Config], Batch]
    loss: Callable[[TokenStats, Batch, Totals, Config], LossTerms]
    critic: bool = False
    environment_tokens: Callable[[Config], bool] = lambda config: False
    silent_without_advantage: bool = True


ALGORITHMS: dict[str, Algorithm[Any]] = {}
"""What is registered, by name."""


def register(algorithm: Algorithm[Any]) -> Algorithm[Any]:
    """Make an algorithm known by its name, also to ``searchqa train algo=<name>``; a second one of the same name replaces the first."""
    ALGORITHMS[algorithm.name] = algorithm
    return algorithm


def get_algorithm(name: str) -> Algorithm[Any]:
    """A registered algorithm. Raises ``ConfigurationError`` for a name that is not known."""
    import searchqa_agents.algorithms  # noqa: F401, registers our own

    if name not in ALGORITHMS:
        raise ConfigurationError(f"The algorithm must be one of {sorted(ALGORITHMS)}, or one that was registered before; got {name!r}.")
    return ALGORITHMS[name]


def check_settings(algorithm: Algorithm[Any], config: AlgorithmConfig) -> None:
    """Raise ``ConfigurationError`` for settings of another algorithm, out of range (:mod:`searchqa_agents.ranges`), or that contradict each other."""
    if not isinstance(config, algorithm.config):
        raise ConfigurationError(f"{algorithm.name} needs settings of type {algorithm.config.__name__}; got {type(config).__name__}.")
    check_ranges(config)
    Sampling(1, (), config.temperature, config.top_p, config.top_k)  # raises here, not after a warm start
    if config.dynamic_sampling > 1 and config.group_size == 1:
        raise ConfigurationError("dynamic_sampling compares the rewards of a group: group_size must be at least 2; got 1.")
    if config.warmup_ratio is not None and config.warmup_steps:
        raise ConfigurationError(
            f"The warm-up is given by warmup_steps or by warmup_ratio, not by both; got {config.warmup_steps} and {config.warmup_ratio}."
        )
    if config.token_budget is not None and (config.schedule_steps is not None or config.warmup_steps):
        raise ConfigurationError(
            "With token_budget schedules are over the budget, whose number of steps is not known: leave schedule_steps out and give the warm-up as "
            f"warmup_ratio; got schedule_steps={config.schedule_steps} and warmup_steps={config.warmup_steps}."
        )
    if not config.mask_environment and getattr(config, "credit", None) == "turn":
        raise ConfigurationError("With credit=turn only the policy's own tokens have a turn: mask_environment must be true; got false.")
    if (config.token_weighting == "constant-length") != (config.constant_length is not None):
        raise ConfigurationError(
            "constant_length must be given with token_weighting=constant-length and only then; "
            f"got token_weighting={config.token_weighting}, constant_length={config.constant_length}."
        )


def clipped_loss(
    stats: TokenStats, part: Batch, totals: Totals, config: AlgorithmConfig, *, clip_coef: float, clip_coef_high: float | None = None
) -> LossTerms:
    """PPO's clipped loss over the policy's tokens, and what :func:`regularised` adds."""
    assert part.advantages is not None
    policy = clipped_policy_loss(
        stats.logprob,
        part.old_logprobs,
        part.advantages,
        totals.tokens,
        clip_coef=clip_coef,
        clip_coef_high=clip_coef_high,
        weights=part.weights,
        mask=part.policy_mask,
    )
    terms = regularised(policy.loss, stats, part, totals, config)
    return LossTerms(terms.loss, {**terms.metrics, "clipfrac": policy.clipfrac})


def regularised(policy_loss: Tensor, stats: TokenStats, part: Batch, totals: Totals, config: AlgorithmConfig) -> LossTerms:
    """The policy's loss plus what most algorithms add: KL from the reference (with ``kl_in=loss``) and minus the entropy bonus."""
    metrics = {"policy_loss": policy_loss.detach()}
    mask = part.policy_mask
    loss = policy_loss
    if config.kl_coef and config.kl_in == "loss":
        assert part.reference_logprobs is not None
        estimate = kl_estimate(stats.logprob[mask], part.reference_logprobs[mask], config.kl_estimator, clamp=config.kl_clamp)
        kl = (estimate * part.weights[mask]).sum() / totals.tokens
        loss, metrics["kl"] = loss + config.kl_coef * kl, kl.detach()
    if config.entropy_coef:
        entropy = entropy_bonus(stats.entropy, totals.tokens, weights=part.weights, mask=mask)
        loss, metrics["entropy"] = loss - config.entropy_coef * entropy, entropy.detach()
    return LossTerms(loss, metrics)


def token_rewards(batch: Batch, config: AlgorithmConfig) -> Tensor:
    """float32[N]: each trajectory's reward at its last token, minus the KL penalty of every token with ``kl_in=reward``."""
    coef = config.kl_coef if config.kl_in == "reward" else 0.0
    reference = batch.reference_logprobs if coef else None
    return kl_penalised_rewards(
        batch.rewards,
        batch.old_logprobs,
        batch.old_logprobs if reference is None else reference,
        batch.sequence_ids,
        coef,
        config.kl_estimator,
        clamp=config.kl_clamp,
        mask=batch.policy_mask,
    )


def sequence_rewards(batch: Batch, config: AlgorithmConfig) -> Tensor:
    """float32[S]: each trajectory's reward, minus the KL penalties of its tokens with ``kl_in=reward``."""
    if not (config.kl_coef and config.kl_in == "reward"):
        return batch.rewards
    return batch.rewards.new_zeros(len(batch.rewards)).index_add_(0, batch.sequence_ids, token_rewards(batch, config))
