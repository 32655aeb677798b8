"""The block decoder: prompts -> trajectories, by confidence-based unmasking (METHOD.md section 2).

One training step, in reading order: deploy/run/train.py (the driver) -> deploy/run/loops.py -> this file ->
actors/teacher/scoring.py -> actors/queue/rules.py -> learner/train_step.py -> learner/losses.py. The loops send prompts
to a rollout actor (`actors/rollout/actor.py`), which calls `BlockDecoder.decode`; the trajectories go to a teacher.

    pending requests ──refill──► slots ──► one forward for all slots ──► candidates, confidence
                        (prefill of      [finished block | current block]     │ strategy
                         prompt blocks)   its keys are     its logits         ▼
                                          committed        are read       reveal; block done? sequence done?
                                                                              └─► trajectory, slot free

The forward that runs the first denoising step of a block also writes the clean keys and values of the block before it
(it commits that block), so a sequence needs as many forwards as denoising steps. With a logit shift (METHOD.md section
11), a block's first token is predicted at the clean token before it, whose hidden state each slot keeps from that
forward. Slots advance independently; the host learns once per step which are finished. Oracle: tests/oracles.py

A step itself is in `denoise.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from opdlm.actors.progress import CallProgress
from opdlm.actors.rollout.denoise import Denoiser, Observer
from opdlm.actors.rollout.forward import Recorder, StepForward
from opdlm.actors.rollout.kv_cache import SlotCache
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.rollout.slots import Slots, longest_sequence
from opdlm.common.batches import batches_by_length
from opdlm.common.form import PAPER_FORM, StudentForm
from opdlm.common.grid import BlockGrid, block_index
from opdlm.common.masks import block_causal
from opdlm.common.model.attention import ATTENTION
from opdlm.common.model.load import hidden_states
from opdlm.common.token_ids import TokenIds
from opdlm.common.types import DecodeStats, RolloutRequest, Trajectory

PREFILL_TOKENS = 16384
"""Most tokens, padding included, in one prefill forward; a sequence that is longer gets a forward of its own."""
_PREFILL_COST = 1 / 2
"""Cost of a prefill relative to a denoising step of the same slots. It reads all weights, even for one prompt, so free
slots are filled once they have idled for as long as that costs."""

_GROW_POSITIONS = 256
"""Positions by which the cache is enlarged for a longer sequence while others are being decoded."""

UpdateWeights = Callable[[], int | None]


class BlockDecoder:
    """Decodes prompts with one student: an engine to which requests are added at any time between two steps.

    `step` returns the trajectories that ended; `stream` and `decode` are loops over it. The cache is kept.

    Args:
        model: causal LM of transformers, in eval mode. The decoder sets its attention to `common/model/attention.py`,
            which is plain `sdpa` for every other caller.
        settings: strategy, sampling, grid.
        mask_id: the mask token; it is never a candidate.
        eos_ids: tokens that end a response.
        batch_size: number of slots.
        make_recorder: makes the recorder for the step forwards of one cache (`forward.py`); None: nothing is recorded.
        tokens: the rows of the vocabulary that are tokens; no other row is a candidate. None: all rows.
        form: what clean tokens attend to, and at which position the model's logits predict a token.
    """

    def __init__(
        self,
        model: Any,
        settings: DecodeSettings,
        mask_id: int,
        eos_ids: Sequence[int],
        batch_size: int,
        make_recorder: Callable[[], Recorder] | None = None,
        tokens: TokenIds | None = None,
        form: StudentForm = PAPER_FORM,
    ) -> None:
        self.model = model
        self.settings = settings
        self.mask_id, self.eos_ids = mask_id, sorted(eos_ids)
        self.batch_size, self.form = batch_size, form
        self.grid = BlockGrid(settings.block_size, settings.block_grid)
        rows = model.lm_head.weight.shape[0]
        never = (TokenIds(rows) if tokens is None else tokens).without(mask_id).others(rows)
        self._denoise = Denoiser(model, settings, mask_id, self.eos_ids, never, form)
        model.set_attn_implementation(ATTENTION)
        self._make_recorder = make_recorder
        self._cache: SlotCache | None = None
        self._step_forward: StepForward | None = None
        self._slots: Slots | None = None
        self._waiting: deque[RolloutRequest] = deque()
        self.version = 0
        """Weight version of the next denoising step."""
        self._idle_steps = 0
        """Steps that slots were free for waiting requests since the last refill, summed over the slots."""
        self._finished: dict[int, Trajectory] = {}
        """By index, the sequences that the running `decode` has finished."""
        self.forwards = self.forward_tokens = 0
        """Denoising forwards, and tokens that went through the student, since the decoder was made."""

    # --- the engine: add requests at any time between two steps -----------------------------------------------------

    @property
    def occupied(self) -> int:
        """Number of sequences that are being decoded."""
        return self._slots.occupied if self._slots else 0

    @property
    def waiting(self) -> int:
        """Number of requests that were added and have no slot yet."""
        return len(self._waiting)

    @property
    def room(self) -> int:
        """Number of further requests that could begin with the next step; negative if more wait than can begin."""
        return self.batch_size - self.occupied - self.waiting

    def add(self, requests: Sequence[RolloutRequest]) -> None:
        """Adds requests, which begin as slots become free, in this order.

        Raises:
            ValueError: see `check`; none is added.
        """
        self.check(requests)
        self._waiting.extend(requests)

    def check(self, requests: Sequence[RolloutRequest]) -> None:
        """Refuses requests that cannot be decoded.

        Raises:
            ValueError: a prompt is empty, or prompt and response do not fit into the model's context.
        """
        longest_sequence(requests, self.grid, self.model.config.max_position_embeddings)

    @torch.inference_mode()
    def step(self, observer: Observer | None = None, refill: bool = True) -> list[Trajectory]:
        """Fills free slots, runs one denoising step, and returns the trajectories that it ended; frees their slots.

        Args:
            observer: called after the step with what it did.
            refill: whether waiting requests may begin.

        Raises:
            OpdlmError: the model's logits are not finite, so no token can be drawn from them.
        """
        self._idle_steps += min(self.batch_size - self.occupied, self.waiting) if refill else 0
        if refill and self.waiting and self._idle_steps >= _PREFILL_COST * self.occupied:
            slots, cache = self._allocate()
            self._prefill(slots, cache, slots.refill(self._waiting, self.grid, self.settings.threshold))
            self._idle_steps = 0
        if self._slots is None or not self.occupied:
            return []
        assert self._cache is not None, "`_allocate` makes it together with the slots"
        assert self._step_forward is not None, "`_allocate` makes it together with the slots"
        if self._make_recorder is None:  # a recorded forward has one part, for which the order does not matter
            self._slots.sort_when_due(self._cache)
        finished, count = self._denoise(self._slots, self._step_forward, observer)
        self.forwards += 1
        self.forward_tokens += count
        if not finished:
            return []
        trajectories = self._slots.trajectories(finished, self.eos_ids, self.settings.ignore_eos)
        self._slots.free(finished, self._cache)
        return trajectories

    @torch.inference_mode()
    def use_weights(self, version: int) -> None:
        """Notes that the model holds the weights of this version from the next step on.

        Unfinished sequences go on with them, as if their tokens so far had been given: a step depends on tokens and
        weights alone, so no slot has to wait for the end of its block.
        """
        self.version = version
        if self._slots is not None and self._cache is not None:
            self._slots.change_version(version)
            self._prefill(self._slots, self._cache, range(self.occupied))
            self._slots.host_commits[: self.occupied] = False  # the prefill has committed those blocks

    def clear(self) -> None:
        """Drops all requests and sequences, finished or not."""
        self._waiting.clear()
        self._slots, self._finished, self._idle_steps = None, {}, 0

    def progress(self) -> CallProgress:
        """How far the running `decode` has come. Call it between two denoising steps, from `update_weights`."""
        tokens = sum(trajectory.response_length for trajectory in self._finished.values())
        return CallProgress(tuple(self._finished), tokens + self.tokens_so_far())

    def tokens_so_far(self) -> int:
        """Response tokens that are revealed in the sequences that are being decoded."""
        return self._slots.tokens_so_far() if self._slots else 0

    # --- whole calls ------------------------------------------------------------------------------------------------

    def decode(
        self,
        requests: Sequence[RolloutRequest],
        weight_version: int = 0,
        observer: Observer | None = None,
        update_weights: UpdateWeights | None = None,
    ) -> tuple[list[Trajectory], DecodeStats]:
        """Decodes every request; arguments and errors as in `stream`. The trajectories follow the order of requests."""
        started, forwards, forward_tokens = time.perf_counter(), self.forwards, self.forward_tokens
        for trajectory in self.stream(requests, weight_version, observer, update_weights):
            self._finished[trajectory.index] = trajectory
        trajectories = [self._finished[request.index] for request in requests]
        self.clear()
        counts = self.forwards - forwards, self.forward_tokens - forward_tokens
        seconds = time.perf_counter() - started
        return trajectories, DecodeStats.of(trajectories, weight_version, *counts, seconds)

    def stream(
        self,
        requests: Sequence[RolloutRequest],
        weight_version: int = 0,
        observer: Observer | None = None,
        update_weights: UpdateWeights | None = None,
    ) -> Iterator[Trajectory]:
        """Yields each trajectory as its sequence ends. Whatever the engine held before is dropped.

        Args:
            weight_version: version of the weights that are in the model.
            observer: see `step`.
            update_weights: called before each denoising step. It may load new weights into the model, and then returns
                their version: see `use_weights`.

        Raises:
            ValueError, OpdlmError: see `add` and `step`.
        """
        self.clear()
        self.version = weight_version
        self.add(requests)
        while self.waiting or self.occupied:
            if update_weights is not None and (version := update_weights()) is not None:
                self.use_weights(version)
            yield from self.step(observer)

    # --- memory and prompts -----------------------------------------------------------------------------------------

    def _allocate(self) -> tuple[Slots, SlotCache]:
        """The slots and their cache, with room for all waiting requests, or for as many as there may be slots.

        Both are kept between calls, and enlarged for more or longer sequences than they have held so far.
        """
        longest = longest_sequence(self._waiting, self.grid, self.model.config.max_position_embeddings)
        # Recorded forwards belong to one cache, so with a recorder the cache has all slots from the beginning.
        slots = self.batch_size if self._make_recorder else min(self.batch_size, self.occupied + self.waiting)
        cache = self._cache
        if cache is None or cache.slots < slots or cache.positions < longest:
            if cache is not None and self.occupied:  # few enlargements while sequences are decoded
                slots = max(slots, min(2 * cache.slots, self.batch_size))
                longest = max(cache.positions, -(-longest // _GROW_POSITIONS) * _GROW_POSITIONS)
            else:
                cache = self._cache = self._step_forward = self._slots = (
                    None  # frees them before the new ones are allocated
                )
            weight = self.model.lm_head.weight
            new = SlotCache(self.model.config, slots, longest, weight.dtype, self.model.device)
            if cache is not None:
                new.take(cache)
            self._cache = cache = new
            recorder = self._make_recorder() if self._make_recorder else None
            self._step_forward = StepForward(self.model, cache, self.grid.block_size, recorder, self.form.causal)
        if self._slots is None:
            border = self.model.config.hidden_size * self.form.logit_shift
            empty = self.model.lm_head.weight.new_zeros(0, border)
            self._slots = Slots(self.grid.block_size, self.mask_id, empty)
            self._slots.version = self.version
        self._slots.enlarge(cache.slots, cache.positions)
        return self._slots, cache

    def _prefill(self, slots: Slots, cache: SlotCache, rows: Sequence[int]) -> None:
        """Computes the keys and values of all blocks before the current one, in forwards of bounded size."""
        rows = [row for row in rows if slots.host_starts[row]]
        lengths = [int(slots.host_starts[row]) for row in rows]
        self.forward_tokens += sum(lengths)
        for group in batches_by_length(lengths, PREFILL_TOKENS):
            chosen, longest = [rows[i] for i in group], lengths[group[0]]
            offsets = [[self.grid.offset(slots.requests[row].prompt_ids.size)] for row in chosen]
            where, offset = (torch.tensor(numbers, device=slots.device) for numbers in (chosen, offsets))
            positions = torch.arange(longest, device=slots.device).expand(len(chosen), -1)
            # Tokens after a shorter sequence's end need no mask: they are in later blocks, which it does not see.
            blocks = positions if self.form.causal else block_index(positions, offset, self.grid.block_size)
            cache.prepare(where, positions, None)
            tokens = slots.tokens[where, :longest]
            hidden = hidden_states(self.model, tokens, positions, block_causal(blocks, blocks), cache)
            if self.form.logit_shift:
                slots.border[where] = hidden[torch.arange(len(chosen)), slots.block_start[where] - 1]
