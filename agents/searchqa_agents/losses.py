"""Losses: pure functions of flat tensors that hold the policy's own tokens, one entry per token.

Every mean is a sum divided by ``normaliser``, the number of policy tokens of the whole batch, so that micro-batches of any size add up to
the exact gradient of the batch. Tokens of prompt and environment never enter: they are left out where the flat tensors are made, or
have ``mask`` 0. ``weights`` are factors of the tokens' losses: :func:`token_weights` for other means than that over tokens,
:func:`truncated_importance`, or the product of both.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
TokenWeighting = Literal["token-mean", "sequence-mean", "constant-length"]


class PolicyLoss(NamedTuple):
    """The clipped loss and its diagnostics, each a scalar: sums divided by ``normaliser``; only ``loss`` carries a gradient."""

    loss: Tensor
    approx_kl: Tensor
    clipfrac: Tensor


class ValueLoss(NamedTuple):
    """The critic's loss, and the share of tokens that the clip decides, each a scalar; only ``loss`` carries a gradient."""

    loss: Tensor
    clipfrac: Tensor


def masked_sum(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of ``values`` where ``mask`` is 1; values under a 0 have no gradient, not even when they are infinite."""
    return values.sum() if mask is None else values.masked_fill(mask == 0, 0.0).sum()


def next_token_loss(logprobs: Tensor, normaliser: float, mask: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the policy's tokens: float[N] -> scalar."""
    return -masked_sum(logprobs, mask) / normaliser


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    normaliser: float,
    *,
    clip_coef: float = 0.2,
    clip_coef_high: float | None = None,
    dual_clip_coef: float | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate, negated: ``-mean(min(ratio * A, clip(ratio, 1 - clip_coef, 1 + clip_coef) * A))``.

    Schulman et al. 2017 (arXiv 1707.06347), equation 7, per token.

    Parameters
    ----------
    logprobs, old_logprobs, advantages
        float[N], one per token; ``advantages`` repeats each trajectory's advantage for its tokens.
    normaliser
        Number of policy tokens of the whole batch.
    clip_coef_high
        The upper clip where it differs (clip-higher of DAPO, arXiv 2503.14476); default ``clip_coef``.
    dual_clip_coef
        Dual clip (Ye et al. 2020, arXiv 1912.09729): where A is negative the objective is at least ``dual_clip_coef * A``, so that a large
        ratio cannot make the loss arbitrarily large. More than 1; the paper has 3. Default: none.
    weights
        float[N], factor of each token's loss; the diagnostics stay means over tokens.
    mask
        [N], 0 leaves a token out.
    """
    if dual_clip_coef is not None and dual_clip_coef <= 1:
        raise ValueError(f"dual_clip_coef must be more than 1 (3 in the paper), or None for no dual clip; got {dual_clip_coef}.")
    logprobs, old_logprobs, advantages = (_kept(tensor, mask) for tensor in (logprobs, old_logprobs, advantages))
    log_ratio = logprobs - old_logprobs
    objective, cut = _clipped_objective(log_ratio.exp(), advantages, clip_coef, clip_coef_high)
    if dual_clip_coef is not None:
        lowest = dual_clip_coef * advantages
        below = (advantages < 0) & (objective < lowest)
        objective, cut = torch.where(below, lowest, objective), cut | below
    loss = -_weighted_sum(objective, weights, mask) / normaliser
    with torch.no_grad():
        approx_kl = kl_estimate(old_logprobs, logprobs, "k3").sum() / normaliser  # of the behaviour policy against the current one
        clipfrac = cut.to(logprobs.dtype).sum() / normaliser
    return PolicyLoss(loss, approx_kl, clipfrac)


def sequence_ratio_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    normaliser: float,
    *,
    clip_coef: float = 3e-4,
    clip_coef_high: float | None = 4e-4,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> PolicyLoss:
    """GSPO: the clipped surrogate with one ratio per sequence, the geometric mean of its tokens' ratios, negated.

    Group sequence policy optimisation (arXiv 2507.18071), equations 5 and 7: ``s = exp(mean_t(log ratio_t))`` and the mean over sequences of
    ``min(s * A, clip(s) * A)``. Written in the form of its section 4.3 (GSPO-token), whose value and gradient are the same where a sequence
    has one advantage, and which allows one per token or turn. The clips are those of section 5.1: the ratios stay much nearer to 1 than a
    token's. All tokens of a sequence must be in one call, never divided among micro-batches.

    Parameters
    ----------
    logprobs, old_logprobs, advantages
        float[N], one per token.
    sequence_ids
        int[N], the sequence of each token, in any order.
    normaliser
        Number of *sequences* of the whole batch.
    clip_coef, clip_coef_high
        Ratios are clipped to ``1 - clip_coef`` and ``1 + clip_coef_high`` (None: ``clip_coef``).
    weights
        float[N], factor of each token's loss before the mean over its sequence; one value per sequence, repeated, keeps one ratio of loss and
        gradient for all its tokens.
    mask
        [N], 0 leaves a token out, of the length too.

    Returns
    -------
    PolicyLoss
        ``approx_kl`` and ``clipfrac`` are means over each sequence's tokens, then over sequences.
    """
    logprobs, old_logprobs, advantages, sequence_ids = (_kept(t, mask) for t in (logprobs, old_logprobs, advantages, sequence_ids))
    sequence, length = _lengths(sequence_ids, logprobs.dtype)
    share = 1 / length[sequence]  # float[N], sums to 1 over a sequence
    log_ratio = logprobs - old_logprobs
    mean_log_ratio = torch.zeros_like(length).index_add_(0, sequence, log_ratio.detach() * share)  # [S]
    # the value is the sequence's ratio, the gradient each token's own
    ratio = (mean_log_ratio[sequence] + logprobs - logprobs.detach()).exp()
    objective, cut = _clipped_objective(ratio, advantages, clip_coef, clip_coef_high)
    loss = -_weighted_sum(objective * share, weights, mask) / normaliser
    with torch.no_grad():
        approx_kl = (kl_estimate(old_logprobs, logprobs, "k3") * share).sum() / normaliser
        clipfrac = (cut * share).sum() / normaliser
    return PolicyLoss(loss, approx_kl, clipfrac)


def reinforce_loss(
    logprobs: Tensor, advantages: Tensor, normaliser: float, *, weights: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """REINFORCE: ``-mean(A * log p)``: float[N], float[N] -> scalar.

    Williams 1992; the policy gradient theorem (Sutton and Barto, "Reinforcement learning", section 13.3) with ``advantages`` for the return.
    Its gradient is that of :func:`clipped_policy_loss` at ratio 1.
    """
    return -_weighted_sum(_kept(logprobs, mask) * _kept(advantages, mask), weights, mask) / normaliser


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    normaliser: float,
    *,
    clip_coef: float | None = 0.2,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> ValueLoss:
    """The critic's loss ``0.5 * mean(max((V - R)^2, (clip(V, V_old - clip_coef, V_old + clip_coef) - R)^2))``.

    The value clip of OpenAI baselines' PPO2 (Engstrom et al. 2020, arXiv 2005.12729, section 3); with the factor 0.5 as in TRL and verl.

    Parameters
    ----------
    values, old_values, returns
        float[N], one per token: the critic's values now, those when the advantages were computed, and the targets.
    normaliser
        Number of the batch's tokens that count: all of the policy's, or with :func:`searchqa_agents.advantages.segment_gae` all segments.
    clip_coef
        None leaves out the clip (Search-R1 has 0.5).
    """
    values, old_values, returns = (_kept(tensor, mask) for tensor in (values, old_values, returns))
    error = (values - returns).square()
    if clip_coef is None:
        return ValueLoss(0.5 * _weighted_sum(error, weights, mask) / normaliser, error.new_zeros(()))
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    clipped_error = (clipped - returns).square()
    loss = 0.5 * _weighted_sum(torch.maximum(error, clipped_error), weights, mask) / normaliser
    return ValueLoss(loss, (clipped_error > error).to(values.dtype).sum() / normaliser)


def entropy_bonus(entropies: Tensor, normaliser: float, *, weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of the policy at its tokens: float[N] -> scalar; the loss *minus* its coefficient times this (arXiv 1707.06347, eq. 9)."""
    return _weighted_sum(_kept(entropies, mask), weights, mask) / normaliser


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator = "k3", *, clamp: float | None = None) -> Tensor:
    """Per-token estimate of KL(policy, reference) from samples of the policy: float[N] -> float[N].

    J. Schulman, "Approximating KL divergence" (2020). With d = log reference - log policy: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d.
    As a loss, k1 has no useful gradient: use k2 or k3. ``clamp`` bounds the estimate's size (10 for k3 in Search-R1 and verl); a token beyond
    it has no gradient.
    """
    difference = reference_logprobs - logprobs
    if estimator == "k1":
        estimate = -difference
    elif estimator == "k2":
        estimate = difference.square() / 2
    elif estimator == "k3":
        # below a clamp the exponent needs a bound of its own, far beyond it: the gradient of an infinite exp would be 0 * inf
        exponent = difference if clamp is None else difference.clamp(max=80.0)
        estimate = exponent.exp() - 1 - difference
    else:
        raise ValueError(f"estimator must be k1, k2 or k3; got {estimator!r}.")
    return estimate if clamp is None else estimate.clamp(-clamp, clamp)


def kl_penalised_rewards(
    terminal_rewards: Tensor,
    logprobs: Tensor,
    reference_logprobs: Tensor,
    sequence_ids: Tensor,
    coef: float,
    estimator: KLEstimator = "k1",
    *,
    clamp: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """KL in the reward: ``-coef * KL_t`` at each token, plus the trajectory's reward at its last token. Carries no gradient.

    Ziegler et al. 2019 (arXiv 1909.08593), equation 2, written per token as in InstructGPT (arXiv 2203.02155) and Search-R1's PPO
    (``coef=0.001``, k1).

    Parameters
    ----------
    terminal_rewards
        float[S], indexed by sequence id.
    logprobs, reference_logprobs
        float[N], one per token; ``logprobs`` those of the policy that sampled.
    sequence_ids
        int[N] in 0..S-1; every trajectory has a token.
    mask
        [N], tokens where it is 0 have no penalty (environment tokens, where a critic sees them) and are no trajectory's last.

    Returns
    -------
    Tensor
        float[N], for :func:`searchqa_agents.advantages.gae` or :func:`searchqa_agents.advantages.discounted_returns`.
    """
    logprobs, reference_logprobs = logprobs.detach(), reference_logprobs.detach()
    penalty = coef * kl_estimate(logprobs, reference_logprobs, estimator, clamp=clamp)
    if mask is not None:
        penalty = penalty.masked_fill(mask == 0, 0.0)
    positions = torch.arange(len(sequence_ids), device=sequence_ids.device)
    own = _kept(sequence_ids, mask)
    if len(own) and (int(own.min()) < 0 or int(own.max()) >= len(terminal_rewards)):
        raise ValueError(
            f"terminal_rewards is indexed by sequence id, so ids must lie in 0..{len(terminal_rewards) - 1}; "
            f"got {int(own.min())}..{int(own.max())}. Number the trajectories from 0."
        )
    last = positions.new_full((len(terminal_rewards),), -1).scatter_reduce_(0, own, _kept(positions, mask), "amax")  # [S]
    if (last < 0).any():
        raise ValueError(
            f"Every trajectory needs a token of the policy to carry its reward; trajectory {int((last < 0).nonzero()[0])} has none. "
            "Leave such trajectories out."
        )
    rewards = -penalty
    rewards[last] += terminal_rewards.detach().to(rewards.dtype)
    return rewards


def token_weights(
    sequence_ids: Tensor,
    how: TokenWeighting,
    *,
    length: float | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Factors that turn a mean over tokens into another mean, for ``weights`` with ``normaliser`` N: int[N] -> float[N].

    - ``token-mean``: 1. Every token counts the same (DAPO, arXiv 2503.14476, equation 8).
    - ``sequence-mean``: ``N / (S * tokens of the sequence)``. Every sequence counts the same (GRPO, arXiv 2402.03300, equation 3).
    - ``constant-length``: ``N / (S * length)``. Tokens are summed and divided by a constant, not by the length (Dr. GRPO, arXiv 2503.20783).

    N tokens with ``mask`` not 0 and S sequences among them; factors under a 0 are 0. The whole batch must be given: take a micro-batch's part
    of the result.

    Parameters
    ----------
    length
        The constant, for example the most tokens that an episode may have; only for ``constant-length``.
    """
    if (how == "constant-length") != (length is not None):
        raise ValueError(f"length must be given with how='constant-length' and only then; got how={how!r}, length={length}.")
    if mask is not None:
        weights = torch.zeros_like(sequence_ids, dtype=dtype)
        weights[mask != 0] = token_weights(sequence_ids[mask != 0], how, length=length, dtype=dtype)
        return weights
    sequence, lengths = _lengths(sequence_ids, dtype)
    if how == "token-mean":
        return torch.ones_like(sequence_ids, dtype=dtype)
    if how == "sequence-mean":
        return len(sequence_ids) / (len(lengths) * lengths[sequence])
    if length is not None:
        return torch.full_like(sequence_ids, len(sequence_ids) / (max(len(lengths), 1) * length), dtype=dtype)
    raise ValueError(f"how must be token-mean, sequence-mean or constant-length; got {how!r}.")


def truncated_importance(logprobs: Tensor, sampling_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """Weights ``min(p / p_sampling, cap)`` for tokens that another distribution sampled: float[N], float[N] -> float[N], no gradient.

    Truncated importance sampling (Ionides 2008). ``logprobs`` are the trainer's as the batch was sampled; ``sampling_logprobs`` those of what
    sampled: an engine with other arithmetic, or top-p and top-k's truncated distribution.
    """
    return (logprobs - sampling_logprobs).detach().exp().clamp(max=cap)


def _kept(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The entries that count. Left out, not multiplied by 0: an infinite entry would make 0 * inf."""
    return tensor if mask is None else tensor[mask != 0]


def _weighted_sum(kept: Tensor, weights: Tensor | None, mask: Tensor | None) -> Tensor:
    return kept.sum() if weights is None else (kept * _kept(weights, mask)).sum()


def _clipped_objective(ratio: Tensor, advantages: Tensor, clip_coef: float, clip_coef_high: float | None) -> tuple[Tensor, Tensor]:
    """``min(ratio * A, clip(ratio) * A)`` and where the clip decides."""
    high = clip_coef if clip_coef_high is None else clip_coef_high
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_coef, 1 + high) * advantages
    return torch.minimum(unclipped, clipped), clipped < unclipped


def _lengths(sequence_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each token's sequence, counted from 0 (int[N]), and the sequences' lengths (float[S])."""
    _, sequence = torch.unique(sequence_ids, return_inverse=True)
    return sequence, torch.bincount(sequence).to(dtype)
