"""Scored trajectories -> training rows -> padded micro-batches (METHOD.md section 4).

A row is `[clean | noisy]`: the clean half is prompt and kept response, the noisy half a second copy from the start of
the block that holds the first response token (so it carries `P mod S` prompt tokens on the absolute grid: their keys
and values depend on the state) with some response tokens masked. A noisy token has the position of its clean twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.config.schema import ObjectiveConfig
from common.grid import BlockGrid
from common.masks import PAD_BLOCK
from common.types import ScoredTrajectory, Trajectory
from learner.states import SELECTIONS, BlockStates


@dataclass(frozen=True, slots=True)
class Row:
    """One training row. T = P + R' + N tokens, N from the first generated block's start to the end."""

    scored: ScoredTrajectory
    input_ids: np.ndarray  # [T] int64
    position_ids: np.ndarray  # [T] int64
    blocks: np.ndarray  # [T] int64
    noisy: np.ndarray  # [T] bool
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
        input_ids=np.concatenate([clean, noisy]),
        position_ids=positions,
        blocks=(positions + grid.offset(prompt_length)) // grid.block_size,
        noisy=np.arange(len(positions)) >= len(clean),
        loss_columns=len(clean) + prompt_length - start + loss_positions,
        loss_positions=loss_positions,
    )


def _in_loss(trajectory: Trajectory, exclude_eos: bool) -> np.ndarray:
    """`[R']` bool: inside the response, and not its end-of-sequence token if that is excluded."""
    ends_with_eos = trajectory.finish_reason == "eos"
    last = trajectory.response_length - (1 if exclude_eos and ends_with_eos else 0)
    return np.arange(len(trajectory.response_ids)) < last


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows padded to one length; N loss positions over all of them, row by row."""

    rows: list[Row]
    input_ids: torch.Tensor  # [B, T] int64
    position_ids: torch.Tensor  # [B, T] int64
    blocks: torch.Tensor  # [B, T] int64, PAD_BLOCK where padded
    noisy: torch.Tensor  # [B, T] bool
    loss_row: torch.Tensor  # [N] int64
    loss_column: torch.Tensor  # [N] int64

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on another device."""
        names = ("input_ids", "position_ids", "blocks", "noisy", "loss_row", "loss_column")
        return MicroBatch(self.rows, *(getattr(self, name).to(device) for name in names))


def collate(rows: Sequence[Row]) -> MicroBatch:
    """Pads rows on the right. Padding is by position: no token id means padding."""
    longest = max(len(row.input_ids) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        arrays = [getattr(row, name) for row in rows]
        return torch.from_numpy(np.stack([np.pad(a, (0, longest - len(a)), constant_values=fill) for a in arrays]))

    counts = [len(row.loss_columns) for row in rows]
    return MicroBatch(
        rows=list(rows),
        input_ids=padded("input_ids", 0),
        position_ids=padded("position_ids", 0),
        blocks=padded("blocks", PAD_BLOCK),
        noisy=padded("noisy", 0),
        loss_row=torch.from_numpy(np.repeat(np.arange(len(rows)), counts)),
        loss_column=torch.from_numpy(np.concatenate([row.loss_columns for row in rows])),
    )
