"""Scored trajectories -> training rows (METHOD.md section 4). `packing.py` lays the rows out for a forward.

A row is `[clean | noisy]`. The clean half is the prompt and the kept response. The noisy half is a second copy of the
tokens from the start of the block that holds the first response token, with some response tokens masked. So on the
absolute grid it also has the last `P mod S` prompt tokens, whose keys and values depend on the state. A noisy token has
the position of its clean twin.

A token is predicted at its own noisy position. With a logit shift (METHOD.md section 11) it is predicted at the
position before: a noisy one inside the block, but a clean one for the block's first token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.form import PAPER_FORM, StudentForm
from opdlm.common.grid import BlockGrid
from opdlm.common.types import ScoredTrajectory, Trajectory
from opdlm.learner.states import SELECTIONS, BlockStates, ChosenStates


@dataclass(frozen=True, slots=True)
class Row:
    """One training row of T = C + N tokens: C = P + R' clean ones, N noisy ones from the first generated block on."""

    scored: ScoredTrajectory
    clean_length: int  # C; the arrays' first C entries are the same in every row of a trajectory
    input_ids: np.ndarray  # [T] int64
    position_ids: np.ndarray  # [T] int64
    blocks: np.ndarray  # [T] int64
    loss_columns: np.ndarray  # [n] int64, where the tokens of the loss are predicted, as indices into the row
    loss_positions: np.ndarray  # [n] int64, these tokens as indices into the response, and so into the targets
    loss_weights: np.ndarray  # [n] float32, how much each counts in a mean over positions


def build_rows(
    scored: ScoredTrajectory,
    grid: BlockGrid,
    objective: ObjectiveConfig,
    mask_id: int,
    rng: np.random.Generator,
    form: StudentForm = PAPER_FORM,
) -> list[Row]:
    """The rows that the objective's selection of states makes of one trajectory. A row may have no loss position."""
    trajectory = scored.trajectory
    exclude_eos = objective.exclude_eos and objective.kind != "rl"  # where to end is part of a policy
    if objective.resolved_selection == "drafts":
        return [build_draft_row(scored, grid.block_size, mask_id, exclude_eos, objective.unreached_weight)]
    states = BlockStates(trajectory.reveal_step, len(trajectory.prompt_ids), grid)
    selected = SELECTIONS[objective.resolved_selection](states, rng)
    return [build_row(scored, chosen, grid, mask_id, exclude_eos, form) for chosen in selected]


def build_row(
    scored: ScoredTrajectory,
    chosen: ChosenStates,
    grid: BlockGrid,
    mask_id: int,
    exclude_eos: bool,
    form: StudentForm = PAPER_FORM,
) -> Row:
    """The row of the chosen states of a trajectory's blocks."""
    trajectory = scored.trajectory
    prompt_length = len(trajectory.prompt_ids)
    clean = np.concatenate([trajectory.prompt_ids, trajectory.response_ids]).astype(np.int64)
    start = grid.first_block_start(prompt_length)
    noisy = clean[start:].copy()
    noisy[prompt_length - start :][chosen.masked] = mask_id
    positions = np.concatenate([np.arange(len(clean)), np.arange(start, len(clean))])
    blocks = (positions + grid.offset(prompt_length)) // grid.block_size
    loss_positions = np.flatnonzero(chosen.in_loss & _in_loss(trajectory, exclude_eos))
    loss_columns = len(clean) + prompt_length - start + loss_positions  # in the noisy half
    if form.logit_shift:
        before = prompt_length + loss_positions - 1  # of the token; in the clean half, its index as well
        first_of_block = (before + 1 + grid.offset(prompt_length)) % grid.block_size == 0
        loss_columns = np.where(first_of_block, before, loss_columns - 1)
    return Row(
        scored=scored,
        clean_length=len(clean),
        input_ids=np.concatenate([clean, noisy]),
        position_ids=positions,
        blocks=blocks,
        loss_columns=loss_columns,
        loss_positions=loss_positions,
        loss_weights=_weights(trajectory.loss_weight if chosen.weight is None else chosen.weight, loss_positions),
    )


def build_draft_row(
    scored: ScoredTrajectory, size: int, mask_id: int, exclude_eos: bool, unreached_weight: float = 1.0
) -> Row:
    """The row of all drafts of a rollout that was decoded with the strategy `verified` (METHOD.md section 11).

    A step ends with a token of the clean path's own, and its draft is `size` masks from there on. The first mask stands
    where that token is, the others predict the tokens behind it, each at the position before. A draft sees the clean
    tokens before its first mask, and itself. Drafts may overlap, since they do not see each other. The next draft
    begins at the first wrong token of this one, or behind its last: the places behind that token were not reached, and
    weigh `unreached_weight`.
    """
    trajectory = scored.trajectory
    prompt_length = len(trajectory.prompt_ids)
    clean = np.concatenate([trajectory.prompt_ids, trajectory.response_ids]).astype(np.int64)
    in_loss, reveal = _in_loss(trajectory, exclude_eos), trajectory.reveal_step
    last_of_step = np.flatnonzero(np.diff(reveal, append=-1) != 0)
    starts = last_of_step[last_of_step < trajectory.response_length]
    ahead = np.arange(size)
    predicted = (starts[:, None] + 1 + ahead)[:, :-1]  # by all masks but the last
    unreached = predicted > np.append(starts, np.iinfo(np.int64).max)[1:, None]
    weights = np.where(unreached, np.float32(unreached_weight), np.float32(1))
    counts = (predicted < len(in_loss)) & (weights > 0)
    counts[counts] = in_loss[predicted[counts]]
    columns = len(clean) + (size * np.arange(len(starts))[:, None] + ahead)[:, :-1]
    return Row(
        scored=scored,
        clean_length=len(clean),
        input_ids=np.concatenate([clean, np.full(size * len(starts), mask_id)]),
        position_ids=np.concatenate([np.arange(len(clean)), (prompt_length + starts[:, None] + ahead).flatten()]),
        blocks=np.concatenate([np.arange(len(clean)), np.repeat(prompt_length + starts, size)]),
        loss_columns=columns[counts],
        loss_positions=predicted[counts],
        loss_weights=_weights(trajectory.loss_weight, predicted[counts]) * weights[counts],
    )


def _weights(weight: np.ndarray | None, positions: np.ndarray) -> np.ndarray:
    return np.ones(len(positions), dtype=np.float32) if weight is None else weight[positions]


def _in_loss(trajectory: Trajectory, exclude_eos: bool) -> np.ndarray:
    """`[R']` bool: True inside the response, except at its end-of-sequence token if that is excluded."""
    ends_with_eos = trajectory.finish_reason == "eos"
    last = trajectory.response_length - (1 if exclude_eos and ends_with_eos else 0)
    return np.arange(len(trajectory.response_ids)) < last
