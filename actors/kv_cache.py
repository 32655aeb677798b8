"""Preallocated key/value cache of the block decoder, addressed by (slot, position).

Each forward writes its keys and values at the tokens' own positions and attends to the whole cache under a mask, so
a block's noisy entries are simply overwritten by its clean ones when it is committed. Column 0 takes the writes of
padding tokens and is never visible; position p lives in column p + 1.
"""

from __future__ import annotations

from typing import Any

import torch


class SlotCache:
    """Keys and values of B slots, given to transformers as `past_key_values` (only `update` is asked for)."""

    def __init__(self, config: Any, slots: int, positions: int, dtype: torch.dtype, device: torch.device):
        """Args: `config`: transformers model config; `positions`: longest sequence in tokens, block end included."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, slots, positions + 1, config.num_key_value_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.slots, self.positions = slots, positions
        self._rows: torch.Tensor | None = None
        self._write_rows = torch.empty(0)
        self._columns = torch.empty(0)
        self._width = 0

    def aim(self, columns: torch.Tensor, width: int, rows: torch.Tensor | None = None) -> None:
        """Says where the next forward writes and how much it sees.

        Args:
            columns: `[n, Q]` int64, column of each token (position + 1; 0 for padding).
            width: columns that are attended, from 0.
            rows: `[n]` int64 slots of the batch rows; None when the batch is all slots in order.
        """
        self._rows, self._columns, self._width = rows, columns, width
        every = torch.arange(self.slots, device=columns.device) if rows is None else rows
        self._write_rows = every[:, None]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes `[n, H, Q, D]` and returns what is attended to, `[n, H, width, D]` each."""
        result = []
        for cache, new in ((self.keys[layer], keys), (self.values[layer], values)):
            cache[self._write_rows, self._columns] = new.transpose(1, 2)
            seen = cache[:, : self._width] if self._rows is None else cache[self._rows, : self._width]
            result.append(seen.transpose(1, 2))
        return result[0], result[1]
