"""Attention of a denoising step: the queries of each slot's one or two blocks against the cache of that slot.

A step's forward has the batch rows `[n occupied slots, then c of them again]`: first the current block of every slot,
then the finished block of each of the c slots that commit one. Attention folds the blocks of a slot, and the query
heads that share a key head, into one row of queries. So no key or value is copied, neither for a slot's second block
nor for grouped heads. Slots are split into parts by length: a part reads the cache only as far as its own longest slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

Parts = tuple[tuple[int, int], ...]
"""Parts of consecutive slots: (number of slots, positions that each of them attends to)."""

NARROWEST_PART = 256
"""Positions of the narrowest part: to split off a narrower one would save less than it costs."""
_WIDTH_MULTIPLE = 16
"""The positions that a part attends to are a multiple of this, because attention kernels want aligned masks."""


def parts_of(ends: np.ndarray, most: int) -> Parts:
    """Splits slots into few parts of similar length, without changing their order.

    If the slots are sorted, longest first, the ends within a part lie within a factor of two of each other or are all
    at most `NARROWEST_PART`.

    Args:
        ends: `[n]` int64, position after each slot's current block.
        most: positions that the cache has.
    """
    needed = np.maximum.accumulate(ends[::-1])[::-1]
    sizes = np.ceil(np.log2(np.maximum(needed, NARROWEST_PART) / NARROWEST_PART))
    begins = np.flatnonzero(np.diff(sizes, prepend=np.inf))
    counts = np.diff(begins, append=len(ends))
    widths = np.minimum(-(-needed[begins] // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE, most)
    return tuple(zip(counts.tolist(), widths.tolist(), strict=True))


def attended(parts: Parts) -> int:
    """Sum over all slots of the positions that a slot attends to."""
    return sum(count * width for count, width in parts)


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Which rows of a batch `[n + c, ...]` belong to the same slot: an `AttentionLayout` (`common/model`)."""

    parts: Parts
    """The n slots as consecutive parts; no part is wider than the one before it."""
    block: int
    """S, queries per row."""
    commit: torch.Tensor | None
    """`[c]` int64, slots of the rows after the first n; None if no slot commits a block."""
    causal: bool = False
    """Whether the tokens of a block that is committed attend causally (`common/form.py`)."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """See `AttentionLayout`. Keys and values are those of the slots in the cache, `[n, H', width, D]`."""
        assert mask is not None, "without a mask a slot would attend to old entries after its end"
        folded, outputs, start = self.fold(query, key.shape[1]), [], 0
        for count, width in self.parts:
            part, start = slice(start, start + count), start + count
            cached = key[part, :, :width], value[part, :, :width]
            outputs.append(
                F.scaled_dot_product_attention(folded[part], *cached, attn_mask=mask[part, :, :, :width], scale=scale)
            )
        return self.unfold(outputs[0] if len(outputs) == 1 else torch.cat(outputs), query.shape[1])

    def fold(self, query: torch.Tensor, key_heads: int) -> torch.Tensor:
        """`[n + c, H, S, D]` -> `[n, H', queries, D]` for H' key heads; queries are (block, head of the group, S)."""
        grouped = query.unflatten(1, (key_heads, -1))  # [n + c, H', G, S, D]
        if self.commit is None:
            return grouped.flatten(2, 3)
        slots = len(query) - len(self.commit)
        both = grouped.new_zeros(slots, key_heads, 2, *grouped.shape[2:])
        both[:, :, 0] = grouped[:slots]
        both[:, :, 1].index_copy_(0, self.commit, grouped[slots:])
        return both.flatten(2, 4)

    def unfold(self, folded: torch.Tensor, heads: int) -> torch.Tensor:
        """The inverse of `fold`, for outputs: `[n, H', queries, D]` -> `[n + c, S, H, D]`."""
        blocks = folded.unflatten(2, (-1, heads // folded.shape[1], self.block))  # [n, H', blocks, G, S, D]
        rows = blocks[:, :, 0]
        if self.commit is not None:
            rows = torch.cat([rows, blocks[:, :, 1].index_select(0, self.commit)])
        return rows.flatten(1, 2).transpose(1, 2)

    def mask(self, ends: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask: a block attends to every position of its slot up to its own end.

        With causal context, the tokens of a block that is committed attend up to themselves.

        Args:
            ends: `[n]` int64, position after the current block.
            group: query heads that share a key head.

        Returns: `[n, 1, 1 or queries, width]`, width of the widest part: 0 where attended, minus infinity elsewhere.
        """
        width = self.parts[0][1]
        if self.commit is None:
            ends = ends[:, None]
        else:  # clamp: before the first block there is none to commit; attending to no position would give NaN
            ends = torch.stack([ends, ends - self.block], dim=1).repeat_interleave(group * self.block, dim=1)
            if self.causal:
                later = torch.arange(self.block - 1, -1, -1, device=ends.device).repeat(group)
                ends[:, group * self.block :] -= later
            ends = ends.clamp(min=1)
        beyond = torch.arange(width, device=ends.device) >= ends[:, None, :, None]
        return torch.zeros(beyond.shape, dtype=dtype, device=ends.device).masked_fill_(beyond, float("-inf"))
