"""Training rows -> the lines of a forward. Packed rows share a trajectory's clean half.

    one row per line (`collate`)      packed (`pack`)
    [clean A | noisy A1]              [clean A | noisy A1 | noisy A2 | clean B | noisy B1 | ...]
    [clean A | noisy A2]
    [clean B | noisy B1 | padding]
    ...

A clean half does not see any noisy half, so all states of a trajectory can share it. The samples of a line do not see
each other. Losses and gradients are the same either way; the tests compare `pack` with `collate`.

`micro_batches` cuts a rank's rows into lines of a bounded number of tokens, so a step's memory does not grow with the
length of the responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opdlm.common.masks import PADDING
from opdlm.learner.rows import Row

LINE_MULTIPLE = 64
"""The tokens of a micro-batch are padded to a multiple of this. A CPU's library for bfloat16 makes and keeps kernels
for every number of tokens that it meets; where nearly every micro-batch has its own, a process grows by gigabytes
(`tests/benchmarks/kernel_shapes.py`)."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows laid out in B lines of T tokens, with N loss positions over all rows, in the order of the rows."""

    rows: list[Row]
    input_ids: torch.Tensor  # [B, T] int64
    position_ids: torch.Tensor  # [B, T] int64
    samples: torch.Tensor  # [B, T] int64; this one and the next two as in common/masks.py
    copies: torch.Tensor  # [B, T] int64
    blocks: torch.Tensor  # [B, T] int64
    loss_line: torch.Tensor  # [N] int64
    loss_column: torch.Tensor  # [N] int64
    loss_row: torch.Tensor  # [N] int64, index into `rows`

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on another device."""
        return MicroBatch(self.rows, *(getattr(self, name).to(device) for name in self.__slots__[1:]))


def collate(rows: Sequence[Row]) -> MicroBatch:
    """One row per line, padded on the right. Padding is known by its position: no token id means padding."""
    return _lay_out(rows, [[[index]] for index in range(len(rows))])


def pack(rows: Sequence[Row], multiple: int = 1) -> MicroBatch:
    """All rows in one line: for each trajectory its clean half, then the noisy halves of its rows.

    Most pairs of tokens in such a line do not see each other. `row_attention.py` and flex_attention skip them.

    Args:
        multiple: the line is padded until its number of tokens is a multiple of this.
    """
    by_trajectory: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_trajectory.setdefault(id(row.scored), []).append(index)
    return _lay_out(rows, [list(by_trajectory.values())], multiple)


def micro_batches(rows: Sequence[Row], most_tokens: int) -> list[MicroBatch]:
    """Packs all rows, the longest first, into micro-batches of at most `most_tokens` tokens each.

    Tokens are counted as attention without flex_attention has them (`row_attention.py`): every clean half is as long as
    the longest of its micro-batch, and so is every noisy half. A row that is longer than `most_tokens` is alone.
    Each line is then padded to a multiple of `LINE_MULTIPLE`.
    """
    groups: list[list[Row]] = []
    trajectories: set[int] = set()  # of the last group, as the next two
    clean = noisy = 0
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        own_clean, own_noisy = row.clean_length, len(row.input_ids) - row.clean_length
        joined = trajectories | {id(row.scored)}
        longest = max(clean, own_clean), max(noisy, own_noisy)
        if groups and len(joined) * longest[0] + (len(groups[-1]) + 1) * longest[1] <= most_tokens:
            groups[-1].append(row)
            trajectories, (clean, noisy) = joined, longest
        else:
            groups.append([row])
            trajectories, clean, noisy = {id(row.scored)}, own_clean, own_noisy
    return [pack(group, LINE_MULTIPLE) for group in groups]


def _lay_out(rows: Sequence[Row], lines: Sequence[Sequence[Sequence[int]]], multiple: int = 1) -> MicroBatch:
    """`lines`: for each line its samples, and for each sample the indices of its rows, all of one trajectory."""
    fields: dict[str, list[np.ndarray]] = {
        name: [] for name in ("input_ids", "position_ids", "blocks", "samples", "copies")
    }
    # Each row's line, and by how much the columns of its clean and its noisy half moved there.
    line_of, clean_shift, noisy_shift = ([0] * len(rows) for _ in range(3))
    for number, line in enumerate(lines):
        parts: dict[str, list[np.ndarray]] = {name: [] for name in fields}
        column = 0
        for sample, indices in enumerate(line):
            clean, start = rows[indices[0]].clean_length, column
            for copy, index in enumerate(indices, start=1):
                row = rows[index]
                begin = 0 if copy == 1 else clean
                length = len(row.input_ids) - begin
                for name in ("input_ids", "position_ids", "blocks"):
                    parts[name].append(getattr(row, name)[begin:])
                parts["samples"].append(np.full(length, sample))
                parts["copies"].append(np.where(np.arange(begin, begin + length) < clean, 0, copy))
                line_of[index], clean_shift[index], noisy_shift[index] = number, start, column - begin
                column += length
        for name, arrays in parts.items():
            fields[name].append(np.concatenate(arrays))
    longest = max(len(line) for line in fields["input_ids"])
    longest += -longest % multiple

    def padded(name: str, fill: int = 0) -> torch.Tensor:
        return torch.from_numpy(
            np.stack([np.pad(line, (0, longest - len(line)), constant_values=fill) for line in fields[name]])
        )

    counts = [len(row.loss_columns) for row in rows]
    columns = [
        row.loss_columns + np.where(row.loss_columns < row.clean_length, clean_shift[i], noisy_shift[i])
        for i, row in enumerate(rows)
    ]
    return MicroBatch(
        rows=list(rows),
        input_ids=padded("input_ids"),
        position_ids=padded("position_ids"),
        samples=padded("samples", PADDING),
        copies=padded("copies"),
        blocks=padded("blocks"),
        loss_line=torch.from_numpy(np.repeat(line_of, counts)),
        loss_column=torch.from_numpy(np.concatenate(columns)),
        loss_row=torch.from_numpy(np.repeat(np.arange(len(rows)), counts)),
    )
