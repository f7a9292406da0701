"""Induction warm-up: random tokens said again, until the model copies.

A plain transformer does not learn to copy a name from a page to a query in any short time from demonstrations alone. On repeated random
sequences the attention heads that do it (induction heads, Olsson et al. 2022, arXiv 2209.11895) form suddenly, after many steps in which the
loss hardly moves; so the warm-up is ended by its loss on fresh sequences and not by a number of steps.

Sequences written twice come first. Once the model copies them, they alternate with short chunks repeated in shuffled order: what follows a
token can then be found by content alone and not by distance, as on a page.
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
from searchqa_agents.optimisation import AdamW, OnCheckpoint, OnStep, Optimiser, load_training_state, training_state
from searchqa_agents.policy import Policy
from searchqa_agents.rollout import episode_seed

logger = logging.getLogger(__name__)


class WarmupError(RuntimeError):
    """The warm-up ended at its step limit before the model could copy."""


@dataclass
class WarmupConfig:
    """Settings of :func:`train_warmup`."""

    target_loss: float = 0.1
    """ends when the loss on fresh sequences of both kinds falls below this (nats per token that can be known)"""
    max_steps: int = 3000
    """gives up after so many steps"""
    batch_size: int = 64
    """sequences per step"""
    min_length: int = 8
    """shortest sequence, before it is written again"""
    max_length: int = 24
    """longest sequence, before it is written again"""
    shuffle_below: float = 0.5
    """shuffled chunks join in when the loss on fresh sequences written twice falls below this"""
    settle_below: float = 0.3
    """the learning rate begins to fall when the loss on fresh sequences of both kinds is below this"""
    settling_steps: int = 200
    """it falls linearly, to a fifth after so many steps"""
    chunk_length: int = 3
    """tokens in a chunk"""
    min_chunks: int = 3
    """fewest chunks in a sequence, before they are repeated"""
    max_chunks: int = 6
    """most chunks in a sequence, before they are repeated"""
    chunked_length: int = 48
    """tokens in a sequence of chunks; as many copies as fit, but at least one"""
    learning_rate: float = 2e-3
    """learning rate of AdamW after its warm-up"""
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


def _copies(config: WarmupConfig, num_chunks: int) -> int:
    """How often so many chunks are repeated."""
    return max(1, config.chunked_length // (num_chunks * config.chunk_length) - 1)


@torch.no_grad()
def copying_losses(policy: Policy, config: WarmupConfig, seed: int) -> tuple[float, float]:
    """Nats per token that can be known, on 64 fresh sequences of each kind and middle length: written twice, and shuffled chunks."""
    rng = np.random.default_rng(seed)
    num_chunks = (config.min_chunks + config.max_chunks) // 2
    kinds = ((1, (config.min_length + config.max_length) // 2, 1), (num_chunks, config.chunk_length, _copies(config, num_chunks)))
    losses = []
    for num_chunks, chunk_length, copies in kinds:
        ids, masks = repeated_chunks(rng, _ids(policy), 64, num_chunks=num_chunks, chunk_length=chunk_length, copies=copies)
        losses.append(float(-policy.evaluate(ids, masks).logprob.mean()))
    return losses[0], losses[1]


def train_warmup(
    policy: Policy,
    config: WarmupConfig,
    *,
    on_step: OnStep | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    state: Mapping[str, Any] | None = None,
) -> int:
    """Train ``policy`` in place until it copies; returns the number of steps taken.

    Metrics: ``losses/warmup_loss``, ``losses/grad_norm``, ``time/update``, and every ``check_every`` steps ``losses/copying_loss`` (fresh sequences
    written twice) and ``losses/shuffled_loss`` (fresh shuffled chunks).

    Raises
    ------
    WarmupError
        If ``max_steps`` were not enough.
    """
    optimiser = Optimiser(
        dict(policy.model.named_parameters()),
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
    first, can_copy, settling_since = 0, False, None
    if state is not None:
        first, can_copy, settling_since = load_training_state(policy.model, optimiser, state), state["can_copy"], state["settling_since"]
    twice = shuffled = float("inf")
    known_ids = _ids(policy)
    for step in range(first, config.max_steps):
        started = time.perf_counter()
        rng = np.random.default_rng([config.seed, 0, step])
        scale = 1.0 if settling_since is None else max(0.2, 1 - 0.8 * (step - settling_since) / config.settling_steps)
        if can_copy and step % 2:
            num_chunks, chunk_length = int(rng.integers(config.min_chunks, config.max_chunks + 1)), config.chunk_length
            copies = _copies(config, num_chunks)
        else:
            num_chunks, chunk_length, copies = 1, int(rng.integers(config.min_length, config.max_length + 1)), 1
        ids, masks = repeated_chunks(rng, known_ids, config.batch_size, num_chunks=num_chunks, chunk_length=chunk_length, copies=copies)
        logprob = policy.evaluate(ids, masks).logprob
        loss = next_token_loss(logprob, len(logprob))
        torch.autograd.backward(loss)
        done = step + 1
        metrics = {"losses/warmup_loss": loss.item(), "losses/grad_norm": optimiser.update(step, loss, scale)}
        if done % config.check_every == 0 or done == config.max_steps:
            twice, shuffled = copying_losses(policy, config, episode_seed(config.seed, 1, step))
            metrics |= {"losses/copying_loss": twice, "losses/shuffled_loss": shuffled}
            can_copy = can_copy or twice < config.shuffle_below
            if settling_since is None and max(twice, shuffled) < config.settle_below:
                settling_since = done
        finished = max(twice, shuffled) < config.target_loss
        if on_step is not None:
            on_step(done, {**metrics, "time/update": time.perf_counter() - started})
        if on_checkpoint is not None and (finished or (config.checkpoint_every and done % config.checkpoint_every == 0)):
            on_checkpoint(done, {**training_state(policy.model, optimiser, done), "can_copy": can_copy, "settling_since": settling_since})
        if finished:
            logger.info("Warm-up: copying losses %.3f and %.3f after %d steps.", twice, shuffled, done)
            return done
    raise WarmupError(
        f"After max_steps={config.max_steps} steps the copying losses are {twice:.3f} (written twice) and {shuffled:.3f} (shuffled chunks), "
        f"not both below target_loss={config.target_loss}. Raise max_steps, or try another learning_rate or seed; "
        "a policy that copies by half searches but cannot read the answer."
    )
