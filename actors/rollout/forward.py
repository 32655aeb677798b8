"""The forward of a denoising step, in exact shapes or in few shapes that are recorded once and replayed.

A small model's forward takes a GPU less time than Python takes to launch its kernels. With a recorder
(`cuda_graphs.py`) a step is rounded up to one of few shapes, and each shape's forward is recorded at its first use.
What is added are free slots, whose cache nobody reads before it is written anew, and blocks that are committed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opdlm.actors.rollout.attention import Lanes, Parts, parts_of
from opdlm.actors.rollout.kv_cache import SlotCache
from opdlm.common.model.load import hidden_states

_FIRST_WIDTH = 256
"""Of the recorded shapes; the others are twice, four times, ... as wide."""

Forward = Callable[..., torch.Tensor]
Record = Callable[[Forward, tuple[torch.Tensor, ...]], Callable[[], torch.Tensor]]
"""Of a function and its arguments, whose memory stays theirs: what computes it again from what that memory then holds.
The result is good until the next call."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the sizes of a forward follow from."""

    commits: int
    """c, blocks to commit"""
    parts: Parts
    """How far each of the first slots attends."""

    @property
    def slots(self) -> int:
        """n"""
        return sum(count for count, _ in self.parts)

    @property
    def width(self) -> int:
        """Positions that the first part attends to, and no other more."""
        return self.parts[0][1]

    def rounded_up(self, slots: int, width: int) -> StepShape:
        """The next of few shapes: slots are a half, a quarter, ... of all, commits quarters of those, widths double.

        All slots are one part. `slots`, `width`: the most there are.
        """
        while (half := -(-slots // 2)) >= self.slots and half < slots:
            slots = half
        quarter = -(-slots // 4)
        commits = min(-(-self.commits // quarter) * quarter, slots)
        wide = _FIRST_WIDTH
        while wide < self.width:
            wide *= 2
        return StepShape(commits, ((slots, min(wide, width)),))


class StepForward:
    """Forwards of one model with one cache.

    Args:
        block: S, tokens in a block.
        record: records a shape's forward; None computes each in its exact shape.
    """

    def __init__(self, model: Any, cache: SlotCache, block: int, record: Record | None) -> None:
        self._model, self._cache, self._block, self._record = model, cache, block, record
        self._recorded: dict[StepShape, tuple[tuple[torch.Tensor, ...], Callable[[], torch.Tensor]]] = {}

    def shape(self, commits: int, ends: np.ndarray) -> StepShape:
        """Of the next forward; `ends`: `[n]`, position after the block in work of each live slot."""
        exact = StepShape(commits, parts_of(ends, self._cache.positions))
        return exact if self._record is None else exact.rounded_up(self._cache.slots, self._cache.positions)

    def __call__(
        self, shape: StepShape, tokens: torch.Tensor, starts: torch.Tensor, commit: torch.Tensor
    ) -> torch.Tensor:
        """The blocks in work of the first slots, and in the same forward the blocks before them of some.

        Args:
            tokens: `[n, T]` int64, of those slots.
            starts: `[n]` int64, position at which each one's block in work starts.
            commit: `[c]` int64, slots whose block before that is to be committed.

        Returns: final hidden states of the blocks in work, `[n, S, D]`, good until the next call.
        """
        window = starts[:, None] + torch.arange(self._block, device=starts.device)
        rows, positions = torch.arange(shape.slots, device=starts.device), window
        if shape.commits:
            rows, positions = torch.cat([rows, commit]), torch.cat([window, window[commit] - self._block])
        arguments = tokens[rows[:, None], positions], rows, positions, starts + self._block, commit

        def forward(*tensors: torch.Tensor) -> torch.Tensor:
            return self._forward(shape, *tensors)

        if self._record is None:
            return forward(*arguments)
        if shape not in self._recorded:
            own = tuple(argument.clone() for argument in arguments)
            self._recorded[shape] = own, self._record(forward, own)
        own, replay = self._recorded[shape]
        for place, argument in zip(own, arguments, strict=True):
            place.copy_(argument)
        return replay()

    def _forward(
        self,
        shape: StepShape,
        tokens: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        ends: torch.Tensor,
        commit: torch.Tensor,
    ) -> torch.Tensor:
        """Reads nothing but its arguments, the weights and the cache, and waits for nothing: it can be recorded."""
        config = self._model.config
        group = config.num_attention_heads // config.num_key_value_heads
        lanes = Lanes(shape.parts, self._block, commit if shape.commits else None)
        mask = lanes.mask(ends, group, self._cache.keys.dtype)
        self._cache.aim(rows, positions, (shape.slots, shape.width))
        return hidden_states(self._model, tokens, positions, mask, self._cache, layout=lanes)[: shape.slots]
