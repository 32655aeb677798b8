"""The decoder's state: one row a slot, on the device, and the requests that occupy the slots.

Occupied slots are always the first `live` ones: a free slot takes no part in a forward. What the host has to know of
the next step (which blocks are to be committed, which positions are masked) it has learnt at the end of the last one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opdlm.actors.rollout import attention as slot_attention
from opdlm.actors.rollout.kv_cache import SlotCache
from opdlm.common.grid import BlockGrid
from opdlm.common.types import RolloutRequest, Trajectory

_SORTING = 4
"""Sorting reads and writes each position twice; attention reads it once."""
_PROMPT, _END, _START, _STEP, _BLOCK_STEP, _SEED = range(6)


class Slots:
    """State of up to B sequences in work."""

    def __init__(self, capacity: int, positions: int, block: int, mask_id: int, device: torch.device) -> None:
        self.capacity, self.block = capacity, block
        self.mask_id, self.device = mask_id, device
        self.requests: list[RolloutRequest] = []
        """Of the occupied slots."""
        self.version = 0
        """Weight version of the next denoising step."""
        self._in_vain = 0
        """Positions that were attended to only because of the slots' order, since they were last sorted."""
        self._history: list[list[tuple[int, int]]] = []
        """By occupied slot: (denoising steps before it, weight version) of each version that decoded it."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._tokens = zeros(capacity, positions)
        self._reveal = zeros(capacity, positions)
        self._threshold = zeros(capacity, dtype=torch.float32)
        self._numbers = zeros(capacity, 6)
        self.starts = np.zeros(capacity, dtype=np.int64)
        """`[B]` on the host: position at which the block in work starts."""
        self.commits = np.zeros(capacity, dtype=bool)
        """`[B]` on the host: the block before the one in work is not in the cache yet."""
        self.masked = np.zeros((capacity, block), dtype=bool)
        """`[B, S]` on the host: positions of the block in work that are still to be revealed."""

    @property
    def live(self) -> int:
        """Occupied slots; the properties below are of those."""
        return len(self.requests)

    @property
    def tokens(self) -> torch.Tensor:
        """`[n, T]` int64, masks where nothing is revealed yet."""
        return self._tokens[: self.live]

    @property
    def reveal(self) -> torch.Tensor:
        """`[n, T]` int64, denoising step; 0 where not revealed."""
        return self._reveal[: self.live]

    @property
    def threshold(self) -> torch.Tensor:
        """`[n]` float32."""
        return self._threshold[: self.live]

    @property
    def prompt_length(self) -> torch.Tensor:
        """`[n]` int64."""
        return self._numbers[: self.live, _PROMPT]

    @property
    def end(self) -> torch.Tensor:
        """`[n]` int64, prompt length + most new tokens."""
        return self._numbers[: self.live, _END]

    @property
    def block_start(self) -> torch.Tensor:
        """`[n]` int64, position at which the block in work starts."""
        return self._numbers[: self.live, _START]

    @property
    def step(self) -> torch.Tensor:
        """`[n]` int64, denoising steps so far, whole response."""
        return self._numbers[: self.live, _STEP]

    @property
    def block_step(self) -> torch.Tensor:
        """`[n]` int64, denoising steps so far, block in work."""
        return self._numbers[: self.live, _BLOCK_STEP]

    @property
    def seed(self) -> torch.Tensor:
        """`[n]` int64."""
        return self._numbers[: self.live, _SEED]

    def first(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[count, T]` and starts of the blocks in work `[count]`, free slots behind the occupied included."""
        return self._tokens[:count], self._numbers[:count, _START]

    def refill(self, pending: deque[RolloutRequest], grid: BlockGrid, threshold: float) -> list[int]:
        """Moves requests into free slots; returns those slots."""
        first = self.live
        fresh = [pending.popleft() for _ in range(min(self.capacity - first, len(pending)))]
        last = first + len(fresh)
        tokens = np.full((len(fresh), self._tokens.shape[1]), self.mask_id, dtype=np.int64)
        numbers = np.zeros((len(fresh), self._numbers.shape[1]), dtype=np.int64)
        for row, request in enumerate(fresh):
            length = request.prompt_ids.size
            tokens[row, :length] = request.prompt_ids
            numbers[row, [_PROMPT, _END, _SEED]] = length, length + request.max_new_tokens, request.seed
            numbers[row, _START] = grid.first_block_start(length)
        thresholds = [threshold if request.threshold is None else request.threshold for request in fresh]
        self._tokens[first:last] = torch.from_numpy(tokens)
        self._reveal[first:last] = 0
        self._numbers[first:last] = torch.from_numpy(numbers)
        self._threshold[first:last] = torch.tensor(thresholds, dtype=torch.float32)
        self.starts[first:last], self.commits[first:last] = numbers[:, _START], False
        window = numbers[:, _START, None] + np.arange(self.block)
        self.masked[first:last] = window >= numbers[:, _PROMPT, None]
        self.requests += fresh
        self._history += [[(0, self.version)] for _ in fresh]
        return list(range(first, last))

    def sort_when_due(self, cache: SlotCache) -> None:
        """The longest first, once attention has read as much in vain for their order as sorting them takes."""
        ends = self.starts[: self.live] + self.block
        if ends.max() <= slot_attention.NARROWEST:
            return
        order = np.argsort(-ends, kind="stable")
        longest, *_ = sorted_parts = slot_attention.parts_of(ends[order], cache.positions)
        parts = slot_attention.parts_of(ends, cache.positions)
        self._in_vain += slot_attention.attended(parts) - slot_attention.attended(sorted_parts)
        if self._in_vain < _SORTING * self.live * longest[1]:
            return
        self._in_vain, rows = 0, order.tolist()
        self._copy(rows, list(range(self.live)))
        cache.reorder(rows, longest[1])

    def renew(self, version: int) -> None:
        """From the next denoising step on, all sequences are decoded with these weights."""
        self.version = version
        for steps, history in zip(self.step.tolist(), self._history, strict=True):
            history.append((steps, version))

    def harvest(self, rows: list[int], eos_ids: Sequence[int], ignore_eos: bool) -> list[Trajectory]:
        """The finished sequences of those slots."""
        tokens, reveals = self._tokens[rows].cpu().numpy(), self._reveal[rows].cpu().numpy()
        return [
            self._trajectory(row, ids, reveal, eos_ids, ignore_eos)
            for row, ids, reveal in zip(rows, tokens, reveals, strict=True)
        ]

    def _trajectory(
        self, row: int, tokens: np.ndarray, reveal: np.ndarray, eos_ids: Sequence[int], ignore_eos: bool
    ) -> Trajectory:
        request = self.requests[row]
        length, last = request.prompt_ids.size, int(reveal.nonzero()[0][-1]) + 1
        response = tokens[length:last].astype(np.int32)
        reveal = reveal[length:last].astype(np.int16)
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
        """`[R'] int32`: a token revealed at step k has the last version that began after fewer than k steps."""
        begins, versions = zip(*self._history[row], strict=True)
        return np.array(versions, dtype=np.int32)[np.searchsorted(begins, reveal) - 1]

    def free(self, rows: list[int], cache: SlotCache) -> None:
        """Empties slots; occupied ones from the end move into the gaps."""
        gone, left = set(rows), self.live - len(rows)
        gaps = [row for row in rows if row < left]
        moved = [row for row in range(left, self.live) if row not in gone]
        if gaps:
            self._copy(moved, gaps)
            cache.move(moved, gaps, int(self.starts[gaps].max()))
        del self.requests[left:], self._history[left:]

    def _copy(self, source: list[int], target: list[int]) -> None:
        """Slots over others, all at once; a slot may be source and target. Their keys and values are the cache's."""
        for state in (self._tokens, self._reveal, self._numbers, self._threshold):
            state[target] = state[source]
        for known in (self.starts, self.commits, self.masked):
            known[target] = known[source]
        lists: tuple[list[Any], ...] = self.requests, self._history
        for kept in lists:
            for place, one in zip(target, [kept[row] for row in source], strict=True):
                kept[place] = one


def _first_of(tokens: np.ndarray, wanted: Sequence[int]) -> int | None:
    return next((place for place, token in enumerate(tokens.tolist()) if token in wanted), None)
