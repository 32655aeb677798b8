"""Scored trajectories -> training rows (METHOD.md section 4). `packing.py` lays them out for a forward.

A row is `[clean | noisy]`: the clean half is prompt and kept response, the noisy half a second copy from the start of
the block that holds the first response token (so it carries `P mod S` prompt tokens on the absolute grid: their keys
and values depend on the state) with some response tokens masked. A noisy token has the position of its clean twin.
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
    """One training row. T = C + N tokens: C = P + R' clean, N noisy from the first generated block on."""

    scored: ScoredTrajectory
    clean_length: int  # C; before it the arrays are the same in every row of a trajectory
    input_ids: np.ndarray  # [T] int64
    position_ids: np.ndarray  # [T] int64
    blocks: np.ndarray  # [T] int64
    loss_columns: np.ndarray  # [n] int64, columns of the row at which the loss is taken (noisy half)
    loss_positions: np.ndarray  # [n] int64, the same as response positions: rows of the teacher's targets


def build_rows(
    scored: ScoredTrajectory, grid: BlockGrid, objective: ObjectiveConfig, mask_id: int, rng: np.random.Generator
) -> list[Row]:
    """The rows that the objective's selection makes of one trajectory; a row may have no loss position."""
    trajectory = scored.trajectory
    states = BlockStates(trajectory.reveal_step, len(trajectory.prompt_ids), grid)
    selected = SELECTIONS[objective.states](states, rng)
    return [build_row(scored, masked, grid, mask_id, objective.exclude_eos) for masked in selected]


def build_row(scored: ScoredTrajectory, masked: np.ndarray, grid: BlockGrid, mask_id: int, exclude_eos: bool) -> Row:
    """One row from one state. `masked`: `[R']` bool over the kept response."""
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
    """`[R']` bool: inside the response, and not its end-of-sequence token if that is excluded."""
    ends_with_eos = trajectory.finish_reason == "eos"
    last = trajectory.response_length - (1 if exclude_eos and ends_with_eos else 0)
    return np.arange(len(trajectory.response_ids)) < last
