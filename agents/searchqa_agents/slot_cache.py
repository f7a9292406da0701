"""An attention cache of slots, and the attention over it.

A slot holds the keys and values of one context in cells 0, 1, 2, ... Slots are filled, continued and reused one by one, and nothing is moved or
padded meanwhile: the new tokens of all contexts go through the model packed one behind the other, and each attends to the cells of its own slot.
The buffers keep their shapes until they must grow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from searchqa_envs.errors import ConfigurationError

_NAME = "searchqa_slots"
_QUERIES = {"cpu": 128}
"""Queries in one call of the attention kernel; their keys are computed with all of them, also those that only the last ones see."""
_CALL_FLOATS = 2**15
"""Keys and values that a CPU core reads in the time that one more call of the attention kernel takes."""


class Feed:
    """The new tokens of one forward pass, packed: of each row its slot, the number of cells it has, and how many tokens follow.

    ``slots`` and ``positions`` are int64[N], of each token; ``ends`` int64[rows], where in the pack each row's last token stands.
    """

    def __init__(self, slots: Sequence[int], starts: Sequence[int], widths: Sequence[int], device: torch.device) -> None:
        self.rows = tuple(zip(slots, starts, widths, strict=True))
        self.decoding = max(widths) == 1
        self.ends = torch.from_numpy(np.cumsum(widths) - 1).to(device)
        offsets = np.asarray(starts) - np.cumsum([0, *widths[:-1]])
        self.slots = torch.from_numpy(np.repeat(np.asarray(slots), widths)).to(device)
        self.positions = torch.from_numpy(np.arange(sum(widths)) + np.repeat(offsets, widths)).to(device)
        self.cells = sum(starts) + sum(widths)  # that are attended to
        self.longest = max(start + width for start, width in zip(starts, widths, strict=True))
        self.highest = max(slots) + 1
        self._mask: Tensor | None = None

    def causal_mask(self, width: int, cells: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [1, 1, width, cells]: the last of ``width`` tokens sees all cells, each one before it one cell less."""
        if self._mask is None:  # one for all: its columns to the left of the triangle can be as many as needed
            widest = max(width, *(min(row[2], _QUERIES.get(self.slots.device.type, row[2])) for row in self.rows))
            self._mask = torch.zeros(widest, self.longest + widest, dtype=dtype, device=self.slots.device)
            self._mask[:, self.longest :].fill_(-torch.inf).triu_(1)
        before = self.longest - (cells - width)
        mask = self._mask[None, None, :width, before : before + cells]
        return mask.contiguous() if mask.is_cuda else mask  # CUDA's kernels want it aligned

    def batch_mask(self, length: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [highest, 1, 1, length] of a pack that adds one token to each row, by slot. A slot that is not fed sees its first cell."""
        if self._mask is None:
            positions = self.slots.new_zeros(self.highest).index_copy(0, self.slots, self.positions)
            unseen = torch.arange(length, device=positions.device) > positions[:, None]
            self._mask = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill_(unseen, -torch.inf)[:, None, None]
        return self._mask


class SlotLayer(CacheLayerMixin):
    """Keys and values [slots, H, capacity, D] of one layer."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers for states [1, H, N, D]. Zeros, because attention multiplies cells that it does not see by 0."""
        self.keys, self.values = (
            states.new_zeros(self._cache.slots, states.shape[1], self._cache.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states [1, H, N, D] of the tokens fed into their cells; returns the whole buffers."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        feed = self._cache.feed
        self.keys[feed.slots, :, feed.positions] = key_states[0].transpose(0, 1)
        self.values[feed.slots, :, feed.positions] = value_states[0].transpose(0, 1)
        return self.keys, self.values

    def grow(self) -> None:
        """Take the cache's size, and keep what is there."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)

    def _grown(self, old: Tensor) -> Tensor:
        slots, heads, capacity, size = old.shape
        if (slots, capacity) == (self._cache.slots, self._cache.capacity):
            return old
        new = old.new_zeros(self._cache.slots, heads, self._cache.capacity, size)
        new[:slots, :, :capacity] = old
        return new

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Copy cells [start, end) of one slot to another."""
        for buffer in (self.keys, self.values):
            if buffer is not None:
                buffer[target, :, start:end] = buffer[source, :, start:end]

    def get_seq_length(self) -> int:
        """The model is told the positions of its tokens; it has no use for this."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Neither for this."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """What older versions of transformers (5.10) call it."""
        return self.get_max_length()


class SlotCache(Cache):
    """The slots of all layers. ``feed`` is what the forward pass under way feeds."""

    layers: list[SlotLayer]  # type: ignore[assignment]  # the base class allows other kinds beside them
    feed: Feed

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(self))  # type: ignore[arg-type]
        self.slots = self.capacity = 0

    def reserve(self, slots: int, cells: int) -> None:
        """Have at least so many slots of so many cells each."""
        self.slots = max(self.slots, slots)
        if cells > self.capacity:
            self.capacity = -(-max(cells, self.capacity * 3 // 2) // 64) * 64
        for layer in self.layers:
            layer.grow()

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Copy cells [start, end) of one slot to another, in all layers."""
        for layer in self.layers:
            layer.copy(source, target, start, end)


def check_attention(model: PreTrainedModel) -> None:
    """Raise ``ConfigurationError`` for a model whose layers do not all attend to the whole context, or that does not let its attention be replaced."""
    config: Any = model.get_decoder().config  # type: ignore[no-untyped-call]
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if kinds:
        raise ConfigurationError(f"{_RULE} {type(model).__name__} has layers of {sorted(kinds)}. {_WAY_OUT}")
    if not (model._supports_attention_backend and model._supports_sdpa):
        raise ConfigurationError(
            f"{_RULE} {type(model).__name__} does not take part in transformers' attention interface or not in plain form. {_WAY_OUT}"
        )


_RULE = "Generation keeps one attention cache for all turns: every layer must attend to the whole context, by plain softmax attention."
_WAY_OUT = (
    "Use another model, or an engine of your own behind CompletionServerLM. (A sliding window that is longer than every context can be set to None in the "
    "model's configuration.)"
)


@contextmanager
def attention_over_slots(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model attends to a :class:`SlotCache`; its own kind of attention (sdpa, eager, flash) is back afterwards."""
    config: Any = model.get_decoder().config  # type: ignore[no-untyped-call]
    own = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = own


def _slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    feed: Feed,
    scaling: float | None = None,
    dropout: float = 0.0,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of the packed tokens, query [1, H, N, D], to the cells of their slots, key and value [slots, Hkv, capacity, D]; [1, N, H, D]."""
    unknown = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if other.get(name) is not None]
    if unknown:
        raise ConfigurationError(f"{_RULE} {type(module).__name__} asks for {unknown}. {_WAY_OUT}")
    attend = _attend_decoding if feed.decoding else _attend_to_contexts
    return attend(query, key, value, feed, scaling), None


def _attend_to_contexts(query: Tensor, key: Tensor, value: Tensor, feed: Feed, scaling: float | None) -> Tensor:
    """Row by row, in blocks of queries that see the same cells but for a triangle."""
    outputs, first = [], 0
    for slot, start, width in feed.rows:
        block = _QUERIES.get(query.device.type, width)
        for begin in range(0, width, block):
            end = min(width, begin + block)
            cells, count = start + end, end - begin
            own_key, own_value = key[slot : slot + 1, :, :cells], value[slot : slot + 1, :, :cells]
            shared = query.shape[1] // key.shape[1]
            causal = query.is_cuda and cells == count  # a context from its beginning: the kernel for that is fast on CUDA
            mask = None if causal or count == 1 else feed.causal_mask(count, cells, query.dtype)
            if shared > 1 and mask is not None and query.is_cuda:  # no fused kernel of CUDA takes a mask and heads that share keys
                own_key, own_value, shared = own_key.repeat_interleave(shared, 1), own_value.repeat_interleave(shared, 1), 1
            outputs.append(
                F.scaled_dot_product_attention(
                    query[:, :, first + begin : first + end],
                    own_key,
                    own_value,
                    attn_mask=mask,
                    is_causal=causal and count > 1,
                    scale=scaling,
                    enable_gqa=shared > 1,
                ).transpose(1, 2)
            )
        first += width
    return torch.cat(outputs, dim=1)


def _attend_decoding(query: Tensor, key: Tensor, value: Tensor, feed: Feed, scaling: float | None) -> Tensor:
    """One query for each row."""
    _, heads, rows, size = query.shape
    grouped = query[0].transpose(0, 1).reshape(rows, key.shape[1], -1, size)  # [N, Hkv, H / Hkv, D]: heads that share keys together
    # One call over the slots as they lie is padded to the longest; a call for each row is not, but takes a moment each.
    unseen = feed.highest * feed.longest - feed.cells
    if query.is_cuda or unseen * key.shape[1] * (size + value.shape[3]) <= rows * _CALL_FLOATS:
        length = min(-(-feed.longest // 16) * 16, key.shape[2])  # a multiple of 16 keeps the mask aligned for CUDA's kernels
        queries = grouped.new_zeros(feed.highest, *grouped.shape[1:]).index_copy(0, feed.slots, grouped)
        output = F.scaled_dot_product_attention(
            queries,
            key[: feed.highest, :, :length],
            value[: feed.highest, :, :length],
            attn_mask=feed.batch_mask(length, query.dtype),
            scale=scaling,
        ).index_select(0, feed.slots)
    else:
        calls = [
            F.scaled_dot_product_attention(one, key[slot : slot + 1, :, : start + 1], value[slot : slot + 1, :, : start + 1], scale=scaling)
            for one, (slot, start, _) in zip(torch.split(grouped, 1), feed.rows, strict=True)
        ]
        output = torch.cat(calls)
    return output.reshape(1, rows, heads, -1)


AttentionInterface.register(_NAME, _slot_attention)
