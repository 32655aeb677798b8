"""The decoder's state: one row per slot, on the device, and the requests that occupy the slots.

Occupied slots are always the first `occupied` ones, and free slots take no part in a forward. At the end of each
denoising step the host copies what it needs to launch the next one (`host_starts`, `host_commits`, `host_masked`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opdlm.actors.rollout import attention
from opdlm.actors.rollout.kv_cache import SlotCache
from opdlm.common.errors import OpdlmError
from opdlm.common.grid import BlockGrid
from opdlm.common.seeds import as_int64
from opdlm.common.types import RolloutRequest, Trajectory

_SORT_COST = 4
"""Cost of sorting one position relative to attending to it: sorting reads and writes it twice, attention reads once."""
_PROMPT, _END, _START, _STEP, _BLOCK_STEP, _SEED = range(6)
"""Columns of `Slots._numbers`."""


class Slots:
    """State of up to B sequences that are being decoded. Shapes: n occupied slots, T positions, S tokens per block."""

    def __init__(self, block: int, mask_id: int, border: torch.Tensor) -> None:
        """Makes a state without slots; `enlarge` adds some.

        Args:
            border: `[0, D]`, of the dtype and on the device of each slot's `border`; D is 0 for a student without a
                logit shift.
        """
        self.block = block
        self.mask_id, self.device = mask_id, border.device
        self.requests: list[RolloutRequest] = []
        """The requests in the occupied slots, in slot order."""
        self.version = 0
        """Weight version of the next denoising step."""
        self._wasted_positions = 0
        """Positions attended to since the last sorting that a sorted order of the slots would have saved."""
        self._history: list[list[tuple[int, int]]] = []
        """Per occupied slot, for each weight version that decoded it: (denoising steps done before it, version)."""

        def none(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(0, *shape, dtype=dtype, device=self.device)

        self._tokens, self._reveal, self._numbers = none(0), none(0), none(6)
        self._threshold = none(dtype=torch.float32)
        self._border = border
        self.host_starts = np.zeros(0, dtype=np.int64)
        """`[B]` on the host: position at which the current block starts."""
        self.host_commits = np.zeros(0, dtype=bool)
        """`[B]` on the host: whether the block before the current one has yet to be committed to the cache."""
        self.host_masked = np.zeros((0, block), dtype=bool)
        """`[B, S]` on the host: whether a position of the current block is still masked."""

    @property
    def capacity(self) -> int:
        """B, the number of slots."""
        return len(self._tokens)

    def enlarge(self, capacity: int, positions: int) -> None:
        """Makes at least this many slots of at least this many positions; what they hold stays."""
        if capacity <= self.capacity and positions <= self._tokens.shape[1]:
            return
        for name in ("_tokens", "_reveal", "_numbers", "_threshold", "_border"):
            old = getattr(self, name)
            width = [positions] if name in ("_tokens", "_reveal") else list(old.shape[1:])
            new = old.new_full((capacity, *width), self.mask_id if name == "_tokens" else 0)
            new[tuple(slice(size) for size in old.shape)] = old
            setattr(self, name, new)
        for name in ("host_starts", "host_commits", "host_masked"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros((capacity - len(old), *old.shape[1:]), old.dtype)]))

    @property
    def occupied(self) -> int:
        """n, the number of occupied slots. The properties below have one row for each of them."""
        return len(self.requests)

    @property
    def tokens(self) -> torch.Tensor:
        """`[n, T]` int64, token ids; the mask token where nothing is revealed yet."""
        return self._tokens[: self.occupied]

    @property
    def reveal(self) -> torch.Tensor:
        """`[n, T]` int64, denoising step that revealed the token; 0 where none has."""
        return self._reveal[: self.occupied]

    @property
    def threshold(self) -> torch.Tensor:
        """`[n]` float32, threshold of `low_confidence_dynamic`."""
        return self._threshold[: self.occupied]

    @property
    def border(self) -> torch.Tensor:
        """`[n, D]`, hidden state of the clean token before the current block; D is 0 without a logit shift."""
        return self._border[: self.occupied]

    @property
    def prompt_length(self) -> torch.Tensor:
        """`[n]` int64, tokens."""
        return self._numbers[: self.occupied, _PROMPT]

    @property
    def end(self) -> torch.Tensor:
        """`[n]` int64, prompt length + `max_new_tokens`."""
        return self._numbers[: self.occupied, _END]

    @property
    def block_start(self) -> torch.Tensor:
        """`[n]` int64, position at which the current block starts."""
        return self._numbers[: self.occupied, _START]

    @property
    def step(self) -> torch.Tensor:
        """`[n]` int64, denoising steps so far over the whole response."""
        return self._numbers[: self.occupied, _STEP]

    @property
    def block_step(self) -> torch.Tensor:
        """`[n]` int64, denoising steps so far in the current block."""
        return self._numbers[: self.occupied, _BLOCK_STEP]

    @property
    def seed(self) -> torch.Tensor:
        """`[n]` int64, seed of the sequence."""
        return self._numbers[: self.occupied, _SEED]

    def shifted(self, hidden: torch.Tensor, committed: torch.Tensor, commit: torch.Tensor) -> torch.Tensor:
        """The hidden states that predict the tokens of the current blocks with a logit shift: of the position before.

        Args:
            hidden: `[n, S, D]`, of the current blocks.
            committed: `[c, S, D]`, of the blocks that the same forward committed, in the slots `commit`, `[c]` int64.

        Returns: `[n, S, D]`.
        """
        self.border[commit] = committed[:, -1]
        return torch.cat([self.border[:, None], hidden[:, :-1]], dim=1)

    def tokens_so_far(self) -> int:
        """Response tokens that are revealed in the occupied slots, from what the host knows anyway."""
        n = self.occupied
        prompts = np.array([request.prompt_ids.size for request in self.requests], dtype=np.int64)
        limits = np.array([request.max_new_tokens for request in self.requests], dtype=np.int64)
        revealed = self.host_starts[:n] + self.block - prompts - self.host_masked[:n].sum(1)
        return int(np.minimum(revealed, limits).sum())

    def first_rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[count, T]` and starts of the current blocks `[count]` of the first slots, free ones included."""
        return self._tokens[:count], self._numbers[:count, _START]

    def refill(self, pending: deque[RolloutRequest], grid: BlockGrid, threshold: float) -> list[int]:
        """Moves requests from `pending` into the free slots; returns the slots that were filled."""
        first = self.occupied
        fresh = [pending.popleft() for _ in range(min(self.capacity - first, len(pending)))]
        last = first + len(fresh)
        tokens = np.full((len(fresh), self._tokens.shape[1]), self.mask_id, dtype=np.int64)
        numbers = np.zeros((len(fresh), self._numbers.shape[1]), dtype=np.int64)
        for row, request in enumerate(fresh):
            length = request.prompt_ids.size
            tokens[row, :length] = request.prompt_ids
            end, seed = length + request.max_new_tokens, as_int64(request.seed)
            numbers[row, [_PROMPT, _END, _SEED]] = length, end, seed
            numbers[row, _START] = grid.first_block_start(length)
        thresholds = [threshold if request.threshold is None else request.threshold for request in fresh]
        self._tokens[first:last] = torch.from_numpy(tokens)
        self._reveal[first:last] = 0
        self._numbers[first:last] = torch.from_numpy(numbers)
        self._threshold[first:last] = torch.tensor(thresholds, dtype=torch.float32)
        self.host_starts[first:last], self.host_commits[first:last] = numbers[:, _START], False
        window = numbers[:, _START, None] + np.arange(self.block)
        self.host_masked[first:last] = window >= numbers[:, _PROMPT, None]
        self.requests += fresh
        self._history += [[(0, self.version)] for _ in fresh]
        return list(range(first, last))

    def sort_when_due(self, cache: SlotCache) -> None:
        """Sorts the slots, longest first, once attention has wasted as much on their order as sorting costs."""
        ends = self.host_starts[: self.occupied] + self.block
        if ends.max() <= attention.NARROWEST_PART:
            return
        order = np.argsort(-ends, kind="stable")
        sorted_parts = attention.parts_of(ends[order], cache.positions)
        parts = attention.parts_of(ends, cache.positions)
        self._wasted_positions += attention.attended(parts) - attention.attended(sorted_parts)
        _, width = sorted_parts[0]
        if self._wasted_positions < _SORT_COST * self.occupied * width:
            return
        self._wasted_positions, rows = 0, order.tolist()
        self._copy(rows, list(range(self.occupied)))
        cache.reorder(rows, width)

    def change_version(self, version: int) -> None:
        """Notes that all sequences are decoded with this weight version from the next denoising step on."""
        self.version = version
        for steps, history in zip(self.step.tolist(), self._history, strict=True):
            history.append((steps, version))

    def refuse_logits(self, row: int) -> None:
        """Raises `OpdlmError` for a slot whose logits have NaN, infinity or no candidate at all."""
        raise OpdlmError(
            f"prompt {self.requests[row].prompt_id}: the student's logits hold NaN or infinity (weights of version "
            f"{self.version}), so no token can be drawn; its weights or its number format are broken"
        )

    def trajectories(self, rows: list[int], eos_ids: Sequence[int], ignore_eos: bool) -> list[Trajectory]:
        """The trajectories of the given slots, whose sequences are finished."""
        tokens, reveals = self._tokens[rows].cpu().numpy(), self._reveal[rows].cpu().numpy()
        return [
            self._trajectory(row, ids, reveal, eos_ids, ignore_eos)
            for row, ids, reveal in zip(rows, tokens, reveals, strict=True)
        ]

    def _trajectory(
        self, row: int, tokens: np.ndarray, reveal: np.ndarray, eos_ids: Sequence[int], ignore_eos: bool
    ) -> Trajectory:
        request = self.requests[row]
        start, end = request.prompt_ids.size, int(reveal.nonzero()[0][-1]) + 1
        response = tokens[start:end].astype(np.int32)
        reveal = reveal[start:end].astype(np.int32)
        versions = self._versions_of(row, reveal)
        stop = None if ignore_eos else _first_of(response[: request.max_new_tokens], eos_ids)
        return Trajectory(
            index=request.index,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            response_ids=response,
            reveal_step=reveal,
            response_length=min(len(response), request.max_new_tokens) if stop is None else stop + 1,
            weight_version=int(versions.min()),
            finish_reason="length" if stop is None else "eos",
            denoising_steps=int(reveal.max()),
            token_versions=versions if versions.min() < versions.max() else None,
        )

    def _versions_of(self, row: int, reveal: np.ndarray) -> np.ndarray:
        """Weight version that revealed each token, `[R'] int32`: at step k, the last one that began before step k."""
        steps_before, versions = zip(*self._history[row], strict=True)
        return np.array(versions, dtype=np.int32)[np.searchsorted(steps_before, reveal) - 1]

    def free(self, rows: list[int], cache: SlotCache) -> None:
        """Frees the given slots; the last occupied slots move into the gaps."""
        freed, remaining = set(rows), self.occupied - len(rows)
        gaps = [row for row in rows if row < remaining]
        moved = [row for row in range(remaining, self.occupied) if row not in freed]
        if gaps:
            self._copy(moved, gaps)
            cache.move(moved, gaps, int(self.host_starts[gaps].max()))
        del self.requests[remaining:], self._history[remaining:]

    def _copy(self, source: list[int], target: list[int]) -> None:
        """Copies slots over others, all at once: a slot may be both source and target. Leaves the cache alone."""
        for state in (self._tokens, self._reveal, self._numbers, self._threshold, self._border):
            state[target] = state[source]
        for host_state in (self.host_starts, self.host_commits, self.host_masked):
            host_state[target] = host_state[source]
        lists: tuple[list[Any], ...] = self.requests, self._history
        for entries in lists:
            for row, entry in zip(target, [entries[row] for row in source], strict=True):
                entries[row] = entry


def _first_of(tokens: np.ndarray, wanted: Sequence[int]) -> int | None:
    """Index of the first token that is one of `wanted`; None if there is none."""
    return next((index for index, token in enumerate(tokens.tolist()) if token in wanted), None)


def longest_sequence(requests: Sequence[RolloutRequest], grid: BlockGrid, context: int) -> int:
    """Positions of the longest sequence, to the end of its last block.

    Raises:
        ValueError: a request cannot be decoded with this grid in a context of `context` positions.
    """
    longest = 0
    for request in requests:
        if request.prompt_ids.size == 0:
            raise ValueError(f"prompt {request.prompt_id} is empty; a response needs a token before it")
        if request.max_new_tokens < 1:
            raise ValueError(
                f"prompt {request.prompt_id}: max_new_tokens is {request.max_new_tokens}; it must be at least 1"
            )
        end = grid.end_position(request.prompt_ids.size, request.max_new_tokens)
        if end > context:
            raise ValueError(
                f"prompt {request.prompt_id}: {request.prompt_ids.size} prompt tokens and {request.max_new_tokens} "
                f"new tokens take {end} positions, to the end of their last block; the model's context is {context}"
            )
        longest = max(longest, end)
    return longest
