"""Attention of a denoising step: the queries of each slot's one or two blocks against the cache of that slot.

A step's forward has the batch rows `[n occupied slots, then c of them again]`: first the current block of every slot,
then the finished block of each of the c slots that commit one. Attention folds the blocks of a slot, and the query
heads that share a key head, into one row of queries. So no key or value is copied, neither for a slot's second block
nor for grouped heads.

The sequences lie one after another in the cache (`places.py`), and an attention kernel wants rows of one width at equal
distances. So consecutive slots share a call that sees the cache through such windows:

    cache    |aaaaaaaa-|bbbbbbb-|cccccc-|ddddd|      a part of 4 slots: windows of 9 positions, 8 apart
    windows  [aaaaaaaa-]                             A window may show positions of its neighbours;
                     [bbbbbbb-c]                     the mask hides them. Where too much is hidden,
                             [cccccc-dd]             another part begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

NARROWEST_PART = 256
"""Positions below which a narrower window saves nothing worth a call."""
PART_COST = 256
"""What another part costs, as a number of positions that one slot attends to."""
_ENOUGH = 1.2
"""A part that costs at most this many times what any split of it would cost is not split."""
_WIDTH_MULTIPLE = 16
"""The width of a window is a multiple of this, because attention kernels want aligned masks."""


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive slots whose attention is one call: windows of the cache of one width at equal distances."""

    begin: int
    """Position at which the first window begins."""
    stride: int
    """Positions from the beginning of a window to that of the next."""
    count: int
    """Number of slots."""
    width: int
    """Positions of a window."""

    @property
    def end(self) -> int:
        """The position after the last window."""
        return self.begin + (self.count - 1) * self.stride + self.width

    def of(self, layer: torch.Tensor) -> torch.Tensor:
        """The windows of a layer's keys or values: `[positions, H', D]` -> a view, `[count, H', width, D]`."""
        position, head, last = layer.stride()
        shape = self.count, layer.shape[1], self.width, layer.shape[2]
        strides = self.stride * position, head, position, last
        return layer.as_strided(shape, strides, layer.storage_offset() + self.begin * position)


Parts = tuple[Part, ...]


class Windows:
    """The parts of the slots, kept from step to step while they show every slot what it needs."""

    def __init__(self) -> None:
        self.parts: Parts = ()
        self.saved = 0
        """What attention would cost less, in one step, if the slots lay sorted by length."""
        self._bases = self._reach = np.zeros(0, dtype=np.int64)

    def update(self, bases: np.ndarray, ends: np.ndarray, positions: int) -> None:
        """Makes the parts fit. Arguments as for `parts_of`."""
        if np.array_equal(bases, self._bases) and (bases + ends <= self._reach).all():
            return
        self.parts, self._bases = parts_of(bases, ends, positions), bases.copy()
        windows = [(p.begin + p.stride * np.arange(p.count) + p.width) for p in self.parts]
        self._reach, ordered = np.concatenate(windows), np.sort(ends)[::-1]
        if len(self.parts) > 1:
            self.saved = cost(self.parts) - cost(parts_of(np.cumsum(ordered) - ordered, ordered, positions))
        else:
            self.saved = 0


def parts_of(bases: np.ndarray, ends: np.ndarray, positions: int) -> Parts:
    """Splits slots into parts, without changing their order: few parts, and windows that show little else.

    Args:
        bases: `[n]` int64, position in the cache at which each slot's place begins, rising.
        ends: `[n]` int64, positions of each slot that are attended to.
        positions: positions of a layer of the cache.
    """
    count = len(bases)
    stride = int(bases[-1] - bases[0]) // (count - 1) if count > 1 else 1
    ahead = bases - bases[0] - np.arange(count) * stride  # of the windows, if the first began at the first slot
    least = int(ahead.min())
    width = -(-int((ahead + ends).max() - least) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    part = Part(int(bases[0]) + least, stride, count, width)
    fits = part.begin >= 0 and part.end <= positions
    best = int(np.maximum(ends, NARROWEST_PART).sum()) + 2 * PART_COST
    if count == 1 or (fits and cost((part,)) <= _ENOUGH * best):
        return (part,)
    # Split where the places are farthest from equal distances or, if that is the lesser evil, between long and short.
    shortest, longest = int(ends.min()), int(ends.max())
    if shortest == longest or int(ahead.max()) - least > longest - shortest:
        at = max(1, int(np.abs(ahead).argmax()))
    else:
        is_long = ends > (longest + shortest) // 2
        borders = np.flatnonzero(is_long[1:] != is_long[:-1]) + 1
        at = int(borders[np.abs(borders - count / 2).argmin()])
    halves = parts_of(bases[:at], ends[:at], positions) + parts_of(bases[at:], ends[at:], positions)
    return halves if not fits or cost(halves) < cost((part,)) else (part,)


def cost(parts: Parts) -> int:
    """What attention costs: positions that all slots attend to, and `PART_COST` for each part."""
    return sum(part.count * max(part.width, NARROWEST_PART) + PART_COST for part in parts)


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Which rows of a batch `[n + c, ...]` belong to the same slot: an `AttentionLayout` (`common/model`)."""

    parts: Parts
    """The n slots as consecutive parts. Empty: `gathered` is used instead."""
    gathered: torch.Tensor | None
    """`[n, width]` int64: the positions of the cache that each slot sees, which are copied. A recorded forward does so,
    because its parts cannot change."""
    block: int
    """S, queries per row."""
    commit: torch.Tensor | None
    """`[c]` int64, slots of the rows after the first n; None if no slot commits a block."""
    causal: bool
    """Whether the tokens of a block that is committed attend causally (`common/form.py`)."""
    masks: tuple[torch.Tensor, ...]
    """Of each part, from `masks_of`."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """See `AttentionLayout`. Keys and values are a layer of the cache, `[positions, H', D]`; `mask` is not used."""
        folded, outputs, start = self.fold(query, key.shape[1]), [], 0
        for keys, values, part_mask in zip(self._seen(key), self._seen(value), self.masks, strict=True):
            queries = folded[start : start + len(keys)]
            outputs.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=part_mask, scale=scale))
            start += len(keys)
        return self.unfold(outputs[0] if len(outputs) == 1 else torch.cat(outputs), query.shape[1])

    def _seen(self, layer: torch.Tensor) -> list[torch.Tensor]:
        """What the slots of each part see of a layer, `[count, H', width, D]`."""
        if self.gathered is not None:
            return [layer[self.gathered].transpose(1, 2)]
        return [part.of(layer) for part in self.parts]

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


def slot_layout(
    parts: Parts,
    width: int,
    bases: torch.Tensor,
    ends: torch.Tensor,
    block: int,
    commit: torch.Tensor | None,
    causal: bool,
    group: int,
    positions: int,
    dtype: torch.dtype,
) -> SlotLayout:
    """The layout of a forward, with its additive masks: 0 where attended, minus infinity elsewhere.

    A block attends to every position of its slot up to its own end. With causal context, the tokens of a block that is
    committed attend up to themselves.

    Args:
        parts: of the slots; empty in a recorded forward, where each slot sees `width` positions.
        bases: `[n]` int64, position in the cache at which each slot's place begins.
        ends: `[n]` int64, position in the slot after the current block.
        group: query heads that share a key head.
        positions: positions of a layer of the cache.
    """
    repeats = 1
    if commit is None:
        last = ends[:, None]
    else:  # clamp: before the first block there is none to commit; attending to no position would give NaN
        last = torch.stack([ends, ends - block], dim=1)
        if causal:
            later = torch.arange(block - 1, -1, -1, device=ends.device).repeat(group)
            last = last.repeat_interleave(group * block, dim=1)
            last[:, group * block :] -= later
        else:
            repeats = group * block
        last = last.clamp(min=1)
    if not parts:
        gathered = (bases[:, None] + torch.arange(width, device=ends.device)).clamp(max=positions - 1)
        mask = _mask(torch.zeros_like(bases), last, repeats, width, dtype)
        return SlotLayout(parts, gathered, block, commit, causal, (mask,))
    masks, start = [], 0
    for part in parts:
        slots = slice(start, start + part.count)
        windows = part.begin + part.stride * torch.arange(part.count, device=ends.device)
        masks.append(_mask(bases[slots] - windows, last[slots], repeats, part.width, dtype))
        start += part.count
    return SlotLayout(parts, None, block, commit, causal, tuple(masks))


def _mask(first: torch.Tensor, last: torch.Tensor, repeats: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask of a part, `[n, 1, rows * repeats, width]`.

    Args:
        first: `[n]` int64, where each slot begins in its window.
        last: `[n, rows]` int64, the position in the slot that queries do not see any more.
        repeats: queries of each of these rows.
    """
    place = torch.arange(width, device=first.device) - first[:, None, None]
    hidden = (place < 0) | (place >= last[:, :, None])
    mask = torch.zeros(hidden.shape, dtype=dtype, device=first.device).masked_fill_(hidden, float("-inf"))
    return mask.repeat_interleave(repeats, dim=1)[:, None] if repeats > 1 else mask[:, None]
