"""The block grid (METHOD.md section 2): position `i` of a sequence is in block `floor((i + offset) / S)`.

Decoder, training rows and masks all take their blocks from here, so that they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

GridKind = Literal["absolute", "response"]


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """Which positions of a sequence share a block.

    Example: prompt of 6 tokens, S = 4. `absolute`: blocks [0-3] [4-7] ..., the prompt's last two tokens share the
    first generated block with two masks. `response`: offset 2, blocks [0-1] [2-5] [6-9] ..., the response starts at 6.
    """

    block_size: int
    kind: GridKind = "absolute"

    def offset(self, prompt_length: int) -> int:
        """The sequence's offset: 0 on the absolute grid, `-P mod S` on the response grid."""
        return 0 if self.kind == "absolute" else -prompt_length % self.block_size

    def first_block_start(self, prompt_length: int) -> int:
        """Position at which the block of the first response token starts; at most `prompt_length`."""
        return prompt_length - self.tail(prompt_length)

    def tail(self, prompt_length: int) -> int:
        """Prompt tokens that share the first generated block: `P mod S` on the absolute grid, else 0."""
        return prompt_length % self.block_size if self.kind == "absolute" else 0

    def kept_length(self, prompt_length: int, response_length: int) -> int:
        """Response tokens up to the end of the block that holds the last of `response_length` (>= 1) tokens."""
        tail = self.tail(prompt_length)
        return -(-(tail + response_length) // self.block_size) * self.block_size - tail

    def last_position(self, prompt_length: int, response_limit: int) -> int:
        """One past the last position that decoding up to `response_limit` tokens can touch."""
        return prompt_length + self.kept_length(prompt_length, response_limit)


def block_index(positions: torch.Tensor, offset: torch.Tensor | int, block_size: int) -> torch.Tensor:
    """Block of each position. Shapes broadcast; int64 in, int64 out."""
    return torch.div(positions + offset, block_size, rounding_mode="floor")
