"""Trajectories as the flat tensors that advantages and losses take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchqa_agents.language_model import IntArray
from searchqa_agents.trajectory import Trajectory


class Batch(NamedTuple):
    """S trajectories with N evaluated tokens: each trajectory's tokens in order, the trajectories in order.

    The evaluated tokens are those that the policy sampled; with ``environment_tokens`` of :func:`make_batch` all tokens behind the prompt,
    because a published system's critic saw those too. All tensors are on the CPU until :func:`to_device`; none carries a gradient.
    """

    token_ids: Sequence[IntArray]
    """S arrays int32[T_i]: everything the policy saw and wrote"""
    token_masks: Sequence[NDArray[np.int8]]
    """S arrays int8[T_i], 1 for the evaluated tokens"""
    rewards: Tensor
    """float32[S]"""
    group_ids: Tensor
    """int64[S], equal for the trajectories of one group"""
    sequence_ids: Tensor
    """int64[N] in 0..S-1, the trajectory of each token"""
    segment_ids: Tensor
    """int64[N], the turn of each token, counted from 0; an environment token belongs to the turn that it answers"""
    policy_mask: Tensor
    """bool[N], False for environment tokens"""
    old_logprobs: Tensor
    """float32[N] under the full softmax when the tokens were sampled; 0 for environment tokens. NaN where the sampler knew only
    ``sampling_logprobs``, or nothing (:func:`without_mask`), until :meth:`~searchqa_agents.learner.Learner.annotate` evaluates them"""
    weights: Tensor
    """float32[N], factor of each token's policy loss: how tokens are averaged, times importance weights"""
    sampling_logprobs: Tensor | None = None
    """float32[N] under the distribution that really sampled, where it is another (top-p, top-k, another engine)"""
    reference_logprobs: Tensor | None = None
    """float32[N] of the reference policy"""
    values: Tensor | None = None
    """float32[N], the critic's value of the state in which each token is chosen"""
    advantages: Tensor | None = None
    """float32[N]"""
    returns: Tensor | None = None
    """float32[N], what the critic should have predicted"""


TOKEN_FIELDS = (
    "sequence_ids", "segment_ids", "policy_mask", "old_logprobs", "weights", "sampling_logprobs", "reference_logprobs", "values", "advantages",
    "returns",
)  # fmt: skip
"""The fields of a :class:`Batch` with one entry per evaluated token."""


def make_batch(trajectories: Sequence[Trajectory], group_ids: Sequence[int], *, environment_tokens: bool = False) -> Batch:
    """The batch of trajectories that are all trainable and have log-probabilities; advantages are still missing.

    Where some have ``sampling_logprobs``, the others' are their ``logprobs``: nothing was cut there.

    Raises
    ------
    ValueError
        If a trajectory has neither kind of log-probabilities.
    """
    masks: list[NDArray[np.int8]] = []
    segments: list[NDArray[np.int64]] = []
    for trajectory in trajectories:
        if trajectory.logprobs is None and trajectory.sampling_logprobs is None:
            raise ValueError(
                f"Training needs log-probabilities of the sampled tokens; the trajectory of question {trajectory.question_id!r} has none. "
                "Use a backend with returns_logprobs; a server that gives raw ones knows them at temperature 1 without top-p and top-k only."
            )
        length = len(trajectory.token_ids)
        first = trajectory.turns[0].start if trajectory.turns else length
        mask = (np.arange(length) >= first).astype(np.int8) if environment_tokens else trajectory.loss_mask
        ends = np.array([turn.end for turn in trajectory.turns[:-1]], dtype=np.int64)
        masks.append(mask)
        segments.append(np.searchsorted(ends, np.arange(length), side="right")[mask == 1])

    def flat(arrays: Sequence[NDArray[Any]]) -> Tensor:
        parts = [array[mask == 1] for array, mask in zip(arrays, masks, strict=True)]
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0)

    def full(t: Trajectory) -> NDArray[np.float32]:
        return np.where(t.loss_mask == 1, np.float32(np.nan), np.float32(0)) if t.logprobs is None else t.logprobs

    counts = torch.tensor([int(mask.sum()) for mask in masks], dtype=torch.int64)
    cut = any(trajectory.sampling_logprobs is not None for trajectory in trajectories)
    return Batch(
        token_ids=[trajectory.token_ids for trajectory in trajectories],
        token_masks=masks,
        rewards=torch.tensor([trajectory.reward for trajectory in trajectories], dtype=torch.float32),
        group_ids=torch.tensor(list(group_ids), dtype=torch.int64),
        sequence_ids=torch.arange(len(trajectories)).repeat_interleave(counts),
        segment_ids=torch.from_numpy(np.concatenate(segments)) if segments else torch.empty(0, dtype=torch.int64),
        policy_mask=flat([trajectory.loss_mask for trajectory in trajectories]).bool(),
        old_logprobs=flat([full(trajectory) for trajectory in trajectories]),
        weights=torch.ones(int(counts.sum())),
        sampling_logprobs=flat([full(t) if t.sampling_logprobs is None else t.sampling_logprobs for t in trajectories]) if cut else None,
    )


def without_mask(batch: Batch) -> Batch:
    """A batch with environment tokens as if the policy had sampled all of them; their ``old_logprobs`` are NaN until ``Learner.annotate`` evaluates them."""
    unknown = ~batch.policy_mask
    sampling = None if batch.sampling_logprobs is None else batch.sampling_logprobs.masked_fill(unknown, torch.nan)
    return batch._replace(
        policy_mask=torch.ones_like(batch.policy_mask),
        old_logprobs=batch.old_logprobs.masked_fill(unknown, torch.nan),
        sampling_logprobs=sampling,
    )


def select(batch: Batch, sequences: Sequence[int]) -> Batch:
    """The batch of these trajectories, in this order; ``sequence_ids`` count from 0 again."""
    counts = torch.bincount(batch.sequence_ids, minlength=len(batch.token_ids))
    starts = counts.cumsum(0) - counts
    chosen = torch.tensor(list(sequences), dtype=torch.int64)
    empty = torch.empty(0, dtype=torch.int64)
    tokens = torch.cat([empty, *(torch.arange(int(starts[i]), int(starts[i] + counts[i])) for i in sequences)])
    changed: dict[str, Any] = {
        name: None if getattr(batch, name) is None else getattr(batch, name)[tokens] for name in TOKEN_FIELDS if name != "sequence_ids"
    }
    return batch._replace(
        token_ids=[batch.token_ids[i] for i in sequences],
        token_masks=[batch.token_masks[i] for i in sequences],
        rewards=batch.rewards[chosen],
        group_ids=batch.group_ids[chosen],
        sequence_ids=torch.arange(len(chosen)).repeat_interleave(counts[chosen]),
        **changed,
    )


def with_advantages(trajectories: Sequence[Trajectory], batch: Batch) -> list[Trajectory]:
    """The trajectories with the advantages that ``batch``, made of some of them, came to have; 0 in those that nothing is learned from."""
    found: dict[int, NDArray[np.float32]] = {}
    if batch.advantages is not None:
        counts = torch.bincount(batch.sequence_ids, minlength=len(batch.token_ids)).tolist()
        values = torch.split(batch.advantages.detach().float().cpu(), counts)
        for token_ids, mask, own in zip(batch.token_ids, batch.token_masks, values, strict=True):
            spread = np.zeros(len(mask), dtype=np.float32)
            spread[mask == 1] = own.numpy()
            found[id(token_ids)] = spread  # the very array of the trajectory, wherever the algorithm has put it
    told = []
    for trajectory in trajectories:
        advantages = found.get(id(trajectory.token_ids), np.zeros(len(trajectory.token_ids), dtype=np.float32))
        told.append(replace(trajectory, advantages=advantages * (trajectory.loss_mask == 1)))
    return told


def anchor_states(batch: Batch) -> list[bytes]:
    """What each segment answers to: the ids of the environment text before it, for a first segment the prompt.

    Of a batch without environment tokens. K values, one per segment: the trajectories in order, in each its segments in time, as
    :func:`~searchqa_agents.advantages.segment_index` counts them.
    """
    counts = torch.bincount(batch.sequence_ids, minlength=len(batch.token_ids)).tolist()
    states: list[bytes] = []
    for token_ids, mask, segments in zip(batch.token_ids, batch.token_masks, torch.split(batch.segment_ids, counts), strict=True):
        sampled = np.flatnonzero(mask)
        for begin in np.flatnonzero(np.diff(segments.numpy(), prepend=-1)):
            after = sampled[begin - 1] + 1 if begin else 0
            states.append(token_ids[after : sampled[begin]].tobytes())
    return states


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; the ids stay NumPy arrays."""
    moved: dict[str, Any] = {name: value.to(device) for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    return batch._replace(**moved)
