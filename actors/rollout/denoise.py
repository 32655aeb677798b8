"""One denoising step of all occupied slots: a forward, candidates, confidence, a strategy (METHOD.md section 2).

Shapes: n occupied slots, S tokens per block, m masked positions in all current blocks together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from opdlm.actors.rollout.forward import StepForward
from opdlm.actors.rollout.observation import StepObservation, StepWatch
from opdlm.actors.rollout.remasking import STRATEGIES, DenoisingStep, entropy_of
from opdlm.actors.rollout.sampling import draw_candidates, hashed_uniform
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.rollout.slots import Slots
from opdlm.common.errors import OpdlmError
from opdlm.common.form import StudentForm
from opdlm.common.tensors import to_device

_TOKEN_STREAM, _ORDER_STREAM = 0, 1  # two independent sequences of uniform numbers

Observer = Callable[[StepObservation], None] | StepWatch


class Denoiser:
    """Runs denoising steps; the state is in `Slots`.

    Args:
        model, settings, mask_id, eos_ids, form: see `BlockDecoder`.
        never: rows of the vocabulary that are never a candidate.
    """

    cache_outlives_weights = False
    """Whether keys and values stay as they are when the weights change."""

    def __init__(
        self,
        model: Any,
        settings: DecodeSettings,
        mask_id: int,
        eos_ids: Sequence[int],
        never: Sequence[int],
        form: StudentForm,
    ) -> None:
        self._model, self.settings, self._mask_id, self._form = model, settings, mask_id, form
        self._eos_ids = torch.tensor(list(eos_ids), device=model.device)
        self._never_candidates = torch.tensor(list(never), device=model.device)
        self._strategy = STRATEGIES[settings.strategy]

    def keeps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[0, ...]` and `[0, 0, ...]`, of the shapes of `Slots.kept` and `Slots.noted`.

        With a logit shift a slot keeps the hidden state `[D]` of the clean token before its current block.
        """
        weight = self._model.lm_head.weight
        width = self._model.config.hidden_size * self._form.logit_shift
        return weight.new_zeros(0, width), weight.new_zeros(0, 0, dtype=torch.float32)

    def __call__(self, slots: Slots, step_forward: StepForward, observer: Observer | None) -> tuple[list[int], int]:
        """Runs one denoising step of all occupied slots.

        Returns: the slots whose sequence is finished by it, and the tokens that went through the model.
        """
        n, block = slots.occupied, self.settings.block_size
        window = slots.block_start[:, None] + torch.arange(block, device=slots.device)  # [n, S] positions
        committing, masked_places = np.flatnonzero(slots.host_commits[:n]), np.flatnonzero(slots.host_masked[:n])
        shape = step_forward.shape(committing.size, slots)
        # A shape that was rounded up has room for more commits: `resize` repeats slots, whose blocks are written twice.
        indices = to_device(np.concatenate([np.resize(committing, shape.commits), masked_places]), slots.device)
        commit, places = indices[: shape.commits], indices[shape.commits :]  # [c] slots, [m] places in [n * S]
        hidden = step_forward(shape, *slots.first_rows(shape.slots, step_forward.cache), commit)
        if self._form.logit_shift:
            hidden = slots.shifted(hidden[:n], hidden[shape.slots :], commit)
        logits = self._model.lm_head(hidden[:n].flatten(0, 1)[places]).float()  # [m, V], masked positions only
        mask_logit = logits[:, self._mask_id].clone()
        logits.index_fill_(1, self._never_candidates, float("-inf"))

        def in_blocks(values: torch.Tensor) -> torch.Tensor:
            """Values of the masked positions `[m, ...]` -> `[n, S, ...]`, 0 at the other positions."""
            whole = values.new_zeros(n * block, *values.shape[1:])
            return whole.index_copy_(0, places, values).unflatten(0, (n, block))

        old_reveal, old_tokens = slots.reveal.gather(1, window), slots.tokens.gather(1, window)
        masked = (window >= slots.prompt_length[:, None]) & (old_reveal == 0)
        drawn, probability, logprob = self._candidates(slots, window, places, logits, masked_places // block)
        candidates, confidence = in_blocks(drawn), in_blocks(probability)
        revealed = self._strategy(
            self._strategy_input(slots, window, masked, confidence, lambda: in_blocks(entropy_of(logits)))
        )
        new_tokens = torch.where(revealed, candidates, old_tokens)
        slots.step.add_(1)
        slots.block_step.add_(1)
        slots.tokens.scatter_(1, window, new_tokens)
        slots.reveal.scatter_(1, window, torch.where(revealed, slots.step[:, None], old_reveal))
        if logprob is not None:
            kept = slots.noted.gather(1, window)
            slots.noted.scatter_(1, window, torch.where(revealed, in_blocks(logprob), kept))
        if isinstance(observer, StepWatch):
            observer(slots.requests, slots.step, window, masked, revealed, candidates, confidence)
        elif observer is not None:
            model_says = candidates, confidence, in_blocks(logits), in_blocks(mask_logit)
            tensors = (tensor.cpu() for tensor in (window, old_tokens, masked, revealed, *model_says))
            observer(StepObservation([request.index for request in slots.requests], slots.step.tolist(), *tensors))
        finished = self._advance(slots, window, new_tokens, masked & ~revealed, confidence)
        return finished, (n + committing.size) * block

    def _candidates(
        self, slots: Slots, window: torch.Tensor, places: torch.Tensor, logits: torch.Tensor, rows: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Draws a candidate for each masked position: candidates `[m]` int64 and the positions' confidence `[m]`.

        Where they are kept, the candidates' log-probabilities `[m]` in the distribution they are drawn from, before
        top-k and top-p, come with them; those of the likeliest tokens are of temperature 1. Both are float32.

        Args:
            rows: `[m]` int64, the slot of each masked position.
        """
        settings = self.settings
        usual = settings.temperature, settings.top_p
        ways = [request.sampling or usual for request in slots.requests]
        uniform = None
        if any(temperature > 0 for temperature, _ in ways):
            uniform = hashed_uniform(slots.seed[:, None], window, slots.step[:, None], _TOKEN_STREAM).flatten()[places]
        groups = _groups(ways, rows, logits.device)
        candidates = places.new_zeros(len(places))
        for (temperature, top_p), chosen in groups:
            random = uniform[chosen] if uniform is not None and temperature > 0 else None
            candidates[chosen] = draw_candidates(logits[chosen], random, temperature, settings.top_k, top_p)
        log_p = logits.log_softmax(dim=-1)
        drawn = log_p.gather(-1, candidates[:, None]).squeeze(-1)
        confidence = (drawn if settings.confidence == "sampled" else log_p.amax(dim=-1)).exp()
        if not settings.keep_logprobs:
            return candidates, confidence, None
        kept = drawn.clone()
        for (temperature, _), chosen in groups:
            if temperature not in (0.0, 1.0):
                tempered = (logits[chosen] / temperature).log_softmax(dim=-1)
                kept[chosen] = tempered.gather(-1, candidates[chosen, None]).squeeze(-1)
        return candidates, confidence, kept

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
        needed, ended = still_masked, slots.block_start + block >= slots.end
        if not self.settings.ignore_eos:
            in_response = window >= slots.prompt_length[:, None]
            is_end = torch.isin(tokens, self._eos_ids) & in_response
            ended = ended | is_end.any(dim=1)
            if not self.settings.finish_blocks:
                needed = still_masked & (is_end.cumsum(dim=1) == 0)
        done = ~needed.any(dim=1)
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
            refuse_logits(slots, int(not_finite.argmax()))
        return np.flatnonzero(finished).tolist()


def _groups(
    ways: Sequence[tuple[float, float]], rows: np.ndarray, device: torch.device
) -> list[tuple[tuple[float, float], Any]]:
    """Each way to sample that occurs, and the masked positions that take it: all of them as a slice, or `[k]` int64.

    Args:
        ways: temperature and top-p of each slot.
        rows: `[m]` int64, the slot of each masked position.
    """
    kinds = sorted(set(ways))
    if len(kinds) == 1:
        return [(kinds[0], slice(None))]
    of_place = np.array([kinds.index(way) for way in ways])[rows]
    return [(kind, to_device(np.flatnonzero(of_place == k), device)) for k, kind in enumerate(kinds)]


def refuse_logits(slots: Slots, row: int) -> NoReturn:
    """Raises `OpdlmError` for a slot whose logits have NaN, infinity or no candidate at all."""
    raise OpdlmError(
        f"prompt {slots.requests[row].prompt_id}: the student's logits hold NaN or infinity "
        f"(weights of version {slots.version}), so no token can be drawn; its weights or its number format are broken"
    )
