"""Advantages: pure functions of rewards and groups."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_ids: Tensor, *, normalise_std: bool = True, epsilon: float = 1e-6) -> Tensor:
    """Reward relative to its group: ``(r - mean) / (std + epsilon)``, with the sample standard deviation.

    DeepSeekMath (arXiv 2402.03300), section 4.1.2. A group of one has mean 0 and standard deviation 1, as in Search-R1's code, so that its
    advantage is its reward.

    Parameters
    ----------
    rewards
        float[N], one per trajectory.
    group_ids
        int[N], equal for trajectories of one group, in any order.
    normalise_std
        False leaves out the division (Dr. GRPO, arXiv 2503.20783).

    Returns
    -------
    Tensor
        float[N].
    """
    if rewards.shape != group_ids.shape or rewards.dim() != 1:
        raise ValueError(f"rewards and group_ids must be 1-D and of one length; got {tuple(rewards.shape)}, {tuple(group_ids.shape)}.")
    _, group = torch.unique(group_ids, return_inverse=True)
    size = torch.bincount(group).to(rewards.dtype)  # [G]
    alone = size == 1
    mean = torch.zeros_like(size).index_add_(0, group, rewards) / size
    mean = torch.where(alone, torch.zeros_like(mean), mean)
    deviation = rewards - mean[group]
    if not normalise_std:
        return deviation
    variance = torch.zeros_like(size).index_add_(0, group, deviation.square()) / (size - 1).clamp(min=1)
    std = torch.where(alone, torch.ones_like(variance), variance.sqrt())
    scaled: Tensor = deviation / (std[group] + epsilon)
    return scaled
