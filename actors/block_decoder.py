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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.decode_settings import DecodeSettings
from actors.decode_slots import Slots
from actors.kv_cache import SlotCache
from actors.remasking import STRATEGIES, Step
from actors.sampling import draw_candidates, hashed_uniform
from actors.teacher_scoring import batches_by_length
from common.grid import BlockGrid, block_index
from common.masks import block_causal
from common.models import hidden_states
from common.types import DecodeStats, RolloutRequest, Trajectory

_TOKEN_STREAM, _ORDER_STREAM = 0, 1  # two independent sequences of uniform numbers
_PREFILL_TOKENS = 16384
"""Most tokens, padding included, in one forward that recomputes keys and values; a longer sequence goes alone."""

Renew = Callable[[], int | None]


@dataclass(frozen=True, slots=True)
class StepView:
    """One denoising step as an observer sees it (`generate --trace`, `trace`, parity tests). Rows are live slots."""

    index: list[int]  # [n] request index
    step: list[int]  # [n] denoising step of the sequence, from 1
    positions: torch.Tensor  # [n, S] int64
    tokens: torch.Tensor  # [n, S] int64, before the step (prompt tokens and masks included)
    masked: torch.Tensor  # [n, S] bool, before the step
    revealed: torch.Tensor  # [n, S] bool
    candidates: torch.Tensor  # [n, S] int64
    confidence: torch.Tensor  # [n, S] float32
    logits: torch.Tensor  # [n, S, V] float32, the mask token at minus infinity
    mask_logit: torch.Tensor  # [n, S] float32, what the model said for the mask token


class BlockDecoder:
    """Decodes batches of prompts with one student; keeps its cache between calls.

    Args:
        model: causal LM of transformers, in eval mode; logits at position i predict token i.
        settings: strategy, sampling, grid.
        mask_id: the mask token; never a candidate.
        eos_ids: tokens that end a response.
        batch_size: slots.
    """

    def __init__(
        self, model: Any, settings: DecodeSettings, mask_id: int, eos_ids: Sequence[int], batch_size: int
    ) -> None:
        self.model = model
        self.settings = settings
        self.mask_id = mask_id
        self.eos_ids = torch.tensor(sorted(eos_ids), device=model.device)
        self.batch_size = batch_size
        self.grid = BlockGrid(settings.block_size, settings.block_grid)
        self._strategy = STRATEGIES[settings.strategy]
        self._cache: SlotCache | None = None
        self._forwards = self._forward_tokens = 0

    def decode(
        self,
        requests: Sequence[RolloutRequest],
        weight_version: int = 0,
        observer: Callable[[StepView], None] | None = None,
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
        observer: Callable[[StepView], None] | None = None,
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
        slots = Slots(min(self.batch_size, len(requests)), longest, self.mask_id, self.model.device)
        cache = self._cache_for(slots.count, longest)
        pending = deque(requests)
        commit, width = 0, 0
        slots.version = weight_version
        while pending or slots.requests:
            if renew is not None and (version := renew()) is not None:
                slots.renew(version)
                self._prefill_again(slots, cache)
            fresh = slots.refill(pending, self.grid, self.settings.threshold)
            if fresh:
                starts = [self.grid.first_block_start(slots.requests[row].prompt_ids.size) for row in fresh]
                width = max(width, max(starts) + self.grid.block_size + 1)
                self._forward_tokens += sum(starts)
                self._prefill(slots, cache, fresh, max(starts))
            finished, commit, width = self._step(slots, cache, commit, width, observer)
            for row in finished:
                yield slots.harvest(row, self.eos_ids, self.settings.ignore_eos)

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
            self._cache = None  # give the old one back first
            weight = self.model.lm_head.weight
            self._cache = SlotCache(self.model.config, slots, positions, weight.dtype, self.model.device)
        return self._cache

    def _prefill_again(self, slots: Slots, cache: SlotCache) -> None:
        """Keys and values of all finished blocks with new weights, in forwards of bounded size."""
        rows, starts = list(slots.requests), slots.block_start.tolist()
        lengths = [starts[row] for row in rows]
        self._forward_tokens += sum(lengths)
        for group in batches_by_length(lengths, _PREFILL_TOKENS):
            self._prefill(slots, cache, [rows[i] for i in group], lengths[group[0]])

    def _prefill(self, slots: Slots, cache: SlotCache, fresh: list[int], longest: int) -> None:
        """Keys and values of those sequences' blocks before the one in work, `longest` tokens at most."""
        if longest == 0:
            return
        rows = torch.tensor(fresh, device=slots.tokens.device)
        lengths = slots.block_start[rows]
        positions = torch.arange(longest, device=rows.device).expand(len(fresh), -1)
        self._forward(slots, cache, positions, positions < lengths[:, None], longest + 1, rows)

    def _forward(
        self,
        slots: Slots,
        cache: SlotCache,
        positions: torch.Tensor,  # [n, Q] int64
        real: torch.Tensor,  # [n, Q] bool; the rest is padding
        width: int,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the student on the tokens at `positions`, writing their keys and values; `[n, Q, D]`."""
        positions = positions.masked_fill(~real, 0)
        offset, tokens = (slots.offset, slots.tokens) if rows is None else (slots.offset[rows], slots.tokens[rows])
        key_blocks = block_index(
            torch.arange(-1, width - 1, device=positions.device)[None], offset[:, None], self.grid.block_size
        )
        key_blocks[:, 0] = torch.iinfo(torch.int64).max  # the padding's column
        query_blocks = block_index(positions, offset[:, None], self.grid.block_size)
        cache.aim((positions + 1).masked_fill(~real, 0), width, rows)
        return hidden_states(
            self.model, tokens.gather(1, positions), positions, block_causal(query_blocks, key_blocks), cache
        )

    def _step(
        self, slots: Slots, cache: SlotCache, commit: int, width: int, observer: Callable[[StepView], None] | None
    ) -> tuple[list[int], int, int]:
        """One denoising step of all slots -> (finished slots, blocks that wait to be committed, next width)."""
        block = self.grid.block_size
        self._forwards += 1
        self._forward_tokens += block * (len(slots.requests) + commit)
        window = slots.block_start[:, None] + torch.arange(block, device=slots.tokens.device)  # [B, S]
        live = slots.live[:, None].expand(-1, block)
        if commit:
            positions = torch.cat([window - block, window], dim=1)
            real = torch.cat([slots.commit[:, None].expand(-1, block) & live, live], dim=1)
            hidden = self._forward(slots, cache, positions, real, width)[:, block:]
        else:
            hidden = self._forward(slots, cache, window, live, width)
        logits = self.model.lm_head(hidden).float()
        mask_logit = logits[..., self.mask_id].clone()
        logits[..., self.mask_id] = float("-inf")

        old_reveal = slots.reveal.gather(1, window)
        masked = live & (window >= slots.prompt_length[:, None]) & (old_reveal == 0)
        candidates, confidence = self._candidates(slots, window, logits)
        revealed = self._strategy(self._strategy_step(slots, window, masked, confidence, logits))
        old_tokens = slots.tokens.gather(1, window)
        new_tokens = torch.where(revealed, candidates, old_tokens)
        slots.step += slots.live
        slots.block_step += slots.live
        slots.tokens.scatter_(1, window, new_tokens)
        slots.reveal.scatter_(1, window, torch.where(revealed, slots.step[:, None], old_reveal))
        if observer is not None:
            rows = slots.live.nonzero()[:, 0]
            shown = (window, old_tokens, masked, revealed, candidates, confidence, logits, mask_logit)
            observer(
                StepView(
                    [slots.requests[row].index for row in rows.tolist()],
                    slots.step[rows].tolist(),
                    *(tensor[rows].cpu() for tensor in shown),
                )
            )
        return self._advance(slots, window, new_tokens, masked & ~revealed)

    def _candidates(
        self, slots: Slots, window: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        settings = self.settings
        uniform = hashed_uniform(slots.seed[:, None], window, slots.step[:, None], _TOKEN_STREAM)
        candidates = draw_candidates(logits, uniform, settings.temperature, settings.top_k, settings.top_p)
        chosen = logits.gather(-1, candidates[..., None]).squeeze(-1)
        return candidates, (chosen - logits.logsumexp(dim=-1)).exp()

    def _strategy_step(
        self,
        slots: Slots,
        window: torch.Tensor,
        masked: torch.Tensor,
        confidence: torch.Tensor,
        logits: torch.Tensor,
    ) -> Step:
        steps_left = (self.settings.steps_per_block - slots.block_step).clamp(min=1)
        return Step(
            masked=masked,
            confidence=confidence,
            static_count=torch.div(masked.sum(1) + steps_left - 1, steps_left, rounding_mode="floor"),
            threshold=slots.threshold,
            entropy_budget=self.settings.entropy_budget,
            logits=logits,
            noise=lambda: hashed_uniform(slots.seed[:, None], window, slots.step[:, None], _ORDER_STREAM),
        )

    def _advance(
        self, slots: Slots, window: torch.Tensor, tokens: torch.Tensor, still_masked: torch.Tensor
    ) -> tuple[list[int], int, int]:
        block = self.grid.block_size
        done = slots.live & ~still_masked.any(dim=1)
        ended = slots.block_start + block >= slots.end
        if not self.settings.ignore_eos:
            in_response = window >= slots.prompt_length[:, None]
            ended = ended | (torch.isin(tokens, self.eos_ids) & in_response).any(dim=1)
        finished = done & ended
        slots.commit = done & ~ended
        slots.live = slots.live & ~finished
        slots.block_start = slots.block_start + block * slots.commit
        slots.block_step = slots.block_step.masked_fill(done, 0)
        # The one host-device synchronisation of a step.
        flags = torch.stack([finished, slots.commit, slots.live * slots.block_start]).cpu().numpy()
        return np.flatnonzero(flags[0]).tolist(), int(flags[1].sum()), int(flags[2].max()) + block + 1
