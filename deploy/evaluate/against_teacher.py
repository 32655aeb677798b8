"""How close a student's answers are to its teacher's: the same tokens, the lengths, and KL(teacher || student)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opdlm.common.batches import in_groups
from opdlm.common.config.schema import ObjectiveConfig, Selection
from opdlm.common.form import StudentForm
from opdlm.common.grid import BlockGrid
from opdlm.common.token_ids import TokenIds
from opdlm.common.types import ScoredTrajectory, TopKTargets
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import pack
from opdlm.learner.rows import build_rows
from opdlm.learner.targets import gather_targets

_ROWS = 16
"""Rows in one forward."""
_LOGITS_CHUNK = 256
"""Positions whose logits exist at one time."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """Responses beside the teacher's greedy responses to the same prompts."""

    agreement: float
    """Share of responses that are the teacher's token for token, the end-of-sequence token included."""
    token_agreement: float
    """Mean share of the teacher's tokens that the response has at the same place."""
    length_ratio: float
    """Mean over the prompts of the response's length in tokens divided by the teacher's."""


def likeness(responses: Sequence[np.ndarray], teacher: Sequence[np.ndarray]) -> Likeness:
    """Compares responses with the teacher's, `[R] int32` each, in the same order."""
    same, places, ratios = [], [], []
    for ours, theirs in zip(responses, teacher, strict=True):
        shared, length = min(len(ours), len(theirs)), max(len(theirs), 1)
        same.append(np.array_equal(ours, theirs))
        places.append((ours[:shared] == theirs[:shared]).sum() / length)
        ratios.append(len(ours) / length)
    return Likeness(float(np.mean(same)), float(np.mean(places)), float(np.mean(ratios)))


def summed_kl(
    student: Any,
    mask_id: int,
    scored: Sequence[ScoredTrajectory],
    head: torch.Tensor | None,
    grid: BlockGrid,
    form: StudentForm,
    tokens: TokenIds | None,
    seed: int = 0,
    selection: Selection | None = None,
) -> tuple[float, int]:
    """KL(teacher || student) on the student's own rollouts, at the states that a training row would have.

    Of each block one visited state is drawn, with the seed and the trajectory's index, so that the same rollouts give
    the same figure (METHOD.md section 4); the end-of-sequence token counts as well. Against top-K targets the teacher's
    remaining mass is one more outcome.

    Args:
        student: causal LM of transformers; its parameters need no gradient afterwards.
        head: the teacher's output matrix `[V, D]`, for hidden-state targets.
        tokens: the tokens that teacher and student share. None: all rows of the teacher.
        selection: of other states, as in `objective.selection`.

    Returns: (the sum in nats over the masked positions, their number).
    """
    top_k = next((s.targets.token_ids.shape[1] for s in scored if isinstance(s.targets, TopKTargets)), 0)
    objective = ObjectiveConfig(selection=selection, exclude_eos=False, top_k=top_k, tail="bucket" if top_k else "drop")
    module = DistillModule(student.requires_grad_(False), objective, _LOGITS_CHUNK, form=form)
    device = next(student.parameters()).device
    rows = [
        row
        for one in scored
        for row in build_rows(one, grid, objective, mask_id, np.random.default_rng([seed, one.trajectory.index]), form)
        if len(row.loss_positions)
    ]
    total, positions = 0.0, 0
    head = None if head is None else head.detach().to(device)
    with torch.no_grad():
        for group in in_groups(sorted(rows, key=lambda row: len(row.input_ids)), _ROWS):
            batch = pack(group)
            targets = gather_targets(batch.rows, head, objective, tokens).to(device)
            weights = torch.ones(len(batch.loss_line), device=device)
            _, losses = module(batch.to(device), targets, weights)
            total, positions = total + float(losses.double().sum()), positions + len(losses)
    return total, positions
