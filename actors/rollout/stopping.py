"""Stop strings: a sequence ends with the block in which its response's text first holds one of its request's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from opdlm.actors.rollout.slots import Slots
from opdlm.common.grid import BlockGrid, DraftGrid

_SPARE_TOKENS = 8
"""Tokens by which the end of a response that is looked at is longer than a stop string can be."""


class StopStrings:
    """Looks for stop strings in responses.

    Args:
        tokenizer: of the student; its text has no special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def cut(self, stop: Sequence[str], ids: np.ndarray) -> np.ndarray:
        """A response `[R] int32` before the first stop string that is a special token, which leaves no text."""
        special = [text for text in stop if text in self._tokenizer.all_special_tokens]
        ends = np.flatnonzero(np.isin(ids, self._tokenizer.convert_tokens_to_ids(special)))
        return ids[: ends[0]] if ends.size else ids

    def reached(self, stop: Sequence[str], ids: np.ndarray, new: int) -> bool:
        """Whether the text of a response `[R] int32` holds a stop string.

        Args:
            new: number of its last tokens that no earlier call has seen.
        """
        if len(self.cut(stop, ids)) < len(ids):
            return True
        # Most often there is none, and then there is none in the last tokens: a token has a byte or more.
        last = new + max(len(text.encode()) for text in stop) + _SPARE_TOKENS
        return all(any(text in self._text(part) for text in stop if text) for part in (ids[-last:], ids))

    def stopped(self, slots: Slots, finished: Sequence[int], grid: BlockGrid | DraftGrid) -> list[int]:
        """The slots, but those that are finished, whose response holds a stop string since the last step."""
        drafting, rows = isinstance(grid, DraftGrid), []
        # A block that is not done has holes; where it is done, it has yet to be committed.
        advanced = range(slots.occupied) if drafting else np.flatnonzero(slots.host_commits[: slots.occupied]).tolist()
        for row in advanced:
            request = slots.requests[row]
            if request.stop and row not in finished:
                end = int(slots.host_starts[row]) + drafting  # drafts begin behind a token that is known
                ids = slots.tokens[row, request.prompt_ids.size : end].cpu().numpy()
                if self.reached(request.stop, ids, grid.block_size):
                    rows.append(row)
        return rows

    def _text(self, ids: np.ndarray) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
