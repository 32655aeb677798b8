"""Attention of training rows in two parts, where there is no flex_attention: most of a dense mask would be empty.

    queries                 keys
    clean half of a sample  the same
    each noisy copy         its sample's clean half, and itself

Copies do not see each other, samples neither, so a line costs what its samples cost, however many it holds. Each kind
of part is padded to its longest: rows of a micro-batch should be of about one length, as those of a sorted batch are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from opdlm.common.masks import PADDING, visible
from opdlm.learner.packing import MicroBatch


@dataclass(frozen=True, slots=True)
class RowParts:
    """Where the parts of a micro-batch are, for G clean halves and M noisy copies: a layout of `common/model/attention.py`.

    Parts are padded to the longest of their kind; a place that pads is that of some other token.
    """

    clean: torch.Tensor
    """`[G, C]` int64, places in the flattened `[B * T]` tokens."""
    noisy: torch.Tensor
    """`[M, N]` int64"""
    owner: torch.Tensor
    """`[M]` int64, the clean half of each copy."""
    clean_mask: torch.Tensor
    """`[G, 1, C, C]`, added to the scores: a boolean one would be made so, and kept, by each layer."""
    noisy_mask: torch.Tensor
    """`[M, 1, N, C + N]`"""
    own: torch.Tensor
    """`[B * T - padding]` int64: which of the `G * C + M * N` places are no padding, in order of `target`."""
    target: torch.Tensor
    """Their places in the flattened tokens."""

    @property
    def padding(self) -> int:
        """Places that are of no token's own."""
        return self.clean.numel() + self.noisy.numel() - self.own.numel()

    @classmethod
    def of(cls, batch: MicroBatch, dtype: torch.dtype) -> RowParts:
        """Finds the parts; `dtype`: of the masks."""
        samples, copies, blocks = (getattr(batch, name).cpu().numpy() for name in ("samples", "copies", "blocks"))
        parts: dict[tuple[int, int, int], np.ndarray] = {}
        for line in range(len(samples)):
            used = np.flatnonzero(samples[line] != PADDING)
            keys = np.stack([samples[line, used], copies[line, used]])
            begins = np.flatnonzero(np.diff(keys, prepend=-2).any(axis=0))  # a part's tokens are side by side
            for part in np.split(used, begins[1:]):
                parts[line, samples[line, part[0]], copies[line, part[0]]] = part + line * samples.shape[1]
        clean = {key[:2]: index for index, key in enumerate(key for key in parts if key[2] == 0)}
        copied = [key for key in parts if key[2] != 0]
        places = [_padded([parts[*key, 0] for key in clean]), _padded([parts[key] for key in copied])]
        owner = np.array([clean[key[:2]] for key in copied])
        flat = [numbers.reshape(-1) for numbers in (samples, copies, blocks)]
        first, second = (_numbers(where, real, flat) for where, real in places)
        both = [np.concatenate([c[owner], n], axis=1) for c, n in zip(first, second, strict=True)]
        own = np.flatnonzero(np.concatenate([real.reshape(-1) for _, real in places]))
        target = np.concatenate([where.reshape(-1) for where, _ in places])[own]
        device = batch.samples.device

        def there(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            clean=there(places[0][0]),
            noisy=there(places[1][0]),
            owner=there(owner),
            clean_mask=_added(first, first, dtype, device),
            noisy_mask=_added(second, both, dtype, device),
            own=there(own),
            target=there(target),
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """See `Layout`; keys and values are the batch's own, `mask` is `clean_mask`."""
        batch, heads, length, width = query.shape
        flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]  # [B * T, heads, D]
        clean_q, clean_k, clean_v = (_gather(tensor, self.clean) for tensor in flat)
        noisy_q, noisy_k, noisy_v = (_gather(tensor, self.noisy) for tensor in flat)
        seen_k = torch.cat([clean_k.index_select(0, self.owner), noisy_k], dim=2)
        seen_v = torch.cat([clean_v.index_select(0, self.owner), noisy_v], dim=2)

        def part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
            grouped = q.shape[1] != k.shape[1]
            if grouped and not q.is_cpu:  # with a mask, grouped heads have no fused kernel there
                k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
                grouped = False
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale, enable_gqa=grouped)
            return output.transpose(1, 2).flatten(0, 1)

        outputs = part(clean_q, clean_k, clean_v, mask), part(noisy_q, seen_k, seen_v, self.noisy_mask)
        together = torch.cat(outputs)
        whole = together.new_zeros(batch * length, heads, width)
        return whole.index_copy(0, self.target, together.index_select(0, self.own)).unflatten(0, (batch, length))


def _padded(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Places `[parts, longest]`, and which of them are the part's own."""
    lengths = np.array([len(part) for part in parts])
    real = np.arange(lengths.max()) < lengths[:, None]
    where = np.zeros(real.shape, dtype=np.int64)
    where[real] = np.concatenate(parts)
    return where, real


def _numbers(where: np.ndarray, real: np.ndarray, flat: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Sample, copy, block and index of each place, for `visible`; padding sees itself only."""
    sample, copy, block = (numbers[where] for numbers in flat)
    alone = -1 - np.arange(where.size).reshape(where.shape)
    return [np.where(real, sample, PADDING), copy, block, np.where(real, where, alone)]


def _added(
    query: Sequence[np.ndarray], key: Sequence[np.ndarray], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    q, k = ([torch.from_numpy(numbers).to(device) for numbers in side] for side in (query, key))
    seen = visible(tuple(n[:, :, None] for n in q), tuple(n[:, None, :] for n in k))[:, None]  # type: ignore[arg-type]
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def _gather(flat: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`[B * T, heads, D]` at `[parts, length]` -> `[parts, heads, length, D]`."""
    return flat.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)
