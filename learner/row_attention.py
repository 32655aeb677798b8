"""Attention of training rows in two parts, for devices without flex_attention. One dense mask would be mostly empty.

    queries                   keys
    clean half of a sample    the same clean half
    each noisy copy           its sample's clean half, and the copy itself

Neither copies nor samples see each other, so the cost of a line is the sum of the costs of its samples. The parts of
each kind are padded to the longest of them, so the rows of a micro-batch should have similar lengths, as the rows of a
sorted batch have.

Long parts are cut into pieces of `PIECE` queries, and a piece has only the keys that one of its queries sees: those
before it, and in a noisy copy those around it. So a long row's masks and scores are less than half as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from opdlm.common.masks import PADDING, visible
from opdlm.learner.packing import MicroBatch

PIECE = 1024
"""Most queries of one piece. Shorter parts are not cut: that would be more calls for few keys less."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some queries of each part, and the keys that they see: some of the clean half, and of the noisy copy itself."""

    queries: slice
    """Columns of the parts, as the next two."""
    clean: slice
    own: slice | None
    """None: the queries are of the clean halves."""
    mask: torch.Tensor
    """`[parts, 1, Q, K]`, added to the scores: every layer would turn a boolean mask into such a one, and keep it."""


@dataclass(frozen=True, slots=True)
class RowParts:
    """Where a micro-batch's parts are, G clean halves and M noisy copies: an `AttentionLayout` (`common/model`).

    The clean halves are padded to C tokens, the noisy copies to N. A padded place repeats the batch's first token.
    """

    clean: torch.Tensor
    """`[G, C]` int64, indices into the flattened `[B * T]` tokens."""
    noisy: torch.Tensor
    """`[M, N]` int64, the same."""
    token: torch.Tensor
    """`[G * C + M * N]` int64, the same for all places: those of the clean halves, then those of the noisy copies."""
    owner: torch.Tensor
    """`[M]` int64, the clean half of each noisy copy."""
    clean_pieces: list[Piece]
    noisy_pieces: list[Piece]
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
        owned = [numbers[owner] for numbers in clean_numbers]
        source = np.flatnonzero(np.concatenate([clean_is_real.reshape(-1), noisy_is_real.reshape(-1)]))
        token = np.concatenate([clean.reshape(-1), noisy.reshape(-1)])
        device = batch.samples.device

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            clean=on_device(clean),
            noisy=on_device(noisy),
            token=on_device(token),
            owner=on_device(owner),
            clean_pieces=_pieces(clean_numbers, clean_numbers, None, causal, dtype, device),
            noisy_pieces=_pieces(noisy_numbers, owned, noisy_numbers, causal, dtype, device),
            source=on_device(source),
            target=on_device(token[source]),
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """See `AttentionLayout`. Keys and values are those of the batch's own tokens; the pieces have the masks."""
        batch, _, length, _ = query.shape
        given, attended = query.dtype, self.noisy_pieces[0].mask.dtype
        places = [
            _ToPlaces.apply(tensor.transpose(1, 2).flatten(0, 1), self).to(attended) for tensor in (query, key, value)
        ]
        (clean_q, noisy_q), (clean_k, noisy_k), (clean_v, noisy_v) = (self._split(tensor) for tensor in places)

        def seen(clean: torch.Tensor, noisy: torch.Tensor, piece: Piece) -> torch.Tensor:
            keys = clean[:, :, piece.clean]
            if piece.own is None:
                return keys
            return torch.cat([keys.index_select(0, self.owner), noisy[:, :, piece.own]], dim=2)

        def attention(q: torch.Tensor, piece: Piece) -> torch.Tensor:
            k, v = seen(clean_k, noisy_k, piece), seen(clean_v, noisy_v, piece)
            grouped = q.shape[1] != k.shape[1]
            if grouped and not q.is_cpu:  # a GPU has no fused kernel for grouped heads with a mask
                k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
                grouped = False
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=piece.mask, scale=scale, enable_gqa=grouped)
            return output.transpose(1, 2)

        def attended_parts(q: torch.Tensor, pieces: Sequence[Piece]) -> torch.Tensor:
            outputs = [attention(q[:, :, piece.queries], piece) for piece in pieces]
            return torch.cat(outputs, dim=1).flatten(0, 1)

        outputs = attended_parts(clean_q, self.clean_pieces), attended_parts(noisy_q, self.noisy_pieces)
        attended_places = torch.cat(outputs).to(given)  # [G * C + M * N, heads, D]
        return _ToTokens.apply(attended_places, self, batch * length).unflatten(0, (batch, length))

    def _split(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[G * C + M * N, heads, D]` -> `[G, heads, C, D]` and `[M, heads, N, D]`."""
        clean, noisy = places.split([self.clean.numel(), self.noisy.numel()])
        return (
            clean.unflatten(0, self.clean.shape).transpose(1, 2),
            noisy.unflatten(0, self.noisy.shape).transpose(1, 2),
        )

    def to_places(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B * T, heads, D]` -> `[G * C + M * N, heads, D]`, the first token in the places of padding."""
        return tokens.index_select(0, self.token)

    def to_tokens(self, places: torch.Tensor, count: int) -> torch.Tensor:
        """`[G * C + M * N, heads, D]` -> `[count, heads, D]` with count B * T, 0 for the batch's padding."""
        tokens = places.new_zeros(count, *places.shape[1:])
        return tokens.index_copy_(0, self.target, places.index_select(0, self.source))


class _ToPlaces(torch.autograd.Function):
    """`RowParts.to_places`. A token has one place, and nothing reads the places of padding, so the gradient moves back
    as tokens move forth. Autograd, which does not know that, would fill and add up a tensor of all tokens."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, parts: RowParts) -> torch.Tensor:
        ctx.parts, ctx.count = parts, len(tokens)
        return parts.to_places(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return ctx.parts.to_tokens(gradient, ctx.count), None


class _ToTokens(torch.autograd.Function):
    """`RowParts.to_tokens`, with the gradient of `_ToPlaces` reversed: what padding gets reaches no token."""

    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, parts: RowParts, count: int) -> torch.Tensor:
        ctx.parts = parts
        return parts.to_tokens(places, count)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return ctx.parts.to_places(gradient), None, None


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


def _pieces(
    queries: Sequence[np.ndarray],
    clean: Sequence[np.ndarray],
    own: Sequence[np.ndarray] | None,
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Piece]:
    """The pieces of parts, all equally long. The arguments are the `_numbers` of queries, clean keys and own keys."""
    length, border = queries[0].shape[1], clean[0].shape[1]
    keys = clean if own is None else [np.concatenate(pair, axis=1) for pair in zip(clean, own, strict=True)]
    k = [torch.from_numpy(numbers).to(device)[:, None, :] for numbers in keys]
    pieces = []
    for start in range(0, length, PIECE):
        part = slice(start, min(start + PIECE, length))
        q = [torch.from_numpy(numbers[:, part]).to(device)[:, :, None] for numbers in queries]
        seen = visible(tuple(q), tuple(k), causal)[:, None]  # type: ignore[arg-type]
        columns = seen.flatten(0, 2).any(0).nonzero().flatten().cpu().numpy()
        earlier, around = columns[columns < border], columns[columns >= border]
        of_clean = slice(0, int(earlier.max(initial=-1)) + 1)
        of_own = slice(int(around[0]), int(around[-1]) + 1) if len(around) else slice(0, 0)
        shown = torch.cat([seen[..., of_clean], seen[..., of_own]], dim=-1)
        mask = torch.zeros(shown.shape, dtype=dtype, device=device).masked_fill_(~shown, float("-inf"))
        inside = slice(of_own.start - border, of_own.stop - border)
        pieces.append(Piece(part, of_clean, inside if own is not None else None, mask))
    return pieces
