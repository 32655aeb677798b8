"""The block grid (METHOD.md section 2): position `i` of a sequence is in block `floor((i + offset) / S)`.

Decoder, training rows and attention masks all compute their blocks with this module, so they always agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

GridKind = Literal["absolute", "response"]


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """Says which positions of a sequence share a block. S is the block size, P the length of the prompt in tokens.

    Example with P = 6 and S = 4. `absolute`: the offset is 0 and the blocks are [0-3] [4-7] ..., so the prompt's last
    two tokens share the first generated block with two masks. `response`: the offset is 2 and the blocks are [0-1]
    [2-5] [6-9] ..., so the response starts a block at position 6.
    """

    block_size: int
    kind: GridKind = "absolute"

    def offset(self, prompt_length: int) -> int:
        """Returns the offset of a sequence: 0 on the absolute grid, `-P mod S` on the response grid."""
        return 0 if self.kind == "absolute" else -prompt_length % self.block_size

    def first_block_start(self, prompt_length: int) -> int:
        """Returns the position at which the block of the first response token starts; it is at most P."""
        return prompt_length - self.prompt_tail(prompt_length)

    def prompt_tail(self, prompt_length: int) -> int:
        """Returns how many prompt tokens share the first generated block: `P mod S` on the absolute grid, else 0."""
        return prompt_length % self.block_size if self.kind == "absolute" else 0

    def kept_length(self, prompt_length: int, response_length: int) -> int:
        """Returns how many tokens of a response are kept: all up to the end of the block of its last token.

        Args:
            response_length: tokens of the response, at least 1.
        """
        tail = self.prompt_tail(prompt_length)
        return -(-(tail + response_length) // self.block_size) * self.block_size - tail

    def end_position(self, prompt_length: int, response_limit: int) -> int:
        """Returns the end of a sequence: one past the last position of a response of `response_limit` tokens.

        It is the end of a block, because decoding fills the block of the last token.
        """
        return prompt_length + self.kept_length(prompt_length, response_limit)

    @property
    def room(self) -> int:
        """Places in the cache that a step needs from its start on: those of a block."""
        return self.block_size

    def context(self, prompt_length: int, response_limit: int) -> int:
        """Returns how many positions the model must know."""
        return self.end_position(prompt_length, response_limit)


@dataclass(frozen=True, slots=True)
class DraftGrid:
    """For drafts, which begin anywhere (METHOD.md section 11). It stands where decoders expect a `BlockGrid`.

    A step begins at the last known token, whose keys and values are not in the cache yet. It needs room in the cache
    for that token and S - 1 drafts, and behind each of these S tokens for a group of S masks.
    """

    block_size: int

    @property
    def room(self) -> int:
        """Places in the cache that a step needs from its start on."""
        return self.block_size * (1 + self.block_size)

    def offset(self, prompt_length: int) -> int:
        """No block has a border; 0."""
        return 0

    def first_block_start(self, prompt_length: int) -> int:
        """Returns the position at which the first step begins: that of the prompt's last token."""
        return prompt_length - 1

    def end_position(self, prompt_length: int, response_limit: int) -> int:
        """Returns the places in the cache that a sequence needs at most, during its last step."""
        return prompt_length + response_limit - 2 + self.room

    def context(self, prompt_length: int, response_limit: int) -> int:
        """Returns how many positions the model must know. Drafts behind the last one are never used."""
        return prompt_length + response_limit


def decoding_grid(strategy: str, block_size: int, kind: GridKind) -> BlockGrid | DraftGrid:
    """Where the steps of a decoder begin, and what room they need."""
    return DraftGrid(block_size) if strategy == "verified" else BlockGrid(block_size, kind)


def block_index(positions: torch.Tensor, offset: torch.Tensor | int, block_size: int) -> torch.Tensor:
    """Returns the block of each position.

    Args:
        positions: int64, any shape.
        offset: offset of each sequence (`BlockGrid.offset`), which broadcasts with `positions`.

    Returns: int64 in the broadcast shape.
    """
    return torch.div(positions + offset, block_size, rounding_mode="floor")
