"""The block decoder: prompts -> trajectories, by confidence-based unmasking (METHOD.md section 2).

One training step, in reading order: deploy/run/train.py (the driver) -> deploy/run/loops.py -> this file ->
actors/teacher/scoring.py -> actors/queue/rules.py -> learner/train_step.py -> learner/losses.py. The loops deal prompts
to rollout actors (`actors/rollout/actor.py`), which step a decoder for ever; each trajectory goes to a teacher.

    waiting requests ──refill──► slots ──► one forward for all slots ──► candidates, confidence
                        (prefill of      [finished block | current block]     │ strategy
                         prompt blocks)   its keys are     its logits         ▼
                                          committed        are read       reveal; block done? sequence done?
                                                                              └─► trajectory, slot free

The forward that runs the first denoising step of a block also writes the clean keys and values of the block before it
(it commits that block), so a sequence needs as many forwards as denoising steps. With a logit shift (METHOD.md section
11), a block's first token is predicted at the clean token before it, whose hidden state each slot keeps from that
forward. Slots advance independently; the host learns once per step which are finished. Oracle: tests/oracles.py

A step itself is in `denoise.py`, that of lossless decoding in `verify.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from opdlm.actors.progress import CallProgress
from opdlm.actors.rollout.denoise import Denoiser, Observer
from opdlm.actors.rollout.forward import Recorder, StepForward, prefill
from opdlm.actors.rollout.kv_cache import SlotCache
from opdlm.actors.rollout.places import ADMISSION_SLACK, GROWING_SLACK, LEAST_SLACK, widths_of
from opdlm.actors.rollout.sequences import check_requests, extent, grid_of
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.rollout.slots import Slots
from opdlm.actors.rollout.stopping import StopStrings
from opdlm.actors.rollout.verify import Verifier
from opdlm.common.errors import OpdlmError
from opdlm.common.form import PAPER_FORM, StudentForm
from opdlm.common.model.attention import ATTENTION
from opdlm.common.token_ids import TokenIds
from opdlm.common.types import DecodeStats, RolloutRequest, Trajectory

_PREFILL_COST = 1 / 2
"""Cost of a prefill relative to a denoising step of the same slots. It reads all weights, even for one prompt, so free
slots are filled once they have idled for as long as that costs."""

UpdateWeights = Callable[[], int | None]


class BlockDecoder:
    """Decodes prompts with one student: an engine to which requests are added at any time between two steps.

    `step` returns the trajectories that ended; `stream` and `decode` are loops over it.

    A sequence begins if a slot is free and the cache has room. Where sequences grow until the cache is full, the one
    that began last is put back: it waits in front of all others and is decoded again, to the same tokens if the
    weights are the same, once another has ended. So the one that began first always ends.

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
        cache: the cache, which decoders of one model may share, one at a time: a decoder that goes on after another one
            computes its unfinished sequences' keys and values again. None: a cache of its own, which grows as needed.
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
        cache: SlotCache | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.mask_id, self.eos_ids, self.batch_size, self.form = mask_id, sorted(eos_ids), batch_size, form
        self.grid = grid_of(settings)
        rows = model.lm_head.weight.shape[0]
        never = (TokenIds(rows) if tokens is None else tokens).without(mask_id).others(rows)
        step = Verifier if settings.strategy == "verified" else Denoiser
        self._denoise = step(model, settings, mask_id, self.eos_ids, never, form)
        model.set_attn_implementation(ATTENTION)
        self._make_recorder = make_recorder
        self.cache = SlotCache(model) if cache is None else cache
        self._step_forward = StepForward(model, self.cache, settings.block_size, batch_size, make_recorder, form.causal)
        self._longest_need = 1  # positions, to the end of the first block, of the longest prompt so far
        self.stops: StopStrings | None = None  # None: the stop strings of requests end nothing
        self.version = 0  # weight version of the next denoising step
        self.forwards = self.forward_tokens = self.put_back = 0
        """Since the decoder was made: denoising forwards, tokens that went through the student, sequences put back."""
        self._idle_steps: int
        self.clear()

    # --- the engine: add requests at any time between two steps -----------------------------------------------------

    @property
    def occupied(self) -> int:
        """Number of sequences that are being decoded."""
        return self._slots.occupied

    @property
    def waiting(self) -> int:
        """Number of requests that have no slot yet."""
        return len(self._waiting)

    @property
    def room(self) -> int:
        """Number of further requests that could begin with the next step; negative if more wait than there are slots.

        In a bounded cache, of requests with the longest prompt so far.
        """
        free = self.batch_size - self.occupied - self.waiting
        if self.cache.limit is None or free <= 0:
            return free
        if self._crowded:
            return 0
        # Another thread may ask, so it copies what it iterates over.
        waiting = sum(extent(request, self.grid)[0] for request in list(self._waiting))
        spare = self.cache.limit / (1 + ADMISSION_SLACK) - self.live_tokens - waiting
        fitting = max(int(spare // self._longest_need), 0)
        return min(free, fitting if self.occupied or self.waiting else max(fitting, 1))

    @property
    def live_tokens(self) -> int:
        """Positions of the cache that the sequences have filled, to the ends of their current blocks."""
        return int(self._slots.host_ends.sum())

    def add(self, requests: Sequence[RolloutRequest]) -> None:
        """Adds requests, which begin as slots become free, in this order. Adds none if `check` refuses one."""
        self.check(requests)
        self._waiting.extend(requests)
        self._longest_need = max([self._longest_need, *(extent(request, self.grid)[0] for request in requests)])

    def check(self, requests: Sequence[RolloutRequest]) -> None:
        """Refuses requests that cannot be decoded.

        Raises:
            ValueError: a prompt is empty, or prompt and response do not fit into the model's context or the cache.
        """
        check_requests(requests, self.grid, self.model.config.max_position_embeddings, self.cache.limit)

    @torch.inference_mode()
    def step(self, observer: Observer | None = None, refill: bool = True) -> list[Trajectory]:
        """Fills free slots, runs one denoising step, and returns the trajectories that it ended; frees their slots.

        Args:
            observer: called after the step with what it did.
            refill: whether waiting requests may begin.

        Raises:
            OpdlmError: the model's logits are not finite, so no token can be drawn from them.
        """
        slots = self._slots
        if self.cache.user is not self:
            self.cache.user = self
            slots.lose_cache()
        self._idle_steps += min(self.batch_size - self.occupied, self.waiting) if refill else 0
        if refill and self.waiting and self._idle_steps >= _PREFILL_COST * self.occupied:
            self._begin()
            self._idle_steps = 0
        if not self.occupied:
            return []
        self._make_room()
        self.forward_tokens += prefill(self.model, self.cache, slots, self.grid, self.form)
        try:
            finished, count = self._denoise(slots, self._step_forward, observer)
        except OpdlmError:
            self.cache.clear()
            raise
        self.forwards += 1
        self.forward_tokens += count
        if self.stops is not None:
            finished = sorted(finished + self.stops.stopped(slots, finished, self.grid))
        if not finished:
            return []
        trajectories = slots.trajectories(finished, self.eos_ids, self.settings)
        slots.free(finished)
        self._crowded = False
        return trajectories

    @torch.inference_mode()
    def use_weights(self, version: int) -> None:
        """Notes that the model holds the weights of this version from the next step on.

        Unfinished sequences go on with them, as if their tokens so far had been given: a step depends on tokens and
        weights alone, so no slot has to wait for the end of its block.
        """
        self.version = version
        self._slots.change_version(version)
        if not self._denoise.cache_outlives_weights:
            self._slots.lose_cache()

    def clear(self) -> None:
        """Drops all requests and sequences, finished or not."""
        self._slots = Slots(self.grid.room, self.mask_id, *self._denoise.keeps(), self.version)
        self._waiting: deque[RolloutRequest] = deque()
        self._crowded = False  # whether a sequence was put back and none has ended since
        self._idle_steps = 0  # that slots were free for waiting requests since the last refill, summed over the slots
        self._finished: dict[int, Trajectory] = {}  # by index, what the running `decode` has finished

    def progress(self) -> CallProgress:
        """How far the running `decode` has come. Call it between two denoising steps, from `update_weights`."""
        tokens = sum(trajectory.response_length for trajectory in self._finished.values())
        return CallProgress(tuple(self._finished), tokens + self.tokens_so_far())

    def tokens_so_far(self) -> int:
        """Response tokens that are revealed in the sequences that are being decoded."""
        return self._slots.tokens_so_far()

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
        self.version = weight_version
        self.clear()
        self.add(requests)
        while self.waiting or self.occupied:
            if update_weights is not None and (version := update_weights()) is not None:
                self.use_weights(version)
            yield from self.step(observer)

    def _begin(self) -> None:
        """Begins as many waiting requests, in their order, as there are free slots and room in the cache."""
        chosen: list[RolloutRequest] = []
        free = self.batch_size - self.occupied
        while self._waiting and len(chosen) < free and self._fit([*chosen, self._waiting[0]]):
            chosen.append(self._waiting.popleft())
        if chosen:
            self._slots.enlarge(self.batch_size, max(extent(request, self.grid)[1] for request in chosen))
            self._slots.refill(chosen, self.grid, self.settings.threshold)

    def _fit(self, fresh: list[RolloutRequest]) -> bool:
        """Whether these requests can begin beside the sequences that are being decoded."""
        if self.cache.limit is None or (self._crowded and self.occupied):
            return self.cache.limit is None
        begin, end = zip(*(extent(request, self.grid) for request in fresh), strict=True)
        needs, limits = np.append(self._slots.host_ends, begin), np.append(self._slots.host_limits, end)
        return widths_of(needs, limits, self.cache.limit, ADMISSION_SLACK) is not None

    def _make_room(self) -> None:
        """Gives every sequence a place in the cache that it fits into; enlarges the cache, or puts sequences back."""
        slots, cache, sorts = self._slots, self.cache, self._make_recorder is None
        while not slots.arrange(cache, LEAST_SLACK if cache.limit else GROWING_SLACK, sorts):
            if cache.limit is not None:
                self._waiting.appendleft(slots.put_back())
                self._crowded = True
                self.put_back += 1
            elif sorts:
                cache.enlarge(int(np.minimum(slots.host_limits, slots.host_ends + -(-slots.host_ends // 2)).sum()))
            else:  # all forwards are recorded again, so enlarge it once for all slots
                cache.enlarge(self.batch_size * int(slots.host_limits.max()))
