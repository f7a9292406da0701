"""Induction warm-up: random token sequences written twice, until the model copies.

A plain transformer does not learn to copy a name from a page to a query in any short time from demonstrations alone. On repeated random
sequences the attention heads that do it (induction heads, Olsson et al. 2022, arXiv 2209.11895) form suddenly, after many steps in which the
loss hardly moves; so the warm-up is ended by its loss on fresh sequences and not by a number of steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from searchqa_agents.language_model import IntArray
from searchqa_agents.losses import next_token_loss
from searchqa_agents.optimisation import AdamW, OnCheckpoint, OnStep, Optimiser
from searchqa_agents.policy import Policy

logger = logging.getLogger(__name__)


class WarmupError(RuntimeError):
    """The warm-up ended at its step limit before the model could copy."""


@dataclass
class WarmupConfig:
    """Settings of :func:`train_warmup`."""

    target_loss: float = 0.05
    """ends when the loss on fresh sequences falls below this (nats per token of the second copy)"""
    max_steps: int = 2000
    """gives up after so many steps"""
    batch_size: int = 64
    """sequences per step"""
    min_length: int = 8
    """shortest sequence, before it is repeated"""
    max_length: int = 24
    """longest sequence, before it is repeated"""
    learning_rate: float = 2e-3
    """learning rate of AdamW, constant after its warm-up"""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient"""
    beta2: float = 0.98
    """AdamW's decay of the mean squared gradient"""
    warmup_steps: int = 30
    """steps of linear learning-rate warm-up"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    check_every: int = 25
    """steps between looks at fresh sequences"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0: only at the end"""
    seed: int = 0
    """determines the sequences"""


def repeated_sequences(
    rng: np.random.Generator, vocab_size: int, batch_size: int, length: int, banned: tuple[int, ...] = ()
) -> tuple[list[IntArray], list[NDArray[np.int8]]]:
    """Random sequences int32[2 * length] that say everything twice, and masks int8[2 * length] of what can be known: the second copy but its first."""
    ids = np.setdiff1d(np.arange(vocab_size, dtype=np.int32), np.array(banned, dtype=np.int32))
    once = rng.choice(ids, (batch_size, length))
    mask = np.zeros(2 * length, dtype=np.int8)
    mask[length + 1 :] = 1
    return list(np.concatenate([once, once], axis=1)), [mask] * batch_size


@torch.no_grad()
def copying_loss(policy: Policy, config: WarmupConfig, step: int) -> float:
    """Loss per token of the second copy, on sequences of middle length that no step trains on."""
    rng = np.random.default_rng([config.seed, 1, step])
    length = (config.min_length + config.max_length) // 2
    ids, masks = repeated_sequences(rng, policy.tokenizer.vocab_size, config.batch_size, length, (policy.tokenizer.pad_id,))
    return float(-policy.evaluate(ids, masks).logprob.mean())


def train_warmup(
    policy: Policy,
    config: WarmupConfig,
    *,
    on_step: OnStep | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    state: Mapping[str, Any] | None = None,
) -> int:
    """Train ``policy`` in place until it copies; returns the number of steps taken.

    Metrics: ``losses/warmup_loss``, ``losses/grad_norm``, ``time/update``, and every ``check_every`` steps ``losses/copying_loss`` (fresh sequences).

    Raises
    ------
    WarmupError
        If ``max_steps`` were not enough.
    """
    optimiser = Optimiser(
        policy,
        AdamW(
            learning_rate=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=0.0,
            warmup_steps=config.warmup_steps,
            final_fraction=1.0,
            total_steps=config.max_steps,
            max_grad_norm=config.max_grad_norm,
        ),
    )
    first = optimiser.load_state_dict(state) if state is not None else 0
    fresh_loss = float("inf")
    for step in range(first, config.max_steps):
        started = time.perf_counter()
        rng = np.random.default_rng([config.seed, 0, step])
        length = int(rng.integers(config.min_length, config.max_length + 1))
        ids, masks = repeated_sequences(rng, policy.tokenizer.vocab_size, config.batch_size, length, (policy.tokenizer.pad_id,))
        logprob = policy.evaluate(ids, masks).logprob
        loss = next_token_loss(logprob, len(logprob))
        torch.autograd.backward(loss)
        done = step + 1
        metrics = {"losses/warmup_loss": loss.item(), "losses/grad_norm": optimiser.update(step)}
        if done % config.check_every == 0 or done == config.max_steps:
            fresh_loss = metrics["losses/copying_loss"] = copying_loss(policy, config, done)
        finished = fresh_loss < config.target_loss
        if on_step is not None:
            on_step(done, {**metrics, "time/update": time.perf_counter() - started})
        if on_checkpoint is not None and (finished or (config.checkpoint_every and done % config.checkpoint_every == 0)):
            on_checkpoint(done, optimiser.state_dict(done))
        if finished:
            logger.info("Warm-up: copying loss %.3f after %d steps.", fresh_loss, done)
            return done
    raise WarmupError(
        f"After max_steps={config.max_steps} steps the copying loss is {fresh_loss:.3f}, not below target_loss={config.target_loss}. "
        "Raise max_steps, or try another learning_rate or seed; a policy that copies by half searches but cannot read the answer."
    )
