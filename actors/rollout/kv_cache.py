"""Preallocated key/value cache of the block decoder, addressed by (slot, position).

A forward writes the keys and values of its tokens at the tokens' own positions, before any of them is read. So a
block's noisy entries are simply overwritten by its clean ones when it is committed, and what stands at positions that
were not decoded yet is overwritten before a mask lets anybody see it.
"""

from __future__ import annotations

from typing import Any

import torch


class SlotCache:
    """Keys and values of B slots, given to transformers as `past_key_values` (only `update` is asked for)."""

    def __init__(self, config: Any, slots: int, positions: int, dtype: torch.dtype, device: torch.device):
        """Args: `config`: transformers model config; `positions`: longest sequence in tokens, block end included."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, slots, positions, config.num_key_value_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.slots, self.positions = slots, positions
        self._where: tuple[torch.Tensor, torch.Tensor]
        self._seen: tuple[int, int] | None = None

    def aim(self, rows: torch.Tensor, positions: torch.Tensor, seen: tuple[int, int] | None) -> None:
        """Says where the next forward writes and what it attends to.

        Args:
            rows: `[n]` int64, slot of each row of the batch.
            positions: `[n, Q]` int64, position of each token.
            seen: attend to the first so many positions of the first so many slots; None: to the batch's own keys,
                which in a prefill are all there are.
        """
        self._where, self._seen = (rows[:, None], positions), seen

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes `[n, H, Q, D]`; returns what is attended to, `[n, H, Q, D]` or `[slots, H, width, D]` each."""
        seen = []
        for cache, new in ((self.keys[layer], keys), (self.values[layer], values)):
            cache[self._where] = new.transpose(1, 2)
            if self._seen is not None:
                slots, width = self._seen
                new = cache[:slots, :width].transpose(1, 2)
            seen.append(new)
        return seen[0], seen[1]

    def reorder(self, order: list[int], width: int) -> None:
        """The first slots in another order, by their first `width` positions; a layer at a time, so with little room.

        `order`: the slot that comes to each place.
        """
        for cache in (self.keys, self.values):
            for layer in cache:
                layer[: len(order), :width] = layer[order, :width]

    def move(self, source: list[int], target: list[int], width: int) -> None:
        """Copies the first `width` positions of slots over others."""
        for cache in (self.keys, self.values):
            for old, new in zip(source, target, strict=True):
                cache[:, new, :width].copy_(cache[:, old, :width])
