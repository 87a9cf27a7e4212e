"""A key-value cache of fixed memory for transformers' models; importing it needs transformers.

Transformers' `DynamicCache` copies itself at every token, and its `StaticCache` makes attention read
all slots, filled or not. Here keys and values lie in one allocation that attention sees

- up to the slot last written, where the host counts the slots ("growing": no copy, no waste);
- whole, the slot to write being a tensor, where a CUDA graph is to hold the step ("fixed").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast.extras import require

cache_utils: Any = require("transformers.cache_utils", "llm", "sampling with CachedSampler")


class Cursor:
    """Where the layers write next, one for all of them.

    Attributes:
        max_rows: rows there is memory for.
        slots: slots there is memory for, in each row.
        rows: rows in use, the first ones.
        slot: slots filled, as the host counts them.
        index: [1] int64, the same on the device; None if the cache grows.
        filling: whether the prompts are being read.
    """

    def __init__(self, max_rows: int, slots: int, index: Tensor | None) -> None:
        self.max_rows = max_rows
        self.slots = slots
        self.index = index
        self.rows = max_rows
        self.slot = 0
        self.filling = True


class FixedLayer(cache_utils.CacheLayerMixin):
    """Keys and values of one layer, [rows, heads, slots, size].

    Sliding windows are left to the mask, which transformers makes for every type of layer.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, cursor: Cursor) -> None:
        super().__init__()
        self.cursor = cursor

    @property
    def is_compileable(self) -> bool:
        """What transformers asks before it looks at the mask's values, which a graph forbids."""
        return self.cursor.index is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, by the first keys and values."""
        cursor = self.cursor
        # Unwritten slots have weight 0, and 0 * NaN is NaN; a growing cache never shows them.
        make = torch.empty if cursor.index is None else torch.zeros

        def like(states: Tensor) -> Tensor:
            shape = (cursor.max_rows, states.shape[1], cursor.slots, states.shape[3])
            return make(shape, dtype=states.dtype, device=states.device)

        self.keys, self.values = like(key_states), like(value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, new, size] and return what attention is to read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cursor = self.cursor
        keys, values = self.keys[: cursor.rows], self.values[: cursor.rows]
        if cursor.index is None or cursor.filling:
            end = cursor.slot + key_states.shape[2]
            keys, values = keys[:, :, :end], values[:, :, :end]
            keys[:, :, cursor.slot :] = key_states
            values[:, :, cursor.slot :] = value_states
        else:
            keys.index_copy_(2, cursor.index, key_states)
            values.index_copy_(2, cursor.index, value_states)
        return keys, values

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy the filled slots of rows `source` over those of rows `target`, both [n] int64."""
        for states in (self.keys, self.values):
            filled = states[:, :, : self.cursor.slot]
            filled.index_copy_(0, target, filled.index_select(0, source))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that attention reads, and the first of them."""
        if self.cursor.index is None or self.cursor.filling:
            return self.cursor.slot + query_length, 0
        return self.cursor.slots, 0

    def get_seq_length(self) -> int | Tensor:
        """Slots filled."""
        if self.cursor.index is None or self.cursor.filling:
            return self.cursor.slot
        return self.cursor.index[0]

    def get_max_length(self) -> int:
        """Slots there is memory for."""
        return self.cursor.slots


def make_cache(num_layers: int, cursor: Cursor) -> Any:
    """A transformers `Cache` of such layers."""
    return cache_utils.Cache(layers=[FixedLayer(cursor) for _ in range(num_layers)])
