"""Ragged sequences as the tensors of one forward pass, with little or no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchqa_agents.language_model import IntArray


class ForwardPass(NamedTuple):
    """N tokens to evaluate, in one forward pass over B rows of T positions. The tokens stand in the order of the sequences."""

    input_ids: Tensor
    """int64[B, T]: one row per sequence, padded on the right where nothing looks; or one row with all sequences"""
    position_ids: Tensor | None
    """int64[1, T], beginning again with each sequence of the one row; None where each row is a sequence"""
    chosen: Tensor
    """bool[B, T]: positions whose next token is evaluated"""
    targets: Tensor
    """int64[N]: those next tokens"""


def evaluated_length(mask: NDArray[np.int8]) -> int:
    """Tokens that a forward pass must read for the evaluated ones: those before the last of these; at least one."""
    evaluated = np.flatnonzero(mask)
    return max(1, int(evaluated[-1])) if len(evaluated) else 1


def lay_out(
    token_ids: Sequence[IntArray], token_masks: Sequence[NDArray[np.int8]], pad_id: int, *, packed: bool, device: torch.device
) -> ForwardPass:
    """The tensors for these sequences, int32[T_i] and int8[T_i] each; without any sequence a pass over one token that evaluates nothing.

    Raises
    ------
    ValueError
        If a first token is to be evaluated: nothing stands before it.
    """
    if any(len(mask) and mask[0] for mask in token_masks):
        raise ValueError("The first token of a sequence cannot be evaluated; its mask must be 0. Begin sequences with the prompt.")
    lengths = [evaluated_length(mask) for mask in token_masks]
    rows, width = (1, sum(lengths)) if packed else (len(lengths), max(lengths, default=1))
    ids = np.full((max(rows, 1), max(width, 1)), pad_id, dtype=np.int64)
    chosen = np.zeros(ids.shape, dtype=bool)
    positions = np.zeros(ids.shape, dtype=np.int64)
    targets = [np.empty(0, dtype=np.int64)]
    column = 0
    for row, (sequence, mask, length) in enumerate(zip(token_ids, token_masks, lengths, strict=True)):
        place = (0, slice(column, column + length)) if packed else (row, slice(0, length))
        ids[place] = sequence[:length]
        positions[place] = np.arange(length)
        next_is_evaluated = mask[1 : length + 1] == 1
        chosen[place][: len(next_is_evaluated)] = next_is_evaluated
        targets.append(sequence[1 : length + 1][next_is_evaluated].astype(np.int64))
        column += length
    return ForwardPass(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(positions).to(device) if packed else None,
        torch.from_numpy(chosen).to(device),
        torch.from_numpy(np.concatenate(targets)).to(device),
    )


def length_sorted_batches(lengths: Sequence[int], max_tokens: int, *, pass_cost: int = 256) -> list[list[int]]:
    """Indices in micro-batches of similar length, each of at most ``max_tokens`` tokens with its padding (or a single sequence).

    Of all ways to cut the sorted lengths, the one with the least padding, where every further forward pass counts as ``pass_cost`` tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    cost = np.zeros(len(order) + 1)  # of the first n sequences
    cut = [0] * (len(order) + 1)  # where their last micro-batch begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        begins = np.arange(max(0, end - max(1, max_tokens // max(longest, 1))), end)
        costs = cost[begins] + (end - begins) * longest
        best = int(costs.argmin())
        cost[end], cut[end] = costs[best] + pass_cost, begins[best]
    batches, end = [], len(order)
    while end:
        batches.append(order[cut[end] : end])
        end = cut[end]
    return batches[::-1]


def packed_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in micro-batches of at most ``max_tokens`` tokens without padding (or a single sequence), the longest first."""
    batches: list[list[int]] = []
    filled = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and filled + lengths[index] <= max_tokens:
            batches[-1].append(index)
            filled += lengths[index]
        else:
            batches.append([index])
            filled = lengths[index]
    return batches
