"""Training rows -> the lines of a forward: little padding, and one clean half for all states of a trajectory.

    row by row (`collate`)            packed (`pack`)
    [clean A | noisy A1]              [clean A | noisy A1 | noisy A2 | clean C | noisy C1]
    [clean A | noisy A2]              [clean B | noisy B1 | clean D | noisy D1 | padding  ]
    [clean B | noisy B1 | padding]
    ...

The clean half does not see any noisy one, so all states of a trajectory may share it; samples of a line do not see
each other. Losses and gradients are those of `collate`, which is the tests' oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.masks import PADDING
from learner.rows import Row

PADDING_SHARE = 0.05
"""Of a micro-batch's tokens: what packing tries to stay under."""
LONGEST_LINE = 2048
"""Tokens, where a dense mask grows with the line's length squared; a longer row has a line of its own."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows in B lines of T tokens; N loss positions over all rows, row by row."""

    rows: list[Row]
    input_ids: torch.Tensor  # [B, T] int64
    position_ids: torch.Tensor  # [B, T] int64
    samples: torch.Tensor  # [B, T] int64; see common/masks.py
    copies: torch.Tensor  # [B, T] int64
    blocks: torch.Tensor  # [B, T] int64
    loss_line: torch.Tensor  # [N] int64
    loss_column: torch.Tensor  # [N] int64
    loss_row: torch.Tensor  # [N] int64, index into `rows`

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on another device."""
        return MicroBatch(self.rows, *(getattr(self, name).to(device) for name in self.__slots__[1:]))

    @property
    def padding_tokens(self) -> int:
        """Tokens that belong to no sample."""
        return int((self.samples == PADDING).sum())


def collate(rows: Sequence[Row]) -> MicroBatch:
    """One row a line, padded on the right. Padding is by position: no token id means padding."""
    return _lay_out(rows, [[[index]] for index in range(len(rows))])


def pack(rows: Sequence[Row], one_line: bool) -> MicroBatch:
    """Rows of a trajectory behind one clean half, trajectories side by side.

    Args:
        one_line: everything in one line, for attention that skips what is not visible (flex_attention); else as few
            tokens of a dense mask as keep padding under `PADDING_SHARE`, where that is possible.
    """
    by_trajectory: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_trajectory.setdefault(id(row.scored), []).append(index)
    samples = list(by_trajectory.values())
    lengths = [_clean(rows, sample) + sum(_noisy(rows[index]) for index in sample) for sample in samples]
    lines = [list(range(len(samples)))] if one_line else plan_lines(lengths)
    return _lay_out(rows, [[samples[place] for place in line] for line in lines])


def plan_lines(lengths: Sequence[int]) -> list[list[int]]:
    """Which samples share a line: first fit by falling length, in lines of one, two, ... times the longest sample."""
    longest = max(lengths)
    tried = [_first_fit(lengths, longest * times) for times in range(1, max(LONGEST_LINE // longest, 1) + 1)]
    useful = sum(lengths)

    def tokens(lines: list[list[int]]) -> int:
        return len(lines) * max(sum(lengths[place] for place in line) for line in lines)

    good = (lines for lines in tried if 1 - useful / tokens(lines) <= PADDING_SHARE)
    return next(good, None) or min(tried, key=tokens)


def _first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    lines: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fits = next((i for i, left in enumerate(room) if left >= lengths[place]), None)
        if fits is None:
            fits = len(lines)
            lines.append([])
            room.append(capacity)
        lines[fits].append(place)
        room[fits] -= lengths[place]
    return lines


def _clean(rows: Sequence[Row], sample: Sequence[int]) -> int:
    return rows[sample[0]].clean_length


def _noisy(row: Row) -> int:
    return len(row.input_ids) - row.clean_length


def _lay_out(rows: Sequence[Row], lines: Sequence[Sequence[Sequence[int]]]) -> MicroBatch:
    """`lines`: of each its samples, of each sample its rows (indices), which are of one trajectory."""
    fields: dict[str, list[np.ndarray]] = {
        name: [] for name in ("input_ids", "position_ids", "blocks", "samples", "copies")
    }
    places: dict[int, tuple[int, int]] = {}  # of each row: its line, and how far its columns moved
    for number, line in enumerate(lines):
        parts: dict[str, list[np.ndarray]] = {name: [] for name in fields}
        column = 0
        for sample, indices in enumerate(line):
            clean = _clean(rows, indices)
            for copy, index in enumerate(indices, start=1):
                row = rows[index]
                begin = 0 if copy == 1 else clean
                length = len(row.input_ids) - begin
                for name in ("input_ids", "position_ids", "blocks"):
                    parts[name].append(getattr(row, name)[begin:])
                parts["samples"].append(np.full(length, sample))
                parts["copies"].append(np.where(np.arange(begin, begin + length) < clean, 0, copy))
                places[index] = (number, column - begin)
                column += length
        for name, arrays in parts.items():
            fields[name].append(np.concatenate(arrays))
    longest = max(len(line) for line in fields["input_ids"])

    def padded(name: str, fill: int = 0) -> torch.Tensor:
        return torch.from_numpy(
            np.stack([np.pad(line, (0, longest - len(line)), constant_values=fill) for line in fields[name]])
        )

    counts = [len(row.loss_columns) for row in rows]
    moved = [row.loss_columns + places[index][1] for index, row in enumerate(rows)]
    return MicroBatch(
        rows=list(rows),
        input_ids=padded("input_ids"),
        position_ids=padded("position_ids"),
        samples=padded("samples", PADDING),
        copies=padded("copies"),
        blocks=padded("blocks"),
        loss_line=torch.from_numpy(np.repeat([places[index][0] for index in range(len(rows))], counts)),
        loss_column=torch.from_numpy(np.concatenate(moved)),
        loss_row=torch.from_numpy(np.repeat(np.arange(len(rows)), counts)),
    )
