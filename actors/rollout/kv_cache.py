"""Preallocated key/value cache of the block decoder, addressed by (slot, position).

A forward writes the keys and values of its tokens at the tokens' own positions before it reads any of them. So the
entries of a noisy block are overwritten by the clean ones when the block is committed, and old entries at positions
that are not decoded yet are overwritten before a mask lets a token attend to them.
"""

from __future__ import annotations

from typing import Any

import torch


class SlotCache:
    """Keys and values of B slots, given to transformers as `past_key_values` (a forward calls only `update`)."""

    def __init__(self, config: Any, slots: int, positions: int, dtype: torch.dtype, device: torch.device):
        """Allocates the cache.

        Args:
            config: transformers model config.
            slots: B.
            positions: tokens of the longest sequence, to the end of its last block.
        """
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, slots, positions, config.num_key_value_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.slots, self.positions = slots, positions
        self._written: tuple[torch.Tensor, torch.Tensor]
        self._attended: tuple[int, int] | None = None

    def prepare(self, rows: torch.Tensor, positions: torch.Tensor, attended: tuple[int, int] | None) -> None:
        """Sets where the next forward writes and what it attends to.

        Args:
            rows: `[n]` int64, slot of each row of the batch.
            positions: `[n, Q]` int64, position of each token.
            attended: (slots, positions): attend to the first `positions` entries of the first `slots` slots. None:
                attend to the keys of the batch itself; in a prefill there are no others.
        """
        self._written, self._attended = (rows[:, None], positions), attended

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values, `[n, H, Q, D]` each, into one layer.

        Returns: the keys and values to attend to, `[n, H, Q, D]` or `[slots, H, width, D]` each.
        """
        attended = []
        for cache, new in ((self.keys[layer], keys), (self.values[layer], values)):
            cache[self._written] = new.transpose(1, 2)
            if self._attended is not None:
                slots, width = self._attended
                new = cache[:slots, :width].transpose(1, 2)
            attended.append(new)
        return attended[0], attended[1]

    def take(self, other: SlotCache) -> None:
        """Copies all of a smaller cache; the slots and positions stay what they are."""
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[:, : other.slots, : other.positions] = theirs

    def reorder(self, order: list[int], width: int) -> None:
        """Puts the first `len(order)` slots into another order, as far as their first `width` positions.

        Copies one layer at a time, to need little memory.

        Args:
            order: for each place, the slot that moves there.
        """
        for cache in (self.keys, self.values):
            for layer in cache:
                layer[: len(order), :width] = layer[order, :width]

    def move(self, source: list[int], target: list[int], width: int) -> None:
        """Copies the first `width` positions of each source slot over those of its target slot."""
        for cache in (self.keys, self.values):
            for old, new in zip(source, target, strict=True):
                cache[:, new, :width].copy_(cache[:, old, :width])
