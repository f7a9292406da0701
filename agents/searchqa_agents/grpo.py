"""Group relative policy optimisation (GRPO), multi-turn.

DeepSeekMath (arXiv 2402.03300), algorithm 1, outcome supervision. What is different here:

- The loss is the mean over all policy tokens of the batch (normalised by their total number), not the mean of each output's own mean.
- One update per batch by default, so that ratios are 1 and nothing is clipped; ``update_epochs`` and ``num_minibatches`` give more.
- No KL term by default (``kl_coef`` adds it; the reference is the policy as training begins).
- Episodes have several turns: only tokens that the policy sampled count, never prompt, passages or other environment text.
- The old log-probabilities are those recorded when the tokens were sampled.

Search-R1's setting (its GRPO scripts) in these terms: ``questions_per_step=512, group_size=5, num_minibatches=10, clip_coef=0.2, kl_coef=0.001,
kl_estimator="k3", entropy_coef=0.001, learning_rate=1e-6, beta2=0.999, weight_decay=0.01``. It averages tokens per micro-batch and clamps k3 to 10 in size.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from searchqa_agents.advantages import group_advantages
from searchqa_agents.losses import clipped_policy_loss, kl_estimate
from searchqa_agents.micro_batches import length_sorted_batches
from searchqa_agents.optimisation import AdamW, OnCheckpoint, OnStep, Optimiser, load_training_state, trainable, training_state
from searchqa_agents.policy import Policy
from searchqa_agents.rollout import draw_questions, episode_seed, rollout
from searchqa_agents.trajectory import Trajectory

logger = logging.getLogger(__name__)


@dataclass
class GRPOConfig:
    """Settings of :func:`train_grpo`."""

    steps: int = 30
    """rollouts, each followed by its updates"""
    questions_per_step: int = 32
    """questions in a rollout"""
    group_size: int = 8
    """episodes on each question"""
    num_worlds: int | None = 4
    """generated worlds: how many new ones each rollout is about; null draws every question from all worlds"""
    temperature: float = 1.0
    """sampling temperature"""
    learning_rate: float = 5e-4
    """peak learning rate of AdamW"""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient"""
    beta2: float = 0.98
    """AdamW's decay of the mean squared gradient"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    warmup_steps: int = 0
    """steps of linear learning-rate warm-up"""
    final_fraction: float = 0.1
    """the learning rate changes linearly to this fraction of its peak"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    clip_coef: float = 0.2
    """ratios are clipped to 1 - clip_coef and 1 + clip_coef"""
    clip_coef_high: float | None = None
    """the upper clip where it differs"""
    normalise_std: bool = True
    """divide advantages by the standard deviation of the group's rewards"""
    kl_coef: float = 0.0
    """weight of the KL divergence from the policy as training begins"""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """how that divergence is estimated"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    update_epochs: int = 1
    """passes over each rollout"""
    num_minibatches: int = 1
    """updates in each pass"""
    max_tokens: int = 16_384
    """tokens in a micro-batch, padding included"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0: only at the end"""
    seed: int = 0
    """determines questions and samples"""


def train_grpo(
    policy: Policy,
    venv: VectorEnv[Any, Any, Any],
    config: GRPOConfig,
    *,
    on_step: OnStep | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    on_rollout: Callable[[int, Sequence[Trajectory]], None] | None = None,
    state: Mapping[str, Any] | None = None,
    stamp: Mapping[str, Any] | None = None,
) -> None:
    """Train ``policy`` in place on the questions of ``venv``.

    ``state`` (from ``on_checkpoint``) continues a run identically. ``on_rollout`` gets each step's trajectories.
    Metrics: see :func:`rollout_metrics`; ``losses/policy_loss, losses/kl, losses/approx_kl, losses/clipfrac, losses/grad_norm``,
    ``charts/learning_rate, charts/trained_share`` (of the episodes: those with an advantage), ``time/rollout, time/update``.
    """
    optimiser = Optimiser(
        dict(policy.model.named_parameters()),
        AdamW(
            learning_rate=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup_steps,
            final_fraction=config.final_fraction,
            total_steps=config.steps,
            max_grad_norm=config.max_grad_norm,
        ),
    )
    reference = copy.deepcopy(policy) if config.kl_coef else None
    first = 0
    if state is not None:
        first = load_training_state(policy.model, optimiser, state)
        if reference is not None:
            reference.model.load_state_dict(state["reference"])
    base: Any = venv.unwrapped
    for step in range(first, config.steps):
        # 1. sample a group of episodes for each question
        started = time.perf_counter()
        base.set_progress(step + 1, config.steps)  # counted from 1, as ZeroSearch's curriculum does
        questions = draw_questions(
            base.source, config.questions_per_step, seed=episode_seed(config.seed, step, 0), num_worlds=config.num_worlds
        )
        trajectories = rollout(
            venv,
            policy,
            questions,
            group_size=config.group_size,
            seed=episode_seed(config.seed, step, 1),
            temperature=config.temperature,
            stamp={**(stamp or {}), "train_step": step},
        )
        if on_rollout is not None:
            on_rollout(step, trajectories)
        rollout_seconds = time.perf_counter() - started

        # 2. an episode's advantage is its reward relative to its group
        group_ids = [index // config.group_size for index in range(len(trajectories))]
        kept = set(map(id, trainable(trajectories)))
        batch = [(t, group) for t, group in zip(trajectories, group_ids, strict=True) if id(t) in kept]
        rewards = torch.tensor([t.reward for t, _ in batch], dtype=torch.float64)  # [N]
        advantages = group_advantages(
            rewards, torch.tensor([group for _, group in batch], dtype=torch.int64), normalise_std=config.normalise_std
        )
        # 3. update
        metrics = _update(policy, reference, optimiser, config, step, [t for t, _ in batch], advantages.tolist())

        done = step + 1
        if on_step is not None:
            on_step(
                done,
                {
                    **rollout_metrics(trajectories),
                    **metrics,
                    "charts/learning_rate": optimiser.learning_rate(step),
                    "time/rollout": rollout_seconds,
                    "time/update": time.perf_counter() - started - rollout_seconds,
                },
            )
        if on_checkpoint is not None and (done == config.steps or (config.checkpoint_every and done % config.checkpoint_every == 0)):
            saved = training_state(policy.model, optimiser, done)
            if reference is not None:
                saved["reference"] = reference.model.state_dict()
            on_checkpoint(done, saved)


def _update(
    policy: Policy,
    reference: Policy | None,
    optimiser: Optimiser,
    config: GRPOConfig,
    step: int,
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float],
) -> dict[str, float]:
    """``update_epochs`` passes of ``num_minibatches`` updates; each is the exact gradient of its minibatch, whatever ``max_tokens``."""
    totals = dict.fromkeys(("policy_loss", "kl", "approx_kl", "clipfrac", "grad_norm"), 0.0)
    # without KL and entropy terms an episode with advantage 0 has gradient 0: it counts in the mean, but need not be evaluated
    only_advantages = reference is None and config.entropy_coef == 0
    updates = 0
    for epoch in range(config.update_epochs):
        order = np.random.default_rng([config.seed, step, epoch]).permutation(len(trajectories))
        for minibatch in np.array_split(order, config.num_minibatches):
            normaliser = sum(int(trajectories[i].loss_mask.sum()) for i in minibatch)
            evaluated = [int(i) for i in sorted(minibatch) if advantages[i] != 0 or not only_advantages]
            if not evaluated:
                continue
            for micro_batch in length_sorted_batches([len(trajectories[i].token_ids) for i in evaluated], config.max_tokens):
                chosen = [evaluated[i] for i in micro_batch]
                losses = _backward(
                    policy, reference, config, [trajectories[i] for i in chosen], [advantages[i] for i in chosen], normaliser
                )
                for name, value in losses.items():
                    totals[name] += value
            totals["grad_norm"] += optimiser.update(step, torch.tensor(totals["policy_loss"]))
            updates += 1
    metrics = {f"losses/{name}": total / max(updates, 1) for name, total in totals.items()}
    metrics["charts/trained_share"] = sum(advantage != 0 for advantage in advantages) / max(len(advantages), 1)
    return metrics


def _backward(
    policy: Policy,
    reference: Policy | None,
    config: GRPOConfig,
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float],
    normaliser: int,
) -> dict[str, float]:
    """Add a micro-batch's share of the gradient; returns its share of the loss terms."""
    token_ids = [t.token_ids for t in trajectories]
    loss_masks = [t.loss_mask for t in trajectories]
    temperature = config.temperature or 1.0
    stats = policy.evaluate(
        token_ids, loss_masks, temperature=temperature, entropy_gradient=config.entropy_coef != 0, max_tokens=config.max_tokens
    )  # [N], flat over the policy's tokens
    old_logprobs = torch.from_numpy(np.concatenate([_old_logprobs(t) for t in trajectories])).to(stats.logprob.device)  # [N]
    counts = torch.tensor([int(mask.sum()) for mask in loss_masks])
    token_advantages = torch.tensor(advantages, dtype=torch.float32).repeat_interleave(counts).to(stats.logprob.device)  # [N]
    policy_loss = clipped_policy_loss(
        stats.logprob, old_logprobs, token_advantages, normaliser, clip_coef=config.clip_coef, clip_coef_high=config.clip_coef_high
    )
    loss = policy_loss.loss - config.entropy_coef * stats.entropy.sum() / normaliser
    kl = torch.zeros(())
    if reference is not None:
        with torch.no_grad():
            reference_stats = reference.evaluate(token_ids, loss_masks, temperature=temperature, max_tokens=config.max_tokens)
        kl = kl_estimate(stats.logprob, reference_stats.logprob, config.kl_estimator).sum() / normaliser
        loss = loss + config.kl_coef * kl
    torch.autograd.backward(loss)
    return {
        "policy_loss": policy_loss.loss.item(),
        "kl": kl.item(),
        "approx_kl": policy_loss.approx_kl.item(),
        "clipfrac": policy_loss.clipfrac.item(),
    }


def _old_logprobs(trajectory: Trajectory) -> Any:
    if trajectory.logprobs is None:
        raise ValueError(
            f"GRPO needs log-probabilities of the sampled tokens; the trajectory of question {trajectory.question_id!r} has none."
        )
    return trajectory.logprobs[trajectory.loss_mask == 1]


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """What a rollout says about the policy.

    ``charts/episodic_return, charts/em, charts/f1, charts/searches, charts/invalid_turns`` are means over the episodes whose search back end
    answered; ``charts/backend_errors`` counts the others. ``charts/entropy`` is minus the mean log-probability of the sampled tokens, an
    unbiased estimate of the entropy per token. ``time/model, time/search, time/environment`` are seconds, summed over the episodes.
    """
    whole = [t for t in trajectories if t.backend_error is None]
    metrics: dict[str, float] = {"charts/backend_errors": float(len(trajectories) - len(whole))}
    if whole:
        metrics["charts/episodic_return"] = float(np.mean([t.reward for t in whole]))
        metrics["charts/sampled_tokens"] = float(np.mean([t.loss_mask.sum() for t in whole]))
        for name in ("em", "f1", "searches", "invalid_turns"):
            values = [t.metrics[name] for t in whole if name in t.metrics]
            if values:
                metrics[f"charts/{name}"] = float(np.mean(values))
        logprobs = [t.logprobs[t.loss_mask == 1] for t in whole if t.logprobs is not None]
        if logprobs:
            metrics["charts/entropy"] = float(-np.concatenate(logprobs).mean())
    for part in ("model", "search", "environment"):
        metrics[f"time/{part}"] = sum(t.seconds.get(part, 0.0) for t in trajectories)
    return metrics
