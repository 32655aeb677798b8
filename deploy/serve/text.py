"""Tokens of a response that come in parts -> text, which ends at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode the first bytes of a character to, before its last bytes have come."""


class TextStream:
    """The text of one response. What is sent is never taken back: a beginning of a stop string waits for its rest.

    Args:
        tokenizer: special tokens are left out.
        stops: texts that end the response; the first to occur ends it and is not part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._sent = 0
        self.stopped = False
        """Whether a stop string has occurred."""

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """Takes further tokens; returns the text that they let be sent. `last`: no more will come."""
        self._ids += ids
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, end = True, min(ends)
        elif last:
            end = len(text)
        else:
            end = len(text.rstrip(_UNFINISHED))
            end -= max((_overlap(text[:end], stop) for stop in self._stops), default=0)
        new = text[self._sent : end]
        self._sent = max(self._sent, end)
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop`, but not all of it, that the text ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
