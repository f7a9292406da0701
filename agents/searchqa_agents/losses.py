"""Losses: pure functions of flat tensors that hold the policy's own tokens, one entry per token.

Every mean is a sum divided by ``normaliser``, the number of policy tokens of the whole batch, so that micro-batches of any size add up to
the exact gradient of the batch. Tokens of prompt and environment never enter: they are left out where the flat tensors are made, or
have ``mask`` 0.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


class PolicyLoss(NamedTuple):
    """The clipped loss and its diagnostics, each a scalar: sums divided by ``normaliser``; only ``loss`` carries a gradient."""

    loss: Tensor
    approx_kl: Tensor
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
        The upper clip where it differs (DAPO, arXiv 2503.14476); default ``clip_coef``.
    """
    high = clip_coef if clip_coef_high is None else clip_coef_high
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_coef, 1 + high) * advantages
    loss = -masked_sum(torch.minimum(unclipped, clipped), mask) / normaliser
    with torch.no_grad():
        approx_kl = masked_sum(ratio - 1 - log_ratio, mask) / normaliser  # k3 of the behaviour policy against the current one
        clipfrac = masked_sum((clipped < unclipped).to(logprobs.dtype), mask) / normaliser
    return PolicyLoss(loss, approx_kl, clipfrac)


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Per-token estimate of KL(policy, reference) from samples of the policy: float[N] -> float[N].

    J. Schulman, "Approximating KL divergence" (2020). With d = log reference - log policy: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d.
    As a loss, k1 has no useful gradient: use k2 or k3.
    """
    difference = reference_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return difference.exp() - 1 - difference
    raise ValueError(f"estimator must be k1, k2 or k3; got {estimator!r}.")
