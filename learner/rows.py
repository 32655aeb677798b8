"""Scored trajectories -> training rows (METHOD.md section 4). `packing.py` lays the rows out for a forward.

A row is `[clean | noisy]`. The clean half is the prompt and the kept response. The noisy half is a second copy of the
tokens from the start of the block that holds the first response token, with some response tokens masked. So on the
absolute grid it also has the last `P mod S` prompt tokens, whose keys and values depend on the state. A noisy token has
the position of its clean twin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.grid import BlockGrid
from opdlm.common.types import ScoredTrajectory, Trajectory
from opdlm.learner.states import SELECTIONS, BlockStates


@dataclass(frozen=True, slots=True)
class Row:
    """One training row of T = C + N tokens: C = P + R' clean ones, N noisy ones from the first generated block on."""

    scored: ScoredTrajectory
    clean_length: int  # C; the arrays' first C entries are the same in every row of a trajectory
    input_ids: np.ndarray  # [T] int64
    position_ids: np.ndarray  # [T] int64
    blocks: np.ndarray  # [T] int64
    loss_columns: np.ndarray  # [n] int64, where the loss is taken, as indices into the row (its noisy half)
    loss_positions: np.ndarray  # [n] int64, the same as indices into the response, and so into the teacher's targets


def build_rows(
    scored: ScoredTrajectory, grid: BlockGrid, objective: ObjectiveConfig, mask_id: int, rng: np.random.Generator
) -> list[Row]:
    """The rows that the objective's selection of states makes of one trajectory. A row may have no loss position."""
    trajectory = scored.trajectory
    states = BlockStates(trajectory.reveal_step, len(trajectory.prompt_ids), grid)
    selected = SELECTIONS[objective.resolved_selection](states, rng)
    return [build_row(scored, masked, grid, mask_id, objective.exclude_eos) for masked in selected]


def build_row(scored: ScoredTrajectory, masked: np.ndarray, grid: BlockGrid, mask_id: int, exclude_eos: bool) -> Row:
    """The row of one state. `masked`: `[R']` bool over the kept response."""
    trajectory = scored.trajectory
    prompt_length = len(trajectory.prompt_ids)
    clean = np.concatenate([trajectory.prompt_ids, trajectory.response_ids]).astype(np.int64)
    start = grid.first_block_start(prompt_length)
    noisy = clean[start:].copy()
    noisy[prompt_length - start :][masked] = mask_id
    positions = np.concatenate([np.arange(len(clean)), np.arange(start, len(clean))])
    loss_positions = np.flatnonzero(masked & _in_loss(trajectory, exclude_eos))
    return Row(
        scored=scored,
        clean_length=len(clean),
        input_ids=np.concatenate([clean, noisy]),
        position_ids=positions,
        blocks=(positions + grid.offset(prompt_length)) // grid.block_size,
        loss_columns=len(clean) + prompt_length - start + loss_positions,
        loss_positions=loss_positions,
    )


def _in_loss(trajectory: Trajectory, exclude_eos: bool) -> np.ndarray:
    """`[R']` bool: True inside the response, except at its end-of-sequence token if that is excluded."""
    ends_with_eos = trajectory.finish_reason == "eos"
    last = trajectory.response_length - (1 if exclude_eos and ends_with_eos else 0)
    return np.arange(len(trajectory.response_ids)) < last
