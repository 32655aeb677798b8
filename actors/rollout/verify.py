"""One step of lossless decoding: the clean path verifies drafts in the forward that makes the next ones (METHOD.md 11).

Let d_0 be the last token that is known, and d_1 .. d_k the k = S - 1 drafts behind it. One forward of S (1 + S) queries
has, for S = 3:

    query     d_0 d_1 d_2 | m m m | m m m | m m m
                            behind   behind  behind
                            d_0      d_0 d_1 d_0 d_1 d_2

Clean tokens attend causally. A mask m attends to the clean tokens that its group is behind, and to its group. The clean
path predicts what the teacher would write behind d_0, behind d_1, ...: drafts are right up to the first that it would
not have written. There its own token follows, and the masks behind the last right draft are the next drafts.

Above temperature 0 this is speculative sampling: a draft d, drawn from q, is right with probability min(1, p(d) / q(d))
under the clean path's p, and the token behind the last right one is drawn from what p has more than q. So tokens follow
the clean path's distribution, whatever the drafts are.

Keys and values lie in the slot's place in the cache: those of the clean tokens where the tokens belong, those of the
masks behind them, where the next step writes over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opdlm.actors.rollout.attention import Part, SlotLayout
from opdlm.actors.rollout.denoise import Observer, refuse_logits
from opdlm.actors.rollout.forward import StepForward
from opdlm.actors.rollout.kv_cache import SPARE
from opdlm.actors.rollout.observation import Drafts, StepObservation, StepWatch
from opdlm.actors.rollout.sampling import distribution, draw, draw_candidates, hashed_uniform
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.rollout.slots import Slots
from opdlm.common.errors import OpdlmError
from opdlm.common.form import StudentForm
from opdlm.common.model.adapters import has_noisy_adapters
from opdlm.common.model.load import hidden_states

_OWN, _ACCEPT, _DRAFT = 2, 3, 4
"""Independent sequences of uniform numbers (`denoise.py` has two more)."""


class Verifier:
    """Runs steps of the strategy `verified`; the state is in `Slots`, whose `block_start` is the position of d_0.

    Args: see `Denoiser`.

    Raises:
        OpdlmError: the student's form has no logit shift or no causal context, so no clean path predicts tokens.
    """

    def __init__(
        self,
        model: Any,
        settings: DecodeSettings,
        mask_id: int,
        eos_ids: Sequence[int],
        never: Sequence[int],
        form: StudentForm,
    ) -> None:
        if not (form.logit_shift and form.causal):
            raise OpdlmError(
                f"strategy verified: the student has {form}; only one with logit shift and causal context (model."
                "logit_shift, model.context) has a clean path that can verify drafts"
            )
        self._model, self.settings, self._mask_id, self._size = model, settings, mask_id, settings.block_size
        self.cache_outlives_weights = has_noisy_adapters(model)  # only verified tokens are kept, and they do not change
        self._eos_ids = torch.tensor([] if settings.ignore_eos else list(eos_ids), device=model.device)
        self._never = torch.tensor(list(never), device=model.device)
        size, device = self._size, model.device
        behind = torch.arange(size, device=device)
        self._ahead = torch.cat([behind, (behind[:, None] + 1 + behind).flatten()])
        """`[Q]` int64, positions of the queries behind d_0."""
        self._noisy = torch.arange(size * (1 + size), device=device)[None] >= size
        self._seen = _seen(size).to(device)

    def keeps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Denoiser.keeps`: the distributions of sampled drafts, and clean hidden states where they are targets."""
        weight, settings = self._model.lm_head.weight, self.settings
        kept = (self._size - 1, len(weight)) if settings.temperature > 0 else (0,)
        noted = (self._model.config.hidden_size,) if settings.keep_targets else ()
        return weight.new_zeros(0, *kept, dtype=torch.float32), weight.new_zeros(0, 0, *noted)

    def __call__(self, slots: Slots, step_forward: StepForward, observer: Observer | None) -> tuple[list[int], int]:
        """Runs one step of all occupied slots.

        Returns: the slots whose sequence is finished by it, and the tokens that went through the model.
        """
        size, start = self._size, slots.block_start.clone()  # [n]
        places = torch.arange(size, device=slots.device)
        clean = slots.tokens.gather(1, start[:, None] + places)  # [n, S]: d_0, and the drafts
        hidden = self._forward(slots, step_forward, clean, start)
        logits, is_finite = self._logits(hidden[:, :size])
        right, own = self._verify(slots, clean, start, logits)
        last = start + 1 + right  # [n], the position of the token of its own that follows
        group = size + right[:, None] * size + places[:-1]  # [n, S - 1] queries that predict the next drafts
        behind = hidden.gather(1, group[..., None].expand(-1, -1, hidden.shape[-1]))
        ahead, are_finite = self._logits(behind)
        drafts = self._draft(slots, last, ahead)
        slots.step.add_(1)
        slots.tokens.scatter_(1, last[:, None], own[:, None])
        slots.tokens.scatter_(1, last[:, None] + 1 + places[:-1], drafts)
        window = start[:, None] + 1 + places
        known = window <= last[:, None]
        reveal = slots.reveal
        reveal.scatter_(1, window, torch.where(known, slots.step[:, None], reveal.gather(1, window)))
        if self.settings.keep_targets:
            at = window[..., None].expand(-1, -1, hidden.shape[-1])
            noted = slots.noted
            noted.scatter_(1, at, torch.where(known[..., None], hidden[:, :size], noted.gather(1, at)))
        slots.block_start.copy_(last)
        new = slots.tokens.gather(1, window)
        if isinstance(observer, StepWatch):
            observer(slots.requests, slots.step, window, window < slots.end[:, None], known, new, None)
        elif observer is not None:
            verified = torch.cat([clean[:, 1:], torch.full_like(own, self._mask_id)[:, None]], dim=1)
            chance = logits.softmax(-1).gather(2, new[..., None])[..., 0]
            parts = [window, verified, window < slots.end[:, None], known, new, chance, logits]
            parts.append(self._mask_logit(hidden[:, :size]))
            drafted = last[:, None] + 1 + places[:-1], drafts, ahead, self._mask_logit(behind)
            indices, cpu = [request.index for request in slots.requests], torch.Tensor.cpu
            observer(StepObservation(indices, slots.step.tolist(), *map(cpu, parts), drafts=Drafts(*map(cpu, drafted))))
        ended = (last + 1 >= slots.end) | (torch.isin(new, self._eos_ids) & known).any(dim=1)
        state = torch.stack([ended.long(), last, is_finite & are_finite], dim=1)
        finished, slots.host_starts[: slots.occupied], finite = state.cpu().numpy().T  # the synchronisation of the step
        if not finite.all():
            refuse_logits(slots, int(finite.argmin()))
        return np.flatnonzero(finished).tolist(), slots.occupied * len(self._ahead)

    def _forward(
        self, slots: Slots, step_forward: StepForward, clean: torch.Tensor, start: torch.Tensor
    ) -> torch.Tensor:
        """Final hidden states of all queries, `[n, Q, D]`."""
        cache, config, queries = step_forward.cache, self._model.config, len(self._ahead)
        slots.windows.update(slots.host_bases, slots.host_ends, cache.positions + SPARE)
        masks, first = [], 0
        for part in slots.windows.parts:
            rows = slice(first, first + part.count)
            masks.append(self._mask(part, slots.bases[rows], start[rows], config))
            first += part.count
        layout = SlotLayout(slots.windows.parts, None, queries, None, True, tuple(masks))
        noisy = clean.new_full((len(clean), queries - self._size), self._mask_id)
        addresses = (slots.bases + start)[:, None] + torch.arange(queries, device=start.device)
        cache.prepare(addresses, attends_to_cache=True)
        tokens, positions = torch.cat([clean, noisy], dim=1), start[:, None] + self._ahead
        return hidden_states(self._model, tokens, positions, masks[0], cache, self._noisy, layout=layout)

    def _mask(self, part: Part, bases: torch.Tensor, start: torch.Tensor, config: Any) -> torch.Tensor:
        """The additive mask of a part, `[n, 1, heads of a group x Q, width]`: what lies before d_0, and `_seen`."""
        windows = part.begin + part.stride * torch.arange(part.count, device=start.device)
        place = torch.arange(part.width, device=start.device) - (bases - windows)[:, None]  # in the slot, [n, width]
        step = place - start[:, None]
        inside = (step >= 0) & (step < len(self._ahead))
        seen = self._seen[step.clamp(0, len(self._ahead) - 1)].transpose(1, 2)  # [n, Q, width]
        shown = torch.where(inside[:, None], seen, ((place >= 0) & (step < 0))[:, None])
        mask = torch.zeros(shown.shape, dtype=self._model.lm_head.weight.dtype, device=start.device)
        mask.masked_fill_(~shown, float("-inf"))
        return mask.repeat(1, config.num_attention_heads // config.num_key_value_heads, 1)[:, None]

    def _logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits at hidden states `[n, m, D]`, and whether the highest of each slot are finite, `[n]` bool.

        The logits, `[n, m, V]` float32, are minus infinity for what is no candidate.
        """
        # Flat: a slice of three dimensions makes a bfloat16 product on a CPU twenty times as slow.
        logits = self._model.lm_head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]).float()
        logits.index_fill_(2, self._never, float("-inf"))
        return logits, logits.amax(dim=2).isfinite().all(dim=1)

    def _mask_logit(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's own logit of the mask token at hidden states `[n, m, D]`: `[n, m]` float32."""
        return torch.nn.functional.linear(hidden, self._model.lm_head.weight[self._mask_id]).float()

    def _verify(
        self, slots: Slots, clean: torch.Tensor, start: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How many drafts are right, `[n]`, and the token of the clean path's own behind them, `[n]`, both int64.

        Args:
            clean: `[n, S]`, d_0 and the drafts.
            start: `[n]`, the position of d_0.
            logits: `[n, S, V]` of the clean path, behind each of them.
        """
        if self.settings.temperature == 0:
            own = draw_candidates(logits, None, 0.0)
            right = (clean[:, 1:] == own[:, :-1]).long().cumprod(dim=1).sum(dim=1)
            return right, own.gather(1, right[:, None])[:, 0]
        p = self._distribution(logits)
        q = torch.where((slots.step > 0)[:, None, None], slots.kept, 0.0)  # a sequence begins without drafts
        drafts = clean[:, 1:, None]
        chance = self._uniform(slots, start[:, None] + 1 + torch.arange(self._size - 1, device=p.device), _ACCEPT)
        accepted = chance * q.gather(2, drafts)[..., 0] < p[:, :-1].gather(2, drafts)[..., 0]
        right = accepted.long().cumprod(dim=1).sum(dim=1)
        at = right[:, None, None].expand(-1, 1, p.shape[2])
        p, q = p.gather(1, at)[:, 0], torch.cat([q, torch.zeros_like(q[:, :1])], dim=1).gather(1, at)[:, 0]
        more = (p - q).clamp(min=0)
        more = torch.where(more.sum(dim=1, keepdim=True) > 0, more, p)  # they differ by rounding only
        return right, draw(more, self._uniform(slots, start[:, None] + 1 + right[:, None], _OWN)[:, 0])

    def _draft(self, slots: Slots, last: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Draws the tokens behind the last known one at `last`, `[n]`, from logits `[n, S - 1, V]`: `[n, S - 1]`."""
        if self.settings.temperature == 0:
            return draw_candidates(logits, None, 0.0)
        q = self._distribution(logits)
        slots.kept.copy_(q)
        return draw(q, self._uniform(slots, last[:, None] + 1 + torch.arange(self._size - 1, device=q.device), _DRAFT))

    def _distribution(self, logits: torch.Tensor) -> torch.Tensor:
        return distribution(logits, self.settings.temperature, self.settings.top_k, self.settings.top_p)

    def _uniform(self, slots: Slots, positions: torch.Tensor, stream: int) -> torch.Tensor:
        """Of each position `[n, m]`: a number that depends on sequence, position and step alone."""
        return hashed_uniform(slots.seed[:, None], positions, slots.step[:, None], stream)


def _seen(size: int) -> torch.Tensor:
    """`[Q, Q]` bool, True where the key (dim 0) is seen by the query (dim 1), both of one step."""
    places = torch.arange(size)
    group = torch.cat([torch.full((size,), -1), places.repeat_interleave(size)])  # -1: clean
    clean = torch.cat([places, torch.full((size * size,), size)])
    reach = torch.where(group < 0, clean, group)  # the last clean token that a query sees
    is_clean = group < 0
    return (is_clean[:, None] & (clean[:, None] <= reach)) | (~is_clean[:, None] & (group[:, None] == group))
