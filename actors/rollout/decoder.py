"""The block decoder: prompts -> trajectories, by confidence-based unmasking (METHOD.md section 2).

    pending requests ──refill──► slots ──► one forward for all slots ──► candidates, confidence
                        (prefill of      [finished block | block in work]     │ strategy
                         prompt blocks)   its keys are     its logits         ▼
                                          committed        are read       reveal; block done? sequence done?
                                                                              └─► trajectory, slot free

A block's clean keys and values are written by the same forward that runs the next block's first denoising step, so
forwards per block = denoising steps. Slots advance independently; the host learns once a step which ones ended.
`tests/oracles.py` holds the short uncached decoder that this one is tested against.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from opdlm.actors.rollout.forward import Record, StepForward
from opdlm.actors.rollout.kv_cache import SlotCache
from opdlm.actors.rollout.observation import StepObservation
from opdlm.actors.rollout.remasking import STRATEGIES, Step, entropy_of
from opdlm.actors.rollout.sampling import draw_candidates, hashed_uniform
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.rollout.slots import Slots
from opdlm.common.batches import batches_by_length
from opdlm.common.grid import BlockGrid, block_index
from opdlm.common.masks import block_causal
from opdlm.common.model.attention import NAME as ATTENTION
from opdlm.common.model.load import hidden_states
from opdlm.common.types import DecodeStats, RolloutRequest, Trajectory

_TOKEN_STREAM, _ORDER_STREAM = 0, 1  # two independent sequences of uniform numbers
PREFILL_TOKENS = 16384
"""Most tokens, padding included, in one forward that computes keys and values; a longer sequence goes alone."""
_REFILL_SHARE = 1 / 4
"""Of the slots, that have to be free before they are filled again (tests/benchmarks/RESULTS.md)."""

Renew = Callable[[], int | None]


class BlockDecoder:
    """Decodes batches of prompts with one student; keeps its cache between calls.

    Args:
        model: causal LM of transformers, in eval mode; logits at position i predict token i. Its attention becomes
            ours, which is `sdpa` for every other caller.
        settings: strategy, sampling, grid.
        mask_id: the mask token; never a candidate.
        eos_ids: tokens that end a response.
        batch_size: slots.
        recorder: makes what records and replays a step's forwards (`step_forward.py`); None: they are not.
    """

    def __init__(
        self,
        model: Any,
        settings: DecodeSettings,
        mask_id: int,
        eos_ids: Sequence[int],
        batch_size: int,
        recorder: Callable[[], Record] | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.mask_id = mask_id
        self.eos_ids = torch.tensor(sorted(eos_ids), device=model.device)
        self.batch_size = batch_size
        self.grid = BlockGrid(settings.block_size, settings.block_grid)
        self._strategy = STRATEGIES[settings.strategy]
        model.set_attn_implementation(ATTENTION)
        self._recorder = recorder
        self._cache: SlotCache | None = None
        self._step_forward: StepForward | None = None
        self._forwards = self._forward_tokens = 0

    def decode(
        self,
        requests: Sequence[RolloutRequest],
        weight_version: int = 0,
        observer: Callable[[StepObservation], None] | None = None,
        renew: Renew | None = None,
    ) -> tuple[list[Trajectory], DecodeStats]:
        """Decodes every request; trajectories come in the order of the requests. `renew`: see `stream`."""
        started = time.perf_counter()
        self._forwards = self._forward_tokens = 0
        by_index = {t.index: t for t in self.stream(requests, weight_version, observer, renew)}
        trajectories = [by_index[request.index] for request in requests]
        continued = [(t, t.token_versions) for t in trajectories if t.token_versions is not None]
        stats = DecodeStats(
            weight_version=min((t.weight_version for t in trajectories), default=weight_version),
            sequences=len(trajectories),
            response_tokens=sum(t.response_length for t in trajectories),
            denoising_steps=sum(t.denoising_steps for t in trajectories),
            forwards=self._forwards,
            forward_tokens=self._forward_tokens,
            seconds=time.perf_counter() - started,
            ended_by_eos=sum(t.finish_reason == "eos" for t in trajectories),
            continued_sequences=len(continued),
            continued_tokens=sum(int((v[: t.response_length] > t.weight_version).sum()) for t, v in continued),
            version_spread_max=max((int(v.max()) - t.weight_version for t, v in continued), default=0),
        )
        return trajectories, stats

    @torch.inference_mode()
    def stream(
        self,
        requests: Sequence[RolloutRequest],
        weight_version: int = 0,
        observer: Callable[[StepObservation], None] | None = None,
        renew: Renew | None = None,
    ) -> Iterator[Trajectory]:
        """Yields each trajectory as its sequence ends.

        Args:
            renew: called before each denoising step; may put new weights into the model, and then returns their
                version. Sequences in work go on with them as if what is decoded so far had been given: a step depends
                on the tokens and the weights alone, so no slot has to wait for a block's end.

        Raises:
            ValueError: a prompt is empty, or prompt and response do not fit into the model's context.
        """
        longest = self._longest(requests)
        if not requests:
            return
        # What was recorded is of one cache, so that has all slots then.
        capacity = self.batch_size if self._recorder else min(self.batch_size, len(requests))
        slots = Slots(capacity, longest, self.grid.block_size, self.mask_id, self.model.device)
        cache = self._cache_for(slots.capacity, longest)
        pending = deque(requests)
        slots.version = weight_version
        while pending or slots.live:
            if renew is not None and (version := renew()) is not None:
                slots.renew(version)
                self._prefill(slots, cache, range(slots.live))
                slots.commits[: slots.live] = False  # what was to be committed is in the cache now
            # A free slot costs nothing, a forward for one prompt reads all weights: so several at a time.
            enough = min(len(pending), max(1, int(slots.capacity * _REFILL_SHARE)))
            if pending and (not slots.live or slots.capacity - slots.live >= enough):
                self._prefill(slots, cache, slots.refill(pending, self.grid, self.settings.threshold))
            if self._recorder is None:  # what is recorded is one part
                slots.sort_when_due(cache)
            finished = self._step(slots, observer)
            if finished:
                yield from slots.harvest(finished, self.eos_ids.tolist(), self.settings.ignore_eos)
                slots.free(finished, cache)

    def _longest(self, requests: Sequence[RolloutRequest]) -> int:
        context = self.model.config.max_position_embeddings
        longest = 0
        for request in requests:
            if request.prompt_ids.size == 0:
                raise ValueError(f"prompt {request.prompt_id} is empty; a response needs a token before it")
            if request.max_new_tokens < 1:
                raise ValueError(f"prompt {request.prompt_id}: max_new_tokens is {request.max_new_tokens}; at least 1")
            end = self.grid.last_position(request.prompt_ids.size, request.max_new_tokens)
            if end > context:
                raise ValueError(
                    f"prompt {request.prompt_id}: {request.prompt_ids.size} prompt tokens and {request.max_new_tokens} "
                    f"new ones, to the end of their last block, are {end}; the model's context is {context}"
                )
            longest = max(longest, end)
        return longest

    def _cache_for(self, slots: int, positions: int) -> SlotCache:
        if self._cache is None or self._cache.slots != slots or self._cache.positions < positions:
            self._cache = self._step_forward = None  # give the old one back first
            weight = self.model.lm_head.weight
            self._cache = SlotCache(self.model.config, slots, positions, weight.dtype, self.model.device)
            record = self._recorder() if self._recorder else None
            self._step_forward = StepForward(self.model, self._cache, self.grid.block_size, record)
        return self._cache

    def _prefill(self, slots: Slots, cache: SlotCache, rows: Sequence[int]) -> None:
        """Keys and values of those slots' blocks before the one in work, in forwards of bounded size."""
        rows = [row for row in rows if slots.starts[row]]
        lengths = [int(slots.starts[row]) for row in rows]
        self._forward_tokens += sum(lengths)
        for group in batches_by_length(lengths, PREFILL_TOKENS):
            chosen, longest = [rows[i] for i in group], lengths[group[0]]
            offsets = [[self.grid.offset(slots.requests[row].prompt_ids.size)] for row in chosen]
            where, offset = torch.tensor(chosen, device=slots.device), torch.tensor(offsets, device=slots.device)
            positions = torch.arange(longest, device=slots.device).expand(len(chosen), -1)
            # What a shorter sequence has after its end belongs to later blocks: no token before it sees that.
            blocks = block_index(positions, offset, self.grid.block_size)
            cache.aim(where, positions, None)
            tokens = slots.tokens[where, :longest]
            hidden_states(self.model, tokens, positions, block_causal(blocks, blocks), cache)

    def _step(self, slots: Slots, observer: Callable[[StepObservation], None] | None) -> list[int]:
        """One denoising step of all slots; those that are finished with it."""
        assert self._step_forward is not None, "made with the cache"
        n, block = slots.live, self.grid.block_size
        window = slots.block_start[:, None] + torch.arange(block, device=slots.device)  # [n, S]
        # What the host knows goes to the device before the forward, or it would wait for the forward's end.
        committing, asked = np.flatnonzero(slots.commits[:n]), np.flatnonzero(slots.masked[:n])
        shape = self._step_forward.shape(committing.size, slots.starts[:n] + block)
        # Where a shape is rounded up, blocks are committed twice.
        known = torch.from_numpy(np.concatenate([np.resize(committing, shape.commits), asked])).to(slots.device)
        commit, index = known[: shape.commits], known[shape.commits :]
        hidden = self._step_forward(shape, *slots.first(shape.slots), commit)[:n].flatten(0, 1)
        self._forwards += 1
        self._forward_tokens += (n + committing.size) * block
        logits = self.model.lm_head(hidden[index]).float()  # of masked positions only
        mask_logit = logits[:, self.mask_id].clone()
        logits[:, self.mask_id] = float("-inf")

        def spread(values: torch.Tensor) -> torch.Tensor:
            """`[m, ...]`, of the masked positions -> `[n, S, ...]`, 0 at the others."""
            whole = values.new_zeros(n * block, *values.shape[1:])
            return whole.index_copy_(0, index, values).unflatten(0, (n, block))

        old_reveal, old_tokens = slots.reveal.gather(1, window), slots.tokens.gather(1, window)
        masked = (window >= slots.prompt_length[:, None]) & (old_reveal == 0)
        drawn, probability = self._candidates(slots, window, index, logits)
        candidates, confidence = spread(drawn), spread(probability)
        revealed = self._strategy(
            self._strategy_step(slots, window, masked, confidence, lambda: spread(entropy_of(logits)))
        )
        new_tokens = torch.where(revealed, candidates, old_tokens)
        slots.step.add_(1)
        slots.block_step.add_(1)
        slots.tokens.scatter_(1, window, new_tokens)
        slots.reveal.scatter_(1, window, torch.where(revealed, slots.step[:, None], old_reveal))
        if observer is not None:
            seen = spread(logits), spread(mask_logit)
            shown = (window, old_tokens, masked, revealed, candidates, confidence, *seen)
            steps, numbers = slots.step.tolist(), [request.index for request in slots.requests]
            observer(StepObservation(numbers, steps, *(tensor.cpu() for tensor in shown)))
        return self._advance(slots, window, new_tokens, masked & ~revealed)

    def _candidates(
        self, slots: Slots, window: torch.Tensor, index: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidate and confidence of each masked position, `[m]` each."""
        settings = self.settings
        uniform = hashed_uniform(slots.seed[:, None], window, slots.step[:, None], _TOKEN_STREAM).flatten()[index]
        candidates = draw_candidates(logits, uniform, settings.temperature, settings.top_k, settings.top_p)
        chosen = logits.gather(-1, candidates[:, None]).squeeze(-1)
        return candidates, (chosen - logits.logsumexp(dim=-1)).exp()

    def _strategy_step(
        self,
        slots: Slots,
        window: torch.Tensor,
        masked: torch.Tensor,
        confidence: torch.Tensor,
        entropy: Callable[[], torch.Tensor],
    ) -> Step:
        steps_left = (self.settings.steps_per_block - slots.block_step).clamp(min=1)
        return Step(
            masked=masked,
            confidence=confidence,
            static_count=torch.div(masked.sum(1) + steps_left - 1, steps_left, rounding_mode="floor"),
            threshold=slots.threshold,
            entropy_budget=self.settings.entropy_budget,
            entropy=entropy,
            noise=lambda: hashed_uniform(slots.seed[:, None], window, slots.step[:, None], _ORDER_STREAM),
        )

    def _advance(
        self, slots: Slots, window: torch.Tensor, tokens: torch.Tensor, still_masked: torch.Tensor
    ) -> list[int]:
        """Finished blocks are left behind; the slots whose sequence is finished."""
        n, block = window.shape
        done = ~still_masked.any(dim=1)
        ended = slots.block_start + block >= slots.end
        if not self.settings.ignore_eos:
            in_response = window >= slots.prompt_length[:, None]
            ended = ended | (torch.isin(tokens, self.eos_ids) & in_response).any(dim=1)
        commit = done & ~ended
        slots.block_start.add_(block * commit)
        slots.block_step.masked_fill_(done, 0)
        state = torch.stack([done & ended, commit, slots.block_start], dim=1)
        # The one host-device synchronisation of a step. After a finished block all of the next one is masked.
        known = torch.cat([state, still_masked | commit[:, None]], dim=1).cpu().numpy()
        slots.commits[:n], slots.starts[:n], slots.masked[:n] = known[:, 1], known[:, 2], known[:, 3:]
        return np.flatnonzero(known[:, 0]).tolist()
