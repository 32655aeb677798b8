"""The decoder's state: one row a slot, on the device, and the requests that occupy the slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from common.grid import BlockGrid
from common.types import RolloutRequest, Trajectory


class Slots:
    """State of B sequences in work; a free slot is not `live` and computes into the padding's column."""

    def __init__(self, count: int, positions: int, mask_id: int, device: torch.device) -> None:
        self.count = count
        self.mask_id = mask_id
        self.requests: dict[int, RolloutRequest] = {}
        """Occupied slots."""
        self.version = 0
        """Weight version of the next denoising step."""
        self._history: dict[int, list[tuple[int, int]]] = {}
        """By occupied slot: (denoising steps before it, weight version) of each version that decoded it."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.tokens = zeros(count, positions)  # [B, T], masks where nothing is revealed yet
        self.reveal = zeros(count, positions)  # [B, T] denoising step, 0 where not revealed
        self.prompt_length = zeros(count)
        self.end = zeros(count)  # prompt length + most new tokens
        self.offset = zeros(count)  # of the block grid
        self.block_start = zeros(count)  # position at which the block in work starts
        self.step = zeros(count)  # denoising steps so far, whole response
        self.block_step = zeros(count)  # denoising steps so far, block in work
        self.seed = zeros(count)
        self.threshold = zeros(count, dtype=torch.float32)
        self.commit = zeros(count, dtype=torch.bool)  # the block before the one in work is not in the cache yet
        self.live = zeros(count, dtype=torch.bool)

    def refill(self, pending: deque[RolloutRequest], grid: BlockGrid, threshold: float) -> list[int]:
        """Moves requests into free slots; returns those slots."""
        free = [row for row in range(self.count) if row not in self.requests][: len(pending)]
        for row in free:
            request = pending.popleft()
            length = request.prompt_ids.size
            self.requests[row] = request
            self._history[row] = [(0, self.version)]
            self.tokens[row] = self.mask_id
            self.tokens[row, :length] = torch.from_numpy(request.prompt_ids.astype(np.int64)).to(self.tokens.device)
            self.reveal[row] = 0
            self.prompt_length[row] = length
            self.end[row] = length + request.max_new_tokens
            self.offset[row] = grid.offset(length)
            self.block_start[row] = grid.first_block_start(length)
            self.step[row] = self.block_step[row] = 0
            self.seed[row] = request.seed
            self.threshold[row] = threshold if request.threshold is None else request.threshold
            self.commit[row] = False
            self.live[row] = True
        return free

    def renew(self, version: int) -> None:
        """From the next denoising step on, all sequences are decoded with these weights."""
        self.version = version
        steps = self.step.tolist()
        for row, history in self._history.items():
            history.append((steps[row], version))

    def harvest(self, row: int, eos_ids: torch.Tensor, ignore_eos: bool) -> Trajectory:
        """The finished sequence of a slot, which becomes free."""
        request = self.requests.pop(row)
        length, last = request.prompt_ids.size, int(self.reveal[row].nonzero()[-1]) + 1
        response = self.tokens[row, length:last].cpu().numpy().astype(np.int32)
        reveal = self.reveal[row, length:last].cpu().numpy().astype(np.int16)
        versions = self._versions_of(row, reveal)
        stop = None if ignore_eos else _first_of(response[: request.max_new_tokens], eos_ids.tolist())
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
        begins, versions = zip(*self._history.pop(row), strict=True)
        return np.array(versions, dtype=np.int32)[np.searchsorted(begins, reveal) - 1]


def _first_of(tokens: np.ndarray, wanted: Sequence[int]) -> int | None:
    hits = np.flatnonzero(np.isin(tokens, wanted))
    return int(hits[0]) if hits.size else None
