"""Induction warm-up: random tokens written again and again, until the model copies.

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
from searchqa_agents.rollout import episode_seed

logger = logging.getLogger(__name__)


class WarmupError(RuntimeError):
    """The warm-up ended at its step limit before the model could copy."""


@dataclass
class WarmupConfig:
    """Settings of :func:`train_warmup`."""

    target_loss: float = 0.15
    """ends when the loss on fresh sequences falls below this (nats per token that can be known)"""
    max_steps: int = 2000
    """gives up after so many steps"""
    batch_size: int = 64
    """sequences per step"""
    chunk_length: int = 3
    """tokens in a chunk"""
    min_chunks: int = 3
    """fewest chunks in a sequence, before they are repeated"""
    max_chunks: int = 6
    """most chunks in a sequence, before they are repeated"""
    sequence_length: int = 48
    """tokens in a sequence; as many copies as fit, but at least one"""
    learning_rate: float = 3e-3
    """learning rate of AdamW after its warm-up"""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient"""
    beta2: float = 0.98
    """AdamW's decay of the mean squared gradient"""
    warmup_steps: int = 30
    """steps of linear learning-rate warm-up"""
    settling_loss: float = 0.5
    """once below this loss, the learning rate falls to 0.6 of itself at every look, to a tenth at least"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    check_every: int = 25
    """steps between looks at fresh sequences"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0: only at the end"""
    seed: int = 0
    """determines the sequences"""


def repeated_chunks(
    rng: np.random.Generator, ids: IntArray, batch_size: int, *, num_chunks: int, chunk_length: int, copies: int
) -> tuple[list[IntArray], list[NDArray[np.int8]]]:
    """Random chunks of ids, and then ``copies`` times the same chunks, each time in a new order.

    Returns sequences int32[(1 + copies) * num_chunks * chunk_length] and masks int8 of the same length: 1 for what can be known, which is every
    token of a copied chunk but its first.
    """
    chunks = rng.choice(ids, (batch_size, num_chunks, chunk_length))  # [B, K, L]
    orders = rng.random((batch_size, copies, num_chunks)).argsort(-1)  # [B, copies, K]
    copied = chunks[np.arange(batch_size)[:, None, None], orders]  # [B, copies, K, L]
    sequences = np.concatenate([chunks.reshape(batch_size, -1), copied.reshape(batch_size, -1)], axis=1)
    known = np.arange(chunk_length) > 0
    mask = np.concatenate([np.zeros(num_chunks * chunk_length), np.tile(known, copies * num_chunks)]).astype(np.int8)
    return list(sequences), [mask] * batch_size


def _ids(policy: Policy) -> IntArray:
    """Every id but padding."""
    return np.delete(np.arange(policy.tokenizer.vocab_size, dtype=np.int32), policy.tokenizer.pad_id)


@torch.no_grad()
def copying_loss(policy: Policy, seed: int) -> float:
    """Nats per token of the second copy of 64 random sequences of 16 tokens, each written twice."""
    rng = np.random.default_rng(seed)
    ids, masks = repeated_chunks(rng, _ids(policy), 64, num_chunks=1, chunk_length=16, copies=1)
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
    known_ids = _ids(policy)
    for step in range(first, config.max_steps):
        started = time.perf_counter()
        rng = np.random.default_rng([config.seed, 0, step])
        num_chunks = int(rng.integers(config.min_chunks, config.max_chunks + 1))
        copies = max(1, config.sequence_length // (num_chunks * config.chunk_length) - 1)
        ids, masks = repeated_chunks(
            rng, known_ids, config.batch_size, num_chunks=num_chunks, chunk_length=config.chunk_length, copies=copies
        )
        logprob = policy.evaluate(ids, masks).logprob
        loss = next_token_loss(logprob, len(logprob))
        torch.autograd.backward(loss)
        done = step + 1
        metrics = {"losses/warmup_loss": loss.item(), "losses/grad_norm": optimiser.update(step)}
        if done % config.check_every == 0 or done == config.max_steps:
            fresh_loss = metrics["losses/copying_loss"] = copying_loss(policy, episode_seed(config.seed, 1, step))
            if fresh_loss < config.settling_loss:
                optimiser.scale = max(0.1, 0.6 * optimiser.scale)
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
