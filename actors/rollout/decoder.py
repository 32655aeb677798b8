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

Shapes: n occupied slots, S tokens per block, m masked positions in all current blocks together, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from opdlm.actors.progress import CallProgress
from opdlm.actors.rollout.forward import Recorder, StepForward
from opdlm.actors.rollout.kv_cache import SlotCache
from opdlm.actors.rollout.observation import StepObservation
from opdlm.actors.rollout.remasking import STRATEGIES, DenoisingStep, entropy_of
from opdlm.actors.rollout.sampling import draw_candidates, hashed_uniform
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

_TOKEN_STREAM, _ORDER_STREAM = 0, 1  # two independent sequences of uniform numbers
PREFILL_TOKENS = 16384
"""Most tokens, padding included, in one prefill forward; a sequence that is longer gets a forward of its own."""
_REFILL_SHARE = 1 / 4
"""Share of the slots that must be free before free slots are filled again (measured in tests/benchmarks/RESULTS.md)."""

Observer = Callable[[StepObservation], None]
UpdateWeights = Callable[[], int | None]


class BlockDecoder:
    """Decodes batches of prompts with one student; keeps its cache between calls.

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
        self.mask_id = mask_id
        self.eos_ids = torch.tensor(sorted(eos_ids), device=model.device)
        self.batch_size, self.form = batch_size, form
        self.grid = BlockGrid(settings.block_size, settings.block_grid)
        self._strategy = STRATEGIES[settings.strategy]
        rows = model.lm_head.weight.shape[0]
        never = (TokenIds(rows) if tokens is None else tokens).without(mask_id).others(rows)
        self._never_candidates = torch.tensor(never, device=model.device)
        model.set_attn_implementation(ATTENTION)
        self._make_recorder = make_recorder
        self._cache: SlotCache | None = None
        self._step_forward: StepForward | None = None
        self._slots: Slots | None = None
        self._finished: dict[int, Trajectory] = {}
        """By index, the sequences that the running `decode` has finished."""
        self._forwards = self._forward_tokens = 0

    def decode(
        self,
        requests: Sequence[RolloutRequest],
        weight_version: int = 0,
        observer: Observer | None = None,
        update_weights: UpdateWeights | None = None,
    ) -> tuple[list[Trajectory], DecodeStats]:
        """Decodes every request; arguments and errors as in `stream`. The trajectories follow the order of requests."""
        started = time.perf_counter()
        self._forwards = self._forward_tokens = 0
        self._finished = {}
        for trajectory in self.stream(requests, weight_version, observer, update_weights):
            self._finished[trajectory.index] = trajectory
        trajectories = [self._finished[request.index] for request in requests]
        self._finished, self._slots = {}, None
        seconds = time.perf_counter() - started
        return trajectories, DecodeStats.of(trajectories, weight_version, self._forwards, self._forward_tokens, seconds)

    def progress(self) -> CallProgress:
        """How far the running `decode` has come. Call it between two denoising steps, from `update_weights`."""
        tokens = sum(trajectory.response_length for trajectory in self._finished.values())
        return CallProgress(tuple(self._finished), tokens + (self._slots.tokens_so_far() if self._slots else 0))

    @torch.inference_mode()
    def stream(
        self,
        requests: Sequence[RolloutRequest],
        weight_version: int = 0,
        observer: Observer | None = None,
        update_weights: UpdateWeights | None = None,
    ) -> Iterator[Trajectory]:
        """Yields each trajectory as its sequence ends.

        Args:
            weight_version: version of the weights that are in the model.
            observer: called after each denoising step with what the step did.
            update_weights: called before each denoising step. It may load new weights into the model, and then returns
                their version. Unfinished sequences go on with the new weights, as if their tokens so far had been
                given: a step depends on tokens and weights alone, so no slot has to wait for the end of its block.

        Raises:
            ValueError: a prompt is empty, or prompt and response do not fit into the model's context.
            OpdlmError: the model's logits are not finite, so no token can be drawn from them.
        """
        longest = longest_sequence(requests, self.grid, self.model.config.max_position_embeddings)
        if not requests:
            return
        # Recorded forwards belong to one cache, so with a recorder every call uses a cache with all slots.
        capacity = self.batch_size if self._make_recorder else min(self.batch_size, len(requests))
        border = self.model.lm_head.weight.new_zeros(capacity, self.model.config.hidden_size * self.form.logit_shift)
        slots = self._slots = Slots(longest, self.grid.block_size, self.mask_id, border)
        cache = self._cache_for(slots.capacity, longest)
        pending = deque(requests)
        slots.version = weight_version
        while pending or slots.occupied:
            if update_weights is not None and (version := update_weights()) is not None:
                slots.change_version(version)
                self._prefill(slots, cache, range(slots.occupied))
                slots.host_commits[: slots.occupied] = False  # the prefill has committed those blocks
            # A free slot costs nothing, but a prefill reads all weights even for one prompt: so fill several at a time.
            enough = min(len(pending), max(1, int(slots.capacity * _REFILL_SHARE)))
            if pending and (not slots.occupied or slots.capacity - slots.occupied >= enough):
                self._prefill(slots, cache, slots.refill(pending, self.grid, self.settings.threshold))
            if self._make_recorder is None:  # a recorded forward has one part, for which the order does not matter
                slots.sort_when_due(cache)
            finished = self._step(slots, observer)
            if finished:
                yield from slots.trajectories(finished, self.eos_ids.tolist(), self.settings.ignore_eos)
                slots.free(finished, cache)

    def _cache_for(self, slots: int, positions: int) -> SlotCache:
        """The cache of the last call if it has exactly these slots and enough positions, else a new one."""
        if self._cache is None or self._cache.slots != slots or self._cache.positions < positions:
            self._cache = self._step_forward = None  # frees the old cache before the new one is allocated
            weight = self.model.lm_head.weight
            self._cache = SlotCache(self.model.config, slots, positions, weight.dtype, self.model.device)
            recorder = self._make_recorder() if self._make_recorder else None
            self._step_forward = StepForward(self.model, self._cache, self.grid.block_size, recorder, self.form.causal)
        return self._cache

    def _prefill(self, slots: Slots, cache: SlotCache, rows: Sequence[int]) -> None:
        """Computes the keys and values of all blocks before the current one, in forwards of bounded size."""
        rows = [row for row in rows if slots.host_starts[row]]
        lengths = [int(slots.host_starts[row]) for row in rows]
        self._forward_tokens += sum(lengths)
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

    def _step(self, slots: Slots, observer: Observer | None) -> list[int]:
        """Runs one denoising step of all occupied slots; returns the slots whose sequence is finished by it."""
        assert self._step_forward is not None, "`_cache_for` makes it together with the cache"
        n, block = slots.occupied, self.grid.block_size
        window = slots.block_start[:, None] + torch.arange(block, device=slots.device)  # [n, S] positions
        # The host copies its indices to the device before it launches the forward: later, the copy would wait for it.
        committing, masked_places = np.flatnonzero(slots.host_commits[:n]), np.flatnonzero(slots.host_masked[:n])
        shape = self._step_forward.shape(committing.size, slots.host_starts[:n] + block)
        # A shape that was rounded up has room for more commits: `resize` repeats slots, whose blocks are written twice.
        indices = torch.from_numpy(np.concatenate([np.resize(committing, shape.commits), masked_places]))
        indices = indices.to(slots.device)
        commit, places = indices[: shape.commits], indices[shape.commits :]  # [c] slots, [m] places in [n * S]
        hidden = self._step_forward(shape, *slots.first_rows(shape.slots), commit)
        self._forwards += 1
        self._forward_tokens += (n + committing.size) * block
        if self.form.logit_shift:
            hidden = slots.shifted(hidden[:n], hidden[shape.slots :], commit)
        logits = self.model.lm_head(hidden[:n].flatten(0, 1)[places]).float()  # [m, V], masked positions only
        mask_logit = logits[:, self.mask_id].clone()
        logits.index_fill_(1, self._never_candidates, float("-inf"))

        def in_blocks(values: torch.Tensor) -> torch.Tensor:
            """Values of the masked positions `[m, ...]` -> `[n, S, ...]`, 0 at the other positions."""
            whole = values.new_zeros(n * block, *values.shape[1:])
            return whole.index_copy_(0, places, values).unflatten(0, (n, block))

        old_reveal, old_tokens = slots.reveal.gather(1, window), slots.tokens.gather(1, window)
        masked = (window >= slots.prompt_length[:, None]) & (old_reveal == 0)
        drawn, probability = self._candidates(slots, window, places, logits)
        candidates, confidence = in_blocks(drawn), in_blocks(probability)
        revealed = self._strategy(
            self._strategy_input(slots, window, masked, confidence, lambda: in_blocks(entropy_of(logits)))
        )
        new_tokens = torch.where(revealed, candidates, old_tokens)
        slots.step.add_(1)
        slots.block_step.add_(1)
        slots.tokens.scatter_(1, window, new_tokens)
        slots.reveal.scatter_(1, window, torch.where(revealed, slots.step[:, None], old_reveal))
        if observer is not None:
            model_says = candidates, confidence, in_blocks(logits), in_blocks(mask_logit)
            tensors = (tensor.cpu() for tensor in (window, old_tokens, masked, revealed, *model_says))
            observer(StepObservation([request.index for request in slots.requests], slots.step.tolist(), *tensors))
        return self._advance(slots, window, new_tokens, masked & ~revealed, confidence)

    def _candidates(
        self, slots: Slots, window: torch.Tensor, places: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws a candidate for each masked position: candidates `[m]` int64 and their confidence `[m]` float32."""
        settings = self.settings
        uniform = hashed_uniform(slots.seed[:, None], window, slots.step[:, None], _TOKEN_STREAM).flatten()[places]
        candidates = draw_candidates(logits, uniform, settings.temperature, settings.top_k, settings.top_p)
        chosen = logits.gather(-1, candidates[:, None]).squeeze(-1)
        return candidates, (chosen - logits.logsumexp(dim=-1)).exp()

    def _strategy_input(
        self,
        slots: Slots,
        window: torch.Tensor,
        masked: torch.Tensor,
        confidence: torch.Tensor,
        entropy: Callable[[], torch.Tensor],
    ) -> DenoisingStep:
        steps_left = (self.settings.steps_per_block - slots.block_step).clamp(min=1)
        return DenoisingStep(
            masked=masked,
            confidence=confidence,
            static_count=torch.div(masked.sum(1) + steps_left - 1, steps_left, rounding_mode="floor"),
            threshold=slots.threshold,
            entropy_budget=self.settings.entropy_budget,
            entropy=entropy,
            noise=lambda: hashed_uniform(slots.seed[:, None], window, slots.step[:, None], _ORDER_STREAM),
        )

    def _advance(
        self,
        slots: Slots,
        window: torch.Tensor,
        tokens: torch.Tensor,
        still_masked: torch.Tensor,
        confidence: torch.Tensor,
    ) -> list[int]:
        """Moves slots whose block is done to their next block; returns the slots whose sequence is finished."""
        n, block = window.shape
        done = ~still_masked.any(dim=1)
        ended = slots.block_start + block >= slots.end
        if not self.settings.ignore_eos:
            in_response = window >= slots.prompt_length[:, None]
            ended = ended | (torch.isin(tokens, self.eos_ids) & in_response).any(dim=1)
        commit = done & ~ended
        slots.block_start.add_(block * commit)
        slots.block_step.masked_fill_(done, 0)
        broken = confidence.isnan().any(dim=1)  # of any distribution that has NaN, infinity or no candidate at all
        state = torch.stack([done & ended, commit, slots.block_start, broken], dim=1)
        # The one host-device synchronisation of a step. A slot that moved on has a new block, which is all masked.
        on_host = torch.cat([state, still_masked | commit[:, None]], dim=1).cpu().numpy()
        finished, slots.host_commits[:n], slots.host_starts[:n], not_finite = on_host[:, :4].T
        slots.host_masked[:n] = on_host[:, 4:]
        if not_finite.any():
            slots.refuse_logits(int(not_finite.argmax()))
        return np.flatnonzero(finished).tolist()
