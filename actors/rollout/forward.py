"""The forwards of prompts, and of a denoising step: in its exact shape, or in one of few that are recorded once.

For a small model, a GPU needs less time for a forward than Python needs to launch its kernels. With a recorder
(`cuda_graphs.py`), a step is rounded up to one of few shapes, and the forward of each shape is recorded at its first
use. Rounding up adds free slots, whose entries go to a spare position of the cache, and commits some blocks twice. A
recorded forward copies the keys and values that it attends to, because the places of the slots change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opdlm.actors.rollout.attention import Parts, slot_layout
from opdlm.actors.rollout.kv_cache import SPARE, SlotCache
from opdlm.actors.rollout.slots import Slots
from opdlm.common.batches import batches_by_length
from opdlm.common.form import StudentForm
from opdlm.common.grid import BlockGrid, DraftGrid, block_index
from opdlm.common.masks import block_causal
from opdlm.common.model.load import hidden_states

PREFILL_TOKENS = 16384
"""Most tokens, padding included, in one prefill forward; a sequence that is longer gets a forward of its own."""
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
    slots: int
    """n, the number of slots in the forward."""
    width: int
    """Positions that a slot attends to at most."""
    parts: Parts = ()
    """How the slots lie in the cache. Empty in a shape that is recorded."""

    def rounded_up(self, slots: int, width: int) -> StepShape:
        """The smallest of few shapes that holds this one.

        The slots of these shapes are all slots, a half, a quarter, ... of them; commits are quarters of those; widths
        are doubled from `_NARROWEST_SHAPE`.

        Args:
            slots: the largest possible number of slots.
            width: the largest possible width.
        """
        while (half := -(-slots // 2)) >= self.slots and half < slots:
            slots = half
        quarter = -(-slots // 4)
        commits = min(-(-self.commits // quarter) * quarter, slots)
        rounded_width = _NARROWEST_SHAPE
        while rounded_width < self.width:
            rounded_width *= 2
        return StepShape(commits, slots, min(rounded_width, width))


class StepForward:
    """The forwards of one model with one cache.

    Args:
        block: S, tokens in a block.
        slots: largest number of slots.
        make_recorder: makes what records the forward of each shape, anew for a cache that was enlarged, because a
            recorded forward knows the memory of its cache; None computes every forward in its exact shape.
        causal: whether clean tokens attend causally.
    """

    def __init__(
        self,
        model: Any,
        cache: SlotCache,
        block: int,
        slots: int,
        make_recorder: Callable[[], Recorder] | None,
        causal: bool = False,
    ) -> None:
        self._model, self.cache, self._block, self._slots = model, cache, block, slots
        self._make_recorder, self._causal = make_recorder, causal
        self._recorder: Recorder | None = None
        self._recorded: dict[StepShape, tuple[tuple[torch.Tensor, ...], Callable[[], torch.Tensor]]] = {}
        self._recorded_positions = 0
        """Positions of the cache that the recorded forwards know."""

    def shape(self, commits: int, slots: Slots) -> StepShape:
        """The shape of the next forward of all occupied slots. `commits`: blocks to commit."""
        width = int(slots.host_ends.max())
        if self._make_recorder is None:
            slots.windows.update(slots.host_bases, slots.host_ends, self.cache.positions + SPARE)
            return StepShape(commits, slots.occupied, width, slots.windows.parts)
        return StepShape(commits, slots.occupied, width).rounded_up(self._slots, self.cache.positions)

    def __call__(
        self, shape: StepShape, tokens: torch.Tensor, starts: torch.Tensor, bases: torch.Tensor, commit: torch.Tensor
    ) -> torch.Tensor:
        """Runs the current blocks of the first n slots; in the same forward, commits the block before it in c of them.

        Args:
            shape: sizes of the forward, from `shape()`.
            tokens: `[n, T]` int64, tokens of the first n slots.
            starts: `[n]` int64, position at which the current block of each slot starts.
            bases: `[n]` int64, position in the cache at which the place of each slot begins.
            commit: `[c]` int64, slots whose block before the current one is to be committed.

        Returns: final hidden states, `[n + c, S, D]`, of the current blocks and then of the committed ones; valid until
            the next call.
        """
        window = starts[:, None] + torch.arange(self._block, device=starts.device)
        rows, positions = torch.arange(shape.slots, device=starts.device), window
        if shape.commits:
            rows, positions = torch.cat([rows, commit]), torch.cat([window, window[commit] - self._block])
        written = bases[rows][:, None] + positions
        arguments = tokens[rows[:, None], positions], positions, written, bases, starts + self._block, commit

        def forward(*tensors: torch.Tensor) -> torch.Tensor:
            return self._forward(shape, *tensors)

        if self._make_recorder is None:
            return forward(*arguments)
        if self._recorder is None or self._recorded_positions != self.cache.positions:
            self._recorded = {}  # frees the old ones before new ones are recorded
            self._recorder, self._recorded_positions = self._make_recorder(), self.cache.positions
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
        positions: torch.Tensor,
        written: torch.Tensor,
        bases: torch.Tensor,
        ends: torch.Tensor,
        commit: torch.Tensor,
    ) -> torch.Tensor:
        """Can be recorded: reads only its arguments, the weights and the cache, and never waits for the device."""
        config, cache = self._model.config, self.cache
        layout = slot_layout(
            shape.parts,
            shape.width,
            bases,
            ends,
            self._block,
            commit if shape.commits else None,
            self._causal,
            config.num_attention_heads // config.num_key_value_heads,
            cache.positions + SPARE,
            self._model.lm_head.weight.dtype,
        )
        cache.prepare(written, attends_to_cache=True)
        noisy = (torch.arange(len(tokens), device=tokens.device) < shape.slots)[:, None]
        # Transformers wants a mask; the layout takes its own.
        return hidden_states(self._model, tokens, positions, layout.masks[0], cache, noisy, layout=layout)


def prefill(model: Any, cache: SlotCache, slots: Slots, grid: BlockGrid | DraftGrid, form: StudentForm) -> int:
    """Computes the keys and values of all blocks before the current one of fresh slots, in forwards of bounded size.

    Returns: the tokens of these blocks.
    """
    n = slots.occupied
    rows = np.flatnonzero(slots.host_fresh[:n] & (slots.host_starts[:n] > 0)).tolist()
    slots.host_fresh[:n] = False
    lengths = [int(slots.host_starts[row]) for row in rows]
    for group in batches_by_length(lengths, PREFILL_TOKENS):
        chosen, longest = [rows[i] for i in group], lengths[group[0]]
        offsets = [[grid.offset(slots.requests[row].prompt_ids.size)] for row in chosen]
        where, offset = (torch.tensor(numbers, device=slots.device) for numbers in (chosen, offsets))
        positions = torch.arange(longest, device=slots.device).expand(len(chosen), -1)
        # Tokens after a shorter sequence's end need no mask: they are in later blocks, which it does not see.
        blocks = positions if form.causal else block_index(positions, offset, grid.block_size)
        starts = slots.block_start[where]
        written = torch.where(positions < starts[:, None], slots.bases[where][:, None] + positions, cache.positions)
        cache.prepare(written, attends_to_cache=False)
        tokens = slots.tokens[where, :longest]
        hidden = hidden_states(model, tokens, positions, block_causal(blocks, blocks), cache)
        if form.logit_shift and isinstance(grid, BlockGrid):
            slots.kept[where] = hidden[torch.arange(len(chosen), device=slots.device), starts - 1]
    return sum(lengths)
