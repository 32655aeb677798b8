"""Attention of a denoising step: the queries of one block, or two, of every slot against that slot's cache.

The batch of a step's forward is `[n live slots, then c of them again]`: the block in work of each, and the finished
block that those c commit. Attention folds both blocks of a slot, and the query heads that share a key head, into one
row of queries, so that no key or value is copied: not for a slot's second block, not for grouped heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Lanes:
    """Which rows of a batch `[n + c, ...]` belong to one slot: a layout of `common/attention.py`."""

    slots: int
    """n"""
    block: int
    """S, queries of a row"""
    commit: torch.Tensor | None
    """`[c]` int64, slots of the rows after n; None where no slot commits."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """See `Layout`; keys and values are the slots' caches, `[n, H', width, D]`."""
        folded = self.fold(query, key.shape[1])
        output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
        return self.unfold(output, query.shape[1])

    def fold(self, query: torch.Tensor, key_heads: int) -> torch.Tensor:
        """`[n + c, H, S, D]` -> `[n, H', queries, D]`, H' key heads; queries are (block, head of the group, S)."""
        grouped = query.unflatten(1, (key_heads, -1))  # [n + c, H', G, S, D]
        if self.commit is None:
            return grouped.flatten(2, 3)
        both = grouped.new_zeros(self.slots, key_heads, 2, *grouped.shape[2:])
        both[:, :, 0] = grouped[: self.slots]
        both[:, :, 1].index_copy_(0, self.commit, grouped[self.slots :])
        return both.flatten(2, 4)

    def unfold(self, folded: torch.Tensor, heads: int) -> torch.Tensor:
        """The other way: `[n, H', queries, D]` -> `[n + c, S, H, D]`."""
        lanes = folded.unflatten(2, (-1, heads // folded.shape[1], self.block))  # [n, H', blocks, G, S, D]
        rows = lanes[:, :, 0]
        if self.commit is not None:
            rows = torch.cat([rows, lanes[:, :, 1].index_select(0, self.commit)])
        return rows.flatten(1, 2).transpose(1, 2)

    def mask(self, ends: torch.Tensor, width: int, group: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask: each block sees all of its slot up to its own end.

        Args:
            ends: `[n]` int64, position after the block in work.
            width: positions that are attended to.
            group: query heads that share a key head.

        Returns: `[n, 1, 1 or queries, width]`, 0 where attended and minus infinity elsewhere.
        """
        if self.commit is None:
            ends = ends[:, None]
        else:  # at least one position is seen, also by the empty second block of a slot that does not commit
            ends = torch.stack([ends, (ends - self.block).clamp(min=1)], dim=1)
            ends = ends.repeat_interleave(group * self.block, dim=1)
        beyond = torch.arange(width, device=ends.device) >= ends[:, None, :, None]
        return torch.zeros(beyond.shape, dtype=dtype, device=ends.device).masked_fill_(beyond, float("-inf"))
