"""Training rows -> one line of a forward: no padding, and one clean half for all states of a trajectory.

    row by row (`collate`)            packed (`pack`)
    [clean A | noisy A1]              [clean A | noisy A1 | noisy A2 | clean B | noisy B1 | ...]
    [clean A | noisy A2]
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

from opdlm.common.masks import PADDING
from opdlm.learner.rows import Row


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


def collate(rows: Sequence[Row]) -> MicroBatch:
    """One row a line, padded on the right. Padding is by position: no token id means padding."""
    return _lay_out(rows, [[[index]] for index in range(len(rows))])


def pack(rows: Sequence[Row]) -> MicroBatch:
    """Rows of a trajectory behind one clean half, trajectories side by side, all in one line.

    Attention has to skip what is not visible: `row_attention.py`, flex_attention.
    """
    by_trajectory: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_trajectory.setdefault(id(row.scored), []).append(index)
    return _lay_out(rows, [list(by_trajectory.values())])


def _clean(rows: Sequence[Row], sample: Sequence[int]) -> int:
    return rows[sample[0]].clean_length


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
