"""Attention of training rows in two parts, for devices without flex_attention. One dense mask would be mostly empty.

    queries                   keys
    clean half of a sample    the same clean half
    each noisy copy           its sample's clean half, and the copy itself

Neither copies nor samples see each other, so the cost of a line is the sum of the costs of its samples. The parts of
each kind are padded to the longest of them, so the rows of a micro-batch should have similar lengths, as the rows of a
sorted batch have.
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
    """Where a micro-batch's parts are, G clean halves and M noisy copies: an `AttentionLayout` (`common/model`).

    The clean halves are padded to C tokens, the noisy copies to N. A padded place repeats the batch's first token.
    """

    clean: torch.Tensor
    """`[G, C]` int64, indices into the flattened `[B * T]` tokens."""
    noisy: torch.Tensor
    """`[M, N]` int64, the same."""
    owner: torch.Tensor
    """`[M]` int64, the clean half of each noisy copy."""
    clean_mask: torch.Tensor
    """`[G, 1, C, C]`, added to the scores: every layer would turn a boolean mask into such a one, and keep it."""
    noisy_mask: torch.Tensor
    """`[M, 1, N, C + N]`, the same."""
    source: torch.Tensor
    """`[B * T - padding of the batch]` int64, which of the `G * C + M * N` places are not padding."""
    target: torch.Tensor
    """The token of each of these places, as an index into the flattened tokens."""

    @property
    def padding(self) -> int:
        """How many of the places are padding."""
        return self.clean.numel() + self.noisy.numel() - self.source.numel()

    @classmethod
    def from_batch(cls, batch: MicroBatch, dtype: torch.dtype, causal: bool = False) -> RowParts:
        """Finds the parts of a micro-batch.

        Args:
            dtype: number format of the masks, in which attention is computed.
            causal: as in `training_mask`.
        """
        samples, copies, blocks = (getattr(batch, name).cpu().numpy() for name in ("samples", "copies", "blocks"))
        tokens_of: dict[tuple[int, int, int], np.ndarray] = {}  # by (line, sample, copy)
        for line in range(len(samples)):
            used = np.flatnonzero(samples[line] != PADDING)
            keys = np.stack([samples[line, used], copies[line, used]])
            starts = np.flatnonzero(np.diff(keys, prepend=-2).any(axis=0))  # the tokens of a part are side by side
            for part in np.split(used, starts[1:]):
                tokens_of[line, samples[line, part[0]], copies[line, part[0]]] = part + line * samples.shape[1]
        clean_index = {key[:2]: index for index, key in enumerate(key for key in tokens_of if key[2] == 0)}
        noisy_keys = [key for key in tokens_of if key[2] != 0]
        clean, clean_is_real = _padded([tokens_of[*key, 0] for key in clean_index])
        noisy, noisy_is_real = _padded([tokens_of[key] for key in noisy_keys])
        owner = np.array([clean_index[key[:2]] for key in noisy_keys])
        flat = [numbers.reshape(-1) for numbers in (samples, copies, blocks)]
        clean_numbers = _numbers(clean, clean_is_real, flat)
        noisy_numbers = _numbers(noisy, noisy_is_real, flat)
        seen_numbers = [
            np.concatenate([c[owner], n], axis=1) for c, n in zip(clean_numbers, noisy_numbers, strict=True)
        ]
        source = np.flatnonzero(np.concatenate([clean_is_real.reshape(-1), noisy_is_real.reshape(-1)]))
        target = np.concatenate([clean.reshape(-1), noisy.reshape(-1)])[source]
        device = batch.samples.device

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            clean=on_device(clean),
            noisy=on_device(noisy),
            owner=on_device(owner),
            clean_mask=_added_mask(clean_numbers, clean_numbers, causal, dtype, device),
            noisy_mask=_added_mask(noisy_numbers, seen_numbers, causal, dtype, device),
            source=on_device(source),
            target=on_device(target),
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """See `AttentionLayout`. Keys and values are those of the batch's own tokens; `mask` is `clean_mask`."""
        batch, heads, length, width = query.shape
        given = query.dtype
        query, key, value = (tensor.to(self.noisy_mask.dtype) for tensor in (query, key, value))
        flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]  # [B * T, heads, D]
        clean_q, clean_k, clean_v = (_gather(tensor, self.clean) for tensor in flat)
        noisy_q, noisy_k, noisy_v = (_gather(tensor, self.noisy) for tensor in flat)
        seen_k = torch.cat([clean_k.index_select(0, self.owner), noisy_k], dim=2)
        seen_v = torch.cat([clean_v.index_select(0, self.owner), noisy_v], dim=2)

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
            grouped = q.shape[1] != k.shape[1]
            if grouped and not q.is_cpu:  # a GPU has no fused kernel for grouped heads with a mask
                k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
                grouped = False
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale, enable_gqa=grouped)
            return output.transpose(1, 2).flatten(0, 1)

        outputs = attention(clean_q, clean_k, clean_v, mask), attention(noisy_q, seen_k, seen_v, self.noisy_mask)
        places = torch.cat(outputs).to(given)  # [G * C + M * N, heads, D]
        tokens = places.new_zeros(batch * length, heads, width)
        return tokens.index_copy(0, self.target, places.index_select(0, self.source)).unflatten(0, (batch, length))


def _padded(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The parts' indices, padded with 0, `[parts, longest]` int64; and which of them are real, bool."""
    lengths = np.array([len(part) for part in parts])
    is_real = np.arange(lengths.max()) < lengths[:, None]
    indices = np.zeros(is_real.shape, dtype=np.int64)
    indices[is_real] = np.concatenate(parts)
    return indices, is_real


def _numbers(indices: np.ndarray, is_real: np.ndarray, flat: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Sample, copy, block and index of each place, as `visible` takes them; padding sees only itself.

    `flat`: sample, copy and block of the flattened tokens.
    """
    sample, copy, block = (numbers[indices] for numbers in flat)
    unique = -1 - np.arange(indices.size).reshape(indices.shape)
    return [np.where(is_real, sample, PADDING), copy, block, np.where(is_real, indices, unique)]


def _added_mask(
    query: Sequence[np.ndarray], key: Sequence[np.ndarray], causal: bool, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`[parts, 1, Q, K]`, 0 where the query sees the key and minus infinity elsewhere, from the `_numbers` of both."""
    q, k = ([torch.from_numpy(numbers).to(device) for numbers in side] for side in (query, key))
    places = tuple(n[:, :, None] for n in q), tuple(n[:, None, :] for n in k)
    seen = visible(*places, causal)[:, None]  # type: ignore[arg-type]
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def _gather(flat: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`[B * T, heads, D]` at `[parts, length]` -> `[parts, heads, length, D]`."""
    return flat.index_select(0, indices.flatten()).unflatten(0, indices.shape).transpose(1, 2)
