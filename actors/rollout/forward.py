"""The forward of a denoising step: in its exact shape, or in one of few shapes that are recorded once and replayed.

For a small model, a GPU needs less time for a forward than Python needs to launch its kernels. With a recorder
(`cuda_graphs.py`), a step is rounded up to one of few shapes, and the forward of each shape is recorded at its first
use. Rounding up adds free slots, whose cache entries nobody reads before they are overwritten, and commits some blocks
twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opdlm.actors.rollout.attention import Parts, SlotLayout, parts_of
from opdlm.actors.rollout.kv_cache import SlotCache
from opdlm.common.model.load import hidden_states

_NARROWEST_SHAPE = 256
"""Width of the narrowest recorded shape in positions; the others are twice, four times, ... as wide."""

Forward = Callable[..., torch.Tensor]
Recorder = Callable[[Forward, tuple[torch.Tensor, ...]], Callable[[], torch.Tensor]]
"""Takes a function and its arguments; returns a replay, which computes the function again from the current contents of
the arguments' memory. The result of a replay is valid until the next one."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes of a step's forward."""

    commits: int
    """c, the number of blocks to commit."""
    parts: Parts
    """The n slots of the forward in parts, with the positions that each part attends to."""

    @property
    def slots(self) -> int:
        """n, the number of slots."""
        return sum(count for count, _ in self.parts)

    @property
    def width(self) -> int:
        """Positions that the first part attends to; no other part attends to more."""
        return self.parts[0][1]

    def rounded_up(self, slots: int, width: int) -> StepShape:
        """The smallest of few shapes that holds this one, with all slots in one part.

        The slots of these shapes are all slots, a half, a quarter, ... of them; commits are quarters of those; widths
        are doubled from `_NARROWEST_SHAPE`.

        Args:
            slots: number of slots in the cache, the largest possible.
            width: number of positions in the cache, the largest possible.
        """
        while (half := -(-slots // 2)) >= self.slots and half < slots:
            slots = half
        quarter = -(-slots // 4)
        commits = min(-(-self.commits // quarter) * quarter, slots)
        rounded_width = _NARROWEST_SHAPE
        while rounded_width < self.width:
            rounded_width *= 2
        return StepShape(commits, ((slots, min(rounded_width, width)),))


class StepForward:
    """The forwards of one model with one cache.

    Args:
        block: S, tokens in a block.
        recorder: records the forward of each shape; None computes every forward in its exact shape.
        causal: whether clean tokens attend causally.
    """

    def __init__(
        self, model: Any, cache: SlotCache, block: int, recorder: Recorder | None, causal: bool = False
    ) -> None:
        self._model, self._cache, self._block, self._recorder = model, cache, block, recorder
        self._causal = causal
        self._recorded: dict[StepShape, tuple[tuple[torch.Tensor, ...], Callable[[], torch.Tensor]]] = {}

    def shape(self, commits: int, ends: np.ndarray) -> StepShape:
        """The shape of the next forward.

        Args:
            commits: blocks to commit.
            ends: `[n]` int64, position after the current block of each occupied slot.
        """
        exact = StepShape(commits, parts_of(ends, self._cache.positions))
        return exact if self._recorder is None else exact.rounded_up(self._cache.slots, self._cache.positions)

    def __call__(
        self, shape: StepShape, tokens: torch.Tensor, starts: torch.Tensor, commit: torch.Tensor
    ) -> torch.Tensor:
        """Runs the current blocks of the first n slots; in the same forward, commits the block before it in c of them.

        Args:
            shape: sizes of the forward, from `shape()`.
            tokens: `[n, T]` int64, tokens of the first n slots.
            starts: `[n]` int64, position at which the current block of each slot starts.
            commit: `[c]` int64, slots whose block before the current one is to be committed.

        Returns: final hidden states, `[n + c, S, D]`, of the current blocks and then of the committed ones; valid until
            the next call.
        """
        window = starts[:, None] + torch.arange(self._block, device=starts.device)
        rows, positions = torch.arange(shape.slots, device=starts.device), window
        if shape.commits:
            rows, positions = torch.cat([rows, commit]), torch.cat([window, window[commit] - self._block])
        arguments = tokens[rows[:, None], positions], rows, positions, starts + self._block, commit

        def forward(*tensors: torch.Tensor) -> torch.Tensor:
            return self._forward(shape, *tensors)

        if self._recorder is None:
            return forward(*arguments)
        if shape not in self._recorded:
            inputs = tuple(argument.clone() for argument in arguments)
            self._recorded[shape] = inputs, self._recorder(forward, inputs)
        inputs, replay = self._recorded[shape]
        for recorded_input, argument in zip(inputs, arguments, strict=True):
            recorded_input.copy_(argument)
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
        """Can be recorded: reads only its arguments, the weights and the cache, and never waits for the device."""
        config = self._model.config
        group = config.num_attention_heads // config.num_key_value_heads
        layout = SlotLayout(shape.parts, self._block, commit if shape.commits else None, self._causal)
        mask = layout.mask(ends, group, self._cache.keys.dtype)
        self._cache.prepare(rows, positions, (shape.slots, shape.width))
        return hidden_states(self._model, tokens, positions, mask, self._cache, layout=layout)
