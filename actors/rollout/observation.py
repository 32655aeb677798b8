"""What the decoder shows an observer of its denoising steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from opdlm.common.types import RolloutRequest


@dataclass(frozen=True, slots=True)
class Drafts:
    """What a step of `verified` drafted for the next one: k = S - 1 tokens behind the last known one. On the CPU."""

    positions: torch.Tensor  # [n, k] int64
    tokens: torch.Tensor  # [n, k] int64
    logits: torch.Tensor  # [n, k, V] float32, minus infinity for the mask token
    mask_logit: torch.Tensor  # [n, k] float32, the model's own logit of the mask token


@dataclass(frozen=True, slots=True)
class StepObservation:
    """One denoising step, for an observer (`generate --trace`, `trace`, the parity tests). One row per occupied slot.

    All tensors are on the CPU. `candidates` and the fields after it hold values at masked positions and 0 elsewhere.

    With `verified` the positions are the S behind the last token that is known. `tokens` are the drafts that the step
    verified, `revealed` what it knows now: the drafts that were right and the clean path's own token behind them.
    `candidates` at other positions are drafts of the next step. `confidence` and `logits` are the clean path's, behind
    the tokens before the step.
    """

    index: list[int]  # [n] request index
    step: list[int]  # [n] denoising step of the sequence, counted from 1
    positions: torch.Tensor  # [n, S] int64
    tokens: torch.Tensor  # [n, S] int64, before the step (prompt tokens and masks included)
    masked: torch.Tensor  # [n, S] bool, before the step
    revealed: torch.Tensor  # [n, S] bool, by this step
    candidates: torch.Tensor  # [n, S] int64
    confidence: torch.Tensor  # [n, S] float32
    logits: torch.Tensor  # [n, S, V] float32, minus infinity for the mask token
    mask_logit: torch.Tensor  # [n, S] float32, the model's own logit of the mask token
    drafts: Drafts | None = field(default=None, kw_only=True)  # of the next step; None: the strategy is not `verified`


@dataclass(frozen=True, slots=True)
class Step:
    """What one denoising step did at the positions of one sequence that had no token before it, k of them."""

    number: int
    """Counted from 1 over the whole response."""
    positions: tuple[int, ...]  # [k], rising, counted from the first token of the response
    ids: tuple[int, ...]  # [k] candidates; with `verified`, where nothing is revealed, the drafts of the next step
    revealed: tuple[bool, ...]  # [k]
    confidences: tuple[float, ...] | None  # [k]; None: the strategy has none (`verified`)


class StepWatch:
    """An observer of the sequences whose requests are `watched`, and of no others.

    Of those it copies a few numbers a position to the host, never logits. A step without such a sequence costs nothing.

    Args:
        see: gets the index of a request, and each step of it.
    """

    def __init__(self, see: Callable[[int, Step], None]) -> None:
        self._see = see

    def __call__(
        self,
        requests: Sequence[RolloutRequest],
        number: torch.Tensor,
        positions: torch.Tensor,
        masked: torch.Tensor,
        revealed: torch.Tensor,
        candidates: torch.Tensor,
        confidence: torch.Tensor | None,
    ) -> None:
        """Takes one step of all occupied slots, n of them.

        Args:
            number: `[n]` int64, the step's number in each sequence.
            positions: `[n, S]` int64, counted from the first token of the prompt.
            masked, revealed: `[n, S]` bool; whether a position had no token before the step, and whether it got one.
            candidates: `[n, S]` int64.
            confidence: `[n, S]` float32; None: the strategy has none.
        """
        rows = [row for row, request in enumerate(requests) if request.watched]
        if not rows:
            return
        numbers = number[rows].tolist()
        whole = torch.stack([positions, candidates, masked.long(), revealed.long()])[:, rows].tolist()
        sure = None if confidence is None else confidence[rows].tolist()
        for i, row in enumerate(rows):
            places, ids, open_before, now = (of_all[i] for of_all in whole)
            first = requests[row].prompt_ids.size
            columns = [column for column, was_open in enumerate(open_before) if was_open]
            step = Step(
                numbers[i],
                tuple(places[column] - first for column in columns),
                tuple(ids[column] for column in columns),
                tuple(bool(now[column]) for column in columns),
                None if sure is None else tuple(sure[i][column] for column in columns),
            )
            self._see(requests[row].index, step)
