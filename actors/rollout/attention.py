"""Attention of a denoising step: the queries of one block, or two, of every slot against that slot's cache.

The batch of a step's forward is `[n live slots, then c of them again]`: the block in work of each, and the finished
block that those c commit. Attention folds both blocks of a slot, and the query heads that share a key head, into one
row of queries, so that no key or value is copied: not for a slot's second block, not for grouped heads. Slots that
are far behind the longest are a part of their own, which does not read what lies behind its own longest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

Parts = tuple[tuple[int, int], ...]
"""(slots, positions that each of them attends to) of slots that lie one after the other."""

NARROWEST = 256
"""Positions of the narrowest part: below, a part of its own would save less than it costs."""
_WIDTH_STEP = 16
"""Attended positions are a multiple of it: kernels like aligned masks."""


def parts_of(ends: np.ndarray, most: int) -> Parts:
    """Few parts of slots whose ends lie within a factor of two of each other, where the order of the slots allows it.

    Args:
        ends: `[n]` int64, position after each slot's block in work.
        most: positions of the cache.
    """
    needed = np.maximum.accumulate(ends[::-1])[::-1]
    sizes = np.ceil(np.log2(np.maximum(needed, NARROWEST) / NARROWEST))
    begins = np.flatnonzero(np.diff(sizes, prepend=np.inf))
    counts = np.diff(begins, append=len(ends))
    widths = np.minimum(-(-needed[begins] // _WIDTH_STEP) * _WIDTH_STEP, most)
    return tuple(zip(counts.tolist(), widths.tolist(), strict=True))


def attended(parts: Parts) -> int:
    """Positions that all slots attend to, together."""
    return sum(count * width for count, width in parts)


@dataclass(frozen=True, slots=True)
class Lanes:
    """Which rows of a batch `[n + c, ...]` belong to one slot: a layout of `common/model/attention.py`."""

    parts: Parts
    """The n slots, one part after the other; no part is wider than the one before it."""
    block: int
    """S, queries of a row"""
    commit: torch.Tensor | None
    """`[c]` int64, slots of the rows after n; None where no slot commits."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """See `Layout`; keys and values are the slots' caches, `[n, H', width, D]`."""
        assert mask is not None, "what lies behind a slot's end is of its past"
        folded, outputs, start = self.fold(query, key.shape[1]), [], 0
        for count, width in self.parts:
            part, start = slice(start, start + count), start + count
            seen = key[part, :, :width], value[part, :, :width]
            outputs.append(
                F.scaled_dot_product_attention(folded[part], *seen, attn_mask=mask[part, :, :, :width], scale=scale)
            )
        return self.unfold(outputs[0] if len(outputs) == 1 else torch.cat(outputs), query.shape[1])

    def fold(self, query: torch.Tensor, key_heads: int) -> torch.Tensor:
        """`[n + c, H, S, D]` -> `[n, H', queries, D]`, H' key heads; queries are (block, head of the group, S)."""
        grouped = query.unflatten(1, (key_heads, -1))  # [n + c, H', G, S, D]
        if self.commit is None:
            return grouped.flatten(2, 3)
        slots = len(query) - len(self.commit)
        both = grouped.new_zeros(slots, key_heads, 2, *grouped.shape[2:])
        both[:, :, 0] = grouped[:slots]
        both[:, :, 1].index_copy_(0, self.commit, grouped[slots:])
        return both.flatten(2, 4)

    def unfold(self, folded: torch.Tensor, heads: int) -> torch.Tensor:
        """The other way: `[n, H', queries, D]` -> `[n + c, S, H, D]`."""
        lanes = folded.unflatten(2, (-1, heads // folded.shape[1], self.block))  # [n, H', blocks, G, S, D]
        rows = lanes[:, :, 0]
        if self.commit is not None:
            rows = torch.cat([rows, lanes[:, :, 1].index_select(0, self.commit)])
        return rows.flatten(1, 2).transpose(1, 2)

    def mask(self, ends: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask: each block sees all of its slot up to its own end.

        Args:
            ends: `[n]` int64, position after the block in work.
            group: query heads that share a key head.

        Returns: `[n, 1, 1 or queries, width]` of the widest part, 0 where attended and minus infinity elsewhere.
        """
        width = self.parts[0][1]
        if self.commit is None:
            ends = ends[:, None]
        else:  # at least one position is seen, also by the empty second block of a slot that does not commit
            ends = torch.stack([ends, (ends - self.block).clamp(min=1)], dim=1)
            ends = ends.repeat_interleave(group * self.block, dim=1)
        beyond = torch.arange(width, device=ends.device) >= ends[:, None, :, None]
        return torch.zeros(beyond.shape, dtype=dtype, device=ends.device).masked_fill_(beyond, float("-inf"))
