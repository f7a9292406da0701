"""Advantages: pure functions of rewards, values and groups.

Token tensors are flat and hold the policy's own tokens only, one entry per token. ``sequence_ids`` says to which trajectory a token
belongs: trajectories may come in any order and may even be interleaved; the tokens of one trajectory are in the order of time. Nothing
here carries a gradient.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AdvantageEstimate(NamedTuple):
    """Advantages for the policy and returns for the critic to predict, each float[N], one per token."""

    advantages: Tensor
    returns: Tensor


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
    _require_flat(rewards=rewards, group_ids=group_ids)
    group, size = _groups(group_ids, rewards.dtype)
    alone = size == 1
    deviation = _deviations(rewards, group, size)
    if not normalise_std:
        return deviation
    variance = torch.zeros_like(size).index_add_(0, group, deviation.square()) / (size - 1).clamp(min=1)
    std = variance.sqrt().masked_fill(alone, 1.0)
    scaled: Tensor = deviation / (std[group] + epsilon)
    return scaled


def group_baseline_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Reward minus the mean of its group: float[N], int[N] -> float[N], one per trajectory.

    REINFORCE++-baseline (arXiv 2501.03262), R1-Searcher's ``reinforce_baseline``. The other half of both is :func:`whiten` over all tokens of
    the batch, after the advantage is repeated to the tokens. A group of one keeps its reward, as in :func:`group_advantages`.
    """
    return group_advantages(rewards, group_ids, normalise_std=False)


def leave_one_out_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Reward minus the mean of the *other* rewards of its group: float[N], int[N] -> float[N], one per trajectory.

    RLOO (Ahmadian et al. 2024, arXiv 2402.14740; Kool et al. 2019). A group of one has no other rewards: its advantage is its reward, as in
    verl (in TRL it is 0).
    """
    _require_flat(rewards=rewards, group_ids=group_ids)
    group, size = _groups(group_ids, rewards.dtype)
    # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
    return _deviations(rewards, group, size) * (size / (size - 1).clamp(min=1))[group]


def discounted_returns(rewards: Tensor, sequence_ids: Tensor, gamma: float = 1.0) -> Tensor:
    """Rewards to go of each token: ``G_t = r_t + gamma * G_(t+1)`` within its trajectory.

    REINFORCE (Williams 1992; Sutton and Barto, "Reinforcement learning", equation 3.9).

    Parameters
    ----------
    rewards
        float[N], one per token.
    sequence_ids
        int[N], the trajectory of each token.

    Returns
    -------
    Tensor
        float[N].
    """
    _require_flat(rewards=rewards, sequence_ids=sequence_ids)
    order = torch.argsort(sequence_ids, stable=True)
    returns = torch.empty_like(rewards)
    returns[order] = _suffix_sums(rewards.detach()[order], sequence_ids[order], gamma)
    return returns


def gae(
    rewards: Tensor, values: Tensor, sequence_ids: Tensor, gamma: float = 1.0, lam: float = 1.0, *, bootstrap_values: Tensor | None = None
) -> AdvantageEstimate:
    """Generalised advantage estimation with tokens as steps.

    Schulman et al. 2016 (arXiv 1506.02438), equation 16: ``delta_t = r_t + gamma * V_(t+1) - V_t`` and
    ``A_t = delta_t + gamma * lam * A_(t+1)``. The step after a trajectory's token is its next token, across the environment's text between
    them. The return is ``A_t + V_t``. (Search-R1 counts the environment's tokens as steps too: for its setting pass those as well.)

    Parameters
    ----------
    rewards, values
        float[N], one per token. ``values[t]`` is the critic's value of the state in which token t is chosen, that is before it.
    sequence_ids
        int[N], the trajectory of each token.
    gamma, lam
        Discount, and GAE's lambda: 1 is the return minus the value, 0 is the error of one step.
    bootstrap_values
        float[S], indexed by sequence id: the value after the trajectory's last token. 0 for an episode that terminated; for one that was
        truncated the critic's value of where it stopped. Default: 0 for all.
    """
    _require_flat(rewards=rewards, values=values, sequence_ids=sequence_ids)
    values = values.detach()
    order = torch.argsort(sequence_ids, stable=True)
    ids, state_values = sequence_ids[order], values[order]
    last = _is_last(ids)
    next_values = state_values.roll(-1)
    next_values[last] = 0.0 if bootstrap_values is None else _per_sequence(bootstrap_values.detach(), ids[last], "bootstrap_values")
    errors = rewards.detach()[order] + gamma * next_values - state_values
    advantages = torch.empty_like(values)
    advantages[order] = _suffix_sums(errors, ids, gamma * lam)
    return AdvantageEstimate(advantages, advantages + values)


def segment_gae(
    rewards: Tensor,
    values: Tensor,
    sequence_ids: Tensor,
    segment_ids: Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    *,
    bootstrap_values: Tensor | None = None,
) -> AdvantageEstimate:
    """Generalised advantage estimation with segments (turns) as steps: credit by turn.

    :func:`gae` where one step is a whole segment: its reward is the sum over its tokens, its value that of the state in which it begins (the
    first token's), and its advantage and return are repeated to its tokens. The critic is read only at :func:`segment_starts`: give these
    to :func:`searchqa_agents.losses.value_loss` as ``mask``.

    Parameters
    ----------
    rewards, values
        float[N], one per token, as for :func:`gae`.
    sequence_ids
        int[N], the trajectory of each token.
    segment_ids
        int[N], the segment of each token, growing in time within a trajectory (the turn's number will do).
    gamma, lam
        As for :func:`gae`, per segment.
    bootstrap_values
        float[S], indexed by sequence id, as for :func:`gae`.
    """
    _require_flat(rewards=rewards, values=values, sequence_ids=sequence_ids, segment_ids=segment_ids)
    segment, first = segment_index(sequence_ids, segment_ids)
    segment_rewards = torch.zeros_like(rewards[first]).index_add_(0, segment, rewards.detach())  # [K]
    per_segment = gae(segment_rewards, values[first], sequence_ids[first], gamma, lam, bootstrap_values=bootstrap_values)
    return AdvantageEstimate(per_segment.advantages[segment], per_segment.returns[segment])


def segment_index(sequence_ids: Tensor, segment_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's segment, counted from 0 by trajectory and time, int[N]; and the position of each segment's first token, int[K]."""
    _require_flat(sequence_ids=sequence_ids, segment_ids=segment_ids)
    _, sequence = torch.unique(sequence_ids, return_inverse=True)
    names, number = torch.unique(segment_ids, return_inverse=True)
    keys, segment = torch.unique(sequence * len(names) + number, return_inverse=True)
    positions = torch.arange(len(segment), device=segment.device)
    first = positions.new_zeros(len(keys)).scatter_reduce_(0, segment, positions, "amin", include_self=False)
    return segment, first


def segment_starts(sequence_ids: Tensor, segment_ids: Tensor) -> Tensor:
    """True at the first token of each segment: int[N], int[N] -> bool[N]."""
    _, first = segment_index(sequence_ids, segment_ids)
    starts = torch.zeros_like(sequence_ids, dtype=torch.bool)
    starts[first] = True
    return starts


def whiten(values: Tensor, mask: Tensor | None = None, *, epsilon: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the whole batch: ``(v - mean) / sqrt(variance + epsilon)``: float[N] -> float[N].

    With the sample variance, as in verl (TRL's PPO too); Andrychowicz et al. 2021 (arXiv 2006.05990) study it for PPO. Entries
    whose ``mask`` is 0 do not count and come back as 0. Values that are all equal, and a single one, become 0. ``values`` must hold the whole
    batch, over all processes, not a micro-batch.
    """
    if mask is not None:
        _require_flat(values=values, mask=mask)
        whitened = torch.zeros_like(values)
        whitened[mask != 0] = whiten(values[mask != 0], epsilon=epsilon)
        return whitened
    if values.numel() == 0:
        return values.detach().clone()
    exact = values.detach().double()  # in float32 the mean of many equal values is not that value
    deviation = exact - exact.mean()
    variance = deviation.square().sum() / max(values.numel() - 1, 1)
    return (deviation / (variance + epsilon).sqrt()).to(values.dtype)


def reinforce_plus_plus_advantages(rewards: Tensor, sequence_ids: Tensor, gamma: float = 1.0) -> Tensor:
    """Rewards to go, whitened over all tokens of the batch: float[N], int[N] -> float[N].

    REINFORCE++ (arXiv 2501.03262): the token rewards are those of :func:`searchqa_agents.losses.kl_penalised_rewards` with k1, so that at
    gamma 1 a token's advantage before whitening is the outcome's reward minus the KL penalties from this token on.
    """
    return whiten(discounted_returns(rewards, sequence_ids, gamma))


def state_group_advantages(
    rewards: Tensor,
    sequence_ids: Tensor,
    group_ids: Tensor,
    states: Sequence[Hashable],
    *,
    gamma: float = 1.0,
    omega: float = 1.0,
    normalise_std: bool = True,
    epsilon: float = 1e-6,
) -> Tensor:
    """Advantage of an episode in its group plus ``omega`` times that of a segment among segments that began in an equal state.

    GiGPO (Feng et al. 2025, arXiv 2505.10978), equations 3 and 5 to 8; segments are the actions. Across the trajectories of one group, the
    segments with equal anchor state form a step group, and each discounted return ``R_t = sum gamma^(k-t) r_k`` is compared with the others
    of its step group. A segment that is alone in its state has step advantage 0; an episode that is alone in its group has its reward, as in
    :func:`group_advantages`.

    Parameters
    ----------
    rewards
        float[K], one per segment (an outcome's reward stands at the last one).
    sequence_ids, group_ids
        int[K], the trajectory of each segment and that trajectory's group.
    states
        K hashable values, the anchor state in which each segment began, e.g. the last observation's text. All segments of a group that start
        from the prompt share one.
    gamma
        Discount per segment, for the step advantages only.
    normalise_std
        False leaves out both divisions by the standard deviation.

    Returns
    -------
    Tensor
        float[K], one per segment; repeat it to the segment's tokens.
    """
    _require_flat(rewards=rewards, sequence_ids=sequence_ids, group_ids=group_ids)
    if len(states) != len(rewards):
        raise ValueError(f"states must have one entry per segment: {len(rewards)}; got {len(states)}.")
    rewards = rewards.detach()
    _, sequence = torch.unique(sequence_ids, return_inverse=True)
    num_sequences = int(sequence.max()) + 1 if len(sequence) else 0
    group_of_sequence = group_ids.new_empty(num_sequences).index_copy_(0, sequence, group_ids)  # [S]
    if not torch.equal(group_of_sequence[sequence], group_ids):
        raise ValueError("All segments of a trajectory must have the same group id.")
    totals = rewards.new_zeros(num_sequences).index_add_(0, sequence, rewards)
    episode = group_advantages(totals, group_of_sequence, normalise_std=normalise_std, epsilon=epsilon)  # [S]

    numbers: dict[tuple[int, Hashable], int] = {}
    keys = zip(group_ids.tolist(), states, strict=True)
    step_groups = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64, device=rewards.device)
    step = group_advantages(discounted_returns(rewards, sequence, gamma), step_groups, normalise_std=normalise_std, epsilon=epsilon)
    alone = torch.bincount(step_groups)[step_groups] == 1
    return episode[sequence] + omega * step.masked_fill(alone, 0.0)


def _require_flat(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"{' and '.join(shapes)} must be 1-D and of one length; got {', '.join(map(str, shapes.values()))}.")


def _groups(group_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each entry's group, counted from 0 (int[N]), and the groups' sizes (float[G])."""
    _, group = torch.unique(group_ids, return_inverse=True)
    return group, torch.bincount(group).to(dtype)


def _deviations(values: Tensor, group: Tensor, size: Tensor) -> Tensor:
    """Each value minus the mean of its group, exactly 0 where a group's values are all equal; a group of one has the mean 0."""
    # in float32 the mean of many equal values is not that value, and a tiny standard deviation would magnify the difference
    exact = values.double()
    mean = torch.zeros_like(size, dtype=torch.float64).index_add_(0, group, exact) / size
    return (exact - mean.masked_fill(size == 1, 0.0)[group]).to(values.dtype)


def _is_last(ids: Tensor) -> Tensor:
    """True where the next id differs, and at the end: int[N] sorted -> bool[N]."""
    last = torch.ones_like(ids, dtype=torch.bool)
    last[:-1] = ids[1:] != ids[:-1]
    return last


def _per_sequence(values: Tensor, ids: Tensor, name: str) -> Tensor:
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= len(values)):
        raise ValueError(
            f"{name} is indexed by sequence id, so ids must lie in 0..{len(values) - 1}; got {int(ids.min())}..{int(ids.max())}. "
            "Number the trajectories from 0."
        )
    return values[ids]


def _suffix_sums(values: Tensor, ids: Tensor, discount: float) -> Tensor:
    """``y_t = x_t + discount * y_(t+1)`` within runs of equal ``ids``: float[N], int[N] sorted -> float[N].

    A parallel scan (Hillis and Steele 1986): after k rounds each entry holds the sum over the 2^k entries from it on, so that the longest run
    needs log2 of its length rounds, and a run's result does not depend on its neighbours.
    """
    sums, reach = values.clone(), 1
    while reach < len(ids):
        together = ids[reach:] == ids[:-reach]
        if not together.any():
            break
        further = sums[reach:].masked_fill(~together, 0.0)
        sums[:-reach] += discount**reach * further
        reach *= 2
    return sums
