"""An attention cache that is written in place.

The cache of transformers copies all keys and values for every new token; at batch 64 that is most of the time of a small model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers registers subclasses, without types
    """Keys and values [B, H, T, D] of one layer, views of buffers that double in length when they are full."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < new:
            self._buffers = (_grown(self.keys, key_states, old, new), _grown(self.values, value_states, old, new))
        keys, values = self._buffers
        keys[..., old:new, :] = key_states
        values[..., old:new, :] = value_states
        self.keys, self.values = keys[..., :new, :], values[..., :new, :]
        return self.keys, self.values

    def select(self, rows: Tensor, columns: Tensor) -> None:
        """Keep these rows and columns (int64 indices)."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, rows).index_select(2, columns)
            self.values = self.values.index_select(0, rows).index_select(2, columns)
            self._buffers = None


def _grown(states: Tensor | None, new_states: Tensor, old: int, new: int) -> Tensor:
    batch, heads, _, size = new_states.shape
    buffer = new_states.new_empty(batch, heads, max(2 * old, new + 64), size)
    if states is not None and old:
        buffer[..., :old, :] = states
    return buffer


class GrowingCache(Cache):
    """A cache of :class:`GrowingLayer`, for models whose layers all attend to the whole context."""

    layers: list[GrowingLayer]  # type: ignore[assignment]  # the base class allows other kinds beside them

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)

    def select(self, rows: Tensor, columns: Tensor) -> None:
        """Keep these rows and columns of every layer."""
        for layer in self.layers:
            layer.select(rows, columns)
