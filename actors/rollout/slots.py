"""The decoder's state: one row per slot, on the device, and the requests that occupy the slots.

Occupied slots are always the first `occupied` ones, and free slots take no part in a forward. At the end of each
denoising step the host copies what it needs to launch the next one (`host_starts`, `host_commits`, `host_masked`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opdlm.actors.rollout.attention import Windows
from opdlm.actors.rollout.kv_cache import SPARE, SlotCache
from opdlm.actors.rollout.places import arrange
from opdlm.actors.rollout.sequences import extent, trajectory_of
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.grid import BlockGrid, DraftGrid
from opdlm.common.seeds import as_int64
from opdlm.common.tensors import tensor_to_array
from opdlm.common.types import RolloutRequest, Trajectory

_SORT_COST = 4
"""Cost of sorting one position relative to attending to it: sorting reads and writes it twice, attention reads once."""
_ON_DEVICE = ("_tokens", "_reveal", "_noted", "_numbers", "_threshold", "_kept")
_ON_HOST = ("host_starts", "host_commits", "host_masked", "host_fresh", "_bases", "_widths", "_limits", "_arrivals")
_PROMPT, _END, _START, _STEP, _BLOCK_STEP, _SEED, _BASE = range(7)
"""Columns of `Slots._numbers`."""


class Slots:
    """State of up to B sequences that are being decoded. Shapes: n occupied slots, T positions, S tokens per block."""

    def __init__(self, block: int, mask_id: int, kept: torch.Tensor, noted: torch.Tensor, version: int) -> None:
        """Makes a state without slots; `enlarge` adds some.

        Args:
            kept, noted: `[0, ...]` and `[0, 0, ...]`, of shape, dtype and device of what is `kept` and `noted`.
        """
        self.block = block
        self.mask_id, self.device = mask_id, kept.device
        self.requests: list[RolloutRequest] = []
        """The requests in the occupied slots, in slot order."""
        self.version = version
        """Weight version of the next denoising step."""
        self._wasted = 0
        """What attention has cost since the last sorting that a sorted order of the slots would have saved."""
        self.windows = Windows()
        self._arrived = 0
        """Sequences that have begun so far."""
        self._history: list[list[tuple[int, int]]] = []
        """Per occupied slot, for each weight version that decoded it: (denoising steps done before it, version)."""

        def none(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(0, *shape, dtype=dtype, device=self.device)

        self._tokens, self._reveal, self._numbers = none(0), none(0), none(7)
        self._threshold = none(dtype=torch.float32)
        self._kept, self._noted = kept, noted
        self.host_starts = np.zeros(0, dtype=np.int64)
        """`[B]` on the host: position at which the current block starts."""
        self.host_commits = np.zeros(0, dtype=bool)
        """`[B]` on the host: whether the block before the current one has yet to be committed to the cache."""
        self.host_masked = np.zeros((0, block), dtype=bool)
        """`[B, S]` on the host: whether a position of the current block is still masked."""
        self.host_fresh = np.zeros(0, dtype=bool)
        """`[B]` on the host: whether the blocks before the current one have yet to be computed into the cache."""
        self._bases, self._widths, self._limits, self._arrivals = (np.zeros(0, dtype=np.int64) for _ in range(4))
        """`[B]` on the host each: the slot's place in the cache (first position, number of positions; 0: none yet), the
        positions that it may need at most, and how many sequences had begun before it."""

    @property
    def capacity(self) -> int:
        """B, the number of slots."""
        return len(self._tokens)

    def enlarge(self, capacity: int, positions: int) -> None:
        """Makes at least this many slots of at least this many positions; what they hold stays."""
        if capacity <= self.capacity and positions <= self._tokens.shape[1]:
            return
        for name in _ON_DEVICE:
            old = getattr(self, name)
            width = [positions, *old.shape[2:]] if name in ("_tokens", "_reveal", "_noted") else list(old.shape[1:])
            new = old.new_full((capacity, *width), self.mask_id if name == "_tokens" else 0)
            new[tuple(slice(size) for size in old.shape)] = old
            setattr(self, name, new)
        for name in _ON_HOST:
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
    def noted(self) -> torch.Tensor:
        """`[n, T, ...]`, what is noted of each revealed token, where it is: see `trajectory_of`."""
        return self._noted[: self.occupied]

    @property
    def threshold(self) -> torch.Tensor:
        """`[n]` float32, threshold of the dynamic strategies."""
        return self._threshold[: self.occupied]

    @property
    def kept(self) -> torch.Tensor:
        """`[n, ...]`, what a step keeps for the next one: see `keeps` of `denoise.py` and `verify.py`."""
        return self._kept[: self.occupied]

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
        self.kept[commit] = committed[:, -1]
        return torch.cat([self.kept[:, None], hidden[:, :-1]], dim=1)

    def tokens_so_far(self) -> int:
        """Response tokens that are revealed in the occupied slots, from what the host knows anyway."""
        n = self.occupied
        prompts = np.array([request.prompt_ids.size for request in self.requests], dtype=np.int64)
        limits = np.array([request.max_new_tokens for request in self.requests], dtype=np.int64)
        revealed = self.host_starts[:n] + self.block - prompts - self.host_masked[:n].sum(1)
        return int(np.minimum(revealed, limits).sum())

    def first_rows(self, count: int, cache: SlotCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens `[count, T]`, starts of the current blocks, and `bases`, `[count]` each, of the first slots.

        Free ones are included; they write to a spare position.
        """
        starts, bases = self._numbers[:count, _START], self._numbers[:count, _BASE]
        if count > self.occupied:
            bases = torch.cat([bases[: self.occupied], cache.positions - starts[self.occupied :]])
        return self._tokens[:count], starts, bases

    @property
    def bases(self) -> torch.Tensor:
        """`[n]` int64, position in the cache at which the slot's place begins; `host_bases` is the same on the host."""
        return self._numbers[: self.occupied, _BASE]

    @property
    def host_bases(self) -> np.ndarray:
        return self._bases[: self.occupied]

    @property
    def host_ends(self) -> np.ndarray:
        """`[n]` int64 on the host: positions of each sequence, to the end of its current block."""
        return self.host_starts[: self.occupied] + self.block

    @property
    def host_limits(self) -> np.ndarray:
        """`[n]` int64 on the host: positions of each sequence if it gets as long as it may."""
        return self._limits[: self.occupied]

    def refill(self, fresh: Sequence[RolloutRequest], grid: BlockGrid | DraftGrid, threshold: float) -> None:
        """Begins requests in the first free slots. They have no place in the cache yet."""
        first, last = self.occupied, self.occupied + len(fresh)
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
        self.host_fresh[first:last], self._widths[first:last] = True, 0
        self._limits[first:last] = [extent(request, grid)[1] for request in fresh]
        self._arrivals[first:last] = self._arrived + np.arange(len(fresh))
        self._arrived += len(fresh)
        self.requests += fresh
        self._history += [[(0, self.version)] for _ in fresh]

    def arrange(self, cache: SlotCache, least_slack: float, sorts: bool) -> bool:
        """Gives each slot a place in the cache that its sequence fits into; returns False if they do not fit together.

        Args:
            least_slack: see `places.widths_of`.
            sorts: also sorts the slots, longest first, once attention has wasted as much on their order as it costs.
        """
        n, ends = self.occupied, self.host_ends
        bases, widths, due = self._bases[:n], self._widths[:n], False
        if (ends <= widths).all():
            if sorts:
                self.windows.update(bases, ends, cache.positions + SPARE)
                self._wasted += self.windows.saved
                due = self._wasted > 0 and self._wasted >= _SORT_COST * int(ends.sum())
            if not due:
                return True
        new = arrange(bases, widths, ends, self.host_limits, cache.positions, least_slack, from_first=due)
        if new is None:
            return due  # all fit where they are, if only a sort is due
        order, places = new.order, slice(new.first, n)
        self._wasted = 0 if new.first == 0 else self._wasted
        cache.move(bases[order], new.bases, np.where(self.host_fresh[order], 0, self.host_starts[order]))
        self._copy(order.tolist(), list(range(new.first, n)))
        self._bases[places], self._widths[places] = new.bases, new.widths
        self._numbers[places, _BASE] = torch.from_numpy(new.bases).to(self.device)
        return True

    def lose_cache(self) -> None:
        """Notes that the cache does not hold these sequences any more: it has other weights' keys, or others' keys."""
        self.host_fresh[: self.occupied] = True
        self.host_commits[: self.occupied] = False  # computing the blocks before the current one commits them

    def put_back(self) -> RolloutRequest:
        """Frees the slot whose sequence began last, and returns its request, which is decoded from its beginning."""
        row = int(self._arrivals[: self.occupied].argmax())
        request = self.requests[row]
        self.free([row])
        return request

    def change_version(self, version: int) -> None:
        """Notes that all sequences are decoded with this weight version from the next denoising step on."""
        self.version = version
        for steps, history in zip(self.step.tolist(), self._history, strict=True):
            history.append((steps, version))

    def trajectories(self, rows: list[int], eos_ids: Sequence[int], settings: DecodeSettings) -> list[Trajectory]:
        """The trajectories of the given slots, whose sequences are finished."""
        tokens, reveals = self._tokens[rows].cpu().numpy(), self._reveal[rows].cpu().numpy()
        notes = tensor_to_array(self._noted[rows]) if settings.keeps_notes else [None] * len(rows)
        ends = [] if settings.ignore_eos else eos_ids
        return [
            trajectory_of(self.requests[row], ids, reveal, self._history[row], ends, note)
            for row, ids, reveal, note in zip(rows, tokens, reveals, notes, strict=True)
        ]

    def free(self, rows: list[int]) -> None:
        """Frees the given slots; the slots after them move up, and nothing moves in the cache."""
        freed, remaining = set(rows), self.occupied - len(rows)
        first = min(rows)
        self._copy([row for row in range(first, self.occupied) if row not in freed], list(range(first, remaining)))
        del self.requests[remaining:], self._history[remaining:]

    def _copy(self, source: list[int], target: list[int]) -> None:
        """Copies slots over others, all at once: a slot may be both source and target. Leaves the cache alone."""
        if source == target:
            return
        for name in _ON_DEVICE + _ON_HOST:
            state = getattr(self, name)
            state[target] = state[source]
        lists: tuple[list[Any], ...] = self.requests, self._history
        for entries in lists:
            for row, entry in zip(target, [entries[row] for row in source], strict=True):
                entries[row] = entry
