"""Supervised fine-tuning: next-token loss on the policy's tokens of given trajectories."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from searchqa_agents.demonstrations import Batches
from searchqa_agents.losses import next_token_loss
from searchqa_agents.micro_batches import length_sorted_batches
from searchqa_agents.optimisation import AdamW, OnCheckpoint, OnStep, Optimiser, load_training_state, trainable, training_state
from searchqa_agents.policy import Policy


@dataclass
class SFTConfig:
    """Settings of :func:`train_sft`."""

    steps: int = 200
    """optimiser steps"""
    batch_size: int = 32
    """demonstrations per step"""
    num_worlds: int | None = 8
    """generated worlds: how many new ones each batch is about; null draws every question from all worlds"""
    learning_rate: float = 2e-3
    """peak learning rate of AdamW"""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient"""
    beta2: float = 0.98
    """AdamW's decay of the mean squared gradient"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    warmup_steps: int = 20
    """steps of linear warm-up"""
    final_fraction: float = 0.05
    """the learning rate falls linearly to this fraction of its peak"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    max_tokens: int = 16_384
    """tokens in a micro-batch, padding included"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """arithmetic of forward and backward passes; bfloat16 by autocast, weights and optimiser stay as they are"""
    gradient_checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0: only at the end"""
    seed: int = 0
    """determines demonstrations and their order"""


def train_sft(
    policy: Policy,
    batches: Batches,
    config: SFTConfig,
    *,
    on_step: OnStep | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Train ``policy`` in place on ``batches(step)`` for every step.

    Each step takes the exact mean over the policy's tokens of its batch. ``state`` (from ``on_checkpoint``) continues a run identically.
    Metrics: ``losses/sft_loss`` (nats per token), ``losses/grad_norm``, ``charts/learning_rate``, ``charts/tokens``, ``time/data``, ``time/update``.
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
    first = load_training_state(policy.model, optimiser, state) if state is not None else 0
    for step in range(first, config.steps):
        started = time.perf_counter()
        batch = trainable(batches(step))
        data_seconds = time.perf_counter() - started
        tokens = sum(int(trajectory.loss_mask.sum()) for trajectory in batch)
        total_loss = 0.0
        for micro_batch in length_sorted_batches([len(trajectory.token_ids) for trajectory in batch], config.max_tokens):
            chosen = [batch[i] for i in micro_batch]
            with torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16"):
                stats = policy.evaluate(
                    [t.token_ids for t in chosen],
                    [t.loss_mask for t in chosen],
                    gradient_checkpointing=config.gradient_checkpointing,
                    max_tokens=config.max_tokens,
                )
            loss = next_token_loss(stats.logprob, tokens)
            torch.autograd.backward(loss)
            total_loss += loss.item()
        grad_norm = optimiser.update(step, torch.tensor(total_loss))
        done = step + 1
        if on_step is not None:
            on_step(
                done,
                {
                    "losses/sft_loss": total_loss,
                    "losses/grad_norm": grad_norm,
                    "charts/learning_rate": optimiser.learning_rate(step),
                    "charts/tokens": tokens,
                    "time/data": data_seconds,
                    "time/update": time.perf_counter() - started - data_seconds,
                },
            )
        if on_checkpoint is not None and (done == config.steps or (config.checkpoint_every and done % config.checkpoint_every == 0)):
            on_checkpoint(done, training_state(policy.model, optimiser, done))
